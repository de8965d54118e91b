// Tables with a caption and scopes, whose rows change in place; sorted by a click on, or Enter in, a column's head.

import { h, show } from "./dom.js";

// columns: [{key, title, hint?, format?(value, row) → text or element, numeric?, figure?(row) → name,
//   head?: whether it is the row's header, sort?: false}]
// Options: caption, key(row) → identity, onSelect?(row), rowClass?(row), empty?: text.
// Gives {element, update(rows)}.
export function table({ caption, columns, key, onSelect, rowClass, empty = "nothing" }) {
  let rows = [];
  let order = null; // {key, down}
  const body = h("tbody");
  const heads = columns.map((column) => head(column));
  const element = h(
    "div",
    { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    h("table", {}, h("caption", {}, h("span", {}, caption)), h("thead", {}, h("tr", {}, heads)), body),
  );
  const drawn = new Map();

  function head(column) {
    const cell = h("th", { scope: "col", class: column.numeric ? "number" : null, title: column.hint });
    if (column.sort === false) cell.append(column.title);
    else cell.append(h("button", { type: "button", class: "sort", onclick: () => sortBy(column) }, column.title));
    return cell;
  }

  function sortBy(column) {
    if (order?.key !== column.key) order = { key: column.key, down: Boolean(column.numeric) };
    else if (order.down === Boolean(column.numeric)) order = { key: column.key, down: !order.down };
    else order = null;
    columns.forEach((each, n) => {
      const sorted = order?.key === each.key;
      if (sorted) heads[n].setAttribute("aria-sort", order.down ? "descending" : "ascending");
      else heads[n].removeAttribute("aria-sort");
    });
    update(rows);
  }

  function sorted() {
    if (!order) return rows;
    const sign = order.down ? -1 : 1;
    return [...rows].sort((a, b) => {
      const [x, y] = [a[order.key], b[order.key]];
      if (x === y) return 0;
      if (x === null || x === undefined) return 1; // what is not known stands last
      if (y === null || y === undefined) return -1;
      return (x < y ? -1 : 1) * sign;
    });
  }

  function rowOf(row) {
    const id = key(row);
    if (!drawn.has(id)) {
      const cells = columns.map((column) =>
        h(column.head ? "th" : "td", { scope: column.head ? "row" : null, class: column.numeric ? "number" : null }),
      );
      const line = h("tr", {}, cells);
      if (onSelect) {
        const select = () => onSelect(drawn.get(id).row);
        line.tabIndex = 0;
        line.classList.add("selectable");
        line.addEventListener("click", select);
        line.addEventListener("keydown", (event) => {
          if (event.key !== "Enter" || event.target !== line) return;
          event.preventDefault(); // else what gets the focus now, such as a dialog's button, is pressed
          select();
        });
      }
      drawn.set(id, { line, cells });
    }
    const { line, cells } = drawn.get(id);
    drawn.get(id).row = row;
    columns.forEach((column, n) => {
      const value = row[column.key];
      const content = column.format ? column.format(value, row) : (value ?? "–");
      if (content instanceof Node) cells[n].replaceChildren(content);
      else show(cells[n], String(content), value);
      if (column.figure) cells[n].setAttribute("data-figure", column.figure(row));
    });
    if (rowClass) line.className = `${onSelect ? "selectable " : ""}${rowClass(row) ?? ""}`;
    return line;
  }

  function update(next) {
    rows = next;
    const lines = sorted().map(rowOf);
    const wanted = new Set(rows.map(key));
    for (const id of drawn.keys()) if (!wanted.has(id)) drawn.delete(id);
    if (!lines.length) lines.push(h("tr", {}, h("td", { colspan: columns.length, class: "quiet" }, empty)));
    const same = lines.length === body.children.length && lines.every((line, n) => body.children[n] === line);
    if (!same) body.replaceChildren(...lines); // the focus stays where nothing moves
  }

  return { element, update };
}
