// Flow: the way of an event from the service to the answers that know it, with what waits where.

import { stackedBar } from "../lib/bars.js";
import { figure, h, show } from "../lib/dom.js";
import { flowchart } from "../lib/flowchart.js";

export const title = "Flow";

// In reading order: on a phone they stand below each other.
const CARDS = [
  { id: "log", title: "Event log", hint: "Kafka or Redis Streams: impressions and feedback, as they arrive" },
  { id: "join", title: "Decode and join", hint: "Feedback is joined to its impression by event time" },
  { id: "batches", title: "Mini-batches", hint: "Examples in order, each trained on once" },
  { id: "trainer", title: "Trainer", hint: "Scores each batch first, then takes one step on it" },
  { id: "cuts", title: "Cuts", hint: "A cut: the weights at one step, about every second. Checkpoints are rarer" },
  { id: "store", title: "Snapshots in Redis", hint: "Published versions, which scorers load" },
  { id: "scorer", title: "Scorer", hint: "Scores with one version, and swaps in the next one while it serves" },
  { id: "service", title: "Your service", hint: "Requests scores, shows items, and sends impressions and feedback" },
  { id: "letters", title: "Dead letters", hint: "Events that were refused, kept with the reason" },
];
const LINKS = [
  { from: "service", to: "log", what: "events" },
  { from: "log", to: "join", what: "events" },
  { from: "join", to: "letters", what: "letters" },
  { from: "join", to: "batches", what: "examples" },
  { from: "batches", to: "trainer", what: "batches" },
  { from: "trainer", to: "cuts", what: "cuts" },
  { from: "cuts", to: "store", what: "versions" },
  { from: "store", to: "scorer", what: "swaps" },
  { from: "scorer", to: "service", what: "answers" },
];
const OVER_MS = 10_000;
const PARTS = {
  prepare: "rows for new ids, copies to the device",
  evaluate: "score by the frozen weights of the window",
  step: "forward, backward, update",
  results: "count scores and routing",
  duties: "cuts, checkpoints, publications that are waited for",
};

