// Charts of lines over time or over a count, drawn by uPlot, in the colours of the style sheet.

import uPlot from "../vendor/uplot/uPlot.esm.js";
import { number, utc } from "./format.js";
import { css } from "./palette.js";

const dark = matchMedia("(prefers-color-scheme: dark)");

// Options:
//   label: what a screen reader says; x: "time" (Unix milliseconds) or "count"; height in pixels;
//   series: [{label, colour, dash?, width?, format?}]; sync?: key shared by charts that zoom and point together;
//   range?: [low, high] of y, or a function (low, high) → [low, high]; draw?: [hooks of uPlot after drawing];
//   onZoom?(low, high): in milliseconds or counts.
// data: [x, y1, y2, …] of equal length; null is a gap.
// Gives {element, update(data), zoom(low, high), destroy(), plot}.
export function lines({ label, x = "time", height = 160, series, sync, range, draw = [], onZoom, legend = true }) {
  const element = document.createElement("div");
  element.className = "chart";
  element.setAttribute("role", "img");
  element.setAttribute("aria-label", label);
  const time = x === "time";
  let plot = null;
  let data = [[], ...series.map(() => [])];

  function options(width) {
    const line = css("--line");
    const axis = { stroke: css("--quiet"), grid: { stroke: line, width: 1 }, ticks: { stroke: line } };
    const ofY = typeof range === "function" ? (_, ...found) => range(...found) : range;
    return {
      width,
      height,
      ms: 1,
      tzDate: (ms) => uPlot.tzDate(new Date(ms), "Etc/UTC"),
      legend: { show: legend, live: true },
      cursor: { ...(sync ? { sync: { key: sync, setSeries: false } } : {}), drag: { x: true, y: false } },
      scales: { x: { time }, y: range ? { range: ofY } : {} },
      axes: [axis, { ...axis, size: 56, values: (_, ticks) => ticks.map((tick) => trimmed(tick)) }],
      series: [
        { label: time ? "UTC" : "", value: (_, v) => (v === null ? "–" : time ? utc(v) : number(v)) },
        ...series.map((each) => ({
          label: each.label,
          stroke: each.colour.startsWith("--") ? css(each.colour) : each.colour,
          dash: each.dash,
          width: each.width ?? 1.5,
          points: { show: false },
          value: (_, v) => (each.format ?? number)(v),
          ...(each.more ?? {}),
        })),
      ],
      hooks: { draw, setScale: onZoom ? [(u, key) => key === "x" && onZoom(u.scales.x.min, u.scales.x.max)] : [] },
    };
  }

  function make() {
    const width = element.clientWidth;
    if (!width) return;
    const zoomed = plot && { min: plot.scales.x.min, max: plot.scales.x.max, whole: plot.data[0] };
    plot?.destroy();
    plot = new uPlot(options(width), data, element);
    handle.plot = plot;
    if (zoomed?.whole.length && (zoomed.min > zoomed.whole[0] || zoomed.max < zoomed.whole.at(-1))) {
      plot.setScale("x", zoomed);
    }
  }

  const sizes = new ResizeObserver(() => {
    if (!plot) make();
    else if (plot.width !== element.clientWidth && element.clientWidth) {
      plot.setSize({ width: element.clientWidth, height });
    }
  });
  sizes.observe(element);
  dark.addEventListener("change", make);

  const handle = {
    element,
    plot: null,
    update(next) {
      const follow = !plot || !data[0].length || plot.scales.x.max >= data[0].at(-1); // not while somebody looks back
      data = next;
      if (!plot) make();
      else plot.setData(next, follow && (plot.scales.x.min ?? -Infinity) <= (next[0][0] ?? 0));
    },
    zoom(low, high) {
      plot?.setScale("x", { min: low, max: high });
    },
    destroy() {
      sizes.disconnect();
      dark.removeEventListener("change", make);
      plot?.destroy();
      plot = null;
    },
  };
  return handle;
}

function trimmed(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6) return `${value / 1e6} M`;
  if (size >= 1e4) return `${value / 1e3} k`;
  return String(Number(value.toPrecision(6)));
}
