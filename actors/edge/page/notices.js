// Short messages above the message box: what went wrong, and what can be done about it.

import { byId, element, iconButton } from "./dom.js";

const MAX_NOTICES = 3;

/**
 * Show a message until it is dismissed, replaced by one with the same `key`, or too old among others.
 *
 * `action` is [label, function]; returns a function that takes the message away.
 */
export function notice(text, { key = "", kind = "problem", action = null, onDismiss = () => {} } = {}) {
  const box = byId("notices");
  const shown = element("div", { class: `notice ${kind}`, "data-key": key }, element("p", { text }));
  const dismiss = () => {
    const hadFocus = shown.contains(document.activeElement);
    shown.remove();
    if (hadFocus) byId("message").focus();
  };
  if (action) {
    const [label, act] = action;
    const click = () => (dismiss(), act());
    shown.append(element("button", { type: "button", class: "plain", text: label, on: { click } }));
  }
  shown.append(iconButton("close", "Dismiss", () => (dismiss(), onDismiss())));
  if (key) forget(key);
  box.append(shown);
  while (box.children.length > MAX_NOTICES) box.firstElementChild.remove();
  return dismiss;
}

/** Take away the message with this key, if it is there. */
export function forget(key) {
  for (const old of [...byId("notices").children]) if (old.dataset.key === key) old.remove();
}
