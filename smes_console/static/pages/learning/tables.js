// The figures of the report and of the curves as tables: what a chart shows, for reading and for a screen reader.

import { h } from "../../lib/dom.js";
import { DASH, number } from "../../lib/format.js";
import { METRICS, textOf } from "../../lib/metrics.js";
import { table } from "../../lib/table.js";

const OF_REPORT = ["base_rate", "auc", "gauc_windowed", "ne", "calibration", "ece", "xauc", "mae", "mean_bias"];

// Gives {headline, figures, say()}.
export function createTables(view) {
  const headline = table({
    caption: "Headline of the whole run: means over dense binary tasks, and over rare ones (base rate below 1 %)",
    key: (row) => row.name,
    columns: [
      { key: "name", title: "Tasks", head: true, sort: false },
      { key: "count", title: "Count", numeric: true, sort: false },
      ...["auc", "gauc_windowed", "ne"].map((name) => ({
        ...columnOf(name, (row) => `headline.${row.name}.${name}`),
        sort: false,
      })),
    ],
  });
  headline.element.classList.add("headline");
  headline.element.hidden = true;
  const figures = h("div", {});
  let tasks = null;
  let columns = "";

  function columnOf(name, figure) {
    const { title, hint } = METRICS[name];
    return { key: name, title, hint, numeric: true, format: (value) => textOf(name, value), figure };
  }

  function say() {
    const { report } = view.answer;
    const lines = ["dense", "rare"].filter((name) => report?.headline?.[name]);
    headline.element.hidden = !lines.length;
    headline.update(
      lines.map((name) => ({ name, count: report.headline[name].tasks.length, ...report.headline[name] })),
    );
    const against = (view.curves?.compared ?? []).filter((run) => run.difference);
    const wanted = JSON.stringify([against.map((run) => run.name), view.metric()]);
    if (columns !== wanted) {
      columns = wanted;
      tasks = tableOf(against.map((run) => run.name));
      figures.replaceChildren(tasks.element);
    }
    tasks.update(view.answer.tasks.map((task) => rowOf(task, against)));
  }

  function rowOf(task, against) {
    const { report, service } = view.answer;
    const name = view.figureOf(task);
    const differences = against.map((run, n) => [`against${n}`, run.difference.tasks[task.name] ?? null]);
    return {
      name: task.name,
      kind: task.density ?? task.kind,
      ...(report?.tasks[task.name] ?? {}),
      newest: view.lastOf(task),
      served: service?.tasks?.[task.name]?.[name === "gauc_windowed" ? "auc" : name] ?? null,
      ...Object.fromEntries(differences),
    };
  }

  function tableOf(against) {
    const metric = view.metric();
    const { title } = METRICS[metric];
    const plain = { numeric: true, format: (value) => number(value) };
    const difference = (value) => (value === null ? DASH : `${value >= 0 ? "+" : "−"}${number(Math.abs(value))}`);
    const beside = against.length ? ", and the difference to other runs" : "";
    return table({
      caption: `Each task: the whole run, the newest point of its curve, the version in service at its cut${beside}`,
      key: (row) => row.name,
      columns: [
        { key: "name", title: "Task", head: true },
        { key: "kind", title: "Kind" },
        { key: "positives", title: "Positives", ...plain, figure: (row) => `tasks.${row.name}.positives` },
        ...OF_REPORT.map((name) => columnOf(name, (row) => `tasks.${row.name}.${name}`)),
        {
          key: "newest",
          title: `${title}, newest point`,
          hint: "Regression tasks: the metric of their chart",
          ...plain,
          figure: (row) => `newest.tasks.${row.name}`,
        },
        {
          key: "served",
          title: `${metric === "gauc_windowed" ? "AUC" : title}, in service`,
          hint: "Over the run up to the cut. A cut has no GAUC",
          ...plain,
          figure: (row) => `service.tasks.${row.name}`,
        },
        ...against.map((other, n) => ({
          key: `against${n}`,
          title: `${title} − ${other}`,
          hint: "This run minus the other one, over the impressions that both have trained on",
          numeric: true,
          format: difference,
          figure: (row) => `against.${other}.${row.name}`,
        })),
      ],
      empty: "no task yet: the run has no stretch and no report",
    });
  }

  return { headline, figures, say };
}
