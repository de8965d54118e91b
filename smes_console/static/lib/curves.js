// Small charts of one quantity for several runs: they point together, and the page decides what part of x they show.

import uPlot from "../vendor/uplot/uPlot.esm.js";
import { s } from "./dom.js";
import { short, utc } from "./format.js";
import { css } from "./palette.js";

const dark = matchMedia("(prefers-color-scheme: dark)");
const FONT = "11px system-ui, sans-serif";
const ROBUST_FROM = 24; // so many points say what is usual

// Options: key (charts of one key point together), height, isTime, onRange(low, high), onWhole(), onPoint(x or null).
// Gives {element, draw(content), destroy()}.
// content: {label, x: [low, high] or null, curves: [{x, y, colour, dash?, width?}],
//           marks: [{x, kind: "lineage" | "service"}], level: a value of y with a line of its own, or null,
//           least?: [low, high] of y that is always there}
export function curveChart({ key, height, isTime, onRange, onWhole, onPoint }) {
  const element = document.createElement("div");
  element.className = "chart";
  element.setAttribute("role", "img");
  let plot = null;
  let content = null;
  let shape = "";

  function make() {
    plot?.destroy();
    plot = null;
    if (!content || !element.clientWidth) return;
    plot = new uPlot(options(), joined(content.curves), element);
  }

  function options() {
    const quiet = css("--quiet");
    const axis = {
      stroke: quiet,
      font: FONT,
      grid: { stroke: css("--line"), width: 1 },
      ticks: { stroke: css("--line"), size: 4 },
    };
    const onlyMoves = (type) => type !== "mousedown" && type !== "mouseup";
    return {
      width: element.clientWidth,
      height,
      ms: 1,
      tzDate: (ms) => uPlot.tzDate(new Date(ms), "Etc/UTC"),
      legend: { show: false },
      padding: [8, isTime ? 22 : 12, 0, 0],
      cursor: {
        y: false,
        points: { size: 5 },
        drag: { x: true, y: false, setScale: false },
        sync: { key, setSeries: false, scales: ["x", null], filters: { pub: onlyMoves } },
        bind: { dblclick: () => () => (onWhole(), null) },
      },
      scales: {
        x: { time: isTime, range: (_, low, high) => content.x ?? widened(low, high) },
        y: { range: (u, low, high) => rangeOf(low, high) },
      },
      axes: [
        {
          ...axis,
          size: 22,
          space: 62,
          gap: 3,
          values: (u, ticks, n, space, step) => ticks.map((tick) => (isTime ? timeText(tick, step) : short(tick))),
        },
        {
          ...axis,
          size: 44,
          space: 26,
          gap: 2,
          values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : String(Number(tick.toPrecision(4))))),
        },
      ],
      series: [
        {},
        ...content.curves.map((curve) => ({
          stroke: curve.colour,
          dash: curve.dash,
          width: curve.width ?? 1.25,
          points: { show: (u, n, from, to) => to - from < 3 },
        })),
      ],
      hooks: {
        setSelect: [select],
        setCursor: [(u) => onPoint?.(u.cursor.left >= 0 ? u.posToVal(u.cursor.left, "x") : null)],
        drawAxes: [drawLevel],
        draw: [drawMarks],
      },
    };
  }

  function select(u) {
    if (u.select.width < 4) return;
    const [low, high] = [u.select.left, u.select.left + u.select.width].map((at) => u.posToVal(at, "x"));
    u.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
    onRange(low, high);
  }

  // What is far from all else does not press the rest flat; `outside` counts it.
  function rangeOf(low, high) {
    if (low === null || high === null) return [0, 1];
    const usual = content.usual ?? [low, high];
    let [from, to] = [Math.max(low, usual[0]), Math.min(high, usual[1])];
    if (content.least) [from, to] = [Math.min(from, content.least[0]), Math.max(to, content.least[1])];
    const room = Math.max((to - from) * 0.08, Math.abs(to) * 5e-3, 1e-9);
    return [from - room, to + room];
  }

  function drawLevel(u) {
    if (content.level === null || content.level === undefined) return;
    const { min, max } = u.scales.y;
    if (content.level < min || content.level > max) return;
    line(u, "y", content.level, css("--quiet"), [1, 3]);
  }

  function drawMarks(u) {
    for (const { x, kind } of content.marks) {
      if (x === null || x < u.scales.x.min || x > u.scales.x.max) continue;
      const colour = css(kind === "service" ? "--ink" : "--quiet");
      const at = line(u, "x", x, colour, kind === "service" ? [] : [4, 3]);
      if (kind === "service") triangle(u, at, colour);
    }
  }

  function line(u, scale, value, colour, dash) {
    const { ctx, bbox } = u;
    const at = Math.round(u.valToPos(value, scale, true));
    ctx.save();
    ctx.strokeStyle = colour;
    ctx.lineWidth = devicePixelRatio;
    ctx.setLineDash(dash.map((each) => each * devicePixelRatio));
    ctx.beginPath();
    if (scale === "x") {
      ctx.moveTo(at, bbox.top);
      ctx.lineTo(at, bbox.top + bbox.height);
    } else {
      ctx.moveTo(bbox.left, at);
      ctx.lineTo(bbox.left + bbox.width, at);
    }
    ctx.stroke();
    ctx.restore();
    return at;
  }

  function triangle(u, at, colour) {
    const { ctx, bbox } = u;
    const size = 5 * devicePixelRatio;
    ctx.save();
    ctx.fillStyle = colour;
    ctx.beginPath();
    ctx.moveTo(at - size, bbox.top - size);
    ctx.lineTo(at + size, bbox.top - size);
    ctx.lineTo(at, bbox.top + size * 0.6);
    ctx.fill();
    ctx.restore();
  }

  const sizes = new ResizeObserver(() => {
    if (!plot) make();
    else if (element.clientWidth && plot.width !== element.clientWidth)
      plot.setSize({ width: element.clientWidth, height });
  });
  sizes.observe(element);
  dark.addEventListener("change", make);

  return {
    element,
    draw(next) {
      content = next;
      content.usual = usualOf(next.curves);
      element.setAttribute("aria-label", next.label);
      const looks = JSON.stringify(next.curves.map(({ colour, dash, width }) => [colour, dash, width]));
      if (!plot || looks !== shape) make();
      else plot.setData(joined(next.curves));
      shape = looks;
    },
    destroy() {
      sizes.disconnect();
      dark.removeEventListener("change", make);
      plot?.destroy();
      plot = null;
    },
  };
}

