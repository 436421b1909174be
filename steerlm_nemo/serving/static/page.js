"use strict";
// Everything a model or a server writes becomes a text node. The page's Content-Security-Policy requires Trusted Types
// and allows no policy, so that a forgotten innerHTML would throw instead of running what a model wrote.

const SIDES = ["A", "B"];
// What the page is for, by the first of these abilities that the model's kind has.
const MODES = { chat: "steer", lines: "grade", generate: "continue" };
const $ = (id) => document.getElementById(id);
const narrow = matchMedia("(max-width: 60rem)"); // as in the style sheet: settings above the conversation

let served; // {model, kind, abilities, contextLength, format}; kind and format null: a checkpoint without
let turns = []; // {prompt, answers: {A: answer, B: answer}, kept: "A", "B" or undefined, element}
let running = null; // AbortController of the answers being written

/* ---- elements ---- */

function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

function button(text, onclick, properties = {}) {
  return element("button", { type: "button", className: "quiet", textContent: text, onclick, ...properties });
}

function announce(text) {
  $("status").textContent = text;
}

/* ---- the server ---- */

class Failure extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status; // 0: no answer at all
  }
}

function headers() {
  const token = sessionStorage.getItem("token");
  return { "Content-Type": "application/json", ...(token && { Authorization: `Bearer ${token}` }) };
}

