// What a person chooses: metric, x, part of the run, tasks and lines; the address remembers most of it.

import { sample } from "../../lib/curves.js";
import { h } from "../../lib/dom.js";
import { CHOICES, METRICS } from "../../lib/metrics.js";
import { line } from "../../lib/palette.js";
import { AXES } from "./view.js";

const OPTIONS = {
  metric: Object.fromEntries(CHOICES.map((name) => [name, METRICS[name].title])),
  axis: AXES,
  together: { 0: "≥ 50 positives", 1: "1 stretch", 4: "4 stretches", 16: "16 stretches", 64: "64 stretches" },
  show: { all: "all tasks", dense: "dense tasks", rare: "rare tasks", regression: "regression tasks" },
  order: { schema: "as in the schema", dense: "densest first", rare: "rarest first", worst: "worst first" },
};
const RANGES = { 1: "all", 2: "newest half", 4: "newest quarter", 10: "newest tenth", chosen: "as drawn" };

// The choices of the address, #/learning?metric=ne&…; others are as at first.
export function choicesOfAddress() {
  const given = new URLSearchParams(location.hash.split("?")[1] ?? "");
  const first = { metric: "", axis: "event_time", together: "0", show: "all", order: "schema" };
  return {
    ...first,
    ...Object.fromEntries([...given].filter(([name, value]) => OPTIONS[name] && value in OPTIONS[name])),
  };
}

// onAsk(): the console has to be asked; onArrange(): what is known is shown in another way.
// Gives {elements, chooseRange(name), zoom(low, high), say(), keys}.
export function createControls(view, { onAsk, onArrange }) {
  const { choice } = view;
  const known = new Set(); // compared runs

  function select(name, options, change) {
    const children = Object.entries(options).map(([value, text]) => h("option", { value }, text));
    const field = h("select", { name, onchange: () => change(field.value) }, children);
    if (name in choice) field.value = choice[name];
    return field;
  }

  const remember = (name, then) => (value) => {
    choice[name] = value;
    const chosen = Object.entries(choice).filter(([, each]) => each);
    history.replaceState(null, "", `#/learning?${new URLSearchParams(chosen)}`);
    then();
  };
  const metric = select("metric", OPTIONS.metric, remember("metric", onAsk));
  const axis = select(
    "axis",
    OPTIONS.axis,
    remember("axis", () => chooseRange("1")),
  );
  const together = select("together", OPTIONS.together, remember("together", onAsk));
  const part = select("range", RANGES, (value) => chooseRange(value));
  const shown = select("show", OPTIONS.show, remember("show", onArrange));
  const order = select("order", OPTIONS.order, remember("order", onArrange));
  const filter = h("input", {
    type: "search",
    size: 12,
    oninput: () => {
      view.words = filter.value;
      onArrange();
    },
  });
  const labelled = (text, field) => h("label", {}, text, field);
  const fields = h(
    "div",
    { class: "fields" },
    labelled("Metric", metric),
    labelled("x axis", axis),
    labelled("One point per", together),
    labelled("Range", part),
    labelled("Tasks", shown),
    labelled("Order", order),
    labelled("Filter by name", filter),
  );
  const runs = h("fieldset", { class: "choices", hidden: true });

  function chooseRange(name) {
    if (name === "chosen") name = view.range ? "chosen" : "1"; // drawn with the pointer, not chosen here
    const whole = name === "1" ? null : view.whole;
    if (name !== "chosen") view.range = whole ? [whole[1] - (whole[1] - whole[0]) / Number(name), whole[1]] : null;
    view.rangeName = part.value = name;
    onAsk();
  }

  function zoom(low, high) {
    view.range = [low, high];
    view.rangeName = part.value = "chosen";
    onAsk();
  }

  // Boxes for the lines of other runs; earlier runs of the same folder are not shown at first.
  function say() {
    metric.value = view.metric();
    const all = (view.curves?.compared ?? []).filter((run) => run.lineage);
    for (const { name, kind } of all) {
      if (!known.has(name) && kind === "earlier") view.hidden.add(name);
      known.add(name);
    }
    runs.hidden = !all.length;
    const now = JSON.stringify(all.map(({ name }) => name));
    if (runs.dataset.shown === now) return;
    runs.dataset.shown = now;
    const own = h("span", {}, sample({ colour: "var(--strong)" }, 3), " this run");
    runs.replaceChildren(h("legend", {}, "Lines"), own, ...all.map(({ name }, n) => box(name, line(n + 1))));
  }

  function box(name, look) {
    const field = h("input", {
      type: "checkbox",
      checked: !view.hidden.has(name),
      onchange: () => {
        if (field.checked) view.hidden.delete(name);
        else view.hidden.add(name);
        onArrange();
      },
    });
    return h("label", {}, field, sample(look), ` ${name}`);
  }

  const next = (field) => () => {
    field.selectedIndex = (field.selectedIndex + 1) % field.options.length;
    field.dispatchEvent(new Event("change"));
  };
  const keys = [
    { key: "m", label: "next metric", run: next(metric) },
    { key: "x", label: "next x axis", run: next(axis) },
    { key: "a", label: "the whole run again", run: () => chooseRange("1") },
    { key: "/", label: "filter the tasks by name", run: () => filter.focus() },
  ];
  return { elements: [fields, runs], chooseRange, zoom, say, keys };
}
