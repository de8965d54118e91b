// The small charts: one for each task, and two of the stream and the routing. What cannot be seen is not drawn.

import { curveChart, curveOf, isNumber, nearest, placeText, sample, usualOf } from "../../lib/curves.js";
import { figure, h, replaceIfOther, show } from "../../lib/dom.js";
import { number, percent } from "../../lib/format.js";
import { METRICS, textOf } from "../../lib/metrics.js";
import { css, line } from "../../lib/palette.js";
import { AXES } from "./view.js";

const MOST_MOVING = 4;
const HEIGHT = 130;
const AHEAD = "2000px"; // charts so far beyond the window are drawn

// onRange(low, high), onWhole(): a person zooms.
// Gives {grid, stream, none, arrange(), destroy()}.
export function createPanels(view, { onRange, onWhole }) {
  const grid = h("div", { class: "grid tasks" });
  const none = h("p", { class: "quiet", hidden: true }, "No task matches these filters.");
  const panels = new Map();
  const moves = panelOf("Base rates", "Each divided by its mean; the tasks that vary most. Variance 1 is chance");
  const drift = panelOf(
    "Drift of the routing",
    "Share of expert choices for a fixed sample (the probe) that changed since the segment before",
  );
  const stream = h("div", { class: "grid" }, moves.element, drift.element);

  const seen = new IntersectionObserver(
    (entries) => {
      for (const { target, isIntersecting } of entries) {
        target.panel.isSeen = isIntersecting;
        if (target.panel.next) flush(target.panel);
      }
    },
    { rootMargin: AHEAD },
  );
  for (const panel of [moves, drift]) seen.observe(panel.element);

  // A panel's `say()` says its figures; `next` is what its chart is to show, `curves` what it shows; `text(value)`.
  function panelOf(name, hint) {
    const place = h("div", { class: "chart-place" });
    const heading = h("h3", { title: hint }, name);
    const readout = h("p", { class: "readout" });
    const element = h("section", { class: "panel", "aria-label": name }, heading, readout, place);
    const panel = { element, heading, readout, place, isSeen: false, next: null, curves: [], at: null, say() {} };
    panel.text = (value) => number(value);
    element.panel = panel;
    return panel;
  }

  function flush(panel) {
    if (!panel.isSeen) return;
    const isTime = view.isTime();
    if (!panel.chart || panel.isTime !== isTime) {
      panel.chart?.destroy();
      panel.isTime = isTime;
      const onPoint = (x) => point(panel, x);
      panel.chart = curveChart({ key: "learning", height: HEIGHT, isTime, onRange, onWhole, onPoint });
      panel.place.replaceChildren(panel.chart.element);
    }
    panel.chart.draw(panel.next);
    panel.next = null;
  }

  // The values below the pointer, in all charts.
  function point(panel, x) {
    panel.at = x;
    if (x === null) return panel.say();
    const found = panel.curves.map((curve) => ({ curve, at: nearest(curve, x) })).filter(({ at }) => at);
    const values = found.map(({ curve, at }) => `${curve.label} ${panel.text(at.value)}`);
    show(panel.readout, found.length ? `${placeText(found[0].at.x, view.isTime())} ${values.join(" · ")}` : "no value");
    panel.readout.dataset.shown = "";
  }

  function arrange() {
    const tasks = view.tasks();
    none.hidden = tasks.length > 0 || !view.answer?.tasks.length;
    const elements = tasks.map((task) => ofTask(task).element);
    const isSame = elements.length === grid.children.length && elements.every((each, n) => grid.children[n] === each);
    if (!isSame) grid.replaceChildren(...elements);
    if (!view.curves || moves.drawn === view.stamp()) return;
    moves.drawn = view.stamp();
    drawMoves();
    drawDrift();
  }

  // ---- the tasks

  function ofTask(task) {
    if (!panels.has(task.name)) {
      panels.set(task.name, panelOf(task.name, null));
      seen.observe(panels.get(task.name).element);
    }
    const panel = panels.get(task.name);
    const name = view.figureOf(task);
    panel.text = (value) => textOf(name, value);
    panel.say = () => sayTask(panel, task, name);
    replaceIfOther(panel.heading, [task.name, h("span", { class: "quiet kind" }, ` ${kindOf(task)}`)]);
    if (view.curves && panel.drawn !== view.stamp()) drawTask(panel, task, name);
    if (panel.at === null) panel.say();
    return panel;
  }

  function kindOf({ kind, density, base_rate: rate }) {
    if (kind === "regression" || density === null) return kind;
    return `${density}, ${percent(rate, rate < 0.01 ? 2 : 1)}`;
  }

  function drawTask(panel, task, name) {
    panel.drawn = view.stamp();
    const { run } = view.curves;
    const own = curveFrom(run, task.name);
    panel.stretches = own ? run.grids[run.values[task.name].grid].newest : 1;
    const others = view
      .compared()
      .map((other) => ({ label: other.name, curve: curveFrom(other, task.name), ...other.look }));
    panel.curves = [
      ...(own ? [{ label: "this run", ...own, colour: css("--strong"), width: 2 }] : []),
      ...others.filter(({ curve }) => curve).map(({ curve, ...look }) => ({ ...look, ...curve })),
    ];
    const marks = run.lineage_changes.map(({ x }) => ({ x, kind: "lineage" }));
    const { service } = view.answer;
    if (service) marks.push({ x: service.x, kind: "service" });
    const { title, level } = METRICS[name];
    panel.next = { label: spoken(panel, task, title), x: view.range, curves: panel.curves, marks, level };
    panel.outside = outsideOf(panel.curves);
    flush(panel);
  }

  function curveFrom({ grids, values }, task) {
    const found = values[task];
    return found ? curveOf(grids[found.grid], found.y) : null;
  }

  function outsideOf(curves) {
    const usual = usualOf(curves);
    const isOutside = (value) => isNumber(value) && (value < usual[0] || value > usual[1]);
    return usual ? curves.flatMap(({ y }) => y).filter(isOutside).length : 0;
  }

  function spoken(panel, task, title) {
    const values = (panel.curves[0]?.y ?? []).filter(isNumber);
    if (!values.length) return `${title} of ${task.name}: no value yet`;
    const extent = `from ${Math.min(...values)} to ${Math.max(...values)}, the newest ${values.at(-1)}`;
    return `${title} of ${task.name} over ${AXES[view.choice.axis]}: ${values.length} points ${extent}`;
  }

  function sayTask(panel, task, name) {
    const last = view.lastOf(task);
    const run = view.runValue(task, name);
    const stretches = (panel.stretches ?? 1) === 1 ? "stretch" : `${panel.stretches} stretches`;
    replaceIfOther(panel.readout, [
      `${METRICS[name].title}, newest ${stretches} `,
      h("strong", {}, figure(`newest.${task.name}.${name}`, textOf(name, last), last)),
      " · whole run ",
      figure(`panel.${task.name}.${name}`, textOf(name, run), run),
      panel.outside ? ` · ${panel.outside} outside of the chart` : "",
    ]);
  }

  // ---- the stream and the routing

  function drawMoves() {
    const rates = view.curves.base_rates;
    const moving = Object.entries(rates.tasks)
      .sort(([, a], [, b]) => b.spread - a.spread)
      .slice(0, MOST_MOVING);
    moves.curves = moving.map(([label, { y, rate }], n) => {
      const curve = curveOf(rates, y);
      return {
        label,
        ...curve,
        y: curve.y.map((value) => (isNumber(value) ? value / rate : value)),
        width: 1.5,
        ...line(n),
      };
    });
    const label = "Base rates over time, each divided by its mean";
    moves.next = { label, x: view.range, curves: moves.curves, marks: [], level: 1 };
    moves.say = () => {
      const named = moving.flatMap(([name, { spread }], n) => [sample(line(n)), ` ${name} ${number(spread, 1)} `]);
      replaceIfOther(moves.readout, ["Base rate ÷ its mean. Variance ÷ that by chance: ", ...named]);
    };
    moves.say();
    flush(moves);
  }

  function drawDrift() {
    const { routing } = view.curves;
    const last = routing.drift.findLast(isNumber) ?? null;
    drift.curves = [{ label: "drift", ...curveOf(routing, routing.drift), colour: css("--strong"), width: 2 }];
    const label = `Drift of the routing over time, the newest ${last ?? "not known"}`;
    drift.next = { label, x: view.range, curves: drift.curves, marks: [], level: null };
    drift.say = () => {
      const { dead, load_skew: skew, active_mean: active } = view.answer.newest?.routing ?? {};
      const rest = `${number(dead)} dead · load skew ${number(skew, 2)} · ${number(active, 2)} active per example. `;
      const text = last === null ? "No drift yet: it needs two segments. " : `Newest ${number(last, 3)} · ${rest}`;
      replaceIfOther(drift.readout, [text, h("a", { href: "#/experts" }, "Experts")]);
    };
    drift.say();
    flush(drift);
  }

  function destroy() {
    seen.disconnect();
    for (const panel of [...panels.values(), moves, drift]) panel.chart?.destroy();
  }

  return { grid, stream, none, arrange, destroy };
}
