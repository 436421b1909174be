// What every part of the page is made with. Everything that a model or a server writes becomes a text node: the page's
// Content-Security-Policy requires Trusted Types and allows no policy, so that a forgotten innerHTML would throw.

export const $ = (id) => document.getElementById(id);
export const narrow = matchMedia("(max-width: 60rem)"); // as in the style sheet: settings above the conversation

export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

export function button(text, onclick, properties = {}) {
  return element("button", { type: "button", className: "quiet", textContent: text, onclick, ...properties });
}

/** For those who do not see the page: said once, when there is time. */
export function announce(text) {
  $("status").textContent = text;
}

/** A message in a place of the page that is for it, with buttons; null takes it away. */
export function tell(place, text, ...buttons) {
  place.hidden = text === null;
  place.replaceChildren(...(text === null ? [] : [element("p", { textContent: text }), ...buttons]));
  if (text !== null) place.scrollIntoView({ block: "nearest" });
}

/** Shows one control in the place of another, and leaves the focus in that place. */
export function swap(from, to) {
  const hadFocus = document.activeElement === from;
  from.hidden = true;
  to.hidden = false;
  if (hadFocus) to.focus();
}

/** Changes the page, and keeps the end of the conversation in view if it was. */
export function follow(change) {
  const box = getComputedStyle($("thread")).overflowY === "auto" ? $("thread") : document.scrollingElement;
  const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
  change();
  if (atEnd) box.scrollTop = box.scrollHeight;
}
