// Cards, and arrows between them that run at the rate of what passes. The cards are laid out by the style sheet; where
// they stand below each other, as on a phone, only arrows between neighbours are drawn.

import { h, s, show } from "./dom.js";

// cards: [{id, title, hint}] in reading order; links: [{from, to, what: in a word, what passes}].
// Gives {element, card(id) → {body, problem(text, more)}, rates({"from-to": {rate, text}}), destroy()}.
export function flowchart({ cards, links }) {
  const made = new Map(cards.map((card) => [card.id, makeCard(card)]));
  const order = cards.map(({ id }) => id);
  const arrows = new Map(links.map((link) => [`${link.from}-${link.to}`, makeArrow(link)]));
  const picture = s(
    "svg",
    { class: "links", "aria-hidden": "true" },
    s(
      "defs",
      {},
      s(
        "marker",
        { id: "tip", viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 8, markerHeight: 8, orient: "auto",
          markerUnits: "userSpaceOnUse" },
        s("path", { d: "M0 0 L8 4 L0 8 z", class: "tip" }),
      ),
    ),
    [...arrows.values()].map(({ group }) => group),
  );
  const element = h("div", { class: "flow" }, picture, [...made.values()].map((card) => card.element));

  function makeCard({ id, title, hint }) {
    const away = h("p", { class: "problem", hidden: true });
    const body = h("div", { class: "figures" });
    const head = h("h2", { id: `card-${id}`, title: hint }, title);
    const named = { class: `card at-${id}`, "aria-labelledby": `card-${id}`, "data-card": id };
    const card = h("section", named, head, away, body);
    return {
      element: card,
      body,
      problem(text, more = "") {
        away.hidden = !text;
        away.title = more;
        card.classList.toggle("away", Boolean(text));
        show(away, text ?? "", null);
      },
    };
  }

  function makeArrow(link) {
    const line = s("path", { class: "line", "marker-end": "url(#tip)" });
    const moving = s("path", { class: "moving" });
    const label = s("text", { class: "rate" });
    const what = s("text", { class: "what" }, link.what);
    return { ...link, line, moving, label, words: what, group: s("g", { class: "still" }, line, moving, label, what) };
  }

  function place() {
    const frame = element.getBoundingClientRect();
    if (!frame.width) return;
    picture.setAttribute("viewBox", `0 0 ${frame.width} ${frame.height}`);
    const box = (id) => {
      const one = made.get(id).element.getBoundingClientRect();
      return { left: one.left - frame.left, right: one.right - frame.left, top: one.top - frame.top,
        bottom: one.bottom - frame.top };
    };
    const oneColumn = getComputedStyle(element).getPropertyValue("--columns").trim() === "1";
    for (const { from, to, line, moving, label, words, group } of arrows.values()) {
      const neighbours = order.indexOf(to) === order.indexOf(from) + 1;
      group.classList.toggle("hidden", oneColumn && !neighbours);
      const { path, x, y, anchor, below } = between(box(from), box(to));
      line.setAttribute("d", path);
      moving.setAttribute("d", path);
      for (const [text, dx, dy] of [[label, 0, 0], [words, below ? 0 : 56, below ? 26 : 0]]) {
        text.setAttribute("x", x + dx);
        text.setAttribute("y", y + dy);
        text.setAttribute("text-anchor", anchor);
      }
    }
  }

  const sizes = new ResizeObserver(place);
  sizes.observe(element);
  for (const { element: card } of made.values()) sizes.observe(card);

  return {
    element,
    card: (id) => made.get(id),
    // What passes an arrow: a number per second (null: not known), and its text.
    rates(values) {
      for (const [name, arrow] of arrows) {
        const { rate, text } = values[name] ?? { rate: null, text: "" };
        show(arrow.label, text, rate);
        arrow.group.classList.toggle("still", !rate);
        // Ten times the rate moves the dashes not quite twice as fast: 1 and 10,000 a second can both be followed.
        if (rate) arrow.moving.style.animationDuration = `${(1.6 / (1 + Math.log10(1 + rate))).toFixed(2)}s`;
        if (rate) arrow.line.style.strokeWidth = `${Math.min(4, 1 + Math.log10(1 + rate) * 0.7).toFixed(1)}px`;
      }
    },
    destroy: () => sizes.disconnect(),
  };
}

// The way from one box to another that stands beside, above or below it, and where its text goes.
function between(a, b) {
  const overlap = (low1, high1, low2, high2) => Math.min(high1, high2) - Math.max(low1, low2);
  if (overlap(a.top, a.bottom, b.top, b.bottom) > 0 && (a.right <= b.left || b.right <= a.left)) {
    const y = (Math.max(a.top, b.top) + Math.min(a.bottom, b.bottom)) / 2;
    const [x1, x2] = a.right <= b.left ? [a.right, b.left] : [a.left, b.right];
    return { path: `M${x1} ${y} L${x2} ${y}`, x: (x1 + x2) / 2, y: y - 8, anchor: "middle", below: true };
  }
  const x = (Math.max(a.left, b.left) + Math.min(a.right, b.right)) / 2;
  const [y1, y2] = a.bottom <= b.top ? [a.bottom, b.top] : [a.top, b.bottom];
  return { path: `M${x} ${y1} L${x} ${y2}`, x: x + 8, y: (y1 + y2) / 2 + 4, anchor: "start", below: false };
}
