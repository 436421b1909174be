// A model that does not chat continues a text.

import { isResponse, isRunning, makeAnswer, reasons, runAll, told, whenBusy } from "./answers.js";
import { $, button, element, swap, tell } from "./elements.js";
import { makeList } from "./lists.js";
import { completionBody } from "./requests.js";
import { served } from "./server.js";
import { drawn, settingsAreGood } from "./settings.js";

// What is kept of an answer goes on changing while it is written, and is read anew at each `list.changed()`.
const list = makeList(
  () => `texts ${served.model}`,
  (past) => shown(makeAnswer("text", "", past.body, askOnceMore, past)),
  { list: "continued", clear: "clear-texts", told: "texts-told" },
);

/** The answer with the text that it goes on from. */
function shown(answer) {
  answer.element.querySelector(".text").before(element("p", { className: "given", dir: "auto" }, answer.body.prompt));
  return answer.element;
}

export function continueText() {
  if (isRunning() || !settingsAreGood()) return;
  write(makeAnswer("text", "", completionBody(served.model, $("text").value, drawn()), askOnceMore));
}

function askOnceMore(old) {
  if (isRunning()) return;
  if (!isResponse(old)) list.remove(old.element);
  write(makeAnswer("text", "", old.body, askOnceMore));
}

async function write(answer) {
  tell($("not-continued"), null);
  const data = { toJSON: () => told(answer) };
  list.add(data, shown(answer));
  answer.element.scrollIntoView({ block: "nearest" });
  const clock = setInterval(list.changed, 1000);
  await runAll([answer], ([refused]) => askOnceMore(refused));
  clearInterval(clock);
  list.changed();
  if (answer.state === "failed") {
    tell($("not-continued"), reasons([answer]), button("Try again", () => askOnceMore(answer)));
  }
}

export const restoreTexts = list.restore;
export const keepTexts = list.changed;

whenBusy((now) => {
  if (now) swap($("continue"), $("stop-text"));
  else swap($("stop-text"), $("continue"));
});
