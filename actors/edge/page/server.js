// Everything the page asks of the server it came from.  Every wait has a deadline.

import { EventReader } from "./events.js";

const REPORT_DEADLINE_MS = 10_000;
const PATIENCE_MS = 15_000; // beyond the server's own deadline for a request
const MAX_ERROR_CHARS = 2_000;

/** Why there is no answer, in words to show.  `status` is 0 where the server could not be reached at all. */
export class ServerError extends Error {
  constructor(message, { status = 0, code = "", requestId = "", retryAfterS = null } = {}) {
    super(message);
    this.status = status;
    this.code = code;
    this.requestId = requestId;
    this.retryAfterS = retryAfterS;
  }
}

/** The reader stopped it. */
export class Stopped extends Error {}

export class Server {
  constructor() {
    this.key = ""; // of the API, where the server wants one
  }

  config() {
    return this.#report("page/config");
  }

  models() {
    return this.#report("v1/models");
  }

  stats() {
    return this.#report("stats");
  }

  /** {ready, down}, also where the server says that it is not ready. */
  health() {
    return this.#report("health", [503]);
  }

  /**
   * The chunks of a streamed chat completion, parsed.
   *
   * Throws Stopped if `controller` was aborted, ServerError for everything else: also for silence longer than silenceS.
   */
  async *chat(body, controller, silenceS) {
    const silent = () => controller.abort(new ServerError(`The server sent nothing for ${Math.round(silenceS)} s.`));
    const deadlineMs = silenceS * 1000 + PATIENCE_MS;
    let timer = setTimeout(silent, deadlineMs);
    let reader = null;
    try {
      const response = await fetch("v1/chat/completions", {
        ...this.#options(),
        method: "POST",
        headers: this.#headers({ "Content-Type": "application/json" }),
        body,
        signal: controller.signal,
      });
      if (!response.ok) throw await refusal(response);
      const requestId = response.headers.get("x-request-id") ?? "";
      reader = response.body.getReader();
      const decoder = new TextDecoder();
      const events = new EventReader();
      for (;;) {
        const { value, done } = await reader.read();
        clearTimeout(timer);
        timer = setTimeout(silent, deadlineMs);
        if (done) throw new ServerError("The connection was lost before the answer was complete.", { requestId });
        for (const data of events.push(decoder.decode(value, { stream: true }))) {
          if (data === "[DONE]") return;
          const chunk = JSON.parse(data);
          if (chunk.error) throw streamError(chunk.error, requestId);
          yield chunk;
        }
      }
    } catch (error) {
      throw reasonOf(error, controller.signal, reader !== null);
    } finally {
      clearTimeout(timer);
      reader?.cancel().catch(() => {}); // of a connection that is gone already
    }
  }

  async #report(path, alsoFine = []) {
    const signal = AbortSignal.timeout(REPORT_DEADLINE_MS);
    try {
      const response = await fetch(path, { ...this.#options(), headers: this.#headers(), signal });
      if (!response.ok && !alsoFine.includes(response.status)) throw await refusal(response);
      return await response.json();
    } catch (error) {
      throw reasonOf(error, signal, false);
    }
  }

  #options() {
    return { cache: "no-store", credentials: "omit", redirect: "error", referrerPolicy: "no-referrer" };
  }

  #headers(more = {}) {
    return this.key ? { ...more, Authorization: `Bearer ${this.key}` } : more;
  }
}

/** An answer that is an error, by the message in its body. */
async function refusal(response) {
  const text = (await response.text()).slice(0, MAX_ERROR_CHARS);
  let error = {};
  try {
    error = JSON.parse(text).error ?? {};
  } catch {
    error = { message: text.trim() }; // of a proxy before the server, perhaps
  }
  const retry = Number.parseInt(response.headers.get("retry-after") ?? "", 10);
  return new ServerError(error.message || `The server answered with status ${response.status}.`, {
    status: response.status,
    code: error.code ?? "",
    requestId: response.headers.get("x-request-id") ?? "",
    retryAfterS: Number.isNaN(retry) ? null : retry,
  });
}

/** An error within a stream whose status was 200. */
function streamError(error, requestId) {
  return new ServerError(error.message ?? "The server ended the answer with an error.", {
    status: 200,
    code: error.code ?? "",
    requestId,
  });
}

function reasonOf(error, signal, begun) {
  const reason = signal.aborted ? signal.reason : null;
  if (reason instanceof Stopped || reason instanceof ServerError) return reason;
  if (error instanceof ServerError) return error;
  if (error.name === "TimeoutError") return new ServerError("The server did not answer in time.");
  if (error instanceof SyntaxError) return new ServerError("The server's answer could not be read.");
  if (begun) return new ServerError("The connection was lost before the answer was complete.");
  return new ServerError("The server cannot be reached.");
}
