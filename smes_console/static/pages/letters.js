// Dead letters: what was refused, by reason, time and partition; a letter in full; and back into the log after a fix.

import { confirm, open, refuse } from "../lib/dialog.js";
import { figure, h, show } from "../lib/dom.js";

export const title = "Dead letters";

const STEPS = {
  60000: "minute",
  300000: "5 minutes",
  900000: "15 minutes",
  3600000: "hour",
  21600000: "6 hours",
  86400000: "day",
  604800000: "week",
  2592000000: "30 days",
};

export function mount(root, context) {
  const { api, format, table } = context;
  let found = null;
  const chosen = { reason: null, topic: null, partition: null, since_ms: null, until_ms: null };

  // ---- what is meant

  const problem = h("p", { class: "problem", role: "status" });
  const reading = h("p", { class: "quiet", role: "status" });
  const letters = figure("dead_letters.letters");
  const events = figure("dead_letters.events");
  const replayed = figure("dead_letters.replayed");
  const filter = h("span", { class: "chosen" });
  const said = h("div", { role: "status" });
  const replay = h("button", { type: "button", onclick: () => replayThem(null) }, "Replay…");
  replay.title = "Append the events of these letters to the event log again, each once; first says what would happen";

  // ---- by reason and place, by time, one by one

  const groups = table({
    caption: "By reason, topic and partition. Enter or a click filters by them.",
    key: (row) => `${row.reason} ${row.topic} ${row.partition}`,
    onSelect: ({ reason, topic, partition }) => choose({ reason, topic, partition }),
    empty: "no dead letters",
    columns: [
      { key: "reason", title: "Reason", head: true },
      { key: "topic", title: "Topic" },
      { key: "partition", title: "Partition", numeric: true, format: String },
      {
        key: "letters",
        title: "Letters",
        numeric: true,
        format: (v) => format.number(v),
        figure: (row) => `dead_letters.${row.reason}.${row.topic}.${row.partition}`,
      },
      {
        key: "events",
        title: "Events",
        hint: "A letter about a whole Arrow record stands for its rows",
        numeric: true,
        format: (v) => format.number(v),
      },
      { key: "replayed", title: "Replayed", numeric: true, format: (v) => format.number(v) },
    ],
  });
  const bars = h("div", { class: "bars", role: "group", "aria-label": "Letters by the time they were written" });
  const every = h("p", { class: "quiet" });
  const newest = table({
    caption: "The newest letters. Enter or a click opens one.",
    key: (row) => row.id,
    onSelect: (row) => details(row.id),
    empty: "none",
    columns: [
      { key: "reason", title: "Reason", head: true },
      { key: "place", title: "Event", hint: "topic/partition/offset, and the row of an Arrow record" },
      { key: "written_ms", title: "Written (UTC)", format: format.utc },
      { key: "replayed", title: "Replayed", format: (v) => (v ? "yes" : "no") },
      { key: "field", title: "Field" },
      { key: "says", title: "What was expected", format: (v) => (v.length > 70 ? `${v.slice(0, 70)}…` : v) },
    ],
  });
  const listed = h("p", { class: "quiet" });

  const none = h("p", { class: "quiet" }, "No dead letters: every event in the log could be read.");
  const parts = h(
    "div",
    {},
    h("div", { class: "buttons" }, replay, filter),
    groups.element,
    h("h2", {}, "By time"),
    bars,
    every,
    h("h2", {}, "One by one"),
    newest.element,
    listed,
  );
  root.append(
    problem,
    h("p", { class: "lead" }, letters, " letters with ", events, " events, ", replayed, " of the letters replayed"),
    reading,
    said,
    none,
    parts,
  );

  function choose(change) {
    Object.assign(chosen, change);
    said.replaceChildren();
    update();
  }

  const asked = () => Object.fromEntries(Object.entries(chosen).filter(([, value]) => value !== null));

  async function update() {
    const answer = await api.get(`api/letters?${new URLSearchParams(asked())}`);
    found = answer;
    const away = answer.problem ? `${answer.problem}, ${format.since(answer.since_ms)}` : "";
    show(problem, away && answer.at_ms ? `${away}; below is what was read before` : away, null);
    const part = `Reading the topic: ${format.number(answer.read)} of ${format.number(answer.of)} records so far`;
    show(reading, answer.read < answer.of ? part : "", null);
    const isEmpty = !answer.letters && !Object.keys(asked()).length;
    parts.hidden = isEmpty;
    none.hidden = !isEmpty || answer.problem !== null || answer.read < answer.of;
    show(letters, format.number(answer.letters), answer.letters);
    show(events, format.number(answer.events), answer.events);
    show(replayed, format.number(answer.replayed), answer.replayed);
    replay.disabled = !answer.letters || !answer.can_replay || answer.replaying;
    const which = Object.keys(asked()).length ? "these" : "all";
    show(replay, answer.replaying ? "A replay is on its way" : `Replay ${which}…`, null);
    drawFilter();
    groups.update(answer.groups);
    drawBars(answer.times);
    newest.update(answer.newest);
    const rest = answer.letters - answer.newest.length;
    const older = rest > 0 ? `${format.number(rest)} older ones: filter, or use \`smes dead-letters list\`. ` : "";
    const foreign = `${format.number(answer.foreign)} entries of the topic are not of this version.`;
    show(listed, older + (answer.foreign ? foreign : ""), null);
  }

  function drawFilter() {
    const parts = []; // a text, and the keys that it stands for
    if (chosen.reason) parts.push([chosen.reason, ["reason"]]);
    if (chosen.topic) parts.push([chosen.topic, ["topic"]]);
    if (chosen.partition !== null) parts.push([`partition ${chosen.partition}`, ["partition"]]);
    if (chosen.since_ms !== null) {
      const span = `${format.utc(chosen.since_ms)} to ${format.utc(chosen.until_ms)} UTC`;
      parts.push([span, ["since_ms", "until_ms"]]);
    }
    const text = parts.map(([name]) => name).join("\n");
    if (filter.dataset.shown === text) return;
    filter.dataset.shown = text;
    filter.replaceChildren(
      ...parts.map(([name, keys]) =>
        h(
          "button",
          {
            type: "button",
            title: "Remove this filter",
            onclick: () => choose(Object.fromEntries(keys.map((key) => [key, null]))),
          },
          `${name} ×`,
        ),
      ),
    );
  }

  function drawBars({ every_ms: step, from_ms: from, letters: counts }) {
    const shown = JSON.stringify([step, from, counts]);
    if (bars.dataset.shown === shown) return;
    bars.dataset.shown = shown;
    const most = Math.max(1, ...counts);
    const focused = document.activeElement?.dataset?.from;
    bars.replaceChildren(
      ...counts.map((count, n) => {
        const since_ms = from + n * step;
        const says = `${format.utc(since_ms).slice(0, 16)}: ${format.number(count)}`;
        const bar = h(
          "button",
          {
            type: "button",
            title: says,
            "aria-label": says,
            "data-from": since_ms,
            disabled: !count,
            onclick: () => choose({ since_ms, until_ms: since_ms + step }),
          },
          h("span", {}),
        );
        bar.firstChild.style.height = `${count ? Math.max(4, (100 * count) / most) : 0}%`;
        return bar;
      }),
    );
    if (focused) bars.querySelector(`[data-from="${focused}"]`)?.focus();
    const until = from + counts.length * step;
    const span = `${format.utc(from).slice(0, 16)} to ${format.utc(until).slice(0, 16)} UTC`;
    const says = `${span}, a bar for each ${STEPS[step]}; the highest is ${format.number(most)}.`;
    show(every, counts.length ? `${says} A click chooses its letters.` : "nothing was written", null);
  }

  // ---- one letter

  async function details(id) {
    const body = h("div", {}, h("p", { class: "quiet" }, "…"));
    const again = h("button", { type: "button", onclick: () => (element.close(), replayThem(id)) }, "Replay it…");
    again.disabled = !found.can_replay;
    const element = open(`Letter ${id}`, [
      body,
      h("div", { class: "buttons" }, again, h("button", { type: "button", onclick: () => element.close() }, "Close")),
    ]);
    try {
      body.replaceChildren(...pageOf(await api.get(`api/letters/one?id=${id}`)));
    } catch (error) {
      body.replaceChildren(h("p", { class: "problem" }, error.message));
    }
  }

  function pageOf({ problem: away, letter, replayed: done }) {
    if (!letter) return [h("p", { class: "problem" }, away)];
    const headers = Object.entries(letter.headers ?? {}).map(([name, value]) => `${name} = ${value}`);
    const pairs = [
      ["Reason", letter.code],
      ["Expected", letter.reason],
      ["Field", letter.field],
      ["Event", letter.where],
      ["Place", letter.place],
      ["Stands for", letter.events === 1 ? null : `${format.number(letter.events)} events`],
      ["Written", `${format.utc(letter.written_ms)} UTC`],
      ["Arrived", letter.arrival_ms === null ? null : `${format.utc(letter.arrival_ms)} UTC`],
      ["Replayed", done ? "yes" : "no"],
      ["Headers", headers.join(", ")],
      ["Log", letter.log || "unknown"],
      ["Payload", `${format.number(letter.payload_bytes)} bytes${letter.is_whole ? "" : ", of which a part is here"}`],
    ];
    const known = pairs.filter(([, value]) => value !== null && value !== "");
    const described = known.map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]);
    const more = letter.lines_left_out ? `${format.number(letter.lines_left_out)} more lines` : "";
    return [
      h("dl", { class: "pairs" }, described.flat()),
      h("pre", { tabindex: "0", "aria-label": "The event" }, letter.lines.join("\n")),
      h("p", { class: "quiet" }, more),
    ];
  }

  // ---- replaying

  async function replayThem(id) {
    said.replaceChildren();
    const meant = id ? { ids: [id] } : asked();
    const adopt = h("input", { type: "checkbox", name: "adopt", value: "yes" });
    const outcome = h("div", { "aria-live": "polite" });
    let tried = null;

    async function dryRun() {
      outcome.replaceChildren(h("p", { class: "quiet" }, "Trying, without appending anything…"));
      tried = null;
      tried = await api.post("api/letters/replay", { ...meant, adopt_schema: adopt.checked, dry_run: true });
      outcome.replaceChildren(...tried.lines.map((line) => h("p", {}, line)));
    }

    try {
      await dryRun();
    } catch (error) {
      if (error.status !== 401) refuse(error.message);
      return;
    }
    const failed = (error) => outcome.replaceChildren(h("p", { class: "problem" }, error.message));
    adopt.addEventListener("change", () => dryRun().catch(failed));
    const result = await confirm({
      title: id ? `Replay letter ${id}?` : "Replay these letters?",
      says: ["The events go into the event log again, each once. The trainer reads them as new records."],
      fields: [
        outcome,
        h("label", { class: "field" }, h("span", {}, adopt, " Take for the configured schema, whatever they say")),
      ],
      verb: "Replay",
      action: () => {
        if (!tried?.appended) throw new Error("There is nothing to append: see above.");
        // What was shown: letters that were written since then are left alone.
        const until_ms = id ? null : Math.min(chosen.until_ms ?? Infinity, tried.at_ms);
        return api.post("api/letters/replay", { ...meant, until_ms, adopt_schema: adopt.checked, dry_run: false });
      },
    });
    if (!result) return;
    said.replaceChildren(...result.lines.map((line) => h("p", { class: "good" }, line)));
    await update();
  }

  return { update, unmount() {} };
}
