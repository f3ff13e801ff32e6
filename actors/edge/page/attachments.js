// Pictures and clips of a message: read from files or named by address, within what the server takes.

import { bytes, count } from "./numbers.js";

const MIB = 2 ** 20;
const REQUEST_MARGIN = 64 * 1024; // of a body, for its text
const VIDEO_ENDINGS = /\.(mp4|m4v|mov|mkv|webm|avi|ts|mpe?g|flv|og[gv]|asf|wmv)$/i;
const IMAGE_ENDINGS = /\.(jpe?g|png|webp|gif|bmp|tiff?)$/i;

/** A file or address that is not taken; the message is to be shown. */
export class Refused extends Error {}

/**
 * {kind: "image" | "video", url, name, size, preview}: the url goes to the server, `preview` is shown and is null for
 * what the page must not fetch itself.
 */
export async function readFile(file) {
  const kind = kindOf(file);
  if (kind === null) throw new Refused(`“${file.name}” is neither a picture nor a clip.`);
  if (file.size === 0) throw new Refused(`“${file.name}” is empty.`);
  const url = await dataUrl(file, kind);
  return { kind, url, name: file.name || nameless(kind), size: file.size, preview: URL.createObjectURL(file) };
}

/** Raises Refused before the file is read if it cannot fit. */
export function checkFile(file, limits) {
  const kind = kindOf(file);
  const sent = Math.ceil(file.size / 3) * 4;
  const room = limits.max_body_mib * MIB - REQUEST_MARGIN;
  if (kind === "video" && file.size > limits.max_video_mib * MIB) {
    throw new Refused(`“${file.name}” has ${bytes(file.size)}; a clip may have ${limits.max_video_mib} MiB here.`);
  }
  if (sent > room) {
    throw new Refused(
      `“${file.name}” has ${bytes(file.size)}, ${bytes(sent)} as it is sent; ` +
        `a request may have ${limits.max_body_mib} MiB here.`,
    );
  }
}

/** Raises Refused if a request with all of these is more than the server takes. */
export function checkTogether(attachments, limits) {
  const images = attachments.filter(({ kind }) => kind === "image").length;
  const videos = attachments.length - images;
  if (images > limits.limit_images) {
    throw new Refused(`A conversation may hold ${count(limits.limit_images, "picture")} here, not ${images}.`);
  }
  if (videos > limits.limit_videos) {
    throw new Refused(`A conversation may hold ${count(limits.limit_videos, "clip")} here, not ${videos}.`);
  }
  const sent = attachments.reduce((sum, { url }) => sum + url.length, 0);
  if (sent > limits.max_body_mib * MIB - REQUEST_MARGIN) {
    throw new Refused(
      `All pictures and clips of the conversation together are ${bytes(sent)} as they are sent; ` +
        `a request may have ${limits.max_body_mib} MiB here. Begin a new chat, or remove some.`,
    );
  }
}

/** What the server shall fetch by itself; the page does not. */
export function fromAddress(text, kind) {
  let url;
  try {
    url = new URL(text);
  } catch {
    throw new Refused("That is no complete address; it begins with https://, for one.");
  }
  if (!["http:", "https:", "file:", "data:"].includes(url.protocol)) {
    throw new Refused(`The server fetches from http, https and file addresses, not from ${url.protocol}`);
  }
  const name = url.protocol === "data:" ? nameless(kind) : url.host + url.pathname;
  return { kind, url: text, name, size: null, preview: null };
}

/** "image" or "video" by the ending of an address, or null. */
export function kindOfAddress(text) {
  const path = text.split(/[?#]/, 1)[0];
  if (VIDEO_ENDINGS.test(path)) return "video";
  return IMAGE_ENDINGS.test(path) ? "image" : null;
}

/** Give the previews' memory back. */
export function release(attachments) {
  for (const { preview } of attachments) if (preview !== null) URL.revokeObjectURL(preview);
}

function kindOf(file) {
  if (file.type.startsWith("image/")) return "image";
  if (file.type.startsWith("video/")) return "video";
  return file.type === "" || file.type === "application/octet-stream" ? kindOfAddress(file.name) : null;
}

function nameless(kind) {
  return kind === "image" ? "picture" : "clip";
}

function dataUrl(file, kind) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => {
      const encoded = reader.result.slice(reader.result.indexOf(",") + 1);
      resolve(`data:${file.type || `${kind}/*`};base64,${encoded}`);
    });
    reader.addEventListener("error", () => reject(new Refused(`“${file.name}” cannot be read.`)));
    reader.readAsDataURL(file);
  });
}
