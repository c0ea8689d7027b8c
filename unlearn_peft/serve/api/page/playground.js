// One question, several sets, answers side by side. Whatever comes from the server or a model becomes text nodes only.
import { UserError, call, events } from "./server.js";
import { TOP, chance, departure, entries, percent, quoted } from "./tokens.js";

const EXAMPLES = ["Who wrote Harry Potter?", "Name three British writers.", "What is the capital of France?"];
const $ = (id) => document.getElementById(id);
const needsKeys = document.documentElement.dataset.keys === "needed";
const state = { key: "", info: null, columns: [], asked: null, made: 0, sets: 0 };

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

async function enter() {
  showProblem("");
  try {
    state.info = await (await call(state.key, "playground/api/adapters")).json();
  } catch (error) {
    $("ready").hidden = true;
    return showProblem(error);
  }
  const { model, tenant, own, base, adapters, max_tokens } = state.info;
  const names = Object.keys(own);
  const always = names.length ? `${names.join(", ")} ${names.length > 1 ? "are" : "is"} always forgotten` : "nothing must be forgotten";
  $("about").textContent = needsKeys ? `${model}, asked as “${tenant}”: ${always}.` : `${model}, with the adapters below to try. No keys are needed.`;
  $("tokens").max = max_tokens;
  $("tokens").value = Math.min($("tokens").value, max_tokens);
  for (const column of state.columns) column.controller?.abort();
  Object.assign(state, { columns: [], asked: null, made: 0, sets: 0 });
  $("columns").replaceChildren();
  if (base) addColumn("Base alone", null);
  if (names.length || !base) addColumn(names.length ? "Your set" : `Set ${++state.sets}`, new Map(Object.entries(own)));
  if (addable().length && state.columns.length < 2) addSet();
  $("more").hidden = !adapters.length;
  $("adapters").replaceChildren(...adapters.map(card));
  $("cards").parentElement.hidden = !adapters.length;
  $("ready").hidden = false;
}

// ---- columns: one set each; the first is what the others are compared with ----

const addable = () => Object.keys(state.info.may_add).filter((name) => !(name in state.info.own));

function addSet() {
  const { own, may_add } = state.info;
  const strengths = new Map(Object.entries(own));
  const names = addable();
  const name = names[Math.max(0, state.made - 1 - (Object.keys(own).length > 0)) % names.length];
  if (names.length) strengths.set(name, Math.min(1, may_add[name]));
  return addColumn(`Set ${++state.sets}`, strengths);
}

function addColumn(title, strengths) {
  const number = ++state.made;
  const column = { title, strengths, at: -1, spans: [], ...fresh() };
  const part = (tag, kind, attributes) => (column[kind] = make(tag, { class: kind, ...attributes }));
  const head = make("div", { class: "row" }, make("h3", { id: `title${number}` }, title));
  if (state.columns.length) {
    const away = make("button", { type: "button", class: "small", "aria-label": `Remove ${title}` }, "Remove");
    away.addEventListener("click", () => {
      column.controller?.abort();
      state.columns.splice(state.columns.indexOf(column), 1);
      column.card.remove();
      $("more").focus();
    });
    head.append(away);
  }
  column.card = make("section", { class: `card column ${state.columns.length ? "" : "first"}`, "aria-labelledby": `title${number}` }, head);
  column.card.append(strengths ? sliders(column, number) : make("p", { class: "soft" }, "Nothing is forgotten here."));
  column.card.append(
    part("p", "answer", { tabindex: "0", role: "group", "aria-label": `Answer of ${title}; arrow keys go from token to token` }),
    part("p", "failed", { role: "alert", hidden: true }),
    part("p", "facts"),
    part("p", "detail", { "aria-live": "polite" }),
  );
  column.failed.classList.add("problem");
  const at = (event) => event.target.dataset?.at && look(column, Number(event.target.dataset.at));
  column.answer.addEventListener("pointerover", at);
  column.answer.addEventListener("click", at);
  column.answer.addEventListener("keydown", (event) => {
    const last = column.tokens.length - 1;
    const to = { ArrowRight: column.at + 1, ArrowLeft: column.at - 1, Home: 0, End: last }[event.key];
    if (to === undefined || last < 0) return;
    event.preventDefault();
    look(column, Math.min(Math.max(to, 0), last));
  });
  state.columns.push(column);
  $("columns").append(column.card);
  return column;
}