export const isNumber = (value) => value !== null && value !== undefined;

// A curve as it is drawn: interrupted where something is missing (null), and not where a stretch has no such figure.
export function curveOf({ x, breaks }, y) {
  const missing = new Set(breaks);
  return { x, y: y.map((value, n) => (value === null && !missing.has(n) ? undefined : value)) };
}

const joined = (curves) => (curves.length ? uPlot.join(curves.map(({ x, y }) => [x, y])) : [[]]);

// A range of x with room; never empty.
function widened(low, high) {
  if (low === null || high === null) return [null, null];
  return low === high ? [low - 1, high + 1] : [low, high];
}

// From the 2nd to the 98th percentile of the curves, and as much again on each side; null for few points.
export function usualOf(curves) {
  const known = curves.flatMap(({ y }) => y.filter(isNumber)).sort((a, b) => a - b);
  if (known.length < ROBUST_FROM) return null;
  const [low, high] = [known[Math.floor(known.length * 0.02)], known[Math.ceil(known.length * 0.98) - 1]];
  return [low - (high - low), high + (high - low)];
}

// The value of a curve nearest to x, and that x; null where it has none.
export function nearest(curve, x) {
  const known = curve.y.map((_, n) => n).filter((n) => isNumber(curve.y[n]));
  const [xs, y] = [known.map((n) => curve.x[n]), known.map((n) => curve.y[n])];
  if (!xs.length || x === null) return null;
  let [low, high] = [0, xs.length - 1];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] <= x) low = middle;
    else high = middle;
  }
  const at = Math.abs(xs[low] - x) <= Math.abs(xs[high] - x) ? low : high;
  return { x: xs[at], value: y[at] };
}

// Times as short as the distance of the ticks allows, in UTC; a day's name where a day begins.
function timeText(ms, step) {
  const text = utc(ms);
  if (step >= 86_400_000 || text.endsWith("00:00:00")) return text.slice(5, 10);
  return step >= 60_000 ? text.slice(11, 16) : text.slice(11);
}

export const placeText = (x, isTime) => (isTime ? `${utc(x)} UTC` : `${short(Math.round(x))} impressions`);

// A piece of a line, to stand beside its name.
export function sample({ colour, dash = [] }, width = 2) {
  const path = s("path", { d: "M0 4H28" });
  path.style.stroke = colour;
  path.style.strokeWidth = width;
  path.style.strokeDasharray = dash.join(" ");
  return s("svg", { width: 28, height: 8, "aria-hidden": "true" }, path);
}
