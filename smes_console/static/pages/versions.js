// Versions: the snapshots that can be loaded, which of them is in service and why, and deciding about it.

import { confirm, open, refuse, whoAndWhy } from "../lib/dialog.js";
import { figure, h, show } from "../lib/dom.js";

export const title = "Versions";

const EVERY_MS = 2000;
const GATE = { passed: "passed", refused: "refused", promoted: "refused, promoted", none: "no gate" };
// Figures are of all that the lineage trained on up to a version; each example was scored before it was learned from.
const FIGURES = {
  auc: ["AUC", "Share of pairs of a positive and a negative that the scores put in the right order; 0.5 is chance"],
  ne: ["NE", "Normalized entropy: log loss over that of always saying the base rate; below 1 is better than that"],
  calibration: ["Calibration", "Mean score over mean label; 1 is right"],
  xauc: ["XAUC", "Share of pairs of examples whose predicted values are in the right order"],
  mae: ["MAE", "Mean absolute error, in the unit of the label"],
};

export function mount(root, context) {
  const { api, format, table } = context;
  let of = "dense";
  let found = null;
  let looked = 0;

  // ---- what is in service

  const serves = figure("versions.serves");
  const why = h("span");
  const current = figure("versions.current");
  const publisher = h("span", { class: "quiet" });
  const said = h("p", { role: "status", class: "good" });
  const problems = h("div", { role: "status" });
  const buttons = {
    unpin: h("button", { type: "button", disabled: true, onclick: () => decide("unpin") }, "Unpin…"),
    rollback: h(
      "button",
      { type: "button", class: "danger", disabled: true, onclick: () => decide("rollback") },
      "Roll back…",
    ),
    promote: h(
      "button",
      { type: "button", hidden: true, onclick: () => decide("promote") },
      "Promote the newest held version…",
    ),
  };
  buttons.unpin.title = "Follow what the trainer publishes again";
  buttons.rollback.title = "Go back to the version published before the one in service";

  // ---- the list

  const select = h("select", { onchange: choose });
  const counted = figure("versions.count", "–", null, { class: "quiet" });
  const listPart = h("div");
  let list = null;

  const arms = table({
    caption: "Arms: other models beside the main one, and how well each served",
    key: (row) => row.name,
    columns: [
      { key: "name", title: "Arm", head: true },
      { key: "kind", title: "Kind", hint: "split: answers a share of the users; shadow: is only measured" },
      { key: "share", title: "Share", numeric: true, format: (v) => format.percent(v) },
      { key: "version", title: "Version", numeric: true, format: (v) => String(v ?? format.DASH) },
      { key: "state", title: "State" },
      { key: "impressions", title: "Impressions with final labels", numeric: true, format: (v) => format.number(v) },
      {
        key: "auc",
        title: "Mean AUC",
        hint: "Of the served scores, mean over its binary tasks",
        numeric: true,
        format: (v) => format.number(v),
      },
    ],
  });
  const armsPart = h("section", { hidden: true }, h("h2", {}, "Arms"), arms.element);

  const decisions = table({
    caption: "Decisions about serving, the newest first",
    key: (row) => row.number,
    empty: "no decision yet: scorers serve the newest published version",
    columns: [
      { key: "at_ms", title: "When (UTC)", format: format.utc, head: true },
      { key: "by", title: "Who" },
      { key: "action", title: "What" },
      { key: "name", title: "Version" },
      { key: "before", title: "In service before" },
      { key: "why", title: "Why" },
    ],
  });

  root.append(
    problems,
    h("p", { class: "lead" }, "In service: ", serves, " ", why),
    h("p", { class: "quiet" }, "Newest published: ", current, ". ", publisher),
    h("div", { class: "buttons" }, Object.values(buttons)),
    said,
    h("div", { class: "fields" }, h("label", {}, "Metrics of ", select), counted),
    listPart,
    armsPart,
    h("h2", {}, "Decisions"),
    decisions.element,
  );

  function choose() {
    of = select.value;
    looked = 0;
    update();
  }

  async function update() {
    if (Date.now() - looked < EVERY_MS - 100) return;
    looked = Date.now();
    const answer = await api.get(`api/versions?of=${encodeURIComponent(of)}`);
    if (answer.problem && found?.versions?.length) answer.problem += "; below is what was there before";
    if (!answer.problem) found = answer;
    draw(answer);
  }

  function draw(answer) {
    const notes = [answer.problem && `${answer.problem}, ${format.since(answer.since_ms)}`, ...(answer.problems ?? [])];
    const texts = notes.filter(Boolean);
    if (problems.dataset.shown !== texts.join("\n")) {
      problems.dataset.shown = texts.join("\n");
      problems.replaceChildren(...texts.map((text) => h("p", { class: "problem" }, text)));
    }
    const shown = found ?? answer;
    const scorer = answer.scorer;
    const differs = scorer.version !== null && shown.serves && `${scorer.lineage}:${scorer.version}` !== shown.serves;
    show(serves, shown.serves ?? "nothing", shown.serves);
    const last = shown.decisions?.[0];
    const reason = last?.why || "no reason given";
    const pin = shown.pinned && last ? `pinned ${format.since(last.at_ms)} by ${last.by}: ${reason}` : "";
    const lag = differs ? `the scorer still answers with ${scorer.lineage}:${scorer.version}` : "";
    show(why, [pin, lag].filter(Boolean).join(" · "), null);
    show(current, shown.current ?? "none", shown.current);
    const { publisher: who } = shown;
    show(publisher, who ? `Publisher: ${who.name}, ${format.since(who.since_ms)}.` : "Nobody publishes now.", null);
    buttons.unpin.disabled = !shown.pinned;
    buttons.rollback.disabled = !shown.serves;
    const held = (shown.versions ?? []).some((row) => row.is_held);
    buttons.promote.hidden = !held;
    const rows = (shown.versions ?? []).map((row) => ({ ...row, ...(row.figures ?? {}), state: stateOf(row) }));
    show(counted, rows.length === 1 ? "1 version" : `${format.number(rows.length)} versions`, rows.length);
    drawTasks(shown.tasks ?? []);
    drawList(rows);
    const ofArms = scorer.arms.filter((arm) => arm.kind || scorer.arms.length > 1);
    armsPart.hidden = !ofArms.length;
    arms.update(ofArms.map(armRow));
    decisions.update(shown.decisions ?? []);
  }

  function drawTasks(tasks) {
    if (select.dataset.tasks === tasks.join("\n")) return;
    select.dataset.tasks = tasks.join("\n");
    const own = tasks.map((name) => option(`task:${name}`, name));
    select.replaceChildren(option("dense", "dense tasks"), option("rare", "rare tasks"), ...own);
    select.value = of;
  }

  function drawList(rows) {
    const isRegression = rows.some((row) => row.xauc != null);
    const ofOne = isRegression ? ["xauc", "mae"] : ["auc", "ne", "calibration"];
    const figures = of.startsWith("task:") ? ofOne : ["auc", "ne"];
    if (listPart.dataset.figures !== figures.join()) {
      listPart.dataset.figures = figures.join();
      list = makeList(figures);
      listPart.replaceChildren(list.element);
    }
    list.update(rows);
  }

  function makeList(figures) {
    return table({
      caption: "Versions that can be loaded, the newest first. Enter or a click opens one.",
      key: (row) => row.name,
      onSelect: (row) => details(row.name),
      rowClass: (row) => (row.serves ? "serves" : row.rolled_back ? "dropped" : row.is_held ? "aside" : ""),
      empty: "no version was published yet",
      columns: [
        {
          key: "version",
          title: "Version",
          head: true,
          numeric: true,
          format: String,
          figure: (row) => `version:${row.name}`,
        },
        { key: "state", title: "State", hint: "In service, pinned, current, held, rolled back" },
        ...figures.map((key) => ({
          key,
          title: FIGURES[key][0],
          hint: FIGURES[key][1],
          numeric: true,
          format: (v) => format.number(v),
          figure: (row) => `${key}:${row.name}`,
        })),
        { key: "published_ms", title: "Published (UTC)", format: format.utc },
        { key: "gate", title: "Gate", hint: "What the publish gate said of it", format: (v) => GATE[v] },
        { key: "kind", title: "Kind", hint: "full: all weights; delta: what changed since the version before" },
        { key: "total_bytes", title: "Size", numeric: true, format: format.bytes },
        {
          key: "base_bytes",
          title: "Base",
          hint: "Size of the full payload that is stored beside a delta",
          numeric: true,
          format: format.bytes,
        },
        {
          key: "event_time_ms",
          title: "Trained up to (UTC)",
          hint: "Event time that training had reached",
          format: format.utc,
        },
        { key: "lineage", title: "Lineage", hint: "One uninterrupted history of weights" },
      ],
    });
  }

  // ---- one version

  async function details(name) {
    const row = found?.versions.find((each) => each.name === name);
    if (!row) return;
    const body = h("div", {}, h("p", { class: "quiet" }, "…"));
    const act = (action) => () => {
      element.close();
      decide(action, row);
    };
    const element = open(`Version ${name}`, [
      body,
      h(
        "div",
        { class: "buttons" },
        row.is_held ? null : h("button", { type: "button", onclick: act("pin") }, "Pin…"),
        row.is_held || row.serves
          ? null
          : h("button", { type: "button", class: "danger", onclick: act("rollback") }, "Roll back to it…"),
        h("button", { type: "button", onclick: act("promote") }, "Promote…"),
        h("button", { type: "button", onclick: () => element.close() }, "Close"),
      ),
    ]);
    try {
      const place = `lineage=${encodeURIComponent(row.lineage)}&version=${row.version}`;
      body.replaceChildren(...pageOf(await api.get(`api/versions/one?${place}`), row));
    } catch (error) {
      body.replaceChildren(h("p", { class: "problem" }, error.message));
    }
  }

  function pageOf({ problem, manifest, loads, loads_problem }, row) {
    if (problem) return [h("p", { class: "problem" }, problem)];
    const gate = manifest.metrics.gate;
    const cuts = gate?.passed >= 0 ? `; ${gate.passed} cuts passed, ${gate.refused} refused so far` : "";
    const whole = loads.reduce((sum, each) => sum + each.bytes, 0);
    const pairs = [
      ["State", stateOf(row) || "may be put into service"],
      ["Step", format.number(manifest.step)],
      ["Cut at", `${format.utc(manifest.created_ms)} UTC`],
      ["Published", `${format.utc(manifest.published_ms)} UTC`],
      ["Learned up to", manifest.event_time_ms === null ? null : `${format.utc(manifest.event_time_ms)} UTC`],
      ["Leads on from", manifest.parent === null ? "nothing: the first of its lineage" : String(manifest.parent)],
      ["Payload", `${manifest.kind}, ${manifest.precision}, ${format.bytes(manifest.total_bytes)}`],
      ["To load it", loads_problem ?? `${many(loads.length, "payload")}, ${format.bytes(whole)}`],
      ["Schema", manifest.schema_hash],
      ["Gate", GATE[row.gate] + cuts],
      ["Why refused", manifest.held],
      ["Signed", manifest.signature ? "yes" : "no"],
    ];
    const measured = typeof manifest.metrics.tasks === "object" ? manifest.metrics.tasks : null;
    const tasks = Object.entries(measured ?? {}).map(([task, figures]) => ({ task, ...figures }));
    const metrics = table({
      caption: "Progressive metrics of all that the lineage trained on up to this version",
      key: (each) => each.task,
      columns: [
        { key: "task", title: "Task", head: true },
        { key: "base_rate", title: "Base rate", numeric: true, format: (v) => format.number(v) },
        ...Object.entries(FIGURES).map(([key, [name, hint]]) => ({
          key,
          title: name,
          hint,
          numeric: true,
          format: (v) => format.number(v),
        })),
      ],
    });
    metrics.update(tasks);
    const known = pairs.filter(([, value]) => value !== null && value !== undefined);
    const described = known.map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]);
    return [h("dl", { class: "pairs" }, described.flat()), tasks.length ? metrics.element : null].filter(Boolean);
  }

  // ---- deciding

  async function decide(action, row = null) {
    said.textContent = "";
    const asked = { action, version: row?.version ?? null, lineage: row?.lineage ?? null };
    let tried;
    try {
      tried = await api.post("api/versions/decide", { ...asked, dry_run: true });
    } catch (error) {
      if (error.status !== 401) refuse(error.message);
      return;
    }
    const { decision } = tried;
    const result = await confirm({
      ...wordsOf(tried, found?.versions.find((each) => each.name === decision.name)),
      fields: whoAndWhy(),
      danger: action === "rollback",
      action: ({ by, why }) =>
        api.post("api/versions/decide", {
          action,
          version: action === "unpin" ? null : decision.version, // what was shown, whatever is published meanwhile
          lineage: action === "unpin" ? null : decision.lineage,
          by,
          why,
        }),
    });
    if (!result) return;
    said.textContent = `Done: ${result.decision.effect}.`;
    looked = 0;
    await update();
  }

  return { update, unmount() {} };
}

