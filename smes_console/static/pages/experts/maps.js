// The heat maps: tasks by experts, experts over time, tasks by tasks, and the drift of each task.

import { h, show } from "../../lib/dom.js";
import { number, percent, short } from "../../lib/format.js";
import { heatmap, scale } from "../../lib/heatmap.js";
import { shortSegment, spokenSegment } from "./view.js";

const MOST_NAMED = 8; // tasks that use an expert
const TASK_ROWS = [9, 22]; // height in pixels, least and most
const SEGMENT_ROWS = [5, 16];

// Gives {ofExperts, ofTasks: elements, draw(), destroy()}.
export function createMaps(view) {
  const point = (_, column) => together(column);
  const now = heatmap({ name: "Tasks by experts: share of a task's uses", figure: "experts.cell", onMove: point });
  const time = heatmap({ name: "Experts over time: share of all uses", figure: "experts.over_time", onMove: point });
  const shared = heatmap({ name: "Tasks by tasks: overlap of their experts", figure: "experts.overlap" });
  const drift = heatmap({ name: "Drift of each task over time", figure: "experts.drift" });
  const colours = h("p", {});
  const users = h("p", {});
  const overlap = h("p", { class: "quiet" });
  const quiet = (...children) => h("p", { class: "quiet" }, ...children);
  const rows = "Share of all uses; one row per segment, the newest on top; columns as above. ";
  const ofExperts = [
    h("h2", {}, "Tasks × experts"),
    colours,
    now.element,
    users,
    h("h2", {}, "Experts over time"),
    quiet(rows, scale("least", "busiest expert of any segment")),
    time.element,
  ];
  const jaccard = "Jaccard index of two tasks' experts for the same example, mean over a fixed sample (the probe)";
  const changed = "Share of a task's choices for a fixed sample (the probe) that changed since the segment before";
  const ofTasks = h(
    "div",
    { class: "two" },
    h("section", {}, h("h2", { title: jaccard }, "Experts shared by tasks"), overlap, shared.element),
    h(
      "section",
      {},
      h("h2", { title: changed }, "Drift of each task"),
      quiet("Share of choices that changed since the segment before. ", scale("0", "1: all changed")),
      drift.element,
    ),
  );

  // Both maps of experts point at the same expert.
  function together(column) {
    if (now.at.column !== column) now.move(now.at.row, column, true);
    if (time.at.column !== column) time.move(time.at.row, column, true);
    sayUsers();
  }

  function sayUsers() {
    const expert = view.order[now.at.column];
    const all = view.usersOf(expert);
    const named = all.slice(0, MOST_NAMED).map(({ name, share }) => `${name} ${percent(share, 2)}`);
    const more = all.length > MOST_NAMED ? ` and ${all.length - MOST_NAMED} more` : "";
    const count = `${all.length} of ${view.data.tasks.length} tasks`;
    const used = `Expert ${expert} is used by ${count}: ${named.join(", ")}${more} of their uses.`;
    show(users, all.length ? used : `Expert ${expert} is used by no task that is known.`, expert);
  }

  function drawNow() {
    const { tasks, map } = view.data;
    const { shares, load } = map;
    const segment = view.segment();
    const highest = shares.map((row) => Math.max(0, ...row.filter((share) => share !== null)));
    const top = Math.max(0, ...highest);
    const isByTask = view.choice.scale === "task";
    const most = isByTask ? "the task's busiest expert" : percent(top);
    colours.replaceChildren("Share of a task's uses that goes to an expert. ", scale("least", most));

    function words(t, column) {
      const expert = view.order[column];
      const share = shares[t][expert];
      const cell = `${tasks[t]}, expert ${expert}`;
      if (share === null) return `${cell}: not among the experts that the task uses most`;
      if (!share) return `${cell}: not used${segment.dead.includes(expert) ? ", and by no other task: dead" : ""}`;
      const place = ordinal(1 + shares[t].filter((other) => other > share).length);
      const counted = load ? `, ${number(load[t][expert])} of ${number(segment.instances)} instances` : "";
      return `${cell}: ${percent(share, 2)} of the task's uses${counted}; its ${place} busiest`;
    }

    const exact = (t, column) => shares[t][view.order[column]];
    now.draw({
      rows: tasks,
      columns: view.order.map(String),
      value: (t, column) => ofMost(exact(t, column), isByTask ? highest[t] : top),
      exact,
      words,
      cell: TASK_ROWS,
      dead: new Set(segment.dead.map((expert) => view.order.indexOf(expert))),
    });
  }

  function drawTime() {
    const segments = [...view.data.segments].reverse();
    const ended = segments.filter(({ is_open: isOpen }) => !isOpen); // an open one may have few instances
    const top = Math.max(0, ...(ended.length ? ended : segments).flatMap((segment) => segment.load_share));
    const exact = (row, column) => segments[row].load_share[view.order[column]];

    function words(row, column) {
      const share = exact(row, column);
      const relative = share ? `, ${number(share / view.meanShare(), 2)} times the mean` : ": dead in this segment";
      const cell = `Expert ${view.order[column]}, ${spokenSegment(segments[row])}`;
      return `${cell}: ${percent(share, 2)} of all uses${relative}`;
    }

    time.draw({
      rows: segments.map(shortSegment),
      columns: view.order.map(String),
      value: (row, column) => ofMost(exact(row, column), top),
      exact,
      words,
      beside: view.data.tasks,
      cell: SEGMENT_ROWS,
    });
  }

  function drawShared() {
    const { tasks, overlap: values } = view.data;
    const known = ["Overlap at the end of the newest finished segment. ", scale("0", "1: the same experts")];
    overlap.replaceChildren(...(values ? known : ["Not known: no segment has finished, or the trainer is away."]));

    function words(a, b) {
      if (a === b) return `${tasks[a]} (column ${b + 1})`;
      return `${tasks[a]} and ${tasks[b]} (column ${b + 1}): overlap ${number(values[a][b], 3)}`;
    }

    const value = (a, b) => values[a][b];
    const rows = values ? tasks : [];
    const columns = rows.map((_, t) => String(t + 1));
    shared.draw({ rows, columns, value, exact: value, words, cell: TASK_ROWS, square: true });
  }

  function drawDrift() {
    const { tasks, segments } = view.data;
    const ended = segments.filter((segment) => segment.drift_of_tasks);
    const value = (t, n) => ended[n].drift_of_tasks[t];

    function words(t, n) {
      const since = `${tasks[t]}, from the segment before to step ${number(ended[n].to)}`;
      return `${since}: ${percent(value(t, n))} of its choices for the probe changed`;
    }

    const columns = ended.map(({ to }) => short(to));
    drift.draw({ rows: ended.length ? tasks : [], columns, value, exact: value, words, cell: TASK_ROWS });
  }

  function draw() {
    for (const each of [drawNow, drawTime, drawShared, drawDrift, sayUsers]) each();
  }

  function destroy() {
    for (const each of [now, time, shared, drift]) each.destroy();
  }

  return { ofExperts, ofTasks, draw, destroy };
}

// A share of the largest one, for the colour.
function ofMost(share, most) {
  if (share === null || share === undefined) return null;
  return most ? Math.min(1, share / most) : 0;
}

function ordinal(n) {
  const isTeen = Math.floor(n / 10) % 10 === 1;
  const endings = { 1: "st", 2: "nd", 3: "rd" };
  return `${n}${(!isTeen && endings[n % 10]) || "th"}`;
}
