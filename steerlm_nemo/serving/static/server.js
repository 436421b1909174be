// Asking the server: what it serves, and answers as they are made.

import { $ } from "./elements.js";

/** {model, kind, title, mode, contextLength, format}; format is null where the model has no attributes. */
export const served = {};

/** What the server, or the way to it, had against a request: a sentence for the reader. */
export class Failure extends Error {
  constructor(message, status = 0, code = null) {
    super(message);
    this.status = status; // 0: no answer at all
    this.code = code; // OpenAI's
  }
}

export const token = {
  get value() {
    try {
      return sessionStorage.getItem("token");
    } catch {
      return this.own; // a browser that keeps nothing
    }
  },
  set value(text) {
    this.own = text;
    try {
      sessionStorage.setItem("token", text);
    } catch {
      // `own` has it until the page is left
    }
  },
  own: null,
};

/** The response, if its status is good. Throws Failure in words for the reader; AbortError passes. */
export async function ask(path, body, signal) {
  let response;
  try {
    response = await fetch(path, {
      method: body ? "POST" : "GET",
      headers: { "Content-Type": "application/json", ...(token.value && { Authorization: `Bearer ${token.value}` }) },
      body: body && JSON.stringify(body),
      signal,
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure(`No answer from ${location.host}. Is the server still running, and can this machine reach it?`);
  }
  if (response.ok) return response;
  const said = (await response.json().catch(() => null)) ?? {};
  const reason = said.error?.message ?? said.message ?? response.statusText;
  const wait = response.headers.get("Retry-After");
  const meaning = {
    401: "The server wants a token, or does not know this one",
    413: "Too long for the server",
    429: "The server is busy" + (wait ? `; it asks to wait ${wait} s` : ""),
    503: "The server is not ready" + (wait ? `; it asks to wait ${wait} s` : ""),
  }[response.status];
  const words = (meaning ?? `The server refused (${response.status})`) + (reason ? `: ${reason}` : ".");
  throw new Failure(words, response.status, said.error?.code);
}

/** The JSON of an answer. Throws Failure where it is something else, such as the page of a proxy. */
export async function askJson(path, body) {
  const response = await ask(path, body);
  try {
    return await response.json();
  } catch {
    throw new Failure(`${location.host} answered ${path} with something that is not JSON. Is a proxy in between?`);
  }
}

/** The JSON events of a streamed answer. Throws Failure if it breaks off before its end. */
export async function* events(response) {
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
    if (piece.done) throw new Failure("The connection broke before the end: what came is incomplete.");
    const lines = (rest + piece.value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      yield parsed(data);
    }
  }
}

function parsed(data) {
  let event;
  try {
    event = JSON.parse(data);
  } catch {
    throw new Failure("The answer has something in it that is not JSON: what came is incomplete.");
  }
  if (event.error) throw new Failure(`The server stopped: ${event.error.message}`);
  return event;
}

/** Asks the reader for the token, then goes on. */
export function wantToken(then) {
  $("token").hidden = false;
  $("token").querySelector("label").textContent = token.value
    ? "The server does not know this token. Another one:"
    : "This server wants a bearer token. It is kept until this tab is closed:";
  $("token-value").focus();
  $("token").onsubmit = (event) => {
    event.preventDefault();
    token.value = $("token-value").value;
    $("token-value").value = "";
    $("token").hidden = true;
    then();
  };
}
