// Tokens of answers: read from logprobs, compared with those of another answer, described in words.

export const TOP = 20; // likeliest tokens that come with each token

/** Return tokens as {id, text, bytes, logprob, top}, from the logprobs of a chat or of a completion. */
export function entries(logprobs) {
  if (!logprobs) return [];
  if (logprobs.content) {
    const read = ({ token, bytes, logprob }) => ({ id: String(bytes || token), text: token, bytes, logprob });
    return logprobs.content.map((entry) => ({ ...read(entry), top: (entry.top_logprobs || []).map(read) }));
  }
  const read = ([text, logprob]) => ({ id: text, text, logprob });
  return (logprobs.tokens || []).map((text, n) => ({ ...read([text, logprobs.token_logprobs[n]]), top: Object.entries(logprobs.top_logprobs?.[n] || {}).map(read) }));
}

const ended = (column) => column.reason === "stop";

/** Return the first token where an answer differs from another one, or -1. */
export function departure(column, first) {
  const [a, b] = [column.tokens, first.tokens];
  let at = 0;
  while (at < a.length && at < b.length && a[at].id === b[at].id) at++;
  const both = at < a.length && at < b.length;
  const shorter = (at === b.length && at < a.length && ended(first)) || (at === a.length && at < b.length && ended(column));
  return both || shorter ? at : -1;
}

/** Return the log-probability (nats) that `token` had where `other` stands; null: unknown. */
export const chance = (token, other) => {
  if (!other || other.logprob === undefined) return null;
  return token.id === other.id ? other.logprob : (other.top.find(({ id }) => id === token.id)?.logprob ?? null);
};

export const percent = (logprob) => {
  const share = 100 * Math.exp(logprob);
  return `${share >= 99.95 ? "100" : share >= 0.1 ? share.toFixed(1) : share >= 0.001 ? share.toFixed(3) : "under 0.001"} %`;
};
export const quoted = (text) => `“${text.replace(/\n/g, "⏎").trim() || text.replace(/\n/g, "⏎").replace(/ /g, "␣")}”`;
