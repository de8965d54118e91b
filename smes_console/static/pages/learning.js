// Metrics of each task over time: small charts, with other runs and the version in service, and the figures beside.

import { curveChart, curveOf, isNumber, nearest, placeText, usualOf } from "../lib/curves.js";
import { figure, h, show } from "../lib/dom.js";

export const title = "Learning";

const METRICS = {
  gauc_windowed: { title: "GAUC", level: 0.5, better: "higher is better", hint: "Windowed GAUC: AUC within a request or a user of one window, by frozen weights" },
  auc: { title: "AUC", level: 0.5, better: "higher is better", hint: "Share of pairs of a positive and a negative that are ordered rightly" },
  ne: { title: "NE", level: 1, better: "lower is better; 1 is the base rate", hint: "Normalised entropy: log loss divided by the entropy of the base rate" },
  calibration: { title: "calibration", level: 1, better: "1 is calibrated", hint: "Mean prediction divided by mean label" },
  ece: { title: "ECE", level: null, better: "lower is better", hint: "Expected calibration error over 20 groups of equal size" },
  base_rate: { title: "base rate", level: null, better: "of the stream, not of the model", hint: "Share of positives among the labelled examples" },
  xauc: { title: "XAUC", level: 0.5, better: "higher is better", hint: "Share of pairs that are ordered as their labels are" },
  mae: { title: "MAE", level: null, better: "lower is better", hint: "Mean absolute error, in the label's unit" },
  mean_bias: { title: "mean bias", level: 0, better: "0 is unbiased", hint: "Mean prediction minus mean label, in the label's unit" },
};
const CHOICES = ["gauc_windowed", "auc", "ne", "calibration", "ece", "base_rate"];
const AXES = { event_time: "event time", wall_time: "wall time", impressions: "impressions trained on" };
const TOGETHER = { 0: "≥ 50 positives", 1: "a stretch", 4: "4 stretches", 16: "16 stretches", 64: "64 stretches" };
const RANGES = { 1: "all", 2: "newest half", 4: "newest quarter", 10: "newest tenth", chosen: "as drawn" };
const ORDERS = { schema: "of the schema", dense: "densest first", rare: "rarest first", worst: "worst first" };
const SHOWN = { all: "all tasks", dense: "dense tasks", rare: "rare tasks", regression: "regression tasks" };
const MOST_MOVING = 4;
const HEIGHT = 130;

