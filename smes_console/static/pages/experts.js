// Which task uses which expert, over time: heat maps that pointer and arrow keys read, and the figures in words.

import { h, show } from "../lib/dom.js";
import { createCharts } from "./experts/charts.js";
import { createMaps } from "./experts/maps.js";
import { createView, spokenSegment } from "./experts/view.js";
import { createWords } from "./experts/words.js";

export const title = "Experts";

const ORDERS = { number: "by number", load: "busiest first" };
const SCALES = { task: "scaled for each task", all: "one scale for all tasks" };
const CALM_MS = 60; // a slider moves fast

export function mount(root, context) {
  const view = createView();
  const words = createWords(view);
  const maps = createMaps(view);
  const charts = createCharts(view);

  const slider = h("input", { type: "range", id: "segment", min: "0", step: "1" });
  slider.addEventListener("input", () => choose(Number(slider.value)));
  const said = h("output", { for: "segment", class: "segment" });
  const newest = h("button", { type: "button", onclick: follow }, "Follow newest");

  function select(name, label, options) {
    const children = Object.entries(options).map(([value, text]) => h("option", { value }, text));
    const field = h("select", {}, children);
    field.addEventListener("change", () => {
      view.choice[name] = field.value;
      arrange();
    });
    return h("label", {}, label, field);
  }

  const body = h(
    "div",
    { hidden: true },
    words.summary,
    words.dead,
    h(
      "div",
      { class: "fields" },
      h("label", { class: "wide" }, "Segment of the stream", slider),
      newest,
      select("order", "Experts", ORDERS),
      select("scale", "Colours", SCALES),
    ),
    h("p", {}, said),
    maps.ofExperts,
    h("h2", {}, "Load balance and drift"),
    charts.element,
    maps.ofTasks,
    h("h2", {}, "The busiest experts"),
    words.busiest.element,
  );
  const none = h("p", { hidden: true });
  root.append(words.problems, none, body);

  // ---- choices

  function follow() {
    view.step = null;
    ask();
  }

  function choose(n) {
    const segment = view.data?.segments[n];
    if (!segment) return;
    view.step = segment.from;
    show(said, spokenSegment(segment), segment.from);
    ask();
  }

  let queued = null;

  function ask() {
    clearTimeout(queued);
    queued = setTimeout(() => update().catch((error) => show(words.problems, error.message)), CALM_MS);
  }

  // ---- what the console says

  let turn = 0; // of the newest question: answers to others come too late
  let key = null; // of what is shown
  let asked = null; // the step that was asked for

  async function update() {
    const mine = ++turn;
    const { step } = view;
    const query = new URLSearchParams();
    if (step !== null) query.set("step", step);
    if (key && asked === step) query.set("seen", key);
    const answer = await context.api.get(`api/experts?${query}`);
    if (mine !== turn) return;
    [asked, key] = [step, answer.key];
    if (answer.experts) view.data = answer.experts;
    words.sayProblems(answer.source);
    const { data } = view;
    const has = Boolean(data?.num_experts && data.segments.length);
    body.hidden = !has;
    none.hidden = has;
    if (has) {
      words.saySummary(answer);
      if (answer.experts) arrange();
    } else if (data && !data.num_experts) show(none, "This ranker has no experts.");
    else show(none, answer.source.problem ? "" : "No segment of the stream yet.");
  }

  function arrange() {
    const { segments } = view.data;
    const segment = view.segment();
    const text = spokenSegment(segment);
    view.arrange();
    slider.max = String(segments.length - 1);
    slider.value = String(segments.indexOf(segment));
    slider.setAttribute("aria-valuetext", text);
    newest.disabled = view.step === null;
    show(said, `${text}${view.step === null ? " · the newest finished segment, followed" : ""}`, segment.from);
    words.saySegment();
    maps.draw();
    charts.draw();
  }

  return {
    update,
    unmount() {
      clearTimeout(queued);
      maps.destroy();
      charts.destroy();
    },
    keys: [
      { key: "n", label: "follow the newest segment", run: follow },
      { key: "[", label: "the segment before", run: () => choose(Number(slider.value) - 1) },
      { key: "]", label: "the segment after", run: () => choose(Number(slider.value) + 1) },
    ],
  };
}