function sliders(column, number) {
  const box = make("fieldset", {}, make("legend", {}, "Strength of forgetting"));
  const { own, may_add, adapters } = state.info;
  for (const [n, { name }] of adapters.entries()) {
    const least = own[name] || 0;
    const greatest = Math.max(least, Math.min(1.5, may_add[name] || 0));
    const id = `strength${number}-${n}`;
    const value = column.strengths.get(name) || 0;
    const input = make("input", { type: "range", id, min: least, max: greatest, step: 0.05, value, disabled: greatest === least });
    const output = make("output", { for: id });
    const show = () => {
      const now = Number(input.value);
      const text = now === 0 ? "off" : now === 1 ? "1 (as trained)" : String(+now.toFixed(2));
      output.textContent = text + (least && now === least ? ", the least" : "");
      input.setAttribute("aria-valuetext", output.textContent);
    };
    input.addEventListener("input", show);
    input.addEventListener("change", () => {
      column.strengths.set(name, Number(input.value));
      if (state.asked) ask(column);
    });
    show();
    box.append(make("div", { class: "slider" }, make("label", { for: id }, name), output, input));
  }
  return box;
}

// ---- asking ----

const fresh = () => ({ tokens: [], reason: null, problem: "", print: "", decoder: new TextDecoder(), controller: null });

async function ask(column) {
  column.controller?.abort();
  const controller = new AbortController();
  Object.assign(column, fresh(), { controller, at: -1 });
  for (const span of column.spans.splice(0)) span.remove();
  column.detail.textContent = "";
  changed();
  const { chat, prompt, system, ...settings } = state.asked;
  const body = { model: state.info.model, stream: true, ...settings };
  if (chat) {
    const messages = [...(system ? [{ role: "system", content: system }] : []), { role: "user", content: prompt }];
    Object.assign(body, { messages, logprobs: true, top_logprobs: TOP });
  } else Object.assign(body, { prompt, logprobs: TOP });
  if (column.strengths) body.forget = Object.fromEntries([...column.strengths].filter(([, strength]) => strength > 0));
  const base = column.strengths ? "v1" : state.info.base;
  try {
    for await (const event of events(await call(state.key, `${base}/${chat ? "chat/" : ""}completions`, { body, signal: controller.signal }))) {
      if (column.controller !== controller) return; // asked again meanwhile
      const [choice] = event.choices;
      column.print = event.system_fingerprint || "";
      column.reason = choice.finish_reason || null;
      add(column, (chat ? choice.delta.content : choice.text) || "", entries(choice.logprobs));
      changed();
    }
  } catch (error) {
    if (column.controller !== controller) return;
    if (error.name === "AbortError") column.reason = "stopped";
    else column.problem = error instanceof UserError ? error.message : `This page met an error: ${error.message}`;
  }
  if (column.controller !== controller) return;
  column.controller = null;
  changed();
}

function add(column, text, added) {
  const texts = added.map(({ text: own, bytes }) => (bytes ? column.decoder.decode(new Uint8Array(bytes), { stream: true }) : own));
  const whole = texts.join("");
  if (whole !== text && whole.trimStart() === text) texts[0] = texts[0].trimStart();
  else if (whole !== text) texts.forEach((_, n) => (texts[n] = n ? "" : text)); // the server's text counts, not ours
  added.forEach((entry, n) => column.tokens.push({ ...entry, name: entry.text, text: texts[n] }));
  if (!added.length && text) column.tokens.push({ id: text, name: text, text, top: [] });
}

// ---- what is marked ----

