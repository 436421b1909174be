// What the page is for is asked of the server when it is opened; the other files are its parts.

import { isRunning, stop } from "./answers.js";
import { askAgain, clearChat, keepChat, restoreChat, send } from "./chat.js";
import { continueText, keepTexts, restoreTexts } from "./continuing.js";
import { copyRequest } from "./copying.js";
import { $, button, element, narrow, tell } from "./elements.js";
import { grade, restoreGrades } from "./grading.js";
import { keepTyped, restoreTyped } from "./kept.js";
import { askJson, served, wantToken } from "./server.js";
import { makeSliders, sampling, settled } from "./settings.js";

// What the page is for, by the first of these abilities that the model has.
const MODES = { steer: "steer", chat: "chat", lines: "grade", generate: "continue" };
const FIRST = { steer: "prompt", chat: "prompt", grade: "question", continue: "text" };
const phone = matchMedia("(hover: none) and (pointer: coarse)"); // its keyboard has no Shift+Enter

async function begin() {
  tell($("problem"), null);
  try {
    const { id, kind, title, abilities, template, context_length } = (await askJson("/v1/models")).data[0];
    const mode = MODES[Object.keys(MODES).find((ability) => abilities.includes(ability))] ?? "none";
    const format = ["steer", "grade"].includes(mode) ? await askJson("/v1/attributes") : null;
    Object.assign(served, { model: id, kind, title, template, mode, contextLength: context_length, format });
  } catch (error) {
    if (error.status === 401) return wantToken(begin);
    $("served").textContent = "";
    return tell($("problem"), error.message, button("Try again", begin));
  }
  const { mode } = served;
  for (const part of document.querySelectorAll("[data-for]")) part.hidden = !part.dataset.for.split(" ").includes(mode);
  document.title = `${served.model} · SteerLM`;
  $("served").replaceChildren(
    element("b", { textContent: served.model }),
    ` is ${served.title}; context ${served.contextLength} tokens`,
  );
  $("max-tokens").max = served.contextLength - 1;
  $("max-tokens").value = Math.min(256, Math.floor(served.contextLength / 2));
  $("system").placeholder = served.template === "own" ? "none" : "the one of training";
  if (mode === "steer") makeSliders();
  if (narrow.matches) $("settings").open = false;
  restoreTyped();
  sampling();
  explain[mode]();
  document.body.dataset.mode = mode;
  // A phone would open its keyboard.
  if (!narrow.matches) $(FIRST[mode] ?? "theme").focus({ preventScroll: true });
}

/** Says what can be asked, and brings back what was. */
const explain = {
  steer() {
    settled();
    $("empty").textContent =
      `Set the ${served.format.schema.attributes.length} attributes, then ask. ` +
      "A and B get the same question; what differs between the answers comes from the attributes.";
    restoreChat();
  },
  chat() {
    $("empty").textContent =
      (served.template === "own"
        ? "This model chats by the chat template that came with it. "
        : "This model was trained on conversations without attributes. ") +
      "It has no attribute schema, so there is nothing to steer.";
    restoreChat();
  },
  grade: restoreGrades,
  continue() {
    $("why-plain").textContent =
      `This model is ${served.title}. It has no attribute schema, so there is nothing to steer, and no chat template, so ` +
      "it does not take messages. It continues a text:";
    restoreTexts();
  },
  none() {
    $("none").textContent =
      `This model is ${served.title}. It writes no text, and this page has nothing to ask it; ` +
      `${location.origin}/openapi.json lists what it answers.`;
  },
};

/* ---- wiring ---- */

function submits(form, action) {
  form.onsubmit = (event) => {
    event.preventDefault();
    action();
  };
  form.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.isComposing || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    form.requestSubmit();
  });
}

submits($("composer"), send);
submits($("grading"), grade);
submits($("continuing"), continueText);
$("prompt").addEventListener("keydown", (event) => {
  const { key, shiftKey, ctrlKey, metaKey, isComposing } = event;
  if (key !== "Enter" || shiftKey || ctrlKey || metaKey || isComposing || phone.matches) return;
  event.preventDefault();
  $("composer").requestSubmit();
});
// What gets the focus is scrolled to where the box for messages does not cover it, however tall it is.
new ResizeObserver(() => {
  document.documentElement.style.setProperty("--composer", `${$("composer").offsetHeight}px`);
}).observe($("composer"));
$("controls").onsubmit = (event) => event.preventDefault();
narrow.onchange = () => ($("settings").open = !narrow.matches); // a wide page has no summary to open them by
$("compare").onchange = settled;
$("greedy").onchange = sampling;
$("stop").onclick = $("stop-text").onclick = stop;
$("again").onclick = askAgain;
$("clear").onclick = clearChat;
$("copy").onclick = copyRequest;
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !event.isComposing && isRunning() && !$("request").open) stop();
});

for (const id of ["controls", "composer", "grading", "continuing"]) {
  for (const kind of ["input", "change"]) $(id).addEventListener(kind, keepTyped);
}
addEventListener("pagehide", () => {
  if (!document.body.dataset.mode) return; // nothing was there to be changed
  keepTyped();
  ({ steer: keepChat, chat: keepChat, continue: keepTexts })[served.mode]?.();
});

function dress() {
  document.documentElement.style.colorScheme = $("theme").value;
}

try {
  $("theme").value = localStorage.getItem("theme") ?? "light dark";
} catch {
  // a browser that keeps nothing: as the system
}
$("theme").onchange = () => {
  dress();
  try {
    localStorage.setItem("theme", $("theme").value);
  } catch {
    // lasts as long as the page
  }
};
dress();
begin();
