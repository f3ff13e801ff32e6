// Asking and answering: ties the conversation, the message box, the transcript and the server together.

import { announce } from "./announcer.js";
import { checkTogether, Refused, release } from "./attachments.js";
import { copy } from "./clipboard.js";
import { Composer } from "./composer.js";
import { Conversation, chatRequest } from "./conversation.js";
import { byId } from "./dom.js";
import { forget, notice } from "./notices.js";
import { bytes } from "./numbers.js";
import { ServerError, Stopped } from "./server.js";
import { WrongSetting } from "./settings.js";
import { Transcript } from "./transcript.js";

const MIB = 2 ** 20;
const MIN_WRITING_S = 0.05; // a shorter time says nothing about tokens per second

export class Chat {
  #server;
  #settings;
  #config;
  #onTrouble;
  #conversation = new Conversation();
  #running = null; // the AbortController of the answer that is being written
  #edited = null; // the turn that is being edited
  #cleared = []; // turns that can still be brought back

  /** onTrouble(error) is called with every ServerError. */
  constructor(server, settings, config, onTrouble) {
    this.#server = server;
    this.#settings = settings;
    this.#config = config;
    this.#onTrouble = onTrouble;
    this.transcript = new Transcript({
      copy,
      edit: (turn) => this.#edit(turn),
      regenerate: (turn) => this.#regenerate(turn),
    });
    this.composer = new Composer({
      send: (text, attachments) => this.#send(text, attachments),
      stop: () => this.stop(),
      sent: () => this.#conversation.attachments(this.#kept()),
      holds: (attachment) => this.#conversation.attachments().includes(attachment),
      limits: () => this.#config,
      editCancelled: () => {
        this.#edited = null;
      },
    });
    byId("new-chat").addEventListener("click", () => this.clear());
    for (const starter of document.querySelectorAll(".starter")) {
      starter.addEventListener("click", () => this.composer.suggest(starter.textContent));
    }
  }

  stop() {
    this.#running?.abort(new Stopped());
  }

  /** Begin anew; one click brings the old conversation back. */
  clear() {
    this.stop();
    this.composer.cancelEdit();
    byId("message").focus();
    if (!this.#conversation.turns.length) return;
    this.#forgetCleared();
    this.#cleared = this.#conversation.turns;
    this.#conversation = new Conversation();
    this.transcript.show([]);
    announce("New chat.");
    notice("The conversation is gone.", {
      key: "cleared",
      kind: "news",
      action: ["Bring it back", () => this.#bringBack()],
      onDismiss: () => this.#forgetCleared(),
    });
  }

  #bringBack() {
    this.#conversation.turns = this.#cleared;
    this.#cleared = [];
    this.transcript.show(this.#conversation.turns);
    this.transcript.toEnd();
    byId("message").focus();
  }

  #forgetCleared() {
    forget("cleared");
    release(this.#conversation.attachments(this.#cleared));
    this.#cleared = [];
  }

  /** The turns that the next message comes after. */
  #kept() {
    const { turns } = this.#conversation;
    return this.#edited ? turns.slice(0, turns.indexOf(this.#edited)) : turns;
  }

  /** Returns whether the message was taken. */
  #send(text, attachments) {
    if (this.#running) {
      notice("One answer is still being written. Stop it first, or wait.", { key: "running", kind: "news" });
      return false;
    }
    const body = this.#prepared([...this.#kept(), { role: "user", text, attachments }]);
    if (body === null) return false;
    this.#forgetCleared();
    if (this.#edited) {
      this.#drop(this.#edited, attachments);
      this.#edited = null;
    }
    this.transcript.addQuestion(this.#conversation.ask(text, [...attachments]));
    this.#answer(body);
    return true;
  }

  #edit(turn) {
    this.stop();
    this.#edited = turn;
    this.composer.edit(turn);
  }

