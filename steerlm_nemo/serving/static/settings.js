// What an answer is asked for with: attributes in two settings, how tokens are drawn, a system prompt.

import { $, button, element } from "./elements.js";
import { keepTyped } from "./kept.js";
import { samplingOf } from "./requests.js";
import { served } from "./server.js";

export const SIDES = ["A", "B"];

export function makeSliders() {
  const { attributes, languages } = served.format.schema;
  const heads = SIDES.map((side, place) => {
    const other = SIDES[1 - place];
    return element(
      "div",
      { className: `head side ${side}` },
      element("b", { textContent: side }),
      button("reset", () => setValues(side, start(side)), {
        title: `Setting ${side} to where it began`,
        "aria-label": `reset setting ${side}`,
      }),
      button(`= ${other}`, () => setValues(side, values(other)), {
        title: `Setting ${side} as ${other} is`,
        "aria-label": `= ${other}: set ${side} as ${other} is`,
        className: "quiet copy",
      }),
    );
  });
  const rows = attributes.map(({ name, minimum, maximum }) =>
    element(
      "div",
      { className: "row", role: "group", "aria-label": name },
      element(
        "span",
        { className: "name" },
        name.replaceAll("_", " "),
        element("small", { textContent: ` ${minimum}–${maximum}` }),
      ),
      ...SIDES.map((side) =>
        element(
          "label",
          { className: `side ${side}` },
          element("input", {
            type: "range",
            min: minimum,
            max: maximum,
            step: 1,
            id: `${side}-${name}`,
            name: `${side} ${name}`,
            "aria-label": `${name}, setting ${side}`,
            oninput: settled,
          }),
          element("output"),
        ),
      ),
    ),
  );
  if (languages.length) {
    rows.push(
      element(
        "div",
        { className: "row", role: "group", "aria-label": "lang" },
        element("span", { className: "name", textContent: "language" }),
        ...SIDES.map((side) =>
          element(
            "label",
            { className: `side ${side}` },
            element(
              "select",
              {
                id: `${side}-lang`,
                name: `${side} lang`,
                "aria-label": `language, setting ${side}`,
                onchange: settled,
              },
              ...languages.map((code) => new Option(code)),
            ),
          ),
        ),
      ),
    );
  }
  $("sliders").replaceChildren(
    element("div", { className: "row" }, element("span", { className: "name" }), ...heads),
    ...rows,
  );
  for (const side of SIDES) setControls(side, start(side));
}

/** In the order of a line. */
export function schemaKeys() {
  return Object.keys(defaults());
}

/** What the server takes for attributes that a request leaves out. */
export function defaults() {
  const { attributes, languages } = served.format.schema;
  const full = Object.fromEntries(attributes.map((attribute) => [attribute.name, attribute.default]));
  if (languages.length) full.lang = languages.includes("en") ? "en" : languages[0];
  return full;
}

/**
 * Where a setting begins: what the schema's defaults ask for more of than the middle is at its top in A and at its bottom
 * in B, so that the first two answers show what steering does. A schema that asks for nothing so lends its first.
 */
function start(side) {
  const full = defaults();
  const movable = served.format.schema.attributes.filter(({ minimum, maximum }) => minimum < maximum);
  const wanted = movable.filter((attribute) => 2 * attribute.default > attribute.minimum + attribute.maximum);
  for (const { name, minimum, maximum } of wanted.length ? wanted : movable.slice(0, 1)) {
    full[name] = side === "A" ? maximum : minimum;
  }
  return full;
}

export function values(side) {
  const full = {};
  for (const key of schemaKeys()) {
    const { value } = $(`${side}-${key}`);
    full[key] = key === "lang" ? value : Number(value);
  }
  return full;
}

function setControls(side, full) {
  for (const [key, value] of Object.entries(full)) $(`${side}-${key}`).value = value;
}

function setValues(side, full) {
  setControls(side, full);
  settled();
}

/** Shows what the sliders say, and keeps it. */
export function settled() {
  const compares = $("compare").checked;
  for (const select of $("sliders").querySelectorAll("select")) {
    if (select.selectedIndex < 0) select.value = defaults().lang; // kept from a model of other languages
  }
  const [a, b] = SIDES.map(values);
  for (const input of $("sliders").querySelectorAll("input")) {
    input.nextElementSibling.textContent = input.value;
    const place = (input.value - input.min) / (input.max - input.min || 1);
    input.style.setProperty("--filled", `${100 * place}%`);
  }
  const keys = Object.keys(a).filter((key) => a[key] !== b[key]);
  for (const row of $("sliders").querySelectorAll(".row[aria-label]")) {
    row.classList.toggle("differs", compares && keys.includes(row.getAttribute("aria-label")));
  }
  document.body.classList.toggle("single", !compares);
  const said = keys.length ? `A and B differ in ${keys.join(", ")}` : "A and B are equal";
  $("summary").textContent = compares ? said : "one setting";
  $("difference").textContent = !compares
    ? ""
    : keys.length
      ? `${said}.`
      : `${said}: move a slider of one of them to see what it changes.`;
  keepTyped();
}

export function sampling() {
  for (const id of ["temperature", "top-p", "seed"]) $(id).disabled = $("greedy").checked;
}

/** The sampling part of a request. */
export function drawn() {
  const seed = $("seed").value;
  return samplingOf({
    greedy: $("greedy").checked,
    temperature: Number($("temperature").value),
    topP: Number($("top-p").value),
    seed: seed === "" ? crypto.getRandomValues(new Uint32Array(1))[0] >>> 1 : Number(seed),
    maxTokens: Number($("max-tokens").value),
  });
}

export function settingsAreGood() {
  if (!$("controls").checkValidity()) $("settings").open = true; // what is hidden cannot show what is wrong with it
  return $("controls").reportValidity();
}
