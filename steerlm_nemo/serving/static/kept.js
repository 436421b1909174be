// What a reload must not lose lies in sessionStorage: it belongs to this tab and ends with it.

import { $, tell } from "./elements.js";

const unkept = new Map(); // keys of what a reload would lose, and why

export function keep(key, value) {
  try {
    sessionStorage.setItem(key, JSON.stringify(value));
    if (!unkept.delete(key)) return;
  } catch (error) {
    if (unkept.get(key) === error.message) return; // said already
    unkept.set(key, error.message);
  }
  const [reason] = unkept.values();
  tell($("unkept"), reason ? `This browser keeps no more of the page, so that a reload loses it: ${reason}` : null);
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