  #regenerate(turn) {
    this.stop();
    const before = this.#conversation.turns.slice(0, this.#conversation.turns.indexOf(turn));
    const body = this.#prepared(before);
    if (body === null) return;
    this.composer.cancelEdit();
    this.#drop(turn, []);
    byId("message").focus();
    this.#answer(body);
  }

  /** Take this turn and all after it away; previews of `kept` attachments stay. */
  #drop(turn, kept) {
    const dropped = this.#conversation.attachments(this.#conversation.dropFrom(turn));
    release(dropped.filter((attachment) => !kept.includes(attachment)));
    this.transcript.show(this.#conversation.turns);
  }

  /** The body of a request about these turns; null, with a notice, if it would be refused anyway. */
  #prepared(turns) {
    try {
      checkTogether(this.#conversation.attachments(turns), this.#config);
      const body = this.#body(turns);
      forget("settings");
      forget("file");
      return body;
    } catch (error) {
      if (error instanceof WrongSetting) {
        const toField = () => this.#settings.show(error.field);
        notice(error.message, { key: "settings", action: ["Change it", toField] });
      } else if (error instanceof Refused) notice(error.message, { key: "file" });
      else throw error;
      return null;
    }
  }

  #body(turns) {
    const body = new Blob([JSON.stringify(chatRequest(turns, this.#settings.values()))], { type: "application/json" });
    if (body.size > this.#config.max_body_mib * MIB) {
      const limit = `a request may have ${this.#config.max_body_mib} MiB here`;
      throw new Refused(`The conversation has ${bytes(body.size)}; ${limit}. Begin a new chat.`);
    }
    return body;
  }

  async #answer(body) {
    const controller = new AbortController();
    this.#running = controller;
    this.composer.running = true;
    const turn = this.#conversation.beginAnswer();
    const shown = this.transcript.addAnswer(turn);
    announce("The answer is being written.");
    try {
      await this.#read(body, controller, turn, shown);
    } catch (error) {
      this.#fail(turn, error);
    } finally {
      shown.finish();
      if (this.#running === controller) {
        this.#running = null;
        this.composer.running = false;
      }
      this.#tell(turn);
    }
  }

  async #read(body, controller, turn, shown) {
    const clock = new AnswerClock();
    let reason = null;
    for await (const chunk of this.#server.chat(body, controller, this.#config.request_timeout_s)) {
      const choice = chunk.choices[0];
      if (choice?.delta.content) turn.text += choice.delta.content;
      reason = choice?.finish_reason ?? reason;
      turn.figures = clock.figures(chunk.usage, Boolean(turn.text));
      shown.update();
    }
    turn.state = reason === "length" ? "cut" : "done";
  }

  #fail(turn, error) {
    if (error instanceof Stopped) {
      turn.state = "stopped";
      return;
    }
    turn.state = "failed";
    turn.failure = error;
    if (error instanceof ServerError) this.#onTrouble(error);
    else console.error(error); // a defect of the page
  }

  #tell({ text, state, failure }) {
    if (failure) announce(`No whole answer: ${failure.message}`);
    else if (state === "stopped") announce(`Stopped. ${text}`);
    else announce(text ? `Answer: ${text}` : "The answer is empty.");
  }
}

/** What the reader waited for, and how fast it came: times of this page, token counts of the server. */
class AnswerClock {
  #asked = performance.now();
  #first = null;
  #tokensAtFirst = 0;

  figures(usage, hasText) {
    const now = performance.now();
    if (this.#first === null && hasText) {
      this.#first = now;
      this.#tokensAtFirst = usage?.completion_tokens ?? 1;
    }
    const tokens = usage?.completion_tokens ?? null;
    const writingS = this.#first === null ? 0 : (now - this.#first) / 1000;
    const since = tokens === null ? 0 : tokens - this.#tokensAtFirst;
    return {
      ttftS: this.#first === null ? null : (this.#first - this.#asked) / 1000,
      tokens,
      tokensPerS: since > 0 && writingS >= MIN_WRITING_S ? since / writingS : null,
      promptTokens: usage?.prompt_tokens ?? null,
      cachedTokens: usage?.prompt_tokens_details?.cached_tokens ?? null,
    };
  }
}