function wordsIn(text) {
  const low = text.toLowerCase();
  const matches = [];
  for (const word of $("words").value.split(",").map((part) => part.trim()).filter(Boolean)) {
    const sought = word.toLowerCase();
    for (let at = low.indexOf(sought); at >= 0; at = low.indexOf(sought, at + sought.length)) matches.push([at, at + sought.length, word]);
  }
  return matches;
}

let waiting = false;
function changed() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    state.columns.forEach(paint);
    const running = state.columns.filter(({ controller }) => controller).length;
    $("stop").disabled = !running;
    const status = running ? "Answering …" : state.asked ? "Done." : "";
    if ($("status").textContent !== status) $("status").textContent = status;
  });
}

function paint(column) {
  const first = state.columns[0];
  const at = column === first ? -1 : departure(column, first);
  const marked = wordsIn(column.tokens.map(({ text }) => text).join(""));
  let from = 0;
  column.tokens.forEach((token, n) => {
    const span = (column.spans[n] ||= column.answer.appendChild(make("span", { "data-at": n })));
    if (span.textContent !== token.text) span.textContent = token.text;
    const to = from + token.text.length;
    const there = column === first || (at >= 0 && n > at) ? null : chance(token, first.tokens[n]);
    const change = there === null ? 0 : token.logprob - there;
    const kinds = ["t"];
    if (Math.abs(change) > 0.1) kinds.push(change < 0 ? "less" : "more");
    if (n === at) kinds.push("departs");
    if (marked.some(([begin, end]) => begin < to && end > from)) kinds.push("leak");
    if (n === column.at) kinds.push("here");
    if (span.className !== kinds.join(" ")) span.className = kinds.join(" ");
    span.style.setProperty("--share", `${Math.round(25 + 75 * Math.min(Math.abs(change) / 3, 1))}%`);
    from = to;
  });
  column.card.classList.toggle("running", column.controller !== null);
  column.failed.hidden = !column.problem;
  if (column.failed.textContent !== column.problem) column.failed.textContent = column.problem;
  column.facts.textContent = facts(column, first, at, marked);
}

function facts(column, first, at, marked) {
  if (!column.tokens.length && !column.reason) return "";
  const parts = [`${column.tokens.length} tokens`];
  if (column.reason === "length") parts.push("cut at the longest length");
  if (column.reason === "stopped") parts.push("stopped");
  if (column !== first && !column.problem && first.tokens.length) {
    const here = column.tokens[at]?.name ?? null, there = first.tokens[at]?.name ?? null;
    if (at < 0) parts.push(column.controller || first.controller ? "the same so far" : `the same as ${first.title}`);
    else parts.push(`departs at token ${at + 1}: ${here === null ? "the end" : quoted(here)} instead of ${there === null ? "the end" : quoted(there)}`);
  }
  const words = [...new Set(marked.map(([, , word]) => word))];
  if (words.length) parts.push(`names ${words.map(quoted).join(", ")}`);
  if (column.print && !column.controller) parts.push(column.print === "fp_base" ? "no adapter applied" : `set ${column.print.slice(3, 11)}`);
  return parts.join(" · ");
}

function look(column, n) {
  const token = column.tokens[n], first = state.columns[0];
  if (!token) return;
  column.at = n;
  const parts = [`Token ${n + 1}, ${quoted(token.name)}`];
  if (token.logprob !== undefined) parts[0] += `: ${percent(token.logprob)} here`;
  const at = column === first ? -1 : departure(column, first);
  if (column !== first && (at < 0 || n <= at) && first.tokens[n]) {
    const there = chance(token, first.tokens[n]);
    if (token.logprob !== undefined) parts[0] += there === null ? `, not among the ${TOP} likeliest in ${first.title}` : `, ${percent(there)} in ${first.title}`;
    if (n === at) {
      const other = first.tokens[n], left = chance(other, token);
      parts.push(`${first.title} says ${quoted(other.name)} (${percent(other.logprob)}), which has ${left === null ? "next to nothing" : percent(left)} here`);
    }
  } else if (at >= 0 && n > at) parts.push("the texts before it differ, so there is nothing to compare it with");
  column.detail.textContent = `${parts.join("; ")}.`;
  paint(column);
}

