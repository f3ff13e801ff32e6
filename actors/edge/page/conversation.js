// What was asked and answered, and the request that asks for the next answer.  No DOM.

/**
 * A turn is {role: "user", text, attachments} or {role: "assistant", text, state, failure, figures}, where state is
 * "running", "done", "cut" (max tokens), "stopped" or "failed".
 */
export class Conversation {
  turns = [];

  ask(text, attachments) {
    const turn = { role: "user", text, attachments };
    this.turns.push(turn);
    return turn;
  }

  beginAnswer() {
    const turn = { role: "assistant", text: "", state: "running", failure: null, figures: null };
    this.turns.push(turn);
    return turn;
  }

  /** Drop this turn and all after it.  Returns them. */
  dropFrom(turn) {
    const index = this.turns.indexOf(turn);
    return index < 0 ? [] : this.turns.splice(index);
  }

  /** All pictures and clips, which every request sends again. */
  attachments(turns = this.turns) {
    return turns.flatMap((turn) => turn.attachments ?? []);
  }
}

/** The body of POST /v1/chat/completions: settings as Settings.values() has them. */
export function chatRequest(turns, settings) {
  const { system, detail, fps, num_frames, model, ...sampling } = settings;
  const messages = system ? [{ role: "system", content: system }] : [];
  for (const turn of turns) {
    if (turn.role === "user") messages.push({ role: "user", content: content(turn, { detail, fps, num_frames }) });
    else if (turn.text) messages.push({ role: "assistant", content: turn.text });
  }
  const stream_options = { include_usage: true, continuous_usage_stats: true };
  return { model: model || "model", messages, ...sampling, stream: true, stream_options };
}

function content(turn, options) {
  if (!turn.attachments.length) return turn.text;
  const parts = turn.attachments.map((attachment) => mediaPart(attachment, options));
  return turn.text ? [...parts, { type: "text", text: turn.text }] : parts;
}

function mediaPart({ kind, url }, { detail, fps, num_frames }) {
  if (kind === "image") return { type: "image_url", image_url: { url, detail } };
  return { type: "video_url", video_url: { url, fps, num_frames } };
}
