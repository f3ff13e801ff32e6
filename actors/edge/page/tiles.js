// Pictures and clips as small tiles, in the message box and in the conversation.

import { byId, element, icon, iconButton } from "./dom.js";
import { bytes } from "./numbers.js";

/** A list item that shows an attachment; with onRemove it can be taken away, else a clip can be played. */
export function tile(attachment, onRemove = null) {
  const item = element("li", { class: "tile" }, face(attachment, onRemove === null));
  if (onRemove) {
    const remove = iconButton("close", `Remove ${attachment.name}`, () => onRemove(attachment));
    remove.classList.add("remove");
    item.append(remove);
  }
  return item;
}

function face(attachment, playable) {
  const { kind, preview, name } = attachment;
  if (preview === null) return plate(attachment);
  const shown = kind === "image" ? picture(attachment) : clip(attachment, playable);
  const media = kind === "image" ? shown.querySelector("img") : shown;
  media.addEventListener("error", () => shown.replaceWith(plate(attachment)), { once: true });
  shown.title = name;
  return shown;
}

function picture(attachment) {
  const image = element("img", { src: attachment.preview, alt: attachment.name, draggable: "false" });
  const label = `Enlarge ${attachment.name}`;
  const on = { click: () => enlarge(attachment) };
  return element("button", { type: "button", class: "face", "aria-label": label, on }, image);
}

function clip({ preview, name }, controls) {
  return element("video", { class: "face", src: preview, preload: "metadata", controls, "aria-label": name });
}

/** For what has no preview: only the server fetches it, or the browser cannot show it. */
function plate({ kind, name, size }) {
  return element(
    "span",
    { class: "face plate", title: name },
    icon(kind === "image" ? "link" : "clip"),
    element("span", { class: "plate-name", text: name }),
    element("span", { class: "note", text: size === null ? "by address" : bytes(size) }),
  );
}

function enlarge({ preview, name }) {
  const image = byId("viewer-picture");
  image.src = preview;
  image.alt = name;
  byId("viewer").showModal();
}

/** Make the enlarged picture closable by its button, and by a click beside it. */
export function startViewer() {
  const viewer = byId("viewer");
  byId("viewer-close").addEventListener("click", () => viewer.close());
  viewer.addEventListener("click", (event) => {
    if (event.target === viewer) viewer.close();
  });
}
