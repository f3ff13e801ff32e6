// Text of a model as DOM nodes, while it grows: paragraphs, headings, lists and code, never HTML.
//
// What is complete is not touched again, so a long answer costs as much per word as a short one.

import { element } from "./dom.js";

const FENCE = /^\s*(`{3,}|~{3,})\s*([\w+#.-]*)\s*$/;
const HEADING = /^(#{1,6})\s+/;
const BULLET = /^(\s*)[-*•]\s+/;
const NUMBERED = /^(\s*)(\d{1,4})[.)]\s+/;
const UNDECIDED = /^\s*(`{1,2}|~{1,2}|[`~]{3,}[^`\n]*|#{1,6}|[-*•]|\d{1,4}[.)]?)?$/; // may become any of these yet
const MAX_UNDECIDED = 60;
const MAX_INLINE = 5_000; // of one line; longer ones stay as they are
const INLINE = /(`[^`\n]+`)|(\*\*(?=\S)(?:[^*]|\*(?!\*))+?\*\*)/g;

export class Prose {
  #root;
  #onCopy;
  #line = ""; // the line that is being written
  #shown = 0; // characters of it that are in the tail
  #tail = null; // the text node that it grows in
  #target = null; // the element of the tail: p, li, pre's code
  #block = null; // the open paragraph or list, which takes more lines
  #fence = null; // what closes the open code block

  /** Writes into `root`; onCopy(text, button) is called by the button of a code block. */
  constructor(root, onCopy) {
    this.#root = root;
    this.#onCopy = onCopy;
  }

  append(text) {
    let from = 0;
    for (let end = text.indexOf("\n"); end >= 0; end = text.indexOf("\n", from)) {
      this.#line += text.slice(from, end);
      this.#endLine();
      from = end + 1;
    }
    this.#line += text.slice(from);
    this.#showLine(false);
  }

  /** No more will come. */
  end() {
    if (this.#line) this.#endLine();
  }

  #endLine() {
    if (this.#fence !== null && this.#line.trim() === this.#fence) {
      this.#fence = this.#tail = this.#target = this.#block = null;
    } else if (this.#fence !== null) {
      this.#showLine(true);
      this.#tail.appendData("\n");
    } else {
      this.#endProse();
    }
    this.#line = "";
    this.#shown = 0;
    if (this.#fence === null) this.#tail = null;
  }

  #endProse() {
    const fence = this.#tail === null ? FENCE.exec(this.#line) : null;
    if (fence) {
      this.#openCode(fence[1], fence[2]);
    } else if (this.#line.trim() === "") {
      if (this.#block?.tagName === "P") this.#block = null; // a list goes on after a blank line
    } else {
      this.#showLine(true);
      const written = this.#tail.data;
      if (written.length <= MAX_INLINE) this.#tail.replaceWith(...inline(written));
      if (this.#target.tagName !== "P") return;
      this.#target.append("\n"); // a line break, as the model made it
    }
  }

  /** Put what is new of the line into the tail; opens a block once the line's beginning says which. */
  #showLine(isWhole) {
    if (this.#fence !== null) {
      const couldClose = this.#fence.startsWith(this.#line.trim()) && this.#line.trim() !== "";
      if (couldClose && !isWhole) return;
    } else if (this.#tail === null) {
      if (!isWhole && this.#line.length < MAX_UNDECIDED && UNDECIDED.test(this.#line)) return;
      this.#shown = this.#open();
    }
    this.#tail.appendData(this.#line.slice(this.#shown));
    this.#shown = this.#line.length;
  }

  /** Open what the line begins.  Returns how many characters of it were its mark. */
  #open() {
    const heading = HEADING.exec(this.#line);
    const bullet = BULLET.exec(this.#line);
    const numbered = NUMBERED.exec(this.#line);
    this.#tail = document.createTextNode("");
    if (heading) {
      this.#target = element("h3", { class: `depth-${heading[1].length}` }, this.#tail);
      this.#root.append(this.#target);
      this.#block = null;
      return heading[0].length;
    }
    if (bullet || numbered) {
      const depth = Math.min(3, Math.floor((bullet ?? numbered)[1].length / 2));
      this.#target = element("li", { class: depth ? `nested-${depth}` : null, value: numbered?.[2] }, this.#tail);
      this.#openBlock(numbered ? "ol" : "ul").append(this.#target);
      return (bullet ?? numbered)[0].length;
    }
    this.#target = this.#openBlock("p");
    this.#target.append(this.#tail);
    return 0;
  }

  /** The open block where it is of this kind, else a new one. */
  #openBlock(tag) {
    if (this.#block?.tagName.toLowerCase() !== tag) {
      this.#block = element(tag);
      this.#root.append(this.#block);
    }
    return this.#block;
  }

  #openCode(fence, language) {
    const code = element("code");
    const copy = element("button", {
      type: "button",
      class: "quiet copy-code",
      text: "Copy",
      "aria-label": "Copy this code",
      on: { click: () => this.#onCopy(code.textContent, copy) },
    });
    const head = element("div", { class: "code-head" }, element("span", { text: language || "text" }), copy);
    this.#root.append(
      element("div", { class: "code" }, head, element("pre", { tabindex: "0", "aria-label": "Code" }, code)),
    );
    this.#tail = document.createTextNode("");
    code.append(this.#tail);
    this.#target = code;
    this.#block = null;
    this.#fence = fence;
  }
}

/** A line's nodes: **bold** and `code`, the rest as it is. */
function inline(text) {
  const nodes = [];
  let from = 0;
  for (const match of text.matchAll(INLINE)) {
    nodes.push(text.slice(from, match.index));
    if (match[1]) nodes.push(element("code", { text: match[1].slice(1, -1) }));
    else nodes.push(element("strong", { text: match[2].slice(2, -2) }));
    from = match.index + match[0].length;
  }
  nodes.push(text.slice(from));
  return nodes.filter((node) => node !== "");
}