const option = (value, text) => h("option", { value }, text);

function stateOf(row) {
  const marks = [];
  if (row.serves) marks.push(row.pinned ? "● in service, pinned" : "● in service");
  else if (row.current) marks.push("○ current");
  if (row.rolled_back) marks.push("✕ rolled back");
  if (row.is_held) marks.push("‖ held");
  else if (row.held) marks.push("promoted, was held");
  return marks.join(" · ");
}

function armRow(arm) {
  const served = arm.served ?? null;
  const areas = Object.values(served?.tasks ?? {}).map((task) => task.auc?.value).filter((value) => value != null);
  return {
    ...arm,
    kind: arm.kind ?? "main",
    state: arm.kind ? (arm.problem ?? (arm.ready ? "ready" : "nothing to serve")) : "in service",
    impressions: served?.impressions ?? null,
    auc: areas.length ? areas.reduce((sum, value) => sum + value, 0) / areas.length : null,
  };
}

// The question before a decision: what will happen, in words.
function wordsOf({ decision, rolls_back: dropped, was_rolled_back }, row) {
  const { action, name, before } = decision;
  const now = before === name ? `It is in service now.` : `In service now: ${before ?? "nothing"}.`;
  const again = was_rolled_back ? [`${name} was rolled back before; this takes that back.`] : [];
  const held = row?.is_held ? `The gate refused it: ${row.held}.` : null;
  const later = `${many(dropped.length, "version")} published after it will count as rolled back: ${listed(dropped)}.`;
  const words = {
    pin: [
      `Pin ${name}?`,
      "Pin it",
      [`Scorers will serve ${name} and stay with it, whatever is published, until the next decision.`],
    ],
    unpin: [
      "Unpin?",
      "Unpin",
      [`Scorers will follow what the trainer publishes again, beginning with ${name}, which is current.`],
    ],
    rollback: [
      `Roll back to ${name}?`,
      "Roll back",
      [`Scorers will serve ${name} and stay with it until the next decision.`, dropped.length ? later : null],
    ],
    promote: [
      `Promote ${name}?`,
      "Promote it",
      [
        held,
        row?.is_held
          ? "It will be published, and served until the trainer publishes next."
          : `Scorers will serve ${name} until the trainer publishes next.`,
      ],
    ],
  };
  const [title, verb, says] = words[action];
  return { title, verb, says: [...says.filter(Boolean), now, ...again] };
}

const many = (count, what) => `${count} ${what}${count === 1 ? "" : "s"}`;

function listed(names) {
  return names.length > 6 ? `${names.slice(0, 3).join(", ")} … ${names.slice(-2).join(", ")}` : names.join(", ");
}
