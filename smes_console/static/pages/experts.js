// Which task uses which expert, over time: heat maps that pointer and arrow keys read, and the figures in words.

import { curveChart } from "../lib/curves.js";
import { figure, h, show } from "../lib/dom.js";
import { heatmap, scale } from "../lib/heatmap.js";

export const title = "Experts";

const ORDERS = { number: "by number", load: "busiest first" };
const SCALES = { task: "each task by its busiest", all: "all by the busiest" };
const MOST_NAMED = 24;
const OF_LINES = "Of each task only the experts that it uses most are known (a dot: not known), from the lines of the history. ";

export function mount(root, context) {
  const { format, palette, table } = context;
  let key = null;
  let asked = null; // the step whose segment was asked for
  let step = null; // null: follow the newest segment that has ended
  let data = null;
  let order = []; // column → expert
  const choice = { order: "number", scale: "task" };

  const problems = h("div", { role: "status" });
  const summary = h("p", { class: "summary" });
  const dead = h("p", {});
  const slider = h("input", { type: "range", id: "segment", min: "0", step: "1", oninput: () => choose(Number(slider.value)) });
  const said = h("output", { for: "segment", class: "segment" });
  const newest = h("button", { type: "button", onclick: () => follow() }, "Newest");
  const select = (name, label, options) =>
    h("label", {}, label, h("select", { onchange: (event) => ((choice[name] = event.target.value), arrange()) }, Object.entries(options).map(([value, text]) => h("option", { value }, text))));
  const colours = h("p", {});
  const controls = h(
    "div",
    { class: "fields" },
    h("label", { class: "wide" }, "Segment of the stream", slider),
    newest,
    select("order", "Experts", ORDERS),
    select("scale", "Colours", SCALES),
  );
  const now = heatmap({ name: "Tasks by experts: share of a task's uses", figure: "experts.cell", onMove: (row, column) => together(column) });
  const time = heatmap({ name: "Experts over time: share of all uses", figure: "experts.over_time", onMove: (row, column) => together(column) });
  const shared = heatmap({ name: "Tasks by tasks: overlap of their experts", figure: "experts.overlap" });
  const drift = heatmap({ name: "Drift of each task over time", figure: "experts.drift" });
  const overlapText = h("p", { class: "quiet" });
  const charts = ["load_skew", "drift", "dead"].map((name) => chartOf(name));
  const users = h("div", {});
  const busiest = table({
    caption: "The busiest experts of the segment",
    key: (row) => row.expert,
    columns: [
      { key: "expert", title: "Expert", head: true, numeric: true },
      { key: "share", title: "Share of all uses", numeric: true, format: (value) => format.percent(value, 2) },
      { key: "relative", title: "Times the mean", numeric: true, format: (value) => format.number(value, 2) },
      { key: "tasks", title: "Tasks that use it, most first", sort: false },
    ],
    empty: "no use yet",
  });
  const body = h(
    "div",
    { hidden: true },
    summary,
    dead,
    controls,
    h("p", {}, said),
    h("h2", {}, "Tasks × experts"),
    colours,
    now.element,
    users,
    h("h2", {}, "Experts over time"),
    h("p", { class: "quiet" }, "Share of all uses, a row for each segment, the newest on top; experts stand as above. ", scale("least", "busiest expert of any segment")),
    time.element,
    h("h2", {}, "Even, and steady?"),
    h("div", { class: "grid" }, charts.map(({ element }) => element)),
    h("div", { class: "two" },
      h("section", {}, h("h2", { title: "Jaccard index of two tasks' experts for the same instance, mean over the probe" }, "Who shares experts"), overlapText, shared.element),
      h("section", {}, h("h2", { title: "Share of a task's expert choices for the probe that changed from one segment to the next" }, "Drift of each task"), h("p", { class: "quiet" }, "Share of choices that changed since the segment before. ", scale("0", "1: all changed")), drift.element),
    ),
    h("h2", {}, "The busiest experts"),
    busiest.element,
  );
  const none = h("p", { hidden: true });
  root.append(problems, none, body);

  function chartOf(name) {
    const [text, hint] = {
      load_skew: ["Load skew", "Largest over mean load of the experts that can be chosen; 1 is even"],
      drift: ["Drift", "Share of expert choices for the probe that changed from one segment to the next, mean over the tasks"],
      dead: ["Dead experts", "Experts that no task used in a segment"],
    }[name];
    const readout = h("p", { class: "readout" });
    const chart = curveChart({ key: "experts", height: 110, isTime: false, onRange() {}, onWhole() {}, onPoint() {} });
    return { name, text, chart, readout, element: h("section", { class: "panel", "aria-label": text }, h("h3", { title: hint }, text), readout, chart.element) };
  }

  // ---- choices

  function follow() {
    step = null;
    ask();
  }

  function choose(n) {
    const segment = data?.segments[n];
    if (!segment) return;
    step = segment.from;
    show(said, spokenSegment(segment), segment.from);
    ask();
  }

  let queued = null;

  function ask() {
    clearTimeout(queued);
    queued = setTimeout(() => update().catch((error) => show(problems, error.message)), 60); // a slider moves fast
  }

  // ---- what the console says

  let turn = 0;

  async function update() {
    const mine = ++turn;
    const query = new URLSearchParams();
    if (step !== null) query.set("step", step);
    if (key && asked === step) query.set("seen", key);
    const wanted = step;
    const found = await context.api.get(`api/experts?${query}`);
    if (mine !== turn) return;
    asked = wanted;
    key = found.key;
    if (found.experts) data = found.experts;
    sayProblems(found);
    const has = data && data.num_experts > 0 && data.segments.length > 0;
    body.hidden = !has;
    none.hidden = has;
    if (!has) {
      const text = data && !data.num_experts ? "This ranker has no experts." : found.source.problem ? "" : "No segment of the stream yet.";
      return show(none, text);
    }
    saySummary(found);
    if (found.experts) arrange();
  }

  function sayProblems({ source }) {
    const text = `${source.kind === "lines" ? OF_LINES : ""}${source.problem ?? ""}${source.problem && source.since_ms ? ` (${format.since(source.since_ms)})` : ""}`;
    if (problems.dataset.shown === text) return;
    problems.dataset.shown = text;
    problems.replaceChildren(...(text ? [h("p", { class: source.kind === "lines" ? "warn" : "problem" }, text)] : []));
  }

  function saySummary({ report, source }) {
    const active = report?.active_experts ?? {};
    const routing = report?.routing ?? {};
    const part = (label, name, value, digits) => [h("span", { class: "quiet" }, `${label} `), h("strong", {}, figure(name, format.number(value, digits), value)), "  "];
    const from = { trainer: "the running trainer", folder: "the run, which has ended", lines: "the newest line" }[source.kind] ?? "";
    const children = [
      ...part("experts", "experts.num_experts", data.num_experts),
      ...(data.pools === null ? [] : part("pools", "experts.pools", data.pools)),
      ...(data.always_on ? part("always on", "experts.always_on", data.always_on) : []),
      ...part("active for an instance, mean", "active_experts.mean", active.mean ?? null, 2),
      ...part("at most", "active_experts.max", active.max ?? null),
      ...part("dead", "routing.dead", routing.dead ?? null),
      ...part("load skew", "routing.load_skew", routing.load_skew ?? null, 3),
      ...part("drift", "routing.drift", routing.drift ?? null, 3),
      ...part("overlap of tasks", "routing.overlap", routing.overlap ?? null, 3),
      h("span", { class: "quiet" }, `of ${from}, newest segment that has ended`),
    ];
    const text = children.map((child) => child.outerHTML ?? child).join("");
    if (summary.dataset.shown === text) return;
    summary.dataset.shown = text;
    summary.replaceChildren(...children);
  }

  // ---- the maps

  const chosen = () => data.segments.find(({ from }) => from === data.map.from) ?? data.segments.at(-1);

  function spokenSegment({ from, to, event_time_ms: ms, instances, is_open: open }) {
    const size = instances === null ? "" : `, ${format.number(instances)} instances`;
    return `steps ${format.number(from)} to ${format.number(to)}${size}, until ${format.utc(ms)} UTC of event time${open ? "; it goes on" : ""}`;
  }

  function arrange() {
    const segment = chosen();
    const E = data.num_experts;
    order = Array.from({ length: E }, (_, e) => e);
    if (choice.order === "load") order.sort((a, b) => segment.load_share[b] - segment.load_share[a] || a - b);
    slider.max = String(data.segments.length - 1);
    slider.value = String(data.segments.indexOf(segment));
    slider.setAttribute("aria-valuetext", spokenSegment(segment));
    newest.disabled = step === null;
    show(said, `${spokenSegment(segment)}${step === null ? " · follows the newest that has ended" : ""}`, segment.from);
    sayDead(segment);
    drawNow(segment);
    drawTime();
    drawShared();
    drawDrift();
    drawCharts();
    busiest.update(rowsOf(segment));
    sayUsers();
  }

  function sayDead(segment) {
    const list = segment.dead;
    const named = list.slice(0, MOST_NAMED).join(", ");
    const more = list.length > MOST_NAMED ? ` and ${list.length - MOST_NAMED} more` : "";
    dead.className = list.length ? "warn" : "quiet";
    show(dead, list.length ? `✕ Dead, used by no task in this segment: ${list.length === 1 ? "expert" : "experts"} ${named}${more}.` : "No expert of this segment is dead.", list.length);
  }

  const meanShare = () => 1 / Math.max(1, data.num_experts - (data.always_on ?? 0));

  function drawNow(segment) {
    const { shares, load } = data.map;
    const known = (row) => row.filter((value) => value !== null);
    const highest = shares.map((row) => Math.max(0, ...known(row)));
    const top = Math.max(0, ...highest);
    colours.replaceChildren("Share of a task's uses that goes to an expert. ", scale("least", choice.scale === "task" ? "the task's busiest expert" : format.percent(top)));
    const value = (t, column) => {
      const share = shares[t][order[column]];
      const most = choice.scale === "task" ? highest[t] : top;
      return share === null ? null : most ? share / most : 0;
    };
    const words = (t, column) => {
      const e = order[column];
      const share = shares[t][e];
      const name = data.tasks[t];
      if (share === null) return `${name}, expert ${e}: not among the experts that the task uses most`;
      if (!share) return `${name}, expert ${e}: not used${segment.dead.includes(e) ? ", and by no other task: dead" : ""}`;
      const rank = 1 + shares[t].filter((other) => other !== null && other > share).length;
      const counted = load ? `, ${format.number(load[t][e])} of ${format.number(segment.instances)} instances` : "";
      return `${name}, expert ${e}: ${format.percent(share, 2)} of the task's uses${counted}; its ${ordinal(rank)} busiest`;
    };
    now.draw({ rows: data.tasks, columns: order.map(String), value, words, exact: (t, column) => shares[t][order[column]], cell: [9, 22], dead: new Set(segment.dead.map((e) => order.indexOf(e))) });
  }

  function drawTime() {
    const segments = [...data.segments].reverse();
    const top = Math.max(1e-12, ...segments.filter(({ is_open: open }) => !open || data.segments.length === 1).flatMap(({ load_share: share }) => share));
    const names = segments.map(({ from, is_open: open }) => (open ? "open" : format.short(from)));
    const words = (row, column) => {
      const e = order[column];
      const share = segments[row].load_share[e];
      const relative = share ? `, ${format.number(share / meanShare(), 2)} times the mean` : ": dead in this segment";
      return `Expert ${e}, ${spokenSegment(segments[row])}: ${format.percent(share, 2)} of all uses${relative}`;
    };
    time.draw({
      rows: names,
      columns: order.map(String),
      value: (row, column) => Math.min(1, segments[row].load_share[order[column]] / top),
      exact: (row, column) => segments[row].load_share[order[column]],
      words,
      beside: data.tasks,
      cell: [5, 16],
    });
  }

  function drawShared() {
    const { tasks, overlap } = data;
    overlapText.replaceChildren(
      ...(overlap ? ["Overlap at the end of the newest segment that has ended. ", scale("0", "1: the same experts")] : ["Not known: no segment has ended, or nobody says it."]),
    );
    if (!overlap) {
      shared.draw({ rows: [], columns: [], value: () => null, exact: () => null, words: () => "", cell: [9, 22] });
      return;
    }
    shared.draw({
      rows: tasks,
      columns: tasks.map((_, t) => String(t + 1)),
      value: (a, b) => overlap[a][b],
      exact: (a, b) => overlap[a][b],
      words: (a, b) => (a === b ? `${tasks[a]} (column ${b + 1})` : `${tasks[a]} and ${tasks[b]} (column ${b + 1}): overlap ${format.number(overlap[a][b], 3)}`),
      cell: [8, 22],
      square: true,
    });
  }

  function drawDrift() {
    const ended = data.segments.filter(({ drift_of_tasks: values }) => values);
    drift.draw({
      rows: ended.length ? data.tasks : [],
      columns: ended.map(({ to }) => format.short(to)),
      value: (t, n) => ended[n].drift_of_tasks[t],
      exact: (t, n) => ended[n].drift_of_tasks[t],
      words: (t, n) => `${data.tasks[t]}, from the segment before to step ${format.number(ended[n].to)}: ${format.percent(ended[n].drift_of_tasks[t])} of its choices for the probe changed`,
      cell: [8, 22],
    });
  }

  function drawCharts() {
    const ended = data.segments.filter(({ is_open: open }) => !open);
    for (const { name, chart, readout, text } of charts) {
      const y = ended.map((segment) => (name === "dead" ? segment.dead.length : segment[name]));
      const last = y.findLast((value) => value !== null) ?? null;
      chart.draw({
        label: `${text} by segment: ${y.filter((value) => value !== null).length} segments, the newest ${last ?? "not known"}`,
        x: null,
        curves: [{ label: text, x: ended.map(({ to }) => to), y, colour: palette.css("--strong"), width: 2 }],
        marks: [],
        level: name === "load_skew" ? 1 : null,
        least: name === "dead" ? [0, 1] : null,
      });
      show(readout, `newest ${format.number(last, name === "dead" ? 0 : 3)} · over steps`, last);
    }
  }

  // Both maps of experts point at the same expert.
  function together(column) {
    if (now.at.column !== column) now.move(now.at.row, column, true);
    if (time.at.column !== column) time.move(time.at.row, column, true);
    sayUsers();
  }

  function usersOf(e) {
    return data.tasks
      .map((name, t) => ({ name, share: data.map.shares[t][e] }))
      .filter(({ share }) => share)
      .sort((a, b) => b.share - a.share);
  }

  function sayUsers() {
    const e = order[now.at.column];
    const all = usersOf(e);
    const list = all.slice(0, 8).map(({ name, share }) => `${name} ${format.percent(share, 2)}`).join(", ");
    const more = all.length > 8 ? ` and ${all.length - 8} more` : "";
    const text = all.length ? `Expert ${e} is used by ${all.length} of ${data.tasks.length} tasks: ${list}${more} of their uses.` : `Expert ${e} is used by no task that is known.`;
    show(users, text, e);
  }

  function rowsOf(segment) {
    return segment.load_share
      .map((share, expert) => ({ expert, share, relative: share / meanShare() }))
      .filter(({ share }) => share)
      .sort((a, b) => b.share - a.share)
      .slice(0, 10)
      .map((row) => ({ ...row, tasks: usersOf(row.expert).slice(0, 4).map(({ name, share }) => `${name} ${format.percent(share)}`).join(", ") }));
  }

  return {
    update,
    unmount() {
      clearTimeout(queued);
      for (const each of [now, time, shared, drift]) each.destroy();
      for (const { chart } of charts) chart.destroy();
    },
    keys: [
      { key: "n", label: "follow the newest segment", run: follow },
      { key: "[", label: "the segment before", run: () => choose(Number(slider.value) - 1) },
      { key: "]", label: "the segment after", run: () => choose(Number(slider.value) + 1) },
    ],
  };
}

function ordinal(n) {
  const last = n % 10;
  const ending = Math.floor(n / 10) % 10 === 1 ? "th" : (["th", "st", "nd", "rd"][last] ?? "th");
  return `${n}${ending}`;
}
