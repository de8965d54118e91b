// What the page Learning shows now: the choices, the answer of the console, and what follows from both.

import { isNumber } from "../../lib/curves.js";
import { badness } from "../../lib/metrics.js";
import { line } from "../../lib/palette.js";

export const AXES = { event_time: "event time", wall_time: "wall time", impressions: "impressions trained on" };

export function createView(choice) {
  const view = {
    choice, // {metric: "" for the console to choose, axis, together, show, order}
    words: "", // that the names of tasks have
    range: null, // [low, high] of x, or null for all
    rangeName: "1", // "newest 1/n", or "chosen"
    whole: null, // [low, high] of the whole run
    hidden: new Set(), // names of compared runs that are not shown
    asked: "", // the question that `curves` answer
    key: null, // of the curves
    curves: null,
    answer: null, // the newest one

    // The metric of binary tasks that is shown.
    metric: () => choice.metric || (view.curves?.metric ?? "gauc_windowed"),
    isTime: () => choice.axis !== "impressions",
    // The name of a task's figure: regression tasks have another one than binary tasks.
    figureOf: (task) => (task.kind === "regression" ? (view.curves?.of_regression ?? view.metric()) : view.metric()),
    runValue: (task, name) => view.answer.report?.tasks[task.name]?.[name] ?? null,
    // The newest point of a task's curve.
    lastOf: (task) => view.curves?.run.values[task.name]?.y.findLast(isNumber) ?? null,
    // The other runs that are drawn, each with its look.
    compared: () =>
      (view.curves?.compared ?? [])
        .map((run, n) => ({ ...run, look: line(n + 1) }))
        .filter((run) => run.is_beside && !view.hidden.has(run.name)),
    // What charts are drawn by.
    stamp: () => `${view.asked}|${view.key}|${[...view.hidden].join(",")}|${view.range?.join("-") ?? ""}`,

    // The tasks that are shown, in their order.
    tasks() {
      const words = view.words.trim().toLowerCase();
      const { show, order } = choice;
      const isShown = (task) =>
        task.name.toLowerCase().includes(words) && (show === "all" || task.density === show || task.kind === show);
      const tasks = (view.answer?.tasks ?? []).filter(isShown);
      const rate = (task) => task.base_rate ?? 2;
      const bad = (task) => {
        const name = view.figureOf(task);
        return badness(name, view.runValue(task, name) ?? view.lastOf(task));
      };
      if (order === "dense") tasks.sort((a, b) => rate(b) - rate(a));
      if (order === "rare") tasks.sort((a, b) => rate(a) - rate(b));
      if (order === "worst") tasks.sort((a, b) => bad(b) - bad(a));
      return tasks;
    },

    // "Newest quarter" goes on with the run.
    followEnd() {
      const { newest } = view.answer;
      if (!view.range || view.rangeName === "chosen" || !newest || !view.whole) return;
      const ends = { event_time: newest.event_time_ms, wall_time: newest.wall_ms, impressions: newest.trained };
      const at = ends[choice.axis];
      const [first, end] = view.whole;
      if (at === null || at <= end) return;
      view.whole = [first, at];
      view.range = [at - (at - first) / Number(view.rangeName), at];
      view.key = null;
    },
  };
  return view;
}