export function mount(root, { api, format, table }) {
  const { number, rate, duration, seconds, bytes, since } = format;
  const chart = flowchart({ cards: CARDS, links: LINKS });
  const rows = []; // functions that draw a figure from an answer of /api/flow
  const fill = {};

  // ---- figures of the cards: name of the figure, label, its value in an answer, its text, and what stands behind it

  function group(card, name) {
    fill[card] = h("dl");
    chart.card(card).body.append(...(name ? [h("h3", {}, name)] : []), fill[card]);
  }

  // `rare`: shown only where it is not 0.
  function row(card, name, label, value, text = number, { hint, more, rare } = {}) {
    if (!fill[card]) group(card);
    const shown = figure(name);
    const behind = more ? h("span", { class: "quiet" }) : null;
    const line = [h("dt", { title: hint }, label), h("dd", {}, shown, behind)];
    fill[card].append(...line);
    rows.push((data) => {
      const found = value(data) ?? null;
      show(shown, text(found, data), found);
      if (behind) show(behind, more(data) ?? "", null);
      if (rare) for (const each of line) each.classList.toggle("hidden", !found);
    });
  }

  const report = (section, key) => (data) => data.trainer.report?.[section]?.[key];
  const now = (section, key) => (data) => {
    const value = data.trainer.rates?.[section]?.[key];
    return value > 0 && key !== "waiting" ? ` ${rate(value)}` : "";
  };
  const ledger = (card, section, key, label, hint, rare) =>
    row(card, `${section}.${key}`, label, report(section, key), number, { hint, rare, more: now(section, key) });
  const unread = { gaps: "Removed from the log before they were read", unreadable: "Records of an unknown format" };
  const lost = (section) => {
    for (const [key, hint] of Object.entries(unread)) ledger("join", section, key, key, hint, true);
  };

  for (const topic of ["impressions", "feedback"]) {
    const places = (data) => Object.values(data.log.topics?.[topic]?.end ?? {});
    const end = (data) => (data.log.topics ? places(data).reduce((sum, each) => sum + each, 0) : null);
    const parts = (data) => Object.values(data.trainer.lag?.partitions?.[topic] ?? {});
    group("log", topic);
    row("log", `log.${topic}.end`, "records", end, number, {
      hint: "End offsets of the topic's partitions, added up. An Arrow record holds many events",
    });
    const behind = (data) => (parts(data).length ? parts(data).reduce((sum, each) => sum + each.records, 0) : null);
    row("log", `log.${topic}.unread`, "lag", (data) => behind(data) ?? data.log.unread?.[topic], number, {
      hint: "Records that the trainer (without one: the newest version) has not read",
    });
    const late = (data) => {
      const known = parts(data).map((each) => each.seconds).filter((each) => each !== null);
      return known.length ? Math.max(...known) : null;
    };
    row("log", `lag.${topic}.seconds`, "lag in time", late, seconds, {
      hint: "Event time between the next record to read and the newest one, of the partition that lags most",
    });
  }
  group("join", "impressions");
  ledger("join", "events", "impressions", "read");
  ledger("join", "events", "waiting", "waiting", "Their attribution window is open, or their mini-batch is not full");
  ledger("join", "events", "late", "late", "Their partition had passed their event time before they were read");
  ledger("join", "events", "duplicate", "duplicate");
  lost("events");
  for (const entity of ["user", "item"]) {
    const counted = (key) => (d) => d.trainer.report?.features?.[entity]?.[key];
    row("join", `features.${entity}.from_store`, `${entity} looked up`, counted("from_store"), number, {
      rare: true,
      hint: `Impressions without features of their ${entity}, for which the store had some`,
    });
    row("join", `features.${entity}.not_in_store`, `${entity} not found`, counted("not_in_store"), number, {
      rare: true,
      hint: `Impressions without features of their ${entity}, for which the store had none`,
    });
  }
  group("join", "feedback");
  ledger("join", "feedback", "received", "read");
  ledger("join", "feedback", "attached", "attached", "Feedback that found its impression in time");
  ledger("join", "feedback", "waiting", "waiting", "For its impression, or for the window of its impression to close");
  ledger("join", "feedback", "corrected", "corrected", "Arrived after its task's wait; trained on as a correction");
  ledger("join", "feedback", "late", "late", "Arrived after its impression was trained on, too late for a correction");
  ledger("join", "feedback", "orphaned", "orphaned", "Its impression did not arrive in time");
  ledger("join", "feedback", "duplicate", "duplicate");
  ledger("join", "feedback", "dropped", "dropped", "Of a task that only an old schema has", true);
  lost("feedback");
  row("batches", "rates.trained", "examples", (d) => d.trainer.rates?.events?.trained, rate, {
    hint: "Over the last ten seconds",
  });
  row("batches", "rates.steps", "mini-batches", (d) => d.trainer.rates?.steps, rate, { hint: "One step each" });
  row(
    "batches",
    "rates.examples_per_step",
    "batch size",
    (d) => (d.trainer.rates?.steps ? d.trainer.rates.events.trained / d.trainer.rates.steps : null),
    (value) => number(value, 1),
    { hint: "Mean over the last ten seconds" },
  );
  ledger("trainer", "events", "trained", "trained on");
  ledger("trainer", "events", "not_finite", "not finite", "Examples of steps whose loss or gradients were not finite");
  row("trainer", "step", "step", (d) => d.trainer.step, number, {
    more: (d) => (d.trainer.rates?.steps ? ` ${rate(d.trainer.rates.steps)}` : ""),
  });
  const partsOf = (d) => Object.entries(d.trainer.step_ms ?? {}).filter(([name]) => name in PARTS);
  const stepMs = (d) => (partsOf(d).length ? partsOf(d).reduce((sum, [, ms]) => sum + ms, 0) : null);
  row("trainer", "step_ms.read", "read and wait", (d) => d.trainer.step_ms?.read, duration, {
    hint: "Per step: reading, decoding, joining, and waiting for events",
  });
  row("trainer", "rows.in_use", "rows", report("rows", "in_use"), number, { hint: "Of the embedding table, for ids" });
  row("trainer", "memory.rss", "memory", (d) => d.trainer.memory?.rss, bytes, {
    more: (d) => (d.trainer.memory?.cuda ? `, ${bytes(d.trainer.memory.cuda)} on the GPU` : ""),
  });
  row("trainer", "step_ms", "step time", stepMs, duration, { hint: "The parts below, added up" });
  const steps = stackedBar("Step time by part");
  const stepList = h("ol", { class: "parts" });
  chart.card("trainer").body.append(steps.element, stepList);

  row("cuts", "cut_age_s", "newest cut", (d) => d.trainer.cut_age_s, (v) => (v === null ? "–" : `${seconds(v)} ago`));
  row("cuts", "checkpoint_age_s", "newest checkpoint", (d) => d.trainer.checkpoint_age_s, (v) =>
    v === null ? "–" : `${seconds(v)} ago`,
  );
  row("cuts", "snapshots.published", "published", report("snapshots", "published"));
  row("cuts", "gate.passed", "gate passed", report("gate", "passed"), number, {
    hint: "Cuts that the publish gate let through",
  });
  row("cuts", "gate.refused", "gate refused", report("gate", "refused"));
  const current = (key) => (d) => d.store.current?.[key];
  row("store", "store.version", "newest version", current("version"), number, {
    more: (d) => (d.store.current ? ` of ${d.store.current.lineage}` : ""),
  });
  row(
    "store",
    "store.age_ms",
    "its age",
    (d) => (d.store.current ? Math.max(0, d.at_ms - d.store.current.created_ms) : null),
    duration,
  );
  row("store", "snapshots.bytes_last", "its size", current("total_bytes"), bytes, {
    more: (d) => (d.store.current ? `, ${d.store.current.kind}` : ""),
  });
  row("store", "store.held", "held", (d) => d.store.held, number, { hint: "Kept aside by the publish gate" });
  row("store", "store.pinned", "pinned", (d) => d.store.pinned, (v) => (v === null ? "–" : v ? "yes" : "no"), {
    hint: "Whether an operator has pinned what is served",
  });
  const publisher = (d) => (d.store.problem ? null : (d.store.publisher?.name ?? "none"));
  row("store", "store.publisher", "publisher", publisher, (v) => v ?? "–", {
    hint: "The trainer that holds the lease",
  });
  row("scorer", "scorer.version", "version", (d) => d.scorer.version, number, {
    more: (d) => (d.scorer.lineage ? ` of ${d.scorer.lineage}` : ""),
  });
  row("scorer", "scorer.age_ms", "its age", (d) => d.scorer.snapshot_age_ms, duration);
  row("scorer", "scorer.requests", "requests", (d) => d.scorer.requests);
  row("scorer", "scorer.errors", "errors", (d) => d.scorer.errors);
  row("scorer", "scorer.waiting", "queue", (d) => d.scorer.waiting, number, {
    hint: "Requests that wait to be scored",
  });
  for (const key of ["p50", "p99"]) {
    row("scorer", `recent_latency_ms.${key}`, `latency ${key}`, (d) => d.scorer.recent_latency_ms?.[key], duration, {
      hint: "From a request's arrival to its answer, over the last ten seconds",
    });
  }
  row("service", "rates.requests", "score requests", (d) => asked(d), rate, {
    hint: "Scoring requests, over the last ten seconds",
  });
  row("service", "rates.impressions", "impressions", (d) => d.trainer.rates?.events?.impressions, rate, {
    hint: "Impressions, as the trainer reads them",
  });
  row("service", "rates.feedback", "feedback", (d) => d.trainer.rates?.feedback?.received, rate);
  row("letters", "letters.kept", "kept", (d) => d.letters.kept, number, {
    hint: "Records of the topic: letters, and notes on replays. Up to ten seconds old",
  });
  ledger("letters", "events", "dead_lettered", "impressions");
  ledger("letters", "feedback", "dead_lettered", "feedback");
  chart.card("letters").body.append(h("p", {}, h("a", { href: "#/letters" }, "List and replay them")));

  const asked = (d) => d.scorer.rates?.requests;

  // ---- rates of what is only counted, over the last ten seconds that this page has seen

  const recent = { published: null, swaps: null };
  const samples = [];

  function remember({ at_ms, trainer, scorer }) {
    const published = trainer.ended ? undefined : trainer.report?.snapshots?.published;
    samples.push({ at_ms, published, swaps: scorer.swaps });
    while (samples.length > 2 && samples[1].at_ms <= at_ms - OVER_MS) samples.shift();
    const [first, last] = [samples[0], samples.at(-1)];
    for (const name of Object.keys(recent)) {
      const more = last[name] - first[name]; // of a server that was started anew there are fewer
      recent[name] = last.at_ms > first.at_ms && more >= 0 ? (1000 * more) / (last.at_ms - first.at_ms) : null;
    }
  }

  // ---- freshness

  const whole = h("p", { class: "freshness" });
  const freshBar = stackedBar("Freshness by stage");
  const stages = table({
    caption: "From a feedback event's arrival to the first answer by a model that has trained on it. The means add up.",
    key: (each) => each.stage,
    empty: "no feedback has been counted yet",
    columns: [
      { key: "mark", title: "", sort: false },
      { key: "what", title: "stage", head: true, sort: false },
      ...["mean", "p50", "p99"].map((key) => ({
        key,
        title: key,
        numeric: true,
        sort: false,
        format: duration,
        figure: ({ stage }) => `freshness_stages_ms.${stage}.${key}`,
      })),
      { key: "why", title: "depends on", sort: false },
    ],
  });
  const freshP50 = figure("freshness_ms.p50");
  const freshP99 = figure("freshness_ms.p99");
  const known = h(
    "span", {}, "p50 ", freshP50, " · p99 ", freshP99,
  );
  const unknown = h("span", { class: "quiet" }, "No scorer has counted any feedback yet.");
  whole.append(known, unknown);

  const balance = h("p", { "data-figure": "conservation" });
  root.append(
    chart.element,
    balance,
    h("h2", { title: "How long it takes until answers know of a feedback event" }, "Freshness"),
    whole,
    freshBar.element,
    stages.element,
  );

  function drawFreshness({ scorer, stages: words }) {
    const figures = scorer.freshness_stages_ms ?? {};
    const lines = words.map(({ stage, what, why }, n) => ({ stage, what, why, mark: `${n + 1}`, ...figures[stage] }));
    const counted = Boolean(scorer.freshness_ms?.p50);
    show(freshP50, duration(scorer.freshness_ms?.p50 ?? null), scorer.freshness_ms?.p50);
    show(freshP99, duration(scorer.freshness_ms?.p99 ?? null), scorer.freshness_ms?.p99);
    freshBar.update(lines.map(({ what, mean, mark }) => ({ name: what, value: mean, mark })));
    for (const each of [known, freshBar.element, stages.element]) each.classList.toggle("hidden", !counted);
    unknown.classList.toggle("hidden", counted);
    stages.update(lines);
  }

  function drawBalance({ trainer }) {
    const wrong = trainer.unaccounted;
    balance.className = wrong?.length ? "problem" : "quiet";
    const well = trainer.ended
      ? "The run has ended; every event that it read is accounted for."
      : "Every event that was read is accounted for.";
    show(balance, !wrong ? "" : wrong.length ? `▲ Not accounted for: ${wrong.join("; ")}` : `✓ ${well}`, wrong?.length);
  }

  function drawParts({ trainer }) {
    const parts = partsOf({ trainer });
    steps.update(parts.map(([name, value], n) => ({ name, value, mark: `${n + 1}` })));
    steps.element.classList.toggle("hidden", !parts.length);
    if (stepList.children.length !== parts.length) {
      stepList.replaceChildren(
        ...parts.map(([name]) => h("li", { title: PARTS[name] }, `${name} `, figure(`step_ms.${name}`))),
      );
    }
    parts.forEach(([, ms], n) => show(stepList.children[n].querySelector("span"), duration(ms), ms));
  }

  function drawLinks(data) {
    const { events, feedback, steps: perS } = data.trainer.rates ?? {};
    const read = events ? events.impressions + feedback.received : null;
    const said = (value) => ({ rate: value ?? null, text: value === null || value === undefined ? "" : rate(value) });
    chart.rates({
      "service-log": said(read),
      "log-join": said(read),
      "join-batches": said(events?.trained),
      "join-letters": said(events ? events.dead_lettered + feedback.dead_lettered : null),
      "batches-trainer": said(perS),
      "trainer-cuts": said(recent.published),
      "cuts-store": said(recent.published),
      "store-scorer": said(recent.swaps),
      "scorer-service": said(asked(data)),
    });
  }

  function drawProblems({ trainer, log, letters, store, scorer }) {
    const away = ({ problem, since_ms }) => (problem ? [`▲ away ${since(since_ms)}`, problem] : [null]);
    const ofTrainer = trainer.ended ? ["▲ no trainer runs; this is of the run that has ended"] : away(trainer);
    for (const id of ["join", "batches", "trainer", "cuts"]) chart.card(id).problem(...ofTrainer);
    chart.card("log").problem(...away(log));
    chart.card("letters").problem(...away(letters));
    chart.card("store").problem(...away(store));
    chart.card("scorer").problem(...away(scorer));
  }

  return {
    async update() {
      const data = await api.get("api/flow");
      remember(data);
      for (const draw of rows) draw(data);
      drawParts(data);
      drawBalance(data);
      drawFreshness(data);
      drawLinks(data);
      drawProblems(data);
    },
    unmount: () => chart.destroy(),
  };
}
