// What is said of the experts: where it is from, the figures of the report, the dead and the busiest ones.

import { figure, h, replaceIfOther, show } from "../../lib/dom.js";
import { number, percent, since } from "../../lib/format.js";
import { table } from "../../lib/table.js";

const MOST_DEAD = 24; // that are named
const MOST_BUSY = 10;
const OF_LINES =
  "The history knows only the experts that each task uses most; a dot means not known. ";
const WHOSE = { trainer: "the running trainer", folder: "the run, which has ended", lines: "the newest line" };

// Gives {problems, summary, dead, busiest: table, sayProblems(source), saySummary(answer), saySegment()}.
export function createWords(view) {
  const problems = h("div", { role: "status" });
  const summary = h("p", { class: "summary" });
  const dead = h("p", {});
  const busiest = table({
    caption: "The busiest experts of the segment",
    key: (row) => row.expert,
    columns: [
      { key: "expert", title: "Expert", head: true, numeric: true },
      { key: "share", title: "Share of all uses", numeric: true, format: (value) => percent(value, 2) },
      { key: "relative", title: "÷ mean share", numeric: true, format: (value) => number(value, 2) },
      { key: "tasks", title: "Tasks that use it, most first", sort: false },
    ],
    empty: "no use yet",
  });

  function sayProblems({ kind, problem, since_ms: ms }) {
    const isOfLines = kind === "lines";
    const text = `${isOfLines ? OF_LINES : ""}${problem ?? ""}${problem && ms ? ` (${since(ms)})` : ""}`;
    replaceIfOther(problems, text ? [h("p", { class: isOfLines ? "warn" : "problem" }, text)] : []);
  }

  function saySummary({ report, source }) {
    const { num_experts: experts, pools, always_on: alwaysOn } = view.data;
    const active = report?.active_experts ?? {};
    const routing = report?.routing ?? {};
    const figures = [
      ["experts", "experts.num_experts", experts],
      ...(pools === null ? [] : [["pools", "experts.pools", pools]]),
      ...(alwaysOn ? [["always on", "experts.always_on", alwaysOn]] : []),
      ["active per example, mean", "active_experts.mean", active.mean, 2],
      ["max", "active_experts.max", active.max],
      ["dead", "routing.dead", routing.dead],
      ["load skew", "routing.load_skew", routing.load_skew, 3],
      ["drift", "routing.drift", routing.drift, 3],
      ["overlap of tasks", "routing.overlap", routing.overlap, 3],
    ];
    const said = figures.flatMap(([label, name, value = null, digits = 4]) => [
      h("span", { class: "quiet" }, `${label} `),
      h("strong", {}, figure(name, number(value, digits), value)),
      "  ",
    ]);
    const whose = h("span", { class: "quiet" }, `of ${WHOSE[source.kind] ?? ""}, newest finished segment`);
    replaceIfOther(summary, [...said, whose]);
  }

  function saySegment() {
    const segment = view.segment();
    sayDead(segment.dead);
    const rows = segment.load_share.map((share, expert) => ({ expert, share, relative: share / view.meanShare() }));
    const most = rows.filter(({ share }) => share).sort((a, b) => b.share - a.share);
    busiest.update(most.slice(0, MOST_BUSY).map((row) => ({ ...row, tasks: namesOf(row.expert) })));
  }

  const namesOf = (expert) =>
    view
      .usersOf(expert)
      .slice(0, 4)
      .map(({ name, share }) => `${name} ${percent(share)}`)
      .join(", ");

  function sayDead(list) {
    const more = list.length > MOST_DEAD ? ` and ${list.length - MOST_DEAD} more` : "";
    const named = `${list.length === 1 ? "expert" : "experts"} ${list.slice(0, MOST_DEAD).join(", ")}${more}`;
    const text = list.length
      ? `✕ Dead, used by no task in this segment: ${named}.`
      : "No dead expert in this segment: each is used by some task.";
    dead.className = list.length ? "warn" : "quiet";
    show(dead, text, list.length);
  }

  return { problems, summary, dead, busiest, sayProblems, saySummary, saySegment };
}
