// DOM nodes made from plain values.  Text is always text: nothing here reads HTML.

const SVG = "http://www.w3.org/2000/svg";

/** The element of the page with this id. */
export function byId(id) {
  const found = document.getElementById(id);
  if (found === null) throw new Error(`the page has no #${id}`);
  return found;
}

/** An element; `attributes` may hold `class`, `text`, `on` (listeners by event) and any attribute by its name. */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  const { text, on = {}, ...rest } = attributes;
  for (const [name, value] of Object.entries(rest)) {
    if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value);
  }
  for (const [event, listener] of Object.entries(on)) made.addEventListener(event, listener);
  if (text !== undefined) made.textContent = text;
  made.append(...children);
  return made;
}

/** An SVG element with these attributes. */
export function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** One of the icons that index.html defines; it says nothing to a screen reader. */
export function icon(name) {
  return svg("svg", { class: "icon", "aria-hidden": "true" }, svg("use", { href: `#icon-${name}` }));
}

/** A button with an icon; `label` is its name, shown beside the icon only if `shown`. */
export function iconButton(name, label, onClick, shown = false) {
  const attributes = { type: "button", class: shown ? "quiet" : "quiet round", on: { click: onClick } };
  if (shown) return element("button", attributes, icon(name), element("span", { text: label }));
  return element("button", { ...attributes, "aria-label": label, title: label }, icon(name));
}
