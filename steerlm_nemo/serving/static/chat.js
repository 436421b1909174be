// The conversation. Nothing typed leaves it in silence: a message that nobody answered stays where it is, says so, and
// is given back for another attempt.

import { isResponse, isRunning, makeAnswer, reasons, runAll, told, whenBusy } from "./answers.js";
import { $, button, element, narrow, swap, tell } from "./elements.js";
import { keep, keepTyped, kept } from "./kept.js";
import { chatBody } from "./requests.js";
import { served } from "./server.js";
import { SIDES, drawn, settingsAreGood, values } from "./settings.js";

// {prompt, answers: {A: answer, B: answer}, before: earlier answers, chosen: "A", "B" or null, element, parts};
// a model without attributes answers as A alone.
let turns = [];

const LEFT_OUT = "Left out of the messages after it: the model was not told of this turn.";
const LEFT_OUT_ONE = `${LEFT_OUT} “Go on from this” at the other answer takes that one for both.`;

/* ---- what the model is told ---- */

/** The answer that a setting takes for its own: the one chosen for both, its own, or the only one there is. */
function answerFor(turn, side) {
  const all = Object.values(turn.answers);
  return turn.answers[turn.chosen ?? side] ?? (all.length === 1 ? all[0] : undefined);
}

function earlier(side, until) {
  return turns.slice(0, until).flatMap((turn) => {
    const answer = answerFor(turn, side);
    if (!answer || !isResponse(answer)) return [];
    return [{ prompt: turn.prompt, response: answer.text.data, attributes: answer.body.attributes }];
  });
}

function isUnanswered(turn) {
  return !Object.values(turn.answers).some(isResponse);
}

/* ---- turns ---- */

function makeTurn(prompt, place) {
  const turn = { prompt, answers: {}, before: [], chosen: null };
  turn.parts = {
    tools: element("div", { className: "unanswered", hidden: true }, "Not answered.", button("Edit", () => edit(turn))),
    answers: element("div", { className: "answers" }),
    summary: element("summary"),
    before: element("div", { className: "answers" }),
  };
  turn.parts.earlier = element("details", { className: "earlier", hidden: true }, turn.parts.summary, turn.parts.before);
  turn.element = element(
    "section",
    { className: "turn", "aria-label": `Turn ${place + 1}` },
    element("p", { className: "prompt", dir: "auto", textContent: prompt }),
    turn.parts.tools,
    turn.parts.earlier,
    turn.parts.answers,
  );
  return turn;
}

function addAnswer(turn, answer) {
  turn.answers[answer.side || "A"] = answer;
  turn.parts.answers.append(answer.element);
}

/** An answer that another takes the place of stays to be read, if there is something to read. */
function setAside(turn, answer) {
  answer.element.remove();
  if (!isResponse(answer)) return;
  turn.before.push(answer);
  turn.parts.before.append(answer.element);
  turn.parts.earlier.hidden = false;
  turn.parts.summary.textContent = `Earlier answers (${turn.before.length})`;
}

/** Where there are two answers, each has the button that makes it the past of both. */
function offerChoice(turn) {
  if (Object.keys(turn.answers).length < 2) return;
  for (const answer of Object.values(turn.answers)) {
    const keepIt = button("Go on from this", () => choose(turn, turn.chosen === answer.side ? null : answer.side), {
      title: "Both settings take this response as the one that was given",
      "aria-pressed": String(turn.chosen === answer.side),
      className: "quiet choice",
    });
    answer.tools.querySelector(".choice")?.remove();
    answer.tools.prepend(keepIt);
  }
}

function choose(turn, side) {
  turn.chosen = side;
  for (const answer of Object.values(turn.answers)) {
    answer.tools.querySelector(".choice").setAttribute("aria-pressed", String(answer.side === side));
  }
  settleAll();
}

/** Says of every turn what became of it, and keeps all. */
function settleAll() {
  turns.forEach((turn, place) => {
    const isLast = place === turns.length - 1;
    turn.parts.tools.hidden = isRunning() || !isUnanswered(turn);
    for (const [side, answer] of Object.entries(turn.answers)) {
      const asTold = answerFor(turn, side);
      answer.parts.leftOut.hidden = isLast || isRunning() || isResponse(answer) || isResponse(asTold);
      answer.parts.leftOut.textContent = isUnanswered(turn) ? LEFT_OUT : LEFT_OUT_ONE;
    }
  });
  $("empty").hidden = turns.length > 0;
  $("clear").disabled = $("again").disabled = isRunning() || !turns.length;
  keepChat();
}

/* ---- asking ---- */

/** Asks at the settings of now; `place` is that of the turn whose answers are asked for once more. */
function ask(prompt, place = turns.length) {
  if (isRunning() || !prompt.trim() || !settingsAreGood()) return false;
  const steers = served.mode === "steer";
  const sides = steers && $("compare").checked ? SIDES : ["A"];
  const system = $("system").value;
  const sampled = drawn();
  const turn = makeTurn(prompt, place);
  for (const side of sides) {
    const attributes = steers ? values(side) : undefined;
    const body = chatBody(served.model, system, earlier(side, place), prompt, attributes, sampled);
    addAnswer(turn, makeAnswer("chat", steers ? side : "", body, (answer) => askOnceMore(turn, [answer])));
  }
  for (const old of turns.splice(place)) {
    for (const answer of [...old.before, ...Object.values(old.answers)]) setAside(turn, answer);
    old.element.remove();
  }
  turns.push(turn);
  offerChoice(turn);
  $("thread").append(turn.element);
  turn.element.scrollIntoView({ block: "end" });
  if (narrow.matches) $("settings").open = false;
  write(turn, Object.values(turn.answers));
  return true;
}

