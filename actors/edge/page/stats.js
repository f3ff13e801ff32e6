// The stats view: GET /stats every two seconds, but only while somebody looks at it.

import { Bar, Sparkline } from "./charts.js";
import { byId, element } from "./dom.js";
import { bytes, count, duration, percent, rate, whole } from "./numbers.js";

const PERIOD_MS = 2_000;
const NUM_POINTS = 90; // three minutes
const NOTHING = "–";
const PROCESS_COLUMNS = ["", "state", "device", "pid", "restarts", "memory", "GPU memory", "queue", "heartbeat"];
const LAST_FIGURES = " The figures below are the last ones.";
const STATES = { ready: "good", starting: "busy", restarting: "busy", failed: "bad" };

export class StatsView {
  #server;
  #onTrouble;
  #root = byId("view-stats");
  #state = element("p", { class: "service-state", role: "status" });
  #facts = element("p", { class: "note" });
  #failure = element("p", { class: "failure", role: "alert", hidden: true });
  #cards = {};
  #latencies = element("tbody");
  #actors = element("tbody");
  #period = element("span");
  #timer = 0;
  #open = false;
  #round = 0; // of the last question asked; answers to earlier ones come too late

  constructor(server, onTrouble) {
    this.#server = server;
    this.#onTrouble = onTrouble;
    this.#build();
    document.addEventListener("visibilitychange", () => this.#run());
  }

  set open(open) {
    this.#open = open;
    this.#run();
  }

  #run() {
    clearTimeout(this.#timer);
    this.#round += 1;
    if (this.#open && !document.hidden) this.#ask(this.#round);
  }

  async #ask(round) {
    let failure = null;
    let stats = null;
    try {
      stats = await this.#server.stats();
    } catch (error) {
      failure = error;
    }
    if (round !== this.#round) return;
    if (stats) this.#show(stats);
    else this.#onTrouble(failure);
    this.#failure.hidden = failure === null;
    if (failure?.status === 401) {
      this.#failure.textContent = `${failure.message}; enter it in the settings of the chat.`;
      return; // asking again would give the same answer
    }
    if (failure) this.#failure.textContent = failure.message + (this.#facts.textContent ? LAST_FIGURES : "");
    this.#timer = setTimeout(() => this.#ask(round), PERIOD_MS);
  }

  #build() {
    const card = (name, title, note, chart) => {
      const figure = element("dd", { class: "figure", text: NOTHING });
      const aside = element("dd", { class: "note", text: note });
      this.#cards[name] = { figure, aside, chart };
      return element("div", { class: "card" }, element("dt", { text: title }), figure, aside, chart.element);
    };
    this.#root.append(
      element("div", { class: "stats-head" }, element("h2", { text: "This server" }), this.#state, this.#facts),
      this.#failure,
      element(
        "dl",
        { class: "cards" },
        card("running", "Running", "", new Sparkline(NUM_POINTS)),
        card("tokens", "Generated tokens/s", "", new Sparkline(NUM_POINTS)),
        card("prompt", "Prompt tokens/s", "", new Sparkline(NUM_POINTS)),
        card("images", "Pictures/s", "", new Sparkline(NUM_POINTS)),
        card("kv", "KV cache", "", new Bar()),
        card("embeds", "Picture cache", "", new Bar()),
      ),
      element("h3", { text: "Latency" }, " ", this.#period),
      table("Latency", ["", "count", "mean", "p50", "p90", "p99"], this.#latencies),
      element("h3", { text: "Processes" }),
      table("Processes", PROCESS_COLUMNS, this.#actors),
    );
  }

  #show(stats) {
    this.#showState(stats);
    this.#showCards(stats);
    const { recent } = stats;
    this.#period.textContent = `of the last ${Math.round(recent.period_s)} s`;
    this.#latencies.replaceChildren(
      latencyRow("To the first token", recent.time_to_first_token),
      latencyRow("Between tokens", recent.inter_token),
      latencyRow("Whole answer", recent.end_to_end),
    );
    this.#actors.replaceChildren(...stats.actors.map(actorRow));
  }

  #showState({ ready, draining, uptime_s, requests }) {
    const word = draining ? "draining" : ready ? "ready" : "not ready";
    const { succeeded, failed, aborted } = requests;
    const done = `${whole(succeeded)} answered, ${whole(failed)} failed, ${whole(aborted)} given up`;
    // as a status it is read out, so it only changes when the word does
    if (this.#state.dataset.word !== word) {
      this.#state.dataset.word = word;
      const dot = element("span", { class: `dot ${ready && !draining ? "good" : "busy"}`, "aria-hidden": "true" });
      this.#state.replaceChildren(dot, element("span", { text: word }));
    }
    this.#facts.textContent = `up ${duration(uptime_s)} · ${done}`;
  }

  #showCards({ requests, rates, prefix_cache, embedding_cache }) {
    this.#card("running", whole(requests.running), `${whole(requests.waiting)} waiting`, requests.running);
    this.#rateCard("tokens", rates, rates.generation_tokens_per_s);
    this.#rateCard("prompt", rates, rates.prompt_tokens_per_s);
    this.#rateCard("images", rates, rates.images_per_s);
    this.#cacheCard("kv", prefix_cache, "token");
    this.#cacheCard("embeds", embedding_cache, "picture");
  }

  #rateCard(name, { period_s }, value) {
    const known = period_s > 0;
    this.#card(name, rate(value), known ? `over ${Math.round(period_s)} s` : "not known yet", known ? value : null);
  }

  #cacheCard(name, cache, what) {
    this.#card(name, percent(cache.usage), `in use · ${hits(cache, what)}`, cache.usage);
  }

  #card(name, figure, note, value) {
    const card = this.#cards[name];
    card.figure.textContent = figure;
    card.aside.textContent = note;
    if (card.chart instanceof Bar) card.chart.show(value);
    else card.chart.push(value);
  }
}

function hits({ queries, hits: found, host_hits }, what) {
  return queries ? `${percent((found + host_hits) / queries)} of ${count(queries, what)} found` : "not asked yet";
}

function latencyRow(name, { count: number, mean_s, p50_s, p90_s, p99_s }) {
  const times = [mean_s, p50_s, p90_s, p99_s].map((time) => (time === null ? NOTHING : duration(time)));
  return row(name, [whole(number), ...times]);
}

function actorRow(stats) {
  const dot = element("span", { class: `dot ${STATES[stats.state] ?? "busy"}`, "aria-hidden": "true" });
  return row(stats.actor, [
    element("span", { class: "badge" }, dot, stats.state),
    stats.device,
    stats.pid || NOTHING,
    whole(stats.restarts),
    stats.resident_bytes ? bytes(stats.resident_bytes) : NOTHING,
    stats.device_bytes ? bytes(stats.device_bytes) : NOTHING,
    whole(stats.mailbox_depth),
    `${duration(stats.heartbeat_age_s)} ago`,
  ]);
}

function row(name, cells) {
  const shown = cells.map((cell) => element("td", {}, cell));
  return element("tr", {}, element("th", { scope: "row", text: name }), ...shown);
}

/** A table that scrolls by itself where the screen is narrow. */
function table(name, columns, body) {
  const head = (text) => element("th", { scope: "col", class: text === "state" ? "left" : null, text });
  const heads = columns.map((column) => (column ? head(column) : element("td")));
  return element(
    "div",
    { class: "table-box", tabindex: "0", role: "region", "aria-label": name },
    element("table", {}, element("thead", {}, element("tr", {}, ...heads)), body),
  );
}
