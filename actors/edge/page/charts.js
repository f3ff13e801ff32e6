// Lines and bars of the stats view, drawn as SVG.

import { svg } from "./dom.js";

const WIDTH = 240;
const HEIGHT = 48;

/** A line over time; values that are null leave gaps.  It is decoration: the figures beside it are read out. */
export class Sparkline {
  #values = [];
  #length;
  #area = svg("path", { class: "area" });
  #line = svg("path", { class: "line" });

  constructor(length) {
    this.#length = length;
    const viewBox = `0 0 ${WIDTH} ${HEIGHT}`;
    const box = { class: "sparkline", viewBox, preserveAspectRatio: "none", "aria-hidden": "true" };
    const base = svg("path", { class: "base", d: `M0,${HEIGHT - 0.5}H${WIDTH}` });
    this.element = svg("svg", box, base, this.#area, this.#line);
  }

  push(value) {
    this.#values.push(value);
    if (this.#values.length > this.#length) this.#values.shift();
    const top = Math.max(1e-9, ...this.#values.map((known) => known ?? 0)) * 1.1;
    const step = WIDTH / (this.#length - 1);
    const from = WIDTH - (this.#values.length - 1) * step;
    const x = (index) => (from + index * step).toFixed(1);
    const y = (known) => (HEIGHT - 1 - (known / top) * (HEIGHT - 4)).toFixed(1);
    let line = "";
    let area = "";
    for (const run of runs(this.#values)) {
      const points = run.map(([index, known]) => `${x(index)},${y(known)}`).join("L");
      line += `M${points}`;
      area += `M${x(run[0][0])},${HEIGHT}L${points}L${x(run[run.length - 1][0])},${HEIGHT}Z`;
    }
    this.#line.setAttribute("d", line);
    this.#area.setAttribute("d", area);
  }
}

/** A horizontal bar of a share from 0 to 1. */
export class Bar {
  #fill = svg("rect", { class: "fill", width: 0, height: 6, rx: 3 });

  constructor() {
    const box = { class: "share-bar", viewBox: "0 0 100 6", preserveAspectRatio: "none", "aria-hidden": "true" };
    this.element = svg("svg", box, svg("rect", { class: "rail", width: 100, height: 6, rx: 3 }), this.#fill);
  }

  show(share) {
    this.#fill.setAttribute("width", 100 * Math.min(1, Math.max(0, share)));
  }
}

/** Stretches of [index, value] without a null between them. */
function runs(values) {
  const found = [];
  let open = null;
  values.forEach((value, index) => {
    if (value === null) open = null;
    else if (open === null) found.push((open = [[index, value]]));
    else open.push([index, value]);
  });
  return found;
}