/** The response, if its status is good. Throws Failure in words for the reader; AbortError passes. */
async function ask(path, body, signal) {
  let response;
  try {
    response = await fetch(path, {
      method: body ? "POST" : "GET",
      headers: headers(),
      body: body && JSON.stringify(body),
      signal,
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure(`No answer from ${location.host}. Is the server still running, and can this machine reach it?`);
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => ({}));
  const reason = said.error?.message ?? said.message ?? response.statusText;
  const wait = response.headers.get("Retry-After");
  const meaning = {
    401: "The server wants a token, or does not know this one",
    413: "Too long for the server",
    429: "The server is busy" + (wait ? `; it asks to wait ${wait} s` : ""),
    503: "The server is not ready",
  }[response.status];
  const advice =
    said.error?.code === "context_length_exceeded" && turns.length > 1 ? " A new chat begins without the history." : "";
  throw new Failure((meaning ?? `The server refused (${response.status})`) + `: ${reason}${advice}`, response.status);
}

/** The JSON events of a streamed answer. Throws Failure if it breaks off before its end. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let piece;
    try {
      piece = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      piece = { done: true };
    }
    if (piece.done) throw new Failure("The connection broke before the end; what is above is incomplete.");
    const lines = (rest + piece.value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Failure(`The server stopped: ${event.error.message}`);
      yield event;
    }
  }
}

/* ---- what is served ---- */

async function begin() {
  $("problem").hidden = true;
  $("work").hidden = true;
  try {
    const { id, kind, abilities, context_length } = (await (await ask("/v1/models")).json()).data[0];
    served = { model: id, kind, abilities, contextLength: context_length, format: null };
    if (kind) served.format = await (await ask("/v1/attributes")).json();
  } catch (error) {
    if (error.status === 401) return wantToken(begin);
    $("served").textContent = "";
    $("problem").firstElementChild.textContent = error.message;
    $("problem").hidden = false;
    return;
  }
  const mode = MODES[Object.keys(MODES).find((ability) => served.abilities.includes(ability))] ?? "none";
  for (const part of document.querySelectorAll("[data-for]")) part.hidden = !part.dataset.for.split(" ").includes(mode);
  document.body.dataset.mode = mode;
  document.title = `${served.model} · SteerLM`;
  $("served").replaceChildren(
    element("b", { textContent: served.model }),
    ` (${served.kind ?? "no kind"}) ` +
      {
        steer: "answers at the attributes you ask for",
        grade: "gives responses attributes",
        continue: "continues text",
        none: "has nothing that this page could show",
      }[mode] +
      `; context ${served.contextLength} tokens`,
  );
  $("max-tokens").max = served.contextLength - 1;
  $("max-tokens").value = Math.min(256, Math.floor(served.contextLength / 2));
  if (mode === "steer") {
    makeSliders();
    $("empty").textContent =
      `Set the ${served.format.schema.attributes.length} attributes, then ask. ` +
      "A and B get the same question; what differs between the answers comes from the attributes.";
  }
  if (mode === "continue") {
    $("why-plain").textContent = served.format
      ? "This model was trained on conversations without attributes, so there is nothing to steer. It continues text:"
      : "This checkpoint carries no attribute schema (it was not trained with SteerLM), so there is nothing to steer " +
        "and no chat template. It continues text:";
  }
  $("work").hidden = false;
  sampling();
  // A phone would open its keyboard.
  if (!narrow.matches) $({ steer: "prompt", grade: "question", continue: "text", none: "theme" }[mode]).focus();
}

function wantToken(then) {
  $("token").hidden = false;
  $("token").querySelector("label").textContent = sessionStorage.getItem("token")
    ? "The server does not know this token. Another one:"
    : "This server wants a bearer token. It is kept until this tab is closed:";
  $("token-value").focus();
  announce("The server wants a bearer token.");
  $("token").onsubmit = (event) => {
    event.preventDefault();
    sessionStorage.setItem("token", $("token-value").value);
    $("token-value").value = "";
    $("token").hidden = true;
    then();
  };
}

/* ---- settings ---- */

function makeSliders() {
  const { attributes, languages } = served.format.schema;
  const heads = SIDES.map((side, place) => {
    const other = SIDES[1 - place];
    return element(
      "div",
      { className: `head side ${side}` },
      element("b", { textContent: side }),
      button("reset", () => setValues(side, defaults()), { title: `Setting ${side} to the defaults of the schema` }),
      button(`= ${other}`, () => setValues(side, values(other)), {
        title: `Setting ${side} as ${other} is`,
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
              { name: `${side} lang`, "aria-label": `language, setting ${side}`, onchange: settled },
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
  for (const side of SIDES) setValues(side, defaults());
}

/** In the order of a line. */
function schemaKeys() {
  return Object.keys(defaults());
}

/** What the server takes for attributes that a request leaves out. */
function defaults() {
  const { attributes, languages } = served.format.schema;
  const full = Object.fromEntries(attributes.map((attribute) => [attribute.name, attribute.default]));
  if (languages.length) full.lang = languages.includes("en") ? "en" : languages[0];
  return full;
}

function values(side) {
  const full = {};
  for (const key of schemaKeys()) {
    const { value } = $("controls").elements[`${side} ${key}`];
    full[key] = key === "lang" ? value : Number(value);
  }
  return full;
}

function setValues(side, full) {
  for (const [key, value] of Object.entries(full)) $("controls").elements[`${side} ${key}`].value = value;
  settled();
}

/** Shows what the sliders say. */
function settled() {
  const [a, b] = SIDES.map(values);
  for (const input of $("sliders").querySelectorAll("input")) {
    input.nextElementSibling.textContent = input.value;
    const place = (input.value - input.min) / (input.max - input.min || 1);
    input.style.setProperty("--filled", `${100 * place}%`);
  }
  const keys = Object.keys(a).filter((key) => a[key] !== b[key]);
  for (const row of $("sliders").querySelectorAll(".row[aria-label]")) {
    row.classList.toggle("differs", $("compare").checked && keys.includes(row.getAttribute("aria-label")));
  }
  document.body.classList.toggle("single", !$("compare").checked);
  $("difference").textContent = !$("compare").checked
    ? ""
    : keys.length
      ? `A and B differ in ${keys.join(", ")}.`
      : "A and B are equal: move a slider of one of them to see what it changes.";
}

function sampling() {
  for (const id of ["temperature", "top-p", "seed"]) $(id).disabled = $("greedy").checked;
}

/** The sampling part of a request. */
function drawn() {
  const seed = $("seed").value;
  return samplingOf({
    greedy: $("greedy").checked,
    temperature: Number($("temperature").value),
    topP: Number($("top-p").value),
    seed: seed === "" ? crypto.getRandomValues(new Uint32Array(1))[0] >>> 1 : Number(seed),
    maxTokens: Number($("max-tokens").value),
  });
}

function settingsAreGood() {
  if (!$("controls").checkValidity()) $("settings").open = true; // what is hidden cannot show what is wrong with it
  return $("controls").reportValidity();
}

/* ---- answers ---- */

/** An article that shows an answer from its first token to its end, and the answer's state. */
function makeAnswer(path, body, { side = "", kind, textOf }) {
  const text = document.createTextNode("");
  const about = element("span", { className: "about" });
  const failure = element("p", { className: "error", role: "alert", hidden: true });
  const again = button("Try again", () => runAll([answer]));
  const tools = element("div", { className: "buttons" });
  const answer = { path, body, side, textOf, text, about, failure, again, tools, state: "waiting", status: 0 };
  tools.append(button("Request", () => showRequest(path, body, kind)));
  answer.element = element(
    "article",
    { className: `answer side ${side}`, "aria-label": side ? `Answer at setting ${side}` : "Continuation" },
    element(
      "header",
      {},
      ...(side ? [element("b", { textContent: side })] : []),
      element("span", { className: "asked", textContent: asked(body) }),
    ),
    element("div", { className: "text" }, text),
    failure,
    element("footer", {}, about, again, tools),
  );
  show(answer, "waiting");
  return answer;
}

/** The attributes of a request that are not the schema's defaults, in words. */
function asked({ attributes }) {
  if (!attributes) return "";
  const usual = defaults();
  const moved = Object.entries(attributes).filter(([key, value]) => usual[key] !== value);
  return moved.length ? moved.map(([key, value]) => `${key}\u00a0${value}`).join(" · ") : "defaults";
}

function show(answer, state, about = "") {
  answer.state = state;
  answer.element.dataset.state = state;
  answer.element.setAttribute("aria-busy", state === "waiting" || state === "writing");
  answer.about.textContent = about;
  answer.failure.hidden = state !== "failed";
  answer.again.hidden = state !== "failed";
}

async function write(answer, signal) {
  answer.text.data = "";
  show(answer, "waiting");
  const start = performance.now();
  let reason = "";
  let usage;
  try {
    for await (const event of events(await ask(answer.path, answer.body, signal))) {
      const choice = event.choices[0];
      const piece = choice && answer.textOf(choice);
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
    answer.status = error.status;
    answer.failure.textContent = error.message;
    follow(() => show(answer, "failed"));
  }
}

/** Writes answers at the same time; the stop button ends them all. */
async function runAll(answers) {
  running = new AbortController();
  busy(true);
  announce(answers.length > 1 ? "A and B are answering." : "Answering.");
  await Promise.all(answers.map((answer) => write(answer, running.signal)));
  running = null;
  busy(false);
  const states = answers.map(({ side, state }) => `${side || "Answer"} ${state}`);
  announce(`${states.join(", ")}.`);
  const refused = answers.filter((answer) => answer.status === 401 && answer.state === "failed");
  if (refused.length) wantToken(() => runAll(refused));
}

function busy(now) {
  for (const id of ["stop", "stop-text"]) $(id).hidden = !now;
  for (const id of ["send", "continue"]) $(id).hidden = now;
  for (const again of document.querySelectorAll(".answer footer > button")) again.disabled = now;
  $("again").disabled = $("clear").disabled = now || !turns.length;
}

/** Changes the page, and keeps its end in view if it was. */
function follow(change) {
  const box = getComputedStyle($("thread")).overflowY === "auto" ? $("thread") : document.scrollingElement;
  const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
  change();
  if (atEnd) box.scrollTop = box.scrollHeight;
}

/* ---- chat ---- */

/** What a setting remembers: its own answers, or the one that was chosen for both. Failed ones are left out. */
function earlier(side, until) {
  return turns.slice(0, until).flatMap(({ prompt, answers, kept }) => {
    const answer = answers[kept ?? side];
    if (!answer?.text.data || answer.state === "failed") return [];
    return [{ prompt, response: answer.text.data, attributes: answer.body.attributes }];
  });
}

function send(prompt, place = turns.length) {
  if (running || !prompt.trim() || !settingsAreGood()) return;
  const sides = $("compare").checked ? SIDES : ["A"];
  const system = $("system").value;
  const sampled = drawn();
  const answers = {};
  for (const side of sides) {
    const body = chatBody(served.model, system, earlier(side, place), prompt, values(side), sampled);
    answers[side] = makeAnswer("/v1/chat/completions", body, {
      side,
      kind: "chat",
      textOf: (choice) => choice.delta.content,
    });
  }
  const turn = { prompt, answers, kept: undefined };
  turn.element = element(
    "section",
    { className: "turn", "aria-label": `Turn ${place + 1}` },
    element("p", { className: "prompt", textContent: prompt }),
    element("div", { className: "answers" }, ...sides.map((side) => answers[side].element)),
  );
  if (sides.length > 1) {
    for (const side of sides) {
      const keep = button("Go on from this", () => choose(turn, turn.kept === side ? undefined : side), {
        title: "Both settings take this response as the one that was given",
        "aria-pressed": "false",
      });
      keep.dataset.side = side;
      answers[side].tools.prepend(keep);
    }
  }
  for (const old of turns.splice(place)) old.element.remove();
  turns.push(turn);
  $("empty").hidden = true;
  $("thread").append(turn.element);
  turn.element.scrollIntoView({ block: "end" });
  if (narrow.matches) $("settings").open = false;
  runAll(Object.values(answers));
}

function choose(turn, side) {
  turn.kept = side;
  for (const keep of turn.element.querySelectorAll("[aria-pressed]"))
    keep.setAttribute("aria-pressed", keep.dataset.side === side);
}

function clearChat() {
  for (const turn of turns) turn.element.remove();
  turns = [];
  $("empty").hidden = false;
  busy(false);
  $("prompt").focus();
}

/* ---- other models ---- */

async function grade() {
  const body = annotateBody($("grading-system").value, $("question").value, $("response").value);
  const shown = element("section", { className: "graded", "aria-label": "Attributes" });
  $("grades").prepend(shown);
  $("grade").disabled = true;
  try {
    const answer = await (await ask("/v1/annotate", body)).json();
    const { content, attributes, attributes_soft } = answer.conversations[0].messages.at(-1);
    const line = schemaKeys().map((key) => `${key}:${attributes[key]}`);
    shown.append(
      element("p", { className: "text response", textContent: content }),
      attributeTable(attributes, attributes_soft),
      element("p", {}, element("code", { textContent: line.join(",") })),
      button("Request", () => showRequest("/v1/annotate", body)),
    );
  } catch (error) {
    shown.append(element("p", { className: "error", role: "alert", textContent: error.message }));
    if (error.status === 401) wantToken(grade);
  }
  $("grade").disabled = false;
}

/** What the model chose, and how sure it was of every legal value. */
function attributeTable(attributes, soft) {
  const rows = schemaKeys().map((name) => {
    const value = attributes[name];
    const { expected, confidence, probabilities } = soft[name];
    const likely = Object.entries(probabilities);
    if (name === "lang") likely.sort((one, other) => other[1] - one[1]).splice(3); // of dozens, the likeliest
    const shares = likely.map(([option, share]) => {
      const cell = element("span", { className: "share", textContent: option, title: `${option}: ${percent(share)}` });
      cell.style.setProperty("--share", share);
      return cell;
    });
    return element(
      "tr",
      {},
      element("th", { scope: "row", textContent: name.replaceAll("_", " ") }),
      element("td", { className: "value", textContent: value }),
      element("td", { className: "number", textContent: percent(confidence) }),
      element("td", { className: "number", textContent: expected?.toFixed(2) ?? "" }),
      element("td", { className: "shares" }, ...shares),
    );
  });
  const heads = ["attribute", "value", "sure", "mean", "of each value"].map((textContent) =>
    element("th", { scope: "col", textContent }),
  );
  return element("table", {}, element("thead", {}, element("tr", {}, ...heads)), element("tbody", {}, ...rows));
}

function percent(share) {
  return `${Math.round(100 * share)} %`;
}

function continueText() {
  if (running || !settingsAreGood()) return;
  const body = completionBody(served.model, $("text").value, drawn());
  const answer = makeAnswer("/v1/completions", body, { kind: "text", textOf: (choice) => choice.text });
  $("continued").prepend(answer.element);
  runAll([answer]);
}

/* ---- the request, to be copied ---- */

function curlLine(path, body) {
  const quoted = `'${JSON.stringify(body).replaceAll("'", "'\\''")}'`;
  const token = sessionStorage.getItem("token") ? ' -H "Authorization: Bearer $STEERLM_TOKEN"' : "";
  return `curl -N ${location.origin}${path} -H 'Content-Type: application/json'${token} -d ${quoted}`;
}

function pythonLiteral(value) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map(pythonLiteral).join(", ")}]`;
  if (typeof value === "object") {
    return `{${Object.entries(value)
      .map(([key, item]) => `${JSON.stringify(key)}: ${pythonLiteral(item)}`)
      .join(", ")}}`;
  }
  return JSON.stringify(value);
}

function pythonProgram(body, kind) {
  const { attributes, ...known } = body;
  const call = Object.entries(known).map(([key, value]) =>
    key === "messages"
      ? `    messages=[\n${value.map((message) => `        ${pythonLiteral(message)},\n`).join("")}    ],`
      : `    ${key}=${pythonLiteral(value)},`,
  );
  if (attributes) call.push(`    extra_body={"attributes": ${pythonLiteral(attributes)}},`);
  const token = sessionStorage.getItem("token");
  return [
    ...(token ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url="${location.origin}/v1", api_key=${token ? 'os.environ["STEERLM_TOKEN"]' : '"none"'})`,
    `chunks = client.${kind === "chat" ? "chat." : ""}completions.create(`,
    ...call,
    ")",
    "for chunk in chunks:",
    "    if chunk.choices:",
    `        print(chunk.choices[0].${kind === "chat" ? 'delta.content or ""' : "text"}, end="", flush=True)`,
    "print()",
  ].join("\n");
}

function showRequest(path, body, kind) {
  const forms = { curl: curlLine(path, body) };
  if (kind) forms.Python = pythonProgram(body, kind);
  const box = $("request").querySelector("pre");
  const tabs = Object.entries(forms).map(([name, text]) =>
    button(name, () => {
      box.textContent = text;
      for (const tab of tabs) tab.setAttribute("aria-pressed", tab.textContent === name);
      $("copy").textContent = "Copy";
    }),
  );
  $("request")
    .querySelector(".tabs")
    .replaceChildren(...tabs);
  $("request").querySelector(".hint").textContent = sessionStorage.getItem("token")
    ? "Your token is not in it: put it into the environment variable STEERLM_TOKEN."
    : "";
  tabs[0].click();
  $("request").showModal();
}

async function copyRequest() {
  const box = $("request").querySelector("pre");
  try {
    await navigator.clipboard.writeText(box.textContent);
  } catch {
    getSelection().selectAllChildren(box); // browsers give the clipboard to https and localhost only
    document.execCommand("copy");
  }
  $("copy").textContent = "Copied";
  announce("Copied.");
}

/* ---- wiring ---- */

$("problem").querySelector("button").onclick = begin;
$("theme").onchange = () => {
  localStorage.setItem("theme", $("theme").value);
  document.documentElement.style.colorScheme = $("theme").value;
};
$("compare").onchange = settled;
$("greedy").onchange = sampling;
$("controls").onsubmit = (event) => event.preventDefault();
$("composer").onsubmit = (event) => {
  event.preventDefault();
  const prompt = $("prompt").value;
  if (running || !prompt.trim()) return;
  send(prompt);
  if (running) $("prompt").value = "";
};
$("prompt").onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("composer").requestSubmit();
};
$("stop").onclick = $("stop-text").onclick = () => running?.abort();
$("again").onclick = () => send(turns.at(-1).prompt, turns.length - 1);
$("clear").onclick = clearChat;
$("grading").onsubmit = (event) => {
  event.preventDefault();
  grade();
};
$("continuing").onsubmit = (event) => {
  event.preventDefault();
  continueText();
};
$("copy").onclick = copyRequest;
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running && !$("request").open) running.abort();
});

$("theme").value = localStorage.getItem("theme") ?? "light dark";
document.documentElement.style.colorScheme = $("theme").value;
begin();
