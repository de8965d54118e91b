// How even the load is, how much the routing moves and how many experts are dead, from segment to segment.

import { curveChart, isNumber } from "../../lib/curves.js";
import { h, show } from "../../lib/dom.js";
import { number } from "../../lib/format.js";
import { css } from "../../lib/palette.js";

const CHARTS = [
  {
    name: "load_skew",
    title: "Load skew",
    hint: "Largest over mean load of the experts that can be chosen; 1 is even",
    value: (segment) => segment.load_skew,
    level: 1,
  },
  {
    name: "drift",
    title: "Drift",
    hint: "Share of expert choices for a fixed sample (probe) that changed since the segment before; mean over tasks",
    value: (segment) => segment.drift,
  },
  {
    name: "dead",
    title: "Dead experts",
    hint: "Experts that no task used in a segment",
    value: (segment) => segment.dead.length,
    least: [0, 1],
  },
];

// Gives {element, draw(), destroy()}.
export function createCharts(view) {
  const drawn = CHARTS.map((each) => {
    const readout = h("p", { class: "readout" });
    const chart = curveChart({ key: "experts", height: 110, isTime: false, onRange() {}, onWhole() {}, onPoint() {} });
    const heading = h("h3", { title: each.hint }, each.title);
    const panel = h("section", { class: "panel", "aria-label": each.title }, heading, readout, chart.element);
    return { ...each, readout, chart, panel };
  });
  const element = h(
    "div",
    { class: "grid" },
    drawn.map(({ panel }) => panel),
  );

  function draw() {
    const ended = view.data.segments.filter(({ is_open: isOpen }) => !isOpen);
    for (const { name, title, value, level = null, least, readout, chart } of drawn) {
      const y = ended.map(value);
      const known = y.filter(isNumber);
      const last = known.at(-1) ?? null;
      const label = `${title} by segment: ${known.length} segments, the newest ${last ?? "not known"}`;
      const curve = { label: title, x: ended.map(({ to }) => to), y, colour: css("--strong"), width: 2 };
      chart.draw({ label, x: null, curves: [curve], marks: [], level, least });
      show(readout, `newest ${number(last, name === "dead" ? 0 : 3)} · over steps`, last);
    }
  }

  function destroy() {
    for (const { chart } of drawn) chart.destroy();
  }

  return { element, draw, destroy };
}
