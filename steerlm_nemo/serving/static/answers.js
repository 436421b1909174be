// Answers from their first token to their end: what is shown of them, and what is kept.

import { announce, button, element, follow } from "./elements.js";
import { showRequest } from "./copying.js";
import { ask, events, served, wantToken } from "./server.js";
import { defaults } from "./settings.js";

const ENDPOINTS = {
  chat: { path: "/v1/chat/completions", textOf: (choice) => choice.delta.content },
  text: { path: "/v1/completions", textOf: (choice) => choice.text },
};
const UNFINISHED = ["waiting", "writing"];

let running = null; // AbortController of the answers being written
let isLeaving = false; // which breaks off what is being written
const listeners = []; // what changes with it

export function isRunning() {
  return running !== null;
}

export function stop() {
  running?.abort();
}

/** `change(true)` when answers begin, `change(false)` when all have ended. */
export function whenBusy(change) {
  listeners.push(change);
}

addEventListener("beforeunload", () => {
  isLeaving = true;
});
whenBusy((now) => {
  for (const again of document.querySelectorAll(".answer .again")) again.disabled = now;
});

/**
 * An answer that has not begun, or one that was kept. `again` asks for it once more.
 *
 * {kind, side, body, state, text, about, error, status, code, element, tools}; the state is waiting, writing, done, stopped
 * or failed.
 */
export function makeAnswer(kind, side, body, again, past = {}) {
  const { state = "waiting", text = "", about = "", error = "" } = past;
  const answer = { kind, side, body, state, text: document.createTextNode(text), about, error, status: 0, code: null };
  answer.tools = element(
    "div",
    { className: "buttons tools" },
    button("Request", () => showRequest(ENDPOINTS[kind].path, body)),
  );
  answer.parts = {
    about: element("span", { className: "about" }),
    failure: element("p", { className: "error", hidden: true }),
    leftOut: element("p", { className: "note", hidden: true }),
    again: button("Try again", () => again(answer), { hidden: true, className: "quiet again" }),
  };
  answer.element = element(
    "article",
    { className: `answer side ${side}`, "aria-label": side ? `Answer at setting ${side}` : "Answer" },
    element(
      "header",
      {},
      ...(side ? [element("b", { textContent: side })] : []),
      element("span", { className: "asked", textContent: asked(body) }),
    ),
    element("div", { className: "text", dir: "auto", lang: body.attributes?.lang ?? "" }, answer.text),
    answer.parts.failure,
    answer.parts.leftOut,
    element("footer", {}, answer.parts.about, answer.parts.again, answer.tools),
  );
  if ("state" in past && UNFINISHED.includes(state)) fail(answer, "This page was left before the end of the answer.");
  else show(answer, state, about, error);
  return answer;
}

/** What is kept of an answer; `makeAnswer` makes it of that again. */
export function told({ kind, side, body, state, text, about, error }) {
  return { kind, side, body, state, text: text.data, about, error };
}

/** Whether the model can be told of it as a response that it gave. */
export function isResponse(answer) {
  return answer.state === "done" || answer.text.data !== "";
}

/** The attributes of a request that are not the schema's defaults, in words. */
function asked({ attributes }) {
  if (!attributes) return "";
  const usual = served.format ? defaults() : {};
  const moved = Object.entries(attributes).filter(([key, value]) => usual[key] !== value);
  return moved.length ? moved.map(([key, value]) => `${key}\u00a0${value}`).join(" · ") : "defaults";
}

function show(answer, state, about = "", error = "") {
  Object.assign(answer, { state, about, error });
  answer.element.dataset.state = state;
  answer.element.setAttribute("aria-busy", UNFINISHED.includes(state));
  answer.parts.about.textContent = about;
  answer.parts.failure.textContent = error;
  answer.parts.failure.hidden = state !== "failed";
  answer.parts.again.hidden = state !== "failed";
}

function fail(answer, reason) {
  show(answer, "failed", answer.text.data && "broken off", reason);
}

async function write(answer, signal) {
  const { path, textOf } = ENDPOINTS[answer.kind];
  const start = performance.now();
  let reason = "";
  let usage;
  try {
    for await (const event of events(await ask(path, answer.body, signal))) {
      const choice = event.choices[0];
      const piece = choice && textOf(choice);
      if (piece) {
        if (answer.state === "waiting") show(answer, "writing");
        follow(() => answer.text.appendData(piece));
      }
      reason = choice?.finish_reason ?? reason;
      usage = event.usage ?? usage;
    }
    const seconds = (performance.now() - start) / 1000;
    const count = usage ? `${usage.completion_tokens} tokens, ` : "";
    const about = `${count}${seconds.toFixed(1)} s${reason === "length" ? "; cut at max tokens" : ""}`;
    follow(() => show(answer, "done", about));
  } catch (error) {
    if (error.name === "AbortError") return show(answer, "stopped", "stopped");
    if (isLeaving) await new Promise((resolve) => setTimeout(resolve, 2000)); // nobody's fault, and nobody sees it
    Object.assign(answer, { status: error.status, code: error.code });
    follow(() => fail(answer, error.message));
  }
}

/**
 * Writes answers at the same time, until all have ended; the stop button ends them together. `afterToken` is what asks
 * again where the server first wants a token.
 */
export async function runAll(answers, afterToken) {
  running = new AbortController();
  for (const change of listeners) change(true);
  announce(answers.length > 1 ? "A and B are answering." : "Answering.");
  await Promise.all(answers.map((answer) => write(answer, running.signal)));
  running = null;
  for (const change of listeners) change(false);
  // Whole answers at their end: read token by token, nobody could follow. Failures are alerts of their own.
  announce(
    answers
      .filter((answer) => answer.state !== "failed")
      .map(({ side, state, text }) => `${side || "Answer"}${state === "stopped" ? ", stopped" : ""}: ${text.data}`)
      .join(" "),
  );
  const refused = answers.filter(({ status, state }) => status === 401 && state === "failed");
  if (refused.length) wantToken(() => afterToken(refused));
}

/** The sentences of failed answers, each once. */
export function reasons(failed) {
  const sentences = [...new Set(failed.map(({ error }) => error))];
  if (sentences.length === 1) return sentences[0];
  return failed.map(({ side, error }) => `${side}: ${error}`).join(" ");
}
