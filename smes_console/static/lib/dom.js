// Elements without markup in strings: what comes from outside is only ever text.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  const given = (child) => child !== null && child !== undefined && child !== false;
  element.append(...children.flat(Infinity).filter(given));
  return element;
}

// h("p", {class: "quiet", onclick: f}, "text", otherElement)
export const h = (name, attributes, ...children) => fill(document.createElement(name), attributes, children);

// The same for SVG.
export const s = (name, attributes, ...children) => fill(document.createElementNS(SVG, name), attributes, children);

// Sets an element's text and its exact value, if they have changed. Browser tests read `data-value`.
export function show(element, text, value) {
  if (element.textContent !== text) element.textContent = text;
  const exact = value === null || value === undefined ? "" : String(value);
  if (element.getAttribute("data-value") !== exact) element.setAttribute("data-value", exact);
}

// An element that shows a figure of the report: data-figure="events.trained".
export function figure(name, text = "–", value = null, attributes = {}) {
  const element = h("span", { "data-figure": name, ...attributes });
  show(element, text, value);
  return element;
}

// Replaces what is in an element, if it would look otherwise: what has the focus or is read aloud stays.
export function replaceIfOther(element, children) {
  const now = children.map((child) => child.outerHTML ?? child).join("|");
  if (element.dataset.shown === now) return;
  element.dataset.shown = now;
  element.replaceChildren(...children);
}
