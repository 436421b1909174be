"""What a page looks like to a browser, in numbers: contrasts, sizes of targets, what sticks out or is covered."""

from __future__ import annotations

# Each script returns sentences about what is wrong; `arguments[0]` is a selector of the part that is looked at.
_SEEN = """
const seen = (element) => element.checkVisibility({opacityProperty: true, visibilityProperty: true}) &&
  element.getBoundingClientRect().width > 1 && !element.closest('.skip:not(:focus)');
const named = (element) => element.tagName.toLowerCase() + (element.id && '#' + element.id) +
  (element.className && '.' + element.className) + ' ' + (element.textContent || element.value || '').slice(0, 30);
const within = (css) => [...document.querySelectorAll(`:is(${arguments[0]}) :is(${css})`)].filter(seen);
const CONTROLS = 'button, input, select, textarea, summary, a[href]';
"""

# WCAG 2.2: 1.4.3 for text and placeholders, 1.4.11 for the edges of what can be operated.
CONTRASTS = (
    _SEEN
    + """
const parsed = (text) => {
  const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number);
  return [r, g, b, a];
};
const over = ([r, g, b, a], [R, G, B]) => [r * a + R * (1 - a), g * a + G * (1 - a), b * a + B * (1 - a), 1];
const behind = (element) => {
  if (!element) return [255, 255, 255, 1];
  const own = parsed(getComputedStyle(element).backgroundColor);
  return own[3] === 1 ? own : over(own, behind(element.parentElement));
};
const light = ([r, g, b]) => {
  const [x, y, z] = [r, g, b].map((c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * x + 0.7152 * y + 0.0722 * z;
};
const contrast = (one, other) => {
  const [dark, bright] = [light(over(one, other)), light(other)].sort((a, b) => a - b);
  return (bright + 0.05) / (dark + 0.05);
};
const wrong = [];
const require = (least, ratio, what) => { if (ratio < least) wrong.push(`${ratio.toFixed(2)}: ${what}`); };
for (const element of within('*')) {
  const style = getComputedStyle(element);
  const hasText = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  if (hasText || element.value) require(4.5, contrast(parsed(style.color), behind(element)), named(element));
  if (element.placeholder && !element.value) {
    const { color, opacity } = getComputedStyle(element, '::placeholder');
    const [r, g, b, a] = parsed(color);
    require(4.5, contrast([r, g, b, a * opacity], behind(element)), `placeholder of ${named(element)}`);
  }
  if (element.matches('button, select, textarea, input[type=number]')) {
    const edge = parsed(style.borderTopColor);
    const around = behind(element.parentElement);
    const strongest = Math.max(contrast(edge, around), contrast(behind(element), around));
    require(3, strongest, `edge of ${named(element)}`);
  }
}
return wrong;
"""
)

SMALL_TARGETS = (
    _SEEN
    + """
return within(CONTROLS)
  .map((element) => [element.getBoundingClientRect(), element])
  .filter(([{ width, height }]) => Math.min(width, height) < 44)
  .map(([{ width, height }, element]) => `${width} x ${height}: ${named(element)}`);
"""
)

STICKS_OUT = (
    _SEEN
    + """
const wrong = within('*')
  .filter((element) => !element.closest('.unseen'))
  .filter((element) => element.getBoundingClientRect().right > innerWidth + 0.5)
  .map((element) => `beyond the right edge: ${named(element)}`);
const wide = document.documentElement.scrollWidth;
if (wide > innerWidth) wrong.push(`the page is ${wide} wide, the window ${innerWidth}`);
return wrong;
"""
)

COVERED = (
    _SEEN
    + """
return within(CONTROLS).filter((element) => {
  element.scrollIntoView({ block: 'nearest', behavior: 'instant' });
  const { left, top, width, height } = element.getBoundingClientRect();
  const hit = document.elementFromPoint(left + width / 2, top + height / 2);
  return !hit || !(element.contains(hit) || hit.contains(element) && hit.tagName === 'LABEL');
}).map(named);
"""
)
