// What a reload must not lose lies in sessionStorage: it belongs to this tab and ends with it.

import { $, element } from "./elements.js";

export function keep(key, value) {
  try {
    sessionStorage.setItem(key, JSON.stringify(value));
    $("unkept").hidden = true;
  } catch (error) {
    $("unkept").hidden = false;
    $("unkept").replaceChildren(
      element("p", { textContent: `This browser keeps no more of the page, so that a reload loses it: ${error.message}` }),
    );
  }
}

/** What was kept, or null. */
export function kept(key) {
  try {
    return JSON.parse(sessionStorage.getItem(key));
  } catch {
    return null; // no storage, or something that this page did not write
  }
}

/** Everything that a person typed or set, by the name of its control: kept as it changes, and put back. */
const TYPED = "typed";

function typedControls() {
  return document.querySelectorAll("#controls [id], #composer textarea, #grading textarea, #continuing textarea");
}

export function keepTyped() {
  const controls = [...typedControls()].filter((control) => "value" in control);
  keep(
    TYPED,
    Object.fromEntries(
      controls.map((control) => [control.id, control.type === "checkbox" ? control.checked : control.value]),
    ),
  );
}

export function restoreTyped() {
  const values = kept(TYPED) ?? {};
  for (const control of typedControls()) {
    if (!(control.id in values)) continue;
    if (control.type === "checkbox") control.checked = values[control.id];
    else control.value = values[control.id];
  }
}
