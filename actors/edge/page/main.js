// Start of the page: what the server is and takes, whether it is ready, and which view is shown.

import { Chat } from "./chat.js";
import { byId } from "./dom.js";
import { forget, notice } from "./notices.js";
import { Server } from "./server.js";
import { Settings } from "./settings.js";
import { StatsView } from "./stats.js";
import { startViewer } from "./tiles.js";

const AGAIN_MS = 2_000; // between two looks at a server that is not ready
const VIEWS = ["chat", "stats"];

class Page {
  #server = new Server();
  #settings;
  #stats;
  #config = null;
  #timer = 0;
  #looking = false;

  constructor() {
    this.#settings = new Settings((key) => {
      this.#server.key = key;
      if (this.#config) this.#askModels();
    });
    this.#stats = new StatsView(this.#server, (error) => this.#trouble(error));
    addEventListener("hashchange", () => this.#route());
    this.#route();
    startViewer();
  }

  /** Until the server has said what it takes there is nothing to do but ask again. */
  async start() {
    try {
      this.#config = await this.#server.config();
    } catch (error) {
      this.#showState("bad", error.message);
      setTimeout(() => this.start(), AGAIN_MS);
      return;
    }
    this.#settings.askForKey(this.#config.needs_key);
    byId("version").textContent = `vlmrt ${this.#config.version}`;
    byId("link-note").hidden = this.#config.fetches_urls;
    new Chat(this.#server, this.#settings, this.#config, (error) => this.#trouble(error));
    document.documentElement.dataset.started = "";
    await Promise.all([this.#askModels(), this.#look()]);
  }

  async #askModels() {
    if (this.#config.needs_key && !this.#server.key) {
      this.#wantKey("This server needs an API key.");
      return;
    }
    try {
      const names = (await this.#server.models()).data.map(({ id }) => id);
      this.#settings.offerModels(names);
      byId("model-name").textContent = names[0];
      byId("model-name").title = names.join(", ");
      document.title = `${names[0]} – vlmrt`;
      forget("key");
    } catch (error) {
      this.#trouble(error);
    }
  }

  /** Is the server ready?  Asked until it is. */
  async #look() {
    if (this.#looking) return;
    this.#looking = true;
    clearTimeout(this.#timer);
    if (!(await this.#isReady())) this.#timer = setTimeout(() => this.#look(), AGAIN_MS);
    this.#looking = false;
  }

  async #isReady() {
    try {
      const { ready, down } = await this.#server.health();
      if (ready) {
        this.#showState("good", "ready");
        forget("state");
        if (byId("model").options.length === 0) this.#askModels();
        return true;
      }
      this.#notReady(`The server is not ready: ${down.join(", ")}.`);
    } catch (error) {
      this.#notReady(error.message);
    }
    return false;
  }

  #notReady(message) {
    if (byId("state-text").textContent !== `, ${message}`) {
      notice(`${message} The page asks again until it is.`, { key: "state", kind: "news" });
    }
    this.#showState("busy", message);
  }

  #showState(kind, text) {
    byId("state-dot").className = `dot ${kind}`;
    byId("state-dot").title = text;
    byId("state-text").textContent = `, ${text}`;
  }

  /** A request failed: ask for a key, or look whether the server is still there. */
  #trouble(error) {
    if (error.status === 401) this.#wantKey(error.message);
    else if (error.status === 0 || error.status === 503) this.#look();
  }

  #wantKey(message) {
    this.#settings.askForKey(true);
    notice(message, { key: "key", action: ["Enter the key", () => this.#settings.show(byId("key"))] });
  }

  #route() {
    const asked = location.hash.slice(1);
    const view = VIEWS.includes(asked) ? asked : byId("view-stats").hidden ? "chat" : "stats";
    for (const name of VIEWS) {
      byId(`view-${name}`).hidden = name !== view;
      if (name === view) byId(`link-${name}`).setAttribute("aria-current", "page");
      else byId(`link-${name}`).removeAttribute("aria-current");
    }
    byId("settings-toggle").hidden = byId("new-chat").hidden = view !== "chat";
    if (view !== "chat") this.#settings.open(false);
    this.#stats.open = view === "stats";
  }
}

new Page().start();