export function mount(root, context) {
  const { format, palette } = context;
  const choice = { metric: "gauc_windowed", axis: "event_time", together: "0", show: "all", order: "schema", ...ofAddress() };
  let range = null; // [low, high] of x, or null for all
  let rangeName = "1";
  let key = null; // of the curves that are drawn
  let asked = "";
  let curves = null;
  let answer = null;
  let words = ""; // that tasks' names have
  const hidden = new Set(); // names of compared runs that are not shown
  const known = new Set();
  const panels = new Map();

  // ---- what stands on the page

  const source = h("p", { class: "quiet", title: "A stretch ends when a window of the evaluation has closed, and also by the clock or by count where trainer.history says so" });
  const problems = h("div", { role: "status" });
  const select = (name, label, options, change) =>
    h("label", {}, label, h("select", { name, onchange: (event) => change(event.target.value) }, options.map(([value, text]) => h("option", { value }, text))));
  const remember = (name) => (value) => {
    choice[name] = value;
    toAddress();
    draw(name === "metric" || name === "axis" || name === "together");
  };
  const metric = select("metric", "Metric", CHOICES.map((each) => [each, METRICS[each].title]), remember("metric"));
  const axis = select("axis", "Over", Object.entries(AXES), (value) => {
    range = null;
    rangeName = "1";
    remember("axis")(value);
  });
  const together = select("together", "A point is", Object.entries(TOGETHER), remember("together"));
  const part = select("range", "Show", Object.entries(RANGES), chooseRange);
  const shown = select("show", "Tasks", Object.entries(SHOWN), remember("show"));
  const order = select("order", "Order", Object.entries(ORDERS), remember("order"));
  const filter = h("input", { type: "search", size: 12, "aria-label": "Only tasks whose name has", oninput: (event) => ((words = event.target.value), draw(false)) });
  const compare = h("fieldset", { class: "choices", hidden: true }, h("legend", {}, "Lines"));
  const controls = h("div", { class: "fields" }, metric, axis, together, part, shown, order, h("label", {}, "Name has", filter));

  const headline = context.table({
    caption: "Headline of the whole run: means over dense binary tasks, and over rare ones (base rate below 1 %)",
    key: (row) => row.name,
    columns: [
      { key: "name", title: "Tasks", head: true, sort: false },
      { key: "count", title: "How many", numeric: true, sort: false },
      ...["auc", "gauc_windowed", "ne"].map((each) => ({
        key: each,
        title: METRICS[each].title,
        hint: METRICS[each].hint,
        numeric: true,
        sort: false,
        format: (value) => format.number(value),
        figure: (row) => `headline.${row.name}.${each}`,
      })),
    ],
    empty: "no report",
  });
  headline.element.classList.add("headline");
  const stream = h("div", { class: "grid" });
  const grid = h("div", { class: "grid tasks" });
  const legend = h("p", { class: "quiet legend" });
  const none = h("p", { class: "quiet", hidden: true }, "No task is left by these choices.");
  const tables = h("div", {});
  root.append(
    source, problems, headline.element, controls, compare, legend, none, grid,
    h("h2", {}, "The stream and the routing"), stream,
    h("h2", {}, "Figures"), tables,
  );
  for (const [label, value] of [[metric, choice.metric], [axis, choice.axis], [together, choice.together], [shown, choice.show], [order, choice.order]]) {
    label.querySelector("select").value = value;
  }

  const moves = panelOf("Base rates", "Each against its own mean: the tasks that move most", true);
  const drift = panelOf("Drift of the routing", "Share of expert choices for the probe that changed from one segment to the next", false);
  stream.append(moves.element, drift.element);

  // Charts that cannot be seen are not drawn.
  const seen = new IntersectionObserver(
    (entries) => {
      for (const { target, isIntersecting } of entries) {
        const panel = target.panel;
        panel.isSeen = isIntersecting;
        if (isIntersecting && panel.next) flush(panel);
      }
    },
    { rootMargin: "2000px" },
  );
  for (const panel of [moves, drift]) observe(panel);

  function observe(panel) {
    panel.element.panel = panel;
    seen.observe(panel.element);
  }

  function flush(panel) {
    if (!panel.isSeen) return;
    if (!panel.chart || panel.isTime !== isTime()) {
      panel.chart?.destroy();
      panel.chart = curveChart({ key: "learning", height: HEIGHT, isTime: isTime(), onRange: zoom, onWhole: () => chooseRange("1"), onPoint: (x) => point(panel, x) });
      panel.isTime = isTime();
      panel.place.replaceChildren(panel.chart.element);
    }
    panel.chart.draw(panel.next);
    panel.next = null;
  }

  function panelOf(name, hint, small) {
    const place = h("div", { class: "chart-place" });
    const heading = h("h3", { title: hint }, name);
    const readout = h("p", { class: "readout" });
    return { element: h("section", { class: "panel", "aria-label": name }, heading, readout, place), heading, readout, place, isSeen: false, next: null, chart: null, small };
  }

  // ---- choices

  function ofAddress() {
    const given = new URLSearchParams(location.hash.split("?")[1] ?? "");
    const allowed = { metric: CHOICES, axis: Object.keys(AXES), together: Object.keys(TOGETHER), show: Object.keys(SHOWN), order: Object.keys(ORDERS) };
    return Object.fromEntries([...given].filter(([name, value]) => allowed[name]?.includes(value)));
  }

  function toAddress() {
    history.replaceState(null, "", `#/learning?${new URLSearchParams(choice)}`);
  }

  const isTime = () => choice.axis !== "impressions";

  function extent() {
    const x = whole ?? [];
    return x.length ? x : null;
  }
  let whole = null; // [low, high] of the whole run

  function chooseRange(value) {
    rangeName = value;
    part.querySelector("select").value = value;
    const all = extent();
    if (value === "chosen") return;
    range = value === "1" || !all ? null : [all[1] - (all[1] - all[0]) / Number(value), all[1]];
    draw(true);
  }

  function zoom(low, high) {
    range = [low, high];
    rangeName = "chosen";
    part.querySelector("select").value = "chosen";
    draw(true);
  }

  // Draw by new choices: at once what is known, and then what the console answers.
  function draw(ask) {
    if (ask) {
      key = null;
      update().catch((error) => show(problems, error.message));
    } else if (answer) arrange();
  }

  // ---- what the console says

  let turn = 0;

  async function update() {
    const mine = ++turn;
    const query = new URLSearchParams({ metric: choice.metric, axis: choice.axis, together: choice.together });
    if (range) {
      query.set("from", range[0]);
      query.set("to", range[1]);
    }
    const question = query.toString();
    if (key && question === asked) query.set("seen", key);
    const found = await context.api.get(`api/learning?${query}`);
    if (mine !== turn) return;
    answer = found;
    if (found.curves) {
      [key, asked, curves] = [found.key, question, found.curves];
      const { x } = curves.routing;
      if (!range && x.length) whole = [x[0], x.at(-1)];
      if (range && rangeName !== "chosen" && found.newest) followEnd(found.newest);
    }
    say();
    arrange();
  }

  // "Newest quarter" goes on with the run.
  function followEnd(newest) {
    const at = { event_time: newest.event_time_ms, wall_time: newest.wall_ms, impressions: newest.trained }[choice.axis];
    if (!whole || at === null || at <= whole[1]) return;
    whole = [whole[0], at];
    range = [at - (at - whole[0]) / Number(rangeName), at];
    key = null;
  }

  function say() {
    const { sources, newest, report, service } = answer;
    const { history } = sources;
    const parts = [];
    if (newest) {
      const from = history.kind === "trainer" ? `the trainer at ${history.where}` : history.where;
      parts.push(`${format.number(history.lines)} stretches from ${from}; lineage ${newest.lineage}, the newest ends at step `);
    }
    const line = newest
      ? [...parts, figure("newest.step", format.number(newest.step), newest.step), ", ", figure("newest.trained", format.number(newest.trained), newest.trained), ` impressions, event time ${format.utc(newest.event_time_ms)} UTC. `]
      : [];
    const reportAt = report
      ? [`Report of the ${sources.report.kind === "trainer" ? "running trainer" : "run, which has ended"} as of ${format.clock(sources.report.at_ms)} UTC, step `, figure("report.version", format.number(report.version), report.version), "."]
      : [];
    replaceIfOther(source, [...line, ...reportAt]);
    const [wrong, notes] = [[], []];
    for (const [name, { problem, since_ms: since }] of Object.entries(sources)) {
      const what = { history: "Curves", report: "Report", snapshots: "Version in service" }[name];
      if (problem && !(name === "report" && sources.history.kind)) wrong.push(`${what}: ${problem}${since ? ` (${format.since(since)})` : ""}`);
    }
    if (!report && sources.report.problem && sources.history.kind) wrong.push(`Figures of the whole run: ${sources.report.problem}`);
    for (const each of curves?.compared ?? []) {
      if (each.problem) wrong.push(`Baseline ${each.name}: ${each.problem}`);
      else if (!each.is_beside && each.lineage) notes.push(`${each.name} has no part of the ${AXES[choice.axis]} axis in common with this run: its curve is not drawn.`);
    }
    for (const { name, difference } of curves?.compared ?? []) {
      if (difference?.windows) notes.push(`GAUC is not compared with ${name}: it is by ${format.number(difference.windows[1])} windows there and by ${format.number(difference.windows[0])} here, over the same impressions.`);
    }
    if (service && !service.is_of_run) notes.push(`Version in service ${service.lineage}:${service.version} is of another run than these curves.`);
    replaceIfOther(problems, [...wrong.map((text) => h("p", { class: "problem" }, text)), ...notes.map((text) => h("p", { class: "quiet" }, text))]);
    sayLegend(service);
    sayCompared();
    sayFigures();
  }

  function sayLegend(service) {
    const said = METRICS[choice.metric];
    const regression = curves?.of_regression ? ` Regression tasks: ${METRICS[curves.of_regression].title}, ${METRICS[curves.of_regression].better}.` : " Regression tasks have none.";
    const changed = (curves?.run.lineage_changes ?? []).slice(-3).map(({ x, lineage }) => `${placeText(x, isTime())} → ${lineage}`).join("; ");
    const gaps = curves?.run.gaps ?? [];
    const gap = gaps.at(-1);
    const lost = gap ? ` The lines are interrupted ${gaps.length === 1 ? "once" : `${gaps.length} times`}, the last time before ${placeText(gap.x, isTime())}${gap.missing ? `: ${format.number(gap.missing)} stretches were not written` : ""}.` : "";
    const texts = [
      `${said.title}: ${said.better}.${regression}`,
      service && service.x !== null ? ` ▼ cut of the version in service, ${service.lineage}:${service.version}.` : "",
      lost,
      changed ? ` ┆ lineage changed: ${changed}.` : "",
      " Drag over a chart to zoom all; double click shows all again.",
    ];
    show(legend, texts.join(""));
    legend.title = said.hint;
  }

  function sayCompared() {
    const all = (curves?.compared ?? []).filter((each) => each.lineage);
    for (const { name, kind } of all) {
      if (!known.has(name) && kind === "earlier") hidden.add(name);
      known.add(name);
    }
    const boxes = all.map(({ name }, n) =>
      h("label", {}, h("input", { type: "checkbox", checked: !hidden.has(name), onchange: (event) => ((event.target.checked ? hidden.delete(name) : hidden.add(name)), arrange()) }), sample(palette.line(n + 1)), ` ${name}`),
    );
    compare.hidden = !boxes.length;
    const now = JSON.stringify(all.map(({ name }) => name));
    if (compare.dataset.shown === now) return;
    compare.dataset.shown = now;
    compare.replaceChildren(h("legend", {}, "Lines"), h("span", {}, sample({ colour: "var(--strong)", dash: [] }, 3), " this run"), ...boxes);
  }

  function sample({ colour, dash }, width = 2) {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    for (const [name, value] of Object.entries({ width: 28, height: 8, "aria-hidden": "true" })) svg.setAttribute(name, value);
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    path.setAttribute("d", "M0 4H28");
    path.style.stroke = colour;
    path.style.strokeWidth = width;
    path.style.strokeDasharray = dash.join(" ");
    svg.append(path);
    return svg;
  }

  function replaceIfOther(element, children) {
    const now = children.map((child) => child.outerHTML ?? child).join("|");
    if (element.dataset.shown === now) return;
    element.dataset.shown = now;
    element.replaceChildren(...children);
  }

  // ---- the small charts

  const figureOf = (task) => (task.kind === "regression" ? (curves?.of_regression ?? choice.metric) : choice.metric);

  function wanted() {
    const words_ = words.trim().toLowerCase();
    const tasks = (answer?.tasks ?? []).filter(
      (task) => (!words_ || task.name.toLowerCase().includes(words_)) && (choice.show === "all" || task.density === choice.show || task.kind === choice.show),
    );
    const rate = (task) => task.base_rate ?? 2;
    if (choice.order === "dense") tasks.sort((a, b) => rate(b) - rate(a));
    if (choice.order === "rare") tasks.sort((a, b) => rate(a) - rate(b));
    if (choice.order === "worst") tasks.sort((a, b) => badness(b) - badness(a));
    return tasks;
  }

  function badness(task) {
    const value = runValue(task, figureOf(task)) ?? lastOf(task);
    if (value === null) return -Infinity;
    const { title: name } = METRICS[figureOf(task)];
    if (name === "calibration") return Math.abs(Math.log(Math.max(value, 1e-9)));
    if (name === "mean bias") return Math.abs(value);
    return ["GAUC", "AUC", "XAUC", "base rate"].includes(name) ? -value : value;
  }

  const runValue = (task, name) => answer.report?.tasks[task.name]?.[name] ?? null;
  const text = (name, value) => (name === "base_rate" ? format.percent(value, 2) : format.number(value));

  function arrange() {
    const tasks = wanted();
    none.hidden = tasks.length > 0 || !answer?.tasks.length;
    const elements = tasks.map((task) => {
      if (!panels.has(task.name)) {
        const panel = { ...panelOf(task.name, "", false), task };
        panels.set(task.name, panel);
        observe(panel);
      }
      const panel = panels.get(task.name);
      panel.task = task;
      fill(panel);
      return panel.element;
    });
    const same = elements.length === grid.children.length && elements.every((each, n) => grid.children[n] === each);
    if (!same) grid.replaceChildren(...elements);
    fillStream();
  }

  function compared() {
    return (curves?.compared ?? []).map((each, n) => ({ ...each, look: palette.line(n + 1) })).filter((each) => each.is_beside && !hidden.has(each.name));
  }

  function fill(panel) {
    const { task } = panel;
    const name = figureOf(task);
    const kind = task.kind === "regression" ? "regression" : task.density === null ? "binary" : `${task.density}, ${format.percent(task.base_rate, task.base_rate < 0.01 ? 2 : 1)}`;
    replaceIfOther(panel.heading, [task.name, h("span", { class: "quiet kind" }, ` ${kind}`)]);
    if (panel.at === undefined || panel.at === null) sayValues(panel);
    if (!curves || panel.drawn === stamp()) return;
    panel.drawn = stamp();
    const own = curveFrom(curves.run, task.name);
    panel.together = own ? curves.run.grids[curves.run.values[task.name].grid].newest : 1;
    panel.curves = [
      ...(own ? [{ label: "this run", ...own, colour: palette.css("--strong"), width: 2 }] : []),
      ...compared().flatMap(({ name: label, look, ...run }) => {
        const curve = curveFrom(run, task.name);
        return curve ? [{ label, ...curve, ...look }] : [];
      }),
    ];
    const marks = curves.run.lineage_changes.map(({ x }) => ({ x, kind: "lineage" }));
    if (answer.service) marks.push({ x: answer.service.x, kind: "service" });
    const { title: said, level } = METRICS[name];
    panel.next = { label: spoken(panel, said), x: range, curves: panel.curves, marks, level };
    const outside = outsideOf(panel.curves);
    panel.outside = outside ? ` · ${outside} outside of the chart` : "";
    sayValues(panel);
    flush(panel);
  }

  // What curves are drawn by.
  const stamp = () => `${asked}|${key}|${[...hidden].join(",")}|${range?.join("-") ?? ""}`;

  function curveFrom(run, task) {
    const values = run.values[task];
    return values ? curveOf(run.grids[values.grid], values.y) : null;
  }

  // The newest point of a task's curve.
  const lastOf = (task) => curves?.run.values[task.name]?.y.findLast(isNumber) ?? null;

  function outsideOf(curves_) {
    const usual = usualOf(curves_);
    return usual ? curves_.flatMap(({ y }) => y).filter((value) => isNumber(value) && (value < usual[0] || value > usual[1])).length : 0;
  }

  function spoken(panel, said) {
    const [own] = panel.curves;
    const values = (own?.y ?? []).filter(isNumber);
    if (!values.length) return `${said} of ${panel.task.name}: no value yet`;
    const [low, high] = [Math.min(...values), Math.max(...values)];
    return `${said} of ${panel.task.name} over ${AXES[choice.axis]}: ${values.length} points from ${low} to ${high}, the newest ${values.at(-1)}`;
  }

  function sayValues(panel) {
    const { task } = panel;
    const name = figureOf(task);
    const together_ = panel.together ?? 1;
    const last = lastOf(task);
    const run = runValue(task, name);
    replaceIfOther(panel.readout, [
      `${METRICS[name].title}, newest ${together_ === 1 ? "stretch" : `${together_} stretches`} `,
      h("strong", {}, figure(`newest.${task.name}.${name}`, text(name, last), last)),
      " · whole run ", figure(`panel.${task.name}.${name}`, text(name, run), run),
      panel.outside ?? "",
    ]);
  }

  // The values below the pointer, in all charts.
  function point(panel, x) {
    panel.at = x;
    if (x === null) {
      if (panel.task) sayValues(panel);
      else if (panel.say) panel.say();
      return;
    }
    const found = (panel.curves ?? []).map((curve) => ({ curve, at: nearest(curve, x) })).filter(({ at }) => at);
    const name = panel.task ? figureOf(panel.task) : null;
    const place = found.length ? placeText(found[0].at.x, isTime()) : "";
    show(panel.readout, `${place} ${found.map(({ curve, at }) => `${curve.label} ${name ? text(name, at.value) : format.number(at.value)}`).join(" · ")}`);
    panel.readout.dataset.shown = "";
  }

  function fillStream() {
    if (!curves || moves.drawn === stamp()) return;
    moves.drawn = stamp();
    const moving = Object.entries(curves.base_rates.tasks).sort(([, a], [, b]) => b.spread - a.spread).slice(0, MOST_MOVING);
    moves.curves = moving.map(([name, { y, rate }], n) => ({
      label: name,
      x: curves.base_rates.x,
      y: curveOf(curves.base_rates, y).y.map((value) => (isNumber(value) ? value / rate : value)),
      width: 1.5,
      ...palette.line(n),
    }));
    moves.next = { label: "Base rates over time, each divided by its mean", x: range, curves: moves.curves, marks: [], level: 1 };
    moves.say = () =>
      replaceIfOther(moves.readout, [
        "Rate ÷ mean rate; spread 1 is chance: ",
        ...moving.flatMap(([name, { spread }], n) => [sample(palette.line(n)), ` ${name} ${format.number(spread, 1)} `]),
      ]);
    moves.say();
    flush(moves);
    const values = curves.routing.drift ?? [];
    const last = values.findLast(isNumber) ?? null;
    drift.curves = [
      { label: "drift", ...curveOf(curves.routing, values), colour: palette.css("--strong"), width: 2 },
    ];
    drift.next = { label: `Drift of the routing over time, newest ${last ?? "not known"}`, x: range, curves: drift.curves, marks: [], level: null };
    drift.say = () => {
      const { dead, load_skew: skew, active_mean: active } = answer.newest?.routing ?? {};
      replaceIfOther(drift.readout, [
        last === null ? "No drift: no experts, or a first segment. " : `Newest ${format.number(last, 3)} · dead experts ${format.number(dead)} · load skew ${format.number(skew, 2)} · ${format.number(active, 2)} active. `,
        h("a", { href: "#/experts" }, "Experts"),
      ]);
    };
    drift.say();
    flush(drift);
  }

  // ---- the tables

  let figures = null;
  let columnsOf = "";

  function sayFigures() {
    const { report, tasks, service } = answer;
    const rows = ["dense", "rare"].filter((name) => report?.headline?.[name]).map((name) => ({ name, count: report.headline[name].tasks.length, ...report.headline[name] }));
    headline.element.hidden = !rows.length;
    headline.update(rows);
    const against = (curves?.compared ?? []).filter((each) => each.difference).map((each) => each.name);
    const wantedColumns = JSON.stringify([against, choice.metric]);
    if (!figures || columnsOf !== wantedColumns) {
      columnsOf = wantedColumns;
      figures = figuresTable(against);
      tables.replaceChildren(figures.element);
    }
    figures.update(
      tasks.map((task) => {
        const name = figureOf(task);
        const row = { name: task.name, kind: task.density ?? task.kind, ...(report?.tasks[task.name] ?? {}) };
        row.newest = lastOf(task);
        row.served = service?.tasks?.[task.name]?.[name === "gauc_windowed" ? "auc" : name] ?? null;
        against.forEach((other, n) => {
          row[`against${n}`] = curves.compared.find((each) => each.name === other)?.difference?.tasks[task.name] ?? null;
        });
        return row;
      }),
    );
  }

  function figuresTable(against) {
    const column = (name) => ({
      key: name,
      title: METRICS[name]?.title ?? name,
      hint: METRICS[name]?.hint,
      numeric: true,
      format: (value) => text(name, value),
      figure: (row) => `tasks.${row.name}.${name}`,
    });
    const said = METRICS[choice.metric].title;
    return context.table({
      caption: `Tasks: the whole run, the newest point of the curve (${said}, or its like for regression tasks), the version in service when it was cut, and the difference to other runs`,
      key: (row) => row.name,
      columns: [
        { key: "name", title: "Task", head: true },
        { key: "kind", title: "Kind" },
        { key: "positives", title: "Positives", numeric: true, format: (value) => format.number(value), figure: (row) => `tasks.${row.name}.positives` },
        ...["base_rate", "auc", "gauc_windowed", "ne", "calibration", "ece", "xauc", "mae", "mean_bias"].map(column),
        { key: "newest", title: `${said}, newest point`, numeric: true, format: (value) => format.number(value), figure: (row) => `newest.tasks.${row.name}` },
        { key: "served", title: `${choice.metric === "gauc_windowed" ? "AUC" : said}, in service`, hint: "Of the run up to the cut; a cut has no GAUC", numeric: true, format: (value) => format.number(value), figure: (row) => `service.tasks.${row.name}` },
        ...against.map((other, n) => ({
          key: `against${n}`,
          title: `${said} − ${other}`,
          hint: "This run minus the other one, over the impressions that both have trained on",
          numeric: true,
          format: (value) => (value === null || value === undefined ? format.DASH : `${value >= 0 ? "+" : "−"}${format.number(Math.abs(value))}`),
          figure: (row) => `against.${other}.${row.name}`,
        })),
      ],
      empty: "no task yet: the run has no window and no report",
    });
  }

  const next = (label, names, name) => () => {
    const at = names[(names.indexOf(choice[name]) + 1) % names.length];
    const field = label.querySelector("select");
    field.value = at;
    field.dispatchEvent(new Event("change"));
  };

  return {
    update,
    unmount() {
      seen.disconnect();
      for (const panel of [...panels.values(), moves, drift]) panel.chart?.destroy();
    },
    keys: [
      { key: "m", label: "next metric", run: next(metric, CHOICES, "metric") },
      { key: "x", label: "next x axis", run: next(axis, Object.keys(AXES), "axis") },
      { key: "a", label: "the whole run again", run: () => chooseRange("1") },
      { key: "/", label: "filter the tasks by name", run: () => filter.focus() },
    ],
  };
}
