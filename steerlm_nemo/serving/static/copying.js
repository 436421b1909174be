// The request of an answer, to be copied and sent again from a shell or a program.

import { $, announce, button } from "./elements.js";
import { token } from "./server.js";

function curlLine(path, body) {
  const quoted = `'${JSON.stringify(body).replaceAll("'", "'\\''")}'`;
  const header = token.value ? ' -H "Authorization: Bearer $STEERLM_TOKEN"' : "";
  return `curl -N ${location.origin}${path} -H 'Content-Type: application/json'${header} -d ${quoted}`;
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

function pythonProgram(body) {
  const { attributes, ...known } = body;
  const isChat = "messages" in body;
  const call = Object.entries(known).map(([key, value]) =>
    key === "messages"
      ? `    messages=[\n${value.map((message) => `        ${pythonLiteral(message)},\n`).join("")}    ],`
      : `    ${key}=${pythonLiteral(value)},`,
  );
  if (attributes) call.push(`    extra_body={"attributes": ${pythonLiteral(attributes)}},`);
  return [
    ...(token.value ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url="${location.origin}/v1", api_key=${token.value ? 'os.environ["STEERLM_TOKEN"]' : '"none"'})`,
    `chunks = client.${isChat ? "chat." : ""}completions.create(`,
    ...call,
    ")",
    "for chunk in chunks:",
    "    if chunk.choices:",
    `        print(chunk.choices[0].${isChat ? 'delta.content or ""' : "text"}, end="", flush=True)`,
    "print()",
  ].join("\n");
}

/** OpenAI's client has no call for grading. */
export function showRequest(path, body) {
  const forms = { curl: curlLine(path, body) };
  if (path !== "/v1/annotate") forms.Python = pythonProgram(body);
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
  $("request").querySelector(".hint").textContent = token.value
    ? "Your token is not in it: put it into the environment variable STEERLM_TOKEN."
    : "";
  tabs[0].click();
  $("request").showModal();
}

export async function copyRequest() {
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
