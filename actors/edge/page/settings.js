// The settings panel: what the next answer is asked for with.  Kept in this tab only, as is the API key.

import { byId, element } from "./dom.js";

const STORED = "vlmrt-settings";
const STORED_KEY = "vlmrt-key";
const NUMBERS = [
  "temperature",
  "top_p",
  "max_tokens",
  "seed",
  "top_k",
  "min_p",
  "repetition_penalty",
  "frequency_penalty",
  "presence_penalty",
];
const TEXTS = ["model", "system", "stop_texts", "detail", "frames_by", "fps", "num_frames"];
const MAX_STOPS = 16;

/** A field that holds what the server would refuse. */
export class WrongSetting extends Error {
  constructor(field, message) {
    super(message);
    this.field = field;
  }
}

export class Settings {
  #panel = byId("settings");
  #toggle = byId("settings-toggle");
  #form = byId("settings-form");
  #narrow = matchMedia("(max-width: 900px)");

  /** onKey(key) is called with every new API key, also with one from before a reload. */
  constructor(onKey) {
    this.#toggle.addEventListener("click", () => this.open(this.#panel.hidden));
    byId("settings-close").addEventListener("click", () => this.open(false));
    this.#panel.addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      event.preventDefault(); // it is not meant for an answer that is being written
      this.open(false);
    });
    this.#narrow.addEventListener("change", () => this.#cover());
    this.#form.addEventListener("submit", (event) => event.preventDefault());
    this.#form.addEventListener("input", () => this.#changed());
    byId("settings-reset").addEventListener("click", () => this.#reset());
    byId("key").addEventListener("change", () => {
      store(STORED_KEY, byId("key").value.trim());
      onKey(byId("key").value.trim());
    });
    this.#restore();
    byId("key").value = stored(STORED_KEY);
    onKey(byId("key").value);
  }

  /** Offer these names, and ask for a key where the server wants one. */
  offerModels(names) {
    const wanted = byId("model").value || this.wantedModel;
    byId("model").replaceChildren(...names.map((name) => element("option", { value: name, text: name })));
    if (names.includes(wanted)) byId("model").value = wanted;
  }

  askForKey(needed) {
    byId("key-field").hidden = !needed;
  }

  /** Open the panel at a field. */
  show(field = null) {
    this.open(true);
    field?.closest("details")?.setAttribute("open", "");
    field?.focus();
  }

  open(opened) {
    if (opened === !this.#panel.hidden) return;
    const hadFocus = this.#panel.contains(document.activeElement);
    this.#panel.hidden = !opened;
    this.#toggle.setAttribute("aria-expanded", String(opened));
    this.#cover();
    if (opened) byId("settings-close").focus();
    else if (hadFocus) this.#toggle.focus();
  }

  /** What to send: fields that were left out are left out.  Throws WrongSetting. */
  values() {
    const values = {};
    for (const name of NUMBERS) {
      const field = byId(name);
      if (field.value !== "" || !field.checkValidity()) values[name] = this.#number(name);
    }
    const frames = byId("frames_by").value;
    if (frames) values[frames] = this.#number(frames);
    const stops = byId("stop_texts").value.split("\n").filter((line) => line !== "");
    if (stops.length > MAX_STOPS) throw new WrongSetting(byId("stop_texts"), `Stop texts: at most ${MAX_STOPS}.`);
    if (stops.length) values.stop = stops;
    for (const name of ["model", "detail"]) if (byId(name).value) values[name] = byId(name).value;
    if (byId("system").value.trim()) values.system = byId("system").value;
    return values;
  }

  #number(name) {
    const field = byId(name);
    if (field.value === "" || !field.checkValidity()) {
      const wrong = field.validationMessage || "a number is needed.";
      throw new WrongSetting(field, `${field.labels[0].textContent}: ${wrong}`);
    }
    return Number(field.value);
  }

  #changed() {
    for (const field of this.#form.querySelectorAll("input[type=number]")) {
      field.setAttribute("aria-invalid", String(!field.checkValidity()));
    }
    this.#showFrames();
    const kept = Object.fromEntries([...NUMBERS, ...TEXTS].map((name) => [name, byId(name).value]));
    store(STORED, JSON.stringify(kept));
  }

  #showFrames() {
    for (const name of ["fps", "num_frames"]) byId(`${name}-field`).hidden = byId("frames_by").value !== name;
  }

  #restore() {
    let kept = {};
    try {
      kept = JSON.parse(stored(STORED) || "{}");
    } catch {
      return; // of another version of the page
    }
    for (const name of [...NUMBERS, ...TEXTS]) {
      if (typeof kept[name] === "string" && name !== "model") byId(name).value = kept[name];
    }
    this.wantedModel = kept.model ?? "";
    this.#showFrames();
  }

  #reset() {
    const [key, model] = [byId("key").value, byId("model").value];
    this.#form.reset();
    byId("key").value = key;
    byId("model").value = model;
    this.#changed();
  }

  /** On a small screen the panel covers the rest, which then cannot be reached. */
  #cover() {
    const covers = !this.#panel.hidden && this.#narrow.matches;
    for (const id of ["view-chat", "view-stats"]) byId(id).inert = covers;
  }
}

function stored(name) {
  try {
    return sessionStorage.getItem(name) ?? "";
  } catch {
    return ""; // the browser keeps nothing
  }
}

function store(name, value) {
  try {
    if (value) sessionStorage.setItem(name, value);
    else sessionStorage.removeItem(name);
  } catch {
    // the browser keeps nothing: it lasts until the next reload
  }
}
