// Try it: a user, some items and a context; what the version in service answers, and from what.

import { figure, h, show } from "../lib/dom.js";

export const title = "Try it";

const INTEGER = /^-?(0|[1-9]\d*)(\.0)?$/; // what the scorer takes for an integer; any other text is hashed
const NO_SCHEMA = "No schema is configured; give --schema to `smes console`.";
const SOURCES = { request: "the request", store: "feature store", derived: "computed", missing: "missing" };

export function mount(root, context) {
  const { api, format, table, palette } = context;
  let form = null; // what a request may hold
  let fields = []; // {name, kind, input}
  let answered = null;

  const problem = h("p", { class: "problem", role: "status" });
  const user = h("input", { id: "try-user", required: true, autocomplete: "off" });
  const items = h("textarea", { id: "try-items", rows: 3, required: true });
  const contextPart = h("div", { class: "fields" });
  const note = h("p", { class: "quiet", role: "status" });
  const score = h("button", { type: "submit", class: "primary" }, "Score");
  const example = h("button", { type: "button", onclick: fillIn }, "Take an example from the log");
  example.title = "User, items and context of the newest impressions in the event log";
  const result = h("div", { "aria-live": "polite" });
  const curl = h("pre", { tabindex: "0", "aria-label": "The same request by curl" });
  const copy = h("button", { type: "button", onclick: copyCurl }, "Copy");

  const element = h(
    "form",
    { class: "try" },
    h(
      "div",
      { class: "fields" },
      h("label", {}, "User", user),
      h("label", { class: "wide" }, "Items, separated by spaces, commas or lines", items),
    ),
    h("details", { class: "context" }, h("summary", {}, "Context features of the request"), contextPart),
    h("div", { class: "buttons" }, score, example),
  );
  element.addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });
  element.addEventListener("input", drawCurl);
  root.append(
    problem,
    element,
    note,
    result,
    h("h2", {}, "The same request with curl"),
    h("p", { class: "quiet" }, "POST /v1/score returns the scores alone; this is what your service calls."),
    curl,
    h("div", { class: "buttons" }, copy),
  );

  async function update() {
    const answer = await api.get("api/try_it");
    show(problem, answer.problem ? `${answer.problem}, ${format.since(answer.since_ms)}` : "", null);
    const known = JSON.stringify([answer.schema, answer.url, answer.needs_token]);
    if (form?.known !== known) {
      form = { ...answer, known };
      drawFields();
      drawCurl();
    }
  }

  function drawFields() {
    const before = Object.fromEntries(fields.map(({ name, input }) => [name, input.value]));
    const features = form.schema?.context ?? [];
    fields = features.map((feature) => ({ ...feature, input: inputOf(feature, before[feature.name] ?? "") }));
    contextPart.replaceChildren(
      ...fields.map(({ name, input, kind, history }) =>
        h("label", {}, `${name} · ${history ? "history" : kind}`, input),
      ),
      ...(features.length ? [] : [h("p", { class: "quiet" }, form.schema ? "The schema has none." : NO_SCHEMA)]),
    );
    example.disabled = !form.schema;
  }

  function inputOf({ kind, max_length: most, accompanies }, value) {
    const list = `up to ${most} ids, separated by commas`;
    const hint = { id: "an id: an integer or a text", numeric: "a number" }[kind] ?? list;
    const title = accompanies ? `${hint}; as many as ${accompanies} has` : hint;
    return h("input", { autocomplete: "off", placeholder: "none", title, value });
  }

  async function fillIn() {
    note.textContent = "";
    const failed = (error) => ({ problem: error.message });
    const { problem: away, example: found } = await api.get("api/try_it/example").catch(failed);
    if (!found) {
      note.textContent = away;
      return;
    }
    user.value = found.user_id;
    items.value = found.items.join(" ");
    for (const { name, input } of fields) input.value = found.context[name] ?? "";
    note.textContent = `Impression of ${format.utc(found.event_time_ms)} UTC, with more items of the newest ones.`;
    drawCurl();
  }

  // ---- the request as text: ids have 64 bits, a browser's numbers 53

  function request() {
    const parts = [`"user_id": ${id(user.value.trim())}`, `"items": [${split(items.value).map(id).join(", ")}]`];
    const given = fields
      .map(({ name, kind, input }) => [name, valueOf(kind, input.value.trim())])
      .filter(([, text]) => text !== null)
      .map(([name, text]) => `${JSON.stringify(name)}: ${text}`);
    if (given.length) parts.push(`"context": {${given.join(", ")}}`);
    return `{${parts.join(", ")}}`;
  }

  function drawCurl() {
    const url = form?.url ?? "http://HOST:PORT";
    const lines = [`curl -s ${url.replace(/\/$/, "")}/v1/score`, `  -H 'content-type: application/json'`];
    if (form?.needs_token) lines.push(`  -H "authorization: Bearer $TOKEN"`);
    lines.push(`  -d '${request().replaceAll("'", "'\\''")}'`);
    show(curl, lines.join(" \\\n"), null);
  }

  async function copyCurl() {
    await navigator.clipboard?.writeText(curl.textContent).catch(() => {});
    note.textContent = "The curl command was copied.";
  }

  async function ask() {
    score.disabled = true;
    note.textContent = "";
    try {
      answered = await api.post("api/try_it/explain", { request: request() });
      draw(answered);
    } catch (error) {
      result.replaceChildren(h("p", { class: "problem", role: "alert" }, error.message));
    } finally {
      score.disabled = false;
    }
  }

  // ---- the answer

  function draw({ answer, took_ms: took }) {
    const tasks = Object.keys(answer.items[0]?.scores ?? {});
    const place = new Map(answer.ranking.map((item, n) => [String(item), n + 1]));
    const rows = answer.items.map((item, n) => ({
      ...item,
      n,
      place: place.get(String(item.item_id)) ?? null,
      ...Object.fromEntries(tasks.map((task) => [`task:${task}`, item.scores[task]])),
    }));
    const scores = table({
      caption: "Scores of each item. Enter or a click shows the item's features and experts.",
      key: (row) => row.n,
      onSelect: (row) => drawItem(answer, row.n),
      columns: [
        { key: "item_id", title: "Item", head: true, format: String },
        { key: "place", title: "Rank", hint: "Place in the order that the answer recommends", numeric: true },
        ...tasks.map((task) => ({
          key: `task:${task}`,
          title: task,
          numeric: true,
          format: (value) => format.number(value, 4),
          figure: (row) => `score:${row.item_id}:${task}`,
        })),
      ],
    });
    scores.update(rows);
    result.replaceChildren(
      h(
        "p",
        { class: "lead" },
        "Answered by version ",
        figure("answer.version", `${answer.lineage}:${answer.version}`, `${answer.lineage}:${answer.version}`),
        ` in ${format.duration(took)}`,
        answer.arm && answer.arm !== "main" ? `, by the arm ${answer.arm}` : "",
      ),
      scores.element,
      h("div", { id: "try-item" }),
    );
    if (rows.length) drawItem(answer, rows.find((row) => row.place === 1)?.n ?? 0);
  }

  function drawItem(answer, n) {
    const item = answer.items[n];
    result.querySelector("#try-item").replaceChildren(
      h("h2", {}, `Item ${item.item_id}`),
      h(
        "div",
        { class: "grid halves" },
        h("div", { class: "panel" }, featuresOf(answer, item)),
        h("div", { class: "panel" }, expertsOf(item)),
      ),
    );
  }

  function featuresOf(answer, item) {
    const groups = { user: answer.features.user, context: answer.features.context, item: item.features };
    const rows = Object.entries(groups).flatMap(([of, named]) =>
      Object.entries(named).map(([name, { value, source }]) => ({ of, name, value, source })),
    );
    const missing = rows.filter((row) => row.source === "missing").length;
    const features = table({
      caption: `${format.number(rows.length - missing)} features found, ${format.number(missing)} missing`,
      key: (row) => `${row.of} ${row.name}`,
      rowClass: (row) => (row.source === "missing" ? "missing" : ""),
      empty: "the schema has no features",
      columns: [
        { key: "name", title: "Feature", head: true },
        {
          key: "source",
          title: "Source",
          format: (source) => `${source === "missing" ? "✕ " : ""}${SOURCES[source]}`,
          figure: (row) => `feature:${row.of}:${row.name}`,
        },
        { key: "value", title: "Value", sort: false, format: valueText },
        { key: "of", title: "Of" },
      ],
    });
    features.update(rows);
    return [features.element];
  }

  function expertsOf(item) {
    if (!item.experts) return [h("p", { class: "quiet" }, "The model in service has no experts.")];
    const rows = Object.entries(item.experts).map(([task, weights]) => ({ task, weights }));
    const experts = table({
      caption: "Which experts answered each task, and with what weight",
      key: (row) => row.task,
      columns: [
        { key: "task", title: "Task", head: true },
        { key: "weights", title: "Experts", sort: false, format: chips, figure: (row) => `experts:${row.task}` },
      ],
    });
    experts.update(rows);
    return [experts.element];
  }

  // A weight as a length beside its number.
  function chips(weights) {
    return h(
      "span",
      { class: "chips" },
      weights.map(([expert, weight]) => {
        const bar = h("span", { class: "weight", "aria-hidden": "true" });
        bar.style.width = `${Math.max(2, 40 * Math.min(1, Math.max(0, weight)))}px`;
        bar.style.background = palette.line(expert).colour;
        const text = `${expert} · ${format.percent(weight, 0)}`;
        return h("span", { class: "chip", title: `expert ${expert}: weight ${weight}` }, bar, text);
      }),
    );
  }

  return { update, unmount() {} };
}

const split = (text) => text.split(/[\s,]+/).filter(Boolean);
const id = (text) => (INTEGER.test(text) ? text.replace(/\.0$/, "") : JSON.stringify(text));

function valueOf(kind, text) {
  if (!text) return null;
  if (kind === "id") return id(text);
  if (kind === "numeric") return Number.isFinite(Number(text)) ? String(Number(text)) : JSON.stringify(text);
  const ids = text.split(",").map((each) => each.trim());
  return `[${ids.filter(Boolean).map(id).join(", ")}]`;
}

function valueText(value) {
  if (value === null || value === undefined) return "–";
  if (Array.isArray(value)) return value.join(", ") || "–";
  return typeof value === "number" ? String(Number(value.toPrecision(7))) : value; // numbers have 32 bits
}
