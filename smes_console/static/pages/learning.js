// Metrics of each task over time: small charts, with other runs and the version in service, and the figures beside.

import { h, show } from "../lib/dom.js";
import { choicesOfAddress, createControls } from "./learning/controls.js";
import { createPanels } from "./learning/panels.js";
import { createTables } from "./learning/tables.js";
import { createView } from "./learning/view.js";
import { createWords } from "./learning/words.js";

export const title = "Learning";

export function mount(root, context) {
  const view = createView(choicesOfAddress());
  const words = createWords(view);
  const controls = createControls(view, { onAsk: ask, onArrange: arrange });
  const panels = createPanels(view, { onRange: controls.zoom, onWhole: () => controls.chooseRange("1") });
  const tables = createTables(view);
  root.append(
    words.source,
    words.problems,
    tables.headline.element,
    ...controls.elements,
    words.legend,
    panels.none,
    panels.grid,
    h("h2", {}, "Stream and routing"),
    panels.stream,
    h("h2", {}, "Metrics by task"),
    tables.figures,
  );
  let turn = 0; // of the newest question: answers to others come too late

  function ask() {
    view.key = null;
    update().catch((error) => show(words.problems, error.message));
  }

  function arrange() {
    if (view.answer) panels.arrange();
  }

  async function update() {
    const mine = ++turn;
    const { metric, axis, together } = view.choice;
    const query = new URLSearchParams({ axis, together });
    if (metric) query.set("metric", metric);
    if (view.range) {
      query.set("from", view.range[0]);
      query.set("to", view.range[1]);
    }
    const question = query.toString();
    if (view.key && question === view.asked) query.set("seen", view.key);
    const answer = await context.api.get(`api/learning?${query}`);
    if (mine !== turn) return;
    view.answer = answer;
    if (answer.curves) {
      [view.key, view.asked, view.curves] = [answer.key, question, answer.curves];
      const { x } = answer.curves.routing;
      if (!view.range && x.length) view.whole = [x[0], x.at(-1)];
      view.followEnd();
    }
    controls.say();
    words.say();
    tables.say();
    panels.arrange();
  }

  return { update, unmount: panels.destroy, keys: controls.keys };
}
