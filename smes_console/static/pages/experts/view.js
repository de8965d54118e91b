// What the page Experts shows now: the answer of the console, and what follows from it and from the choices.

import { number, short, utc } from "../../lib/format.js";

export function createView() {
  const view = {
    choice: { order: "number", scale: "task" },
    step: null, // the segment that has it is shown; null: the newest that has ended
    data: null, // {tasks, num_experts, segments, overlap, map, …}
    order: [], // column → expert

    // The segment whose map is shown.
    segment: () => view.data.segments.find(({ from }) => from === view.data.map.from) ?? view.data.segments.at(-1),
    // The share of an expert where all that can be chosen carry the same.
    meanShare: () => 1 / Math.max(1, view.data.num_experts - (view.data.always_on ?? 0)),

    arrange() {
      const { load_share: share } = view.segment();
      view.order = share.map((_, expert) => expert);
      if (view.choice.order === "load") view.order.sort((a, b) => share[b] - share[a] || a - b);
    },

    // The tasks that use an expert in the segment that is shown, most first: [{name, share}].
    usersOf(expert) {
      const shares = view.data.tasks.map((name, t) => ({ name, share: view.data.map.shares[t][expert] }));
      return shares.filter(({ share }) => share).sort((a, b) => b.share - a.share);
    },
  };
  return view;
}

export function spokenSegment({ from, to, event_time_ms: ms, instances, is_open: isOpen }) {
  const size = instances === null ? "" : `, ${number(instances)} instances`;
  const goesOn = isOpen ? "; it goes on" : "";
  return `steps ${number(from)} to ${number(to)}${size}, until ${utc(ms)} UTC of event time${goesOn}`;
}

export const shortSegment = ({ from, is_open: isOpen }) => (isOpen ? "open" : short(from));
