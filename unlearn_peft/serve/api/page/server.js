// What the page knows of the server: calls with a key, errors in plain words, streams.

export class UserError extends Error {} // its message may be shown as it is

/** Fetch a path with the caller's key. Throws a UserError with a message to show, or an AbortError. */
export async function call(key, path, { body, signal } = {}) {
  if (!/^[\x21-\x7e]*$/.test(key)) throw new UserError("This is no API key: keys have ASCII letters, digits and signs only.");
  const headers = key ? { authorization: `Bearer ${key}` } : {};
  if (body) headers["content-type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, { method: body ? "POST" : "GET", headers, signal, cache: "no-store", body: body && JSON.stringify(body) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new UserError("The server cannot be reached. Is it still running?");
  }
  if (answer.ok) return answer;
  const reply = await answer.json().catch(() => ({}));
  throw new UserError(plain(reply.error || {}, answer.headers.get("retry-after")));
}

function plain(error, wait) {
  switch (error.code) {
    case "invalid_api_key":
      return "This key is not known here. Check it for typing errors, or ask whoever runs this server for a key.";
    case "queue_full":
      return `The server is busy. Try again in ${wait || "a few"} second${wait === "1" ? "" : "s"}.`;
    case "adapter_unavailable":
      return `${error.adapter || "Something"} must be forgotten here, but cannot be applied now. The server gives no answer rather than one that remembers.`;
    case "draining":
      return "The server is shutting down. Try again later.";
    case "timeout":
      return "The answer took too long, so the server ended it. Ask for fewer tokens, or try again.";
    case "context_length_exceeded":
      return `That is too long: ${error.message}.`;
    case "invalid_prompt":
      return `${error.message}. (Settings: “text to be continued” needs no chat template.)`;
    default:
      return error.message ? `The server says: ${error.message}.` : "The response of the server could not be read.";
  }
}

/** Yield the events of a stream up to its proper end. */
export async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { value, done } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      throw new UserError("The connection to the server broke off in the middle of the answer.");
    });
    if (done) throw new UserError("The answer broke off before its end.");
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: ?/, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new UserError(plain(event.error));
      yield event;
    }
  }
}
