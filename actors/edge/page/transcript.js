// The conversation on the page.  Text that streams in is drawn once a frame, however many tokens came.

import { byId, element, icon, iconButton } from "./dom.js";
import { count, duration, rate, whole } from "./numbers.js";
import { Prose } from "./prose.js";
import { tile } from "./tiles.js";

const ENDINGS = { stopped: "Stopped.", cut: "Cut off: the limit of tokens was reached." };
const NEAR_END_PX = 60; // a reader who is this near to the end follows it

export class Transcript {
  #actions;
  #box = byId("transcript");
  #turns = byId("turns");
  #latest = byId("latest");
  #follows = true;

  /** `actions`: {copy(text, button), edit(turn), regenerate(turn)}. */
  constructor(actions) {
    this.#actions = actions;
    this.#box.addEventListener("scroll", () => this.#look(), { passive: true });
    this.#latest.addEventListener("click", () => {
      this.toEnd();
      byId("message").focus();
    });
    const resized = new ResizeObserver(() => this.#stay());
    for (const box of [this.#turns, this.#box]) resized.observe(box);
  }

  /** Show these turns and nothing else; none may be running. */
  show(turns) {
    this.#turns.replaceChildren();
    for (const turn of turns) {
      if (turn.role === "user") this.addQuestion(turn);
      else this.addAnswer(turn).finish();
    }
    byId("welcome").hidden = turns.length > 0;
  }

  addQuestion(turn) {
    byId("welcome").hidden = true;
    const article = element("article", { class: "turn question" }, hidden("h2", "You"));
    if (turn.attachments.length) {
      const tiles = turn.attachments.map((attachment) => tile(attachment));
      article.append(element("ul", { class: "tiles", "aria-label": "Attached" }, ...tiles));
    }
    const edit = iconButton("edit", "Edit this message", () => this.#actions.edit(turn));
    const said = turn.text ? [element("p", { class: "said", text: turn.text })] : [];
    article.append(element("div", { class: "asked" }, edit, ...said));
    this.#turns.append(article);
    this.toEnd();
  }

  addAnswer(turn) {
    byId("welcome").hidden = true;
    const shown = new ShownAnswer(turn, this.#actions);
    this.#turns.append(shown.article);
    this.toEnd();
    return shown;
  }

  toEnd() {
    this.#follows = true;
    this.#stay();
  }

  #stay() {
    if (this.#follows) this.#box.scrollTop = this.#box.scrollHeight;
    this.#look();
  }

  #look() {
    const left = this.#box.scrollHeight - this.#box.scrollTop - this.#box.clientHeight;
    this.#follows = left < NEAR_END_PX;
    this.#latest.hidden = this.#follows;
  }
}

class ShownAnswer {
  #turn;
  #actions;
  #prose;
  #body = element("div", { class: "prose" });
  #foot = element("div", { class: "turn-foot" });
  #waiting = element("p", { class: "waiting" }, hidden("span", "Waiting for the first token"));
  #drawn = 0; // characters of the turn's text
  #frame = 0;

  constructor(turn, actions) {
    this.#turn = turn;
    this.#actions = actions;
    this.#prose = new Prose(this.#body, actions.copy);
    this.#waiting.append(...[0, 1, 2].map(() => element("span", { class: "beat", "aria-hidden": "true" })));
    this.article = element(
      "article",
      { class: "turn answer", "aria-busy": "true" },
      hidden("h2", "Answer"),
      this.#body,
      this.#waiting,
      this.#foot,
    );
  }

  /** The turn has more text, or newer figures. */
  update() {
    if (this.#frame === 0) this.#frame = requestAnimationFrame(() => this.#draw());
  }

  /** The turn has ended: draw the rest now, and what one can do with it. */
  finish() {
    this.#draw();
    this.#prose.end();
    this.#waiting.remove();
    this.article.setAttribute("aria-busy", "false");
    const { state, failure, text } = this.#turn;
    if (failure) this.#body.after(failed(failure));
    if (ENDINGS[state]) this.#body.after(element("p", { class: "ending", text: ENDINGS[state] }));
    const copy = (event) => this.#actions.copy(text, event.currentTarget);
    if (text) this.#foot.append(iconButton("copy", "Copy this answer", copy));
    const again = () => this.#actions.regenerate(this.#turn);
    const label = failure ? "Try again" : "Regenerate";
    this.#foot.append(iconButton("again", label, again, Boolean(failure)));
  }

  #draw() {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    const { text, figures } = this.#turn;
    if (text.length > this.#drawn) {
      this.#waiting.hidden = true;
      this.#prose.append(text.slice(this.#drawn));
      this.#drawn = text.length;
    }
    if (figures) this.#drawFigures(figures);
  }

  #drawFigures(figures) {
    if (this.#foot.firstElementChild?.className !== "figures") this.#foot.prepend(element("p", { class: "figures" }));
    this.#foot.firstElementChild.textContent = figuresText(figures);
  }
}

/** {ttftS, tokens, tokensPerS, promptTokens, cachedTokens}; what is not known is null. */
export function figuresText({ ttftS, tokens, tokensPerS, promptTokens, cachedTokens }) {
  const pieces = [];
  if (ttftS !== null) pieces.push(`TTFT ${duration(ttftS)}`);
  if (tokensPerS !== null) pieces.push(`${rate(tokensPerS)} tokens/s`);
  if (tokens !== null) pieces.push(count(tokens, "token"));
  if (promptTokens !== null) {
    pieces.push(`prompt ${whole(promptTokens)}${cachedTokens ? ` (${whole(cachedTokens)} cached)` : ""}`);
  }
  return pieces.join(" · ");
}

function hidden(tag, text) {
  return element(tag, { class: "visually-hidden", text });
}

function failed({ message, status, code, requestId }) {
  const facts = [status > 200 ? `HTTP ${status}` : "", code, requestId ? `request ${requestId}` : ""].filter(Boolean);
  const box = element("div", { class: "failure" }, icon("close"), element("p", { text: message }));
  if (facts.length) box.append(element("p", { class: "note", text: facts.join(" · ") }));
  return box;
}
