// The message box: text, pictures and clips by picker, drop, paste or address, and send or stop.

import { checkFile, checkTogether, fromAddress, kindOfAddress, readFile, Refused, release } from "./attachments.js";
import { announce } from "./announcer.js";
import { byId } from "./dom.js";
import { forget, notice } from "./notices.js";
import { count } from "./numbers.js";
import { tile } from "./tiles.js";

const MAX_HEIGHT_PX = 220;

export class Composer {
  #form = byId("composer");
  #message = byId("message");
  #list = byId("attachments");
  #attachments = [];
  #reading = Promise.resolve(); // files are read one after the other, in their order
  #numReading = 0;
  #draft = null; // what was being written when an edit began
  #actions;

  /**
   * `actions`: send(text, attachments) says whether it was taken; stop(); sent() are the attachments that every request
   * sends again, holds(attachment) says whether any turn shows it; limits(); editCancelled().
   */
  constructor(actions) {
    this.#actions = actions;
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send();
    });
    this.#message.addEventListener("input", () => this.#grow());
    this.#message.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.#send();
    });
    byId("stop").addEventListener("click", () => actions.stop());
    byId("cancel-edit").addEventListener("click", () => this.cancelEdit());
    document.addEventListener("keydown", (event) => this.#escape(event));
    this.#startFiles();
    this.#startAddress();
    this.#startDrop();
  }

  /** Stop in place of send, with the focus where it was. */
  set running(running) {
    const [shown, hidden] = running ? [byId("stop"), byId("send")] : [byId("send"), byId("stop")];
    const hadFocus = document.activeElement === hidden;
    shown.hidden = false;
    hidden.hidden = true;
    if (hadFocus) (running ? shown : this.#message).focus();
  }

  /** The text of a question to begin with. */
  suggest(text) {
    this.#message.value = text;
    this.#grow();
    this.#message.focus();
  }

  /** Show an earlier message to be changed; what was being written comes back after it. */
  edit({ text, attachments }) {
    this.#draft ??= { text: this.#message.value, attachments: this.#attachments };
    byId("editing").hidden = false;
    this.#fill(text, [...attachments]);
    this.#message.focus();
  }

  cancelEdit() {
    if (this.#draft === null) return;
    const { text, attachments } = this.#draft;
    this.#release(this.#attachments);
    this.#endEdit();
    this.#fill(text, attachments);
    this.#message.focus();
    this.#actions.editCancelled();
  }

  #endEdit() {
    this.#draft = null;
    byId("editing").hidden = true;
  }

  #fill(text, attachments) {
    this.#message.value = text;
    this.#attachments = attachments;
    this.#showAttachments();
    this.#grow();
  }

  #send() {
    if (this.#numReading) {
      notice("Some files are still being read.", { key: "reading", kind: "news" });
      return;
    }
    const text = this.#message.value.trim();
    if (!text && !this.#attachments.length) return;
    if (!this.#actions.send(text, this.#attachments)) return;
    const { text: draft = "", attachments = [] } = this.#draft ?? {};
    this.#endEdit();
    this.#fill(draft, attachments);
  }

  #escape(event) {
    if (event.key !== "Escape" || event.defaultPrevented || byId("viewer").open) return;
    if (!byId("stop").hidden) this.#actions.stop();
    else this.cancelEdit();
  }

  #grow() {
    this.#message.style.height = "auto";
    this.#message.style.height = `${Math.min(this.#message.scrollHeight, MAX_HEIGHT_PX)}px`;
  }

  #startFiles() {
    const input = byId("files");
    byId("attach").addEventListener("click", () => input.click());
    input.addEventListener("change", () => {
      this.addFiles(input.files);
      input.value = ""; // so that the same file can be chosen again
    });
    document.addEventListener("paste", (event) => {
      const files = event.clipboardData?.files ?? [];
      if (!files.length || byId("view-chat").hidden) return;
      event.preventDefault();
      this.addFiles(files);
    });
  }

  #startAddress() {
    const [row, toggle, url, kind] = ["link-row", "link", "link-url", "link-kind"].map(byId);
    const open = (opened) => {
      row.hidden = !opened;
      toggle.setAttribute("aria-expanded", String(opened));
      (opened ? url : this.#message).focus();
    };
    const add = () => {
      if (!url.value.trim()) return;
      if (!this.addAddress(url.value.trim(), kind.value)) return;
      url.value = "";
      open(false);
    };
    toggle.addEventListener("click", () => open(row.hidden));
    byId("link-add").addEventListener("click", add);
    url.addEventListener("input", () => {
      kind.value = kindOfAddress(url.value) ?? kind.value;
    });
    row.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && event.target !== byId("link-add")) {
        event.preventDefault(); // of the form around it
        add();
      } else if (event.key === "Escape") {
        event.preventDefault();
        open(false);
      }
    });
  }

  #startDrop() {
    const veil = byId("drop-veil");
    const wanted = ({ dataTransfer }) =>
      !byId("view-chat").hidden && ["Files", "text/uri-list"].some((type) => dataTransfer.types.includes(type));
    document.addEventListener("dragenter", (event) => {
      if (wanted(event)) veil.hidden = false;
    });
    document.addEventListener("dragover", (event) => {
      if (wanted(event)) event.preventDefault();
    });
    document.addEventListener("dragleave", (event) => {
      if (event.relatedTarget === null) veil.hidden = true;
    });
    document.addEventListener("drop", (event) => {
      veil.hidden = true;
      if (!wanted(event)) return;
      event.preventDefault();
      const address = event.dataTransfer.getData("text/uri-list").split("\n", 1)[0].trim();
      if (event.dataTransfer.files.length) this.addFiles(event.dataTransfer.files);
      else if (address) this.addAddress(address, kindOfAddress(address) ?? "image");
    });
  }

  /** Read files and attach them, as far as the server takes them. */
  addFiles(files) {
    for (const file of files) {
      this.#numReading += 1;
      this.#reading = this.#reading.then(() => this.#addFile(file)).finally(() => {
        this.#numReading -= 1;
        if (this.#numReading === 0) forget("reading");
      });
    }
  }

  async #addFile(file) {
    await this.#attempt(async () => {
      checkFile(file, this.#actions.limits());
      return readFile(file);
    });
  }

  /** Returns whether it was taken. */
  addAddress(text, kind) {
    try {
      this.#take(fromAddress(text, kind));
      return true;
    } catch (error) {
      this.#refuse(error);
      return false;
    }
  }

  async #attempt(make) {
    try {
      this.#take(await make());
    } catch (error) {
      this.#refuse(error);
    }
  }

  #take(attachment) {
    try {
      checkTogether([...this.#actions.sent(), ...this.#attachments, attachment], this.#actions.limits());
    } catch (error) {
      release([attachment]);
      throw error;
    }
    this.#attachments.push(attachment);
    this.#showAttachments();
    announce(`Attached ${attachment.name}. ${count(this.#attachments.length, "file")} in this message.`);
  }

  #refuse(error) {
    if (!(error instanceof Refused)) throw error;
    notice(error.message, { key: "file" });
  }

  #remove(attachment) {
    const index = this.#attachments.indexOf(attachment);
    this.#attachments.splice(index, 1);
    this.#release([attachment]);
    this.#showAttachments();
    announce(`Removed ${attachment.name}.`);
    const left = this.#list.children[Math.min(index, this.#attachments.length - 1)];
    (left?.querySelector(".remove") ?? this.#message).focus();
  }

  /** But for those of a message that is being edited, which may come back. */
  #release(attachments) {
    release(attachments.filter((attachment) => !this.#actions.holds(attachment)));
  }

  #showAttachments() {
    this.#list.replaceChildren(...this.#attachments.map((one) => tile(one, (gone) => this.#remove(gone))));
    this.#list.hidden = this.#attachments.length === 0;
  }
}
