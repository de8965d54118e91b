// A bar of parts that add up, each with a number inside or a name in its title; numbers and names stand in a table too.

import { s } from "./dom.js";
import { COLOURS } from "./palette.js";

const HEIGHT = 22;

// `label` is what a screen reader says. update([{name, value, mark}]): `mark` is the short text inside of a part.
export function stackedBar(label) {
  const parts = s("g");
  const said = { role: "img", "aria-label": label };
  const element = s("svg", { class: "stacked", ...said, height: HEIGHT, width: "100%" }, parts);

  function update(values) {
    const total = values.reduce((sum, each) => sum + (each.value ?? 0), 0);
    let at = 0;
    parts.replaceChildren(
      ...values.flatMap(({ name, value, mark }, n) => {
        const share = total ? (value ?? 0) / total : 0;
        const x = at;
        at += share;
        if (!share) return [];
        const box = s("rect", {
          x: `${100 * x}%`, width: `${100 * share}%`, y: 0, height: HEIGHT, fill: COLOURS[n % COLOURS.length],
        });
        box.append(s("title", {}, `${name}: ${(100 * share).toFixed(0)} %`));
        const tone = n % COLOURS.length ? "on-light" : "on-dark";
        const inside = { x: `${100 * (x + share / 2)}%`, y: HEIGHT / 2, class: tone };
        return share > 0.03 ? [box, s("text", inside, mark)] : [box];
      }),
    );
  }

  return { element, update };
}
