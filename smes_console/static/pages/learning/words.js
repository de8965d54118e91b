// What is said of the curves: where they are from, what is away, and what lines and marks mean.

import { placeText } from "../../lib/curves.js";
import { figure, h, replaceIfOther, show } from "../../lib/dom.js";
import { clock, number, since, utc } from "../../lib/format.js";
import { METRICS } from "../../lib/metrics.js";
import { AXES } from "./view.js";

const STRETCH =
  "A stretch ends when a window of the evaluation has closed, and by clock or count where trainer.history says so";

// Gives {source, problems, legend, say()}.
export function createWords(view) {
  const source = h("p", { class: "quiet", title: STRETCH });
  const problems = h("div", { role: "status" });
  const legend = h("p", { class: "quiet legend" });

  function say() {
    replaceIfOther(source, [...ofLines(), ...ofReport()]);
    const wrong = wrongs().map((text) => h("p", { class: "problem" }, text));
    const noted = notes().map((text) => h("p", { class: "quiet" }, text));
    replaceIfOther(problems, [...wrong, ...noted]);
    show(legend, meaning());
    legend.title = METRICS[view.metric()].hint;
  }

  function ofLines() {
    const { newest, sources } = view.answer;
    if (!newest) return [];
    const { kind, where, lines } = sources.history;
    const from = kind === "trainer" ? `the trainer at ${where}` : where;
    return [
      `${number(lines)} stretches of the stream from ${from}; lineage ${newest.lineage}, the newest ends at step `,
      figure("newest.step", number(newest.step), newest.step),
      ", ",
      figure("newest.trained", number(newest.trained), newest.trained),
      ` impressions, event time ${utc(newest.event_time_ms)} UTC. `,
    ];
  }

  function ofReport() {
    const { report, sources } = view.answer;
    if (!report) return [];
    const whose = sources.report.kind === "trainer" ? "running trainer" : "run, which has ended";
    return [
      `Report of the ${whose} as of ${clock(sources.report.at_ms)} UTC, step `,
      figure("report.version", number(report.version), report.version),
      ".",
    ];
  }

  function wrongs() {
    const { history, report, snapshots } = view.answer.sources;
    const with_ = (what, { problem, since_ms: ms }) => `${what}: ${problem}${ms ? ` (${since(ms)})` : ""}`;
    return [
      ...(history.problem ? [with_("Curves", history)] : []),
      ...(report.problem && !history.kind ? [with_("Report", report)] : []),
      ...(snapshots.problem ? [with_("Version in service", snapshots)] : []),
      ...(view.curves?.compared ?? [])
        .filter((run) => run.problem)
        .map((run) => `Baseline ${run.name}: ${run.problem}`),
    ];
  }

  function notes() {
    const { sources, report, service } = view.answer;
    const texts = [];
    if (!report && sources.report.problem && sources.history.kind) {
      texts.push(`Figures of the whole run: ${sources.report.problem}`);
    }
    for (const { name, lineage, is_beside: isBeside, problem, difference } of view.curves?.compared ?? []) {
      if (!problem && lineage && !isBeside) {
        texts.push(`${name} was not trained in this part of the ${AXES[view.choice.axis]}: its curve is not drawn.`);
      }
      if (difference?.windows) {
        const [here, there] = difference.windows.map((count) => number(count));
        texts.push(
          `GAUC is not compared with ${name}: over the same impressions it has ${there} windows, this run ${here}.`,
        );
      }
    }
    if (service && !service.is_of_run) {
      texts.push(`The version in service, ${service.lineage}:${service.version}, is of another run than these curves.`);
    }
    return texts;
  }

  function meaning() {
    const { title, better } = METRICS[view.metric()];
    const other = METRICS[view.curves?.of_regression];
    const { service } = view.answer;
    const isTime = view.isTime();
    const texts = [`${title}: ${better}.`];
    if (!view.choice.metric && view.metric() === "auc") {
      texts.push("Shown because GAUC has too few points yet: one for each closed window of the evaluation.");
    }
    texts.push(other ? `Regression tasks: ${other.title}, ${other.better}.` : "Regression tasks have none.");
    if (service && service.x !== null)
      texts.push(`▼ cut of the version in service, ${service.lineage}:${service.version}.`);
    const gaps = view.curves?.run.gaps ?? [];
    if (gaps.length) {
      const { x, missing } = gaps.at(-1);
      const times = gaps.length === 1 ? "once" : `${number(gaps.length)} times`;
      const lost = missing ? `: ${number(missing)} stretches were not written` : "";
      texts.push(`The curves are interrupted ${times}, the last time before ${placeText(x, isTime)}${lost}.`);
    }
    const changes = (view.curves?.run.lineage_changes ?? []).slice(-3);
    if (changes.length) {
      const named = changes.map(({ x, lineage }) => `${placeText(x, isTime)} → ${lineage}`);
      texts.push(`┆ lineage changed: ${named.join("; ")}.`);
    }
    texts.push("Drag over a chart to zoom all charts; double-click to zoom out.");
    return texts.join(" ");
  }

  return { source, problems, legend, say };
}