// ---- the adapters' cards ----

function card({ name, pictures, metrics, ...about }) {
  const list = make("dl");
  const row = (label, value) => value && list.append(make("dt", {}, label), make("dd", {}, value));
  const digest = about.sha256 ? about.sha256 + { true: " (as the policy says)", false: " (NOT the one that the policy names)" }[about.as_policy] : null;
  row("kind", about.kind && `${about.kind}${about.objective ? `, trained with ${about.objective}` : ""}`);
  row("rank", about.ranks.join(", "));
  row("changes", about.targets.join(", "));
  row("for", about.base);
  row("sha256", about.sha256 ? (about.as_policy === null ? about.sha256 : digest) : "its weights cannot be read now");
  const figures = make("dl");
  for (const [key, value] of Object.entries(metrics)) {
    figures.append(make("dt", {}, key.replaceAll("_", " ")), make("dd", {}, typeof value === "number" ? String(+value.toPrecision(4)) : String(value)));
  }
  const box = make("article", { class: "card" }, make("h3", {}, name), list);
  if (figures.children.length) box.append(make("details", {}, make("summary", {}, "Figures of its training"), figures));
  for (const picture of pictures) box.append(pictureOf(name, picture));
  return box;
}

function pictureOf(name, picture) {
  const title = picture === "curves.png" ? "Curves of its training" : "Figures of its evaluation";
  const box = make("details", {}, make("summary", {}, title));
  box.addEventListener("toggle", async () => {
    if (!box.open || box.children.length > 1) return;
    const status = box.appendChild(make("p", { class: "soft" }, "Loading …"));
    try {
      const blob = await (await call(state.key, `playground/api/adapters/${encodeURIComponent(name)}/${picture}`)).blob();
      const image = make("img", { src: URL.createObjectURL(blob), alt: `${title}: ${name}` });
      image.addEventListener("load", () => URL.revokeObjectURL(image.src), { once: true });
      status.replaceWith(image);
    } catch (error) {
      status.textContent = error.message;
    }
  });
  return box;
}

// ---- the page ----

function showProblem(problem) {
  $("problem").textContent = problem instanceof Error && !(problem instanceof UserError) ? `This page met an error: ${problem.message}` : problem.message || problem;
  $("problem").hidden = !problem;
}

function askAll() {
  const prompt = $("question").value, chat = $("how").value === "chat";
  if (!prompt.trim()) return showProblem("Type a question first.");
  for (const id of ["temperature", "seed", "tokens"]) {
    if (!$(id).checkValidity() || $(id).value === "") {
      $("settings").open = true;
      $(id).focus();
      return showProblem(`${$(id).labels[0].firstChild.textContent.trim()}: expected ${$(id).step === "1" ? "a whole number" : "a number"} from ${$(id).min} to ${$(id).max}.`);
    }
  }
  showProblem("");
  state.asked = { chat, prompt, system: $("system").value.trim(), temperature: +$("temperature").value, seed: +$("seed").value, max_tokens: +$("tokens").value };
  state.columns.forEach(ask);
}

$("keys").addEventListener("submit", (event) => {
  event.preventDefault();
  state.key = $("key").value.trim();
  if (state.key) enter();
  else showProblem("Type your API key first.");
});
$("ask").addEventListener("submit", (event) => (event.preventDefault(), askAll()));
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) event.preventDefault(), askAll();
});
$("stop").addEventListener("click", () => state.columns.forEach(({ controller }) => controller?.abort()));
$("more").addEventListener("click", () => {
  const column = addSet();
  column.card.querySelector("input")?.focus();
  if (state.asked) ask(column);
});
$("words").addEventListener("input", changed);
$("examples").append(
  ...EXAMPLES.map((text) => {
    const button = make("button", { type: "button", class: "small" }, text);
    button.addEventListener("click", () => (($("question").value = text), askAll()));
    return button;
  }),
);
if (needsKeys) $("keys").hidden = false;
else enter();
