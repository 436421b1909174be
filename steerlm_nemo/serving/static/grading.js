// A value model gives responses attributes: a form for a pair, and the list of what was graded.

import { $, announce, button, element, tell } from "./elements.js";
import { makeList } from "./lists.js";
import { annotateBody } from "./requests.js";
import { askJson, served, wantToken } from "./server.js";
import { schemaKeys } from "./settings.js";
import { showRequest } from "./copying.js";

const MOST_SHOWN = 11; // values of an attribute; of more, such as languages, the likeliest
const LIKELIEST = 4;

let isGrading = false;

const list = makeList(() => `grades ${served.model} ${served.format.digest}`, shown, {
  list: "grades",
  clear: "clear-grades",
  told: "grades-told",
  empty: "no-grades",
});

export const restoreGrades = list.restore;

export async function grade() {
  if (isGrading) return;
  const body = annotateBody($("grading-system").value, $("question").value, $("response").value);
  tell($("ungraded"), null);
  busy(true);
  announce("Grading.");
  try {
    const { content, attributes, attributes_soft } = (await askJson("/v1/annotate", body)).conversations[0].messages.at(-1);
    const data = { body, content, attributes, soft: attributes_soft };
    const result = shown(data);
    list.add(data, result);
    result.scrollIntoView({ block: "nearest" });
    announce(`Graded: ${schemaKeys().map((key) => `${spoken(key)} ${attributes[key]}`)}`);
  } catch (error) {
    tell($("ungraded"), error.message, button("Try again", grade));
    if (error.status === 401) wantToken(grade);
  } finally {
    busy(false);
  }
}

/** The button keeps the focus, as a disabled one would not. */
function busy(now) {
  isGrading = now;
  $("grade").setAttribute("aria-disabled", String(now));
}

function spoken(name) {
  return name.replaceAll("_", " ");
}

/** A result: what was asked about, and what the model gave it. */
function shown({ body, content, attributes, soft }) {
  const [{ messages }] = body.conversations;
  const system = messages.find(({ role }) => role === "system");
  const question = messages.find(({ role }) => role === "user");
  const line = schemaKeys().map((key) => `${key}:${attributes[key]}`);
  return element(
    "article",
    { className: "graded", "aria-label": "Graded response" },
    element(
      "dl",
      {},
      ...(system ? labelled("System prompt", system.content) : []),
      ...labelled("Question", question.content),
      ...labelled("Response", content, "response"),
    ),
    attributeTable(attributes, soft),
    element("p", {}, element("code", { textContent: line.join(",") })),
    element("div", { className: "buttons" }, button("Request", () => showRequest("/v1/annotate", body))),
  );
}

function labelled(name, text, className = "") {
  return [
    element("dt", { textContent: name }),
    element("dd", { className: `text ${className}`, dir: "auto", textContent: text }),
  ];
}

/** What the model chose, and how likely it held every legal value to be. */
function attributeTable(attributes, soft) {
  const rows = schemaKeys().map((name) =>
    element(
      "tr",
      {},
      element("th", { scope: "row", textContent: spoken(name) }),
      element("td", { className: "value" }, element("b", { textContent: attributes[name] }), ...mean(soft[name])),
      element("td", {}, shares(soft[name].probabilities, String(attributes[name]))),
    ),
  );
  const heads = ["attribute", "value", "how likely each value is"].map((textContent) =>
    element("th", { scope: "col", textContent }),
  );
  return element("table", {}, element("thead", {}, element("tr", {}, ...heads)), element("tbody", {}, ...rows));
}

function mean({ expected }) {
  return expected === null ? [] : [element("small", { textContent: `mean ${expected.toFixed(2)}` })];
}

/** A line per value: the value, a bar, a number. */
function shares(probabilities, chosen) {
  let shown = Object.entries(probabilities);
  let rest = [];
  if (shown.length > MOST_SHOWN) {
    shown.sort((one, other) => other[1] - one[1]);
    rest = shown.splice(LIKELIEST);
  }
  const lines = shown.map(([value, share]) => shareLine(value, share, value === chosen));
  if (rest.length) {
    const sum = rest.reduce((total, [, share]) => total + share, 0);
    lines.push(shareLine(`${rest.length} others`, sum, false));
  }
  return element("ul", { className: "shares" }, ...lines);
}

function shareLine(value, share, isChosen) {
  const line = element(
    "li",
    { className: isChosen ? "chosen" : "" },
    element("span", { className: "option", textContent: value }),
    element("span", { className: "bar" }, element("i")),
    element("span", { className: "number", textContent: percent(share) }),
  );
  line.style.setProperty("--share", share);
  return line;
}

function percent(share) {
  const whole = Math.round(100 * share);
  return whole === 0 && share > 0 ? "< 1 %" : `${whole} %`;
}
