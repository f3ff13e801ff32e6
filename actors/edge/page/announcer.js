// What a screen reader says by itself: that an answer is on its way, and the answer once it is whole.

import { byId } from "./dom.js";

const MAX_CHARS = 3_000;

export function announce(text) {
  const spoken = text.length > MAX_CHARS ? `${text.slice(0, MAX_CHARS)}… The rest is in the conversation.` : text;
  const announcer = byId("announcer");
  announcer.textContent = announcer.textContent === spoken ? `${spoken}\u00a0` : spoken; // the same again is news too
}
