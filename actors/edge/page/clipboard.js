// Text onto the clipboard, also where the page came by plain http from another machine.

import { announce } from "./announcer.js";
import { element } from "./dom.js";
import { notice } from "./notices.js";

const SHOWN_MS = 1_500;

/** `button` shows for a moment that it worked. */
export async function copy(text, button) {
  if (await copied(text)) {
    announce("Copied.");
    button.classList.add("done");
    setTimeout(() => button.classList.remove("done"), SHOWN_MS);
  } else notice("The browser does not let the page copy. Select the text instead.", { key: "copy" });
}

async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copiedBySelection(text); // no clipboard outside of https and localhost
  }
}

function copiedBySelection(text) {
  const focused = document.activeElement;
  const area = element("textarea", { class: "visually-hidden", "aria-hidden": "true" });
  area.value = text;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  focused?.focus();
  return done;
}