/** The very requests that failed. */
function askOnceMore(turn, answers) {
  if (isRunning()) return;
  const fresh = answers.map((old) => {
    const answer = makeAnswer("chat", old.side, old.body, (answer) => askOnceMore(turn, [answer]));
    old.element.before(answer.element);
    turn.answers[old.side || "A"] = answer;
    setAside(turn, old);
    return answer;
  });
  offerChoice(turn);
  if (!narrow.matches) $("prompt").focus(); // the button that was pressed is gone; a phone would open its keyboard
  write(turn, fresh);
}

async function write(turn, answers) {
  tell($("refused"), null);
  tell($("told"), null);
  const clock = setInterval(keepChat, 1000);
  await runAll(answers, (refused) => askOnceMore(turn, refused));
  clearInterval(clock);
  settleAll();
  const failed = answers.filter(({ state }) => state === "failed");
  const back = isUnanswered(turn) && giveBack(turn);
  if (!isUnanswered(turn) && $("prompt").value === turn.given) setPrompt("");
  const where = back ? " Your message is back in the box, to be changed or sent again." : "";
  if (failed.length) {
    tell($("refused"), reasons(failed) + advice(failed) + where, button("Try again", () => askOnceMore(turn, failed)));
  } else if (back) {
    tell($("told"), `Stopped before the first word.${where}`);
  }
}

function advice(failed) {
  const codes = failed.map(({ code }) => code);
  if (codes.includes("model_not_found")) return " Reload the page to talk to the model of now; what is typed stays.";
  if (codes.includes("context_length_exceeded") && turns.length > 1) return " “Clear chat” begins without the history.";
  return "";
}

/* ---- the box for messages ---- */

function setPrompt(text) {
  $("prompt").value = text;
  keepTyped();
}

/** Puts an unanswered message back where it was typed, unless something else is being typed there. */
function giveBack(turn) {
  if (!$("prompt").value.trim()) setPrompt(turn.prompt);
  const isBack = $("prompt").value === turn.prompt;
  if (isBack) turn.given = turn.prompt;
  return isBack;
}

function edit(turn) {
  if (!giveBack(turn)) setPrompt(`${$("prompt").value}\n\n${turn.prompt}`);
  $("prompt").focus();
}

export function send() {
  const prompt = $("prompt").value;
  const last = turns.at(-1);
  // The same message again takes the place of the one that nobody answered.
  const place = last && isUnanswered(last) && last.prompt === prompt ? turns.length - 1 : turns.length;
  if (ask(prompt, place)) setPrompt("");
}

export function askAgain() {
  ask(turns.at(-1).prompt, turns.length - 1);
}

export function clearChat() {
  const old = turns;
  turns = [];
  for (const turn of old) turn.element.remove();
  tell($("refused"), null);
  const undo = button("Bring it back", () => {
    turns = [...old, ...turns];
    $("thread").prepend(...old.map((turn) => turn.element));
    tell($("told"), null);
    settleAll();
    $("prompt").focus();
  });
  tell($("told"), "The chat is cleared, and this tab keeps it no longer.", undo);
  settleAll();
  $("prompt").focus();
}

/* ---- kept over a reload ---- */

function key() {
  return `chat ${served.model} ${served.format?.digest ?? ""}`;
}

/** Every request repeats the messages before it, so that each is kept once and named by its number. */
export function keepChat() {
  const messages = [];
  const places = new Map();
  const placeOf = (message) => {
    const text = JSON.stringify(message);
    if (!places.has(text)) places.set(text, messages.push(message) - 1);
    return places.get(text);
  };
  const short = (answer) => ({ ...told(answer), body: { ...answer.body, messages: answer.body.messages.map(placeOf) } });
  const all = turns.map(({ prompt, answers, before, chosen }) => ({
    prompt,
    answers: Object.values(answers).map(short),
    before: before.map(short),
    chosen,
  }));
  keep(key(), { turns: all, messages });
}

export function restoreChat() {
  const { turns: all, messages } = kept(key()) ?? { turns: [], messages: [] };
  for (const { prompt, answers, before, chosen } of all) {
    const turn = makeTurn(prompt, turns.length);
    const whole = (short) => {
      const body = { ...short.body, messages: short.body.messages.map((place) => messages[place]) };
      return makeAnswer(short.kind, short.side, body, (answer) => askOnceMore(turn, [answer]), short);
    };
    turn.chosen = chosen;
    for (const short of before) setAside(turn, whole(short));
    for (const short of answers) addAnswer(turn, whole(short));
    offerChoice(turn);
    turns.push(turn);
    $("thread").append(turn.element);
  }
  if (turns.length) {
    if (isUnanswered(turns.at(-1))) giveBack(turns.at(-1));
    turns.at(-1).element.scrollIntoView({ block: "end" });
  }
  settleAll();
}

whenBusy((now) => {
  if (now) swap($("send"), $("stop"));
  else swap($("stop"), $("send"));
  settleAll();
});
