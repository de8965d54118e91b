// A heat map on a canvas: cells in Cividis, a cursor that pointer and arrow keys move, and the cell's figures in words.

import { h, show } from "./dom.js";
import { css, sequential } from "./palette.js";

const dark = matchMedia("(prefers-color-scheme: dark)");
const HEAD = 3; // for the cursor
const FOOT = 16; // for the columns' labels
const FONT = "11px system-ui, sans-serif";

// Options: name: what a screen reader calls it; figure: name of the element with the cell's value;
//   onMove(row, column): the cursor has moved.
// Gives {element, draw(content), move(row, column, quiet), at: {row, column}, destroy()}.
// content: {rows: [names], columns: [names], value(row, column) → 0…1 of the scale, or null: not known,
//   exact(row, column) → the cell's figure, words(row, column) → text, cell: [least, most] height of a row in pixels,
//   beside?: names that the left margin has room for, so that maps stand below each other, square?: as wide as high,
//   dead?: Set of columns to be marked}
export function heatmap({ name, figure, onMove }) {
  const canvas = h("canvas", {
    tabindex: "0",
    role: "application",
    "aria-roledescription": "heat map",
    "aria-label": `${name}; arrow keys move from cell to cell`,
  });
  const words = h("p", { class: "cell", "aria-live": "polite", "data-figure": figure });
  const element = h("div", { class: "heatmap" }, canvas, words);
  const at = { row: 0, column: 0 };
  let content = null;
  let box = null; // {left, width, height} of the cells in CSS pixels
  const cells = document.createElement("canvas"); // all but the cursor

  function layout() {
    const { rows, columns, cell, square, beside = [] } = content;
    const width = element.clientWidth;
    const context = cells.getContext("2d");
    context.font = FONT;
    const longest = Math.max(0, ...[...rows, ...beside].map((each) => context.measureText(each).width));
    const left = Math.ceil(Math.min(longest + 8, width * 0.3));
    let cellWidth = (width - left - 1) / Math.max(1, columns.length);
    let cellHeight = Math.max(cell[0], Math.min(cell[1], 280 / Math.max(1, rows.length)));
    if (square) cellWidth = cellHeight = Math.min(cellWidth, cell[1]);
    else cellWidth = Math.min(cellWidth, 36);
    box = { left, width: cellWidth, height: cellHeight };
    const size = {
      width: Math.ceil(left + cellWidth * columns.length) + 1,
      height: HEAD + Math.ceil(cellHeight * rows.length) + FOOT,
    };
    canvas.style.width = `${size.width}px`;
    canvas.style.height = `${size.height}px`;
    canvas.width = cells.width = Math.round(size.width * devicePixelRatio);
    canvas.height = cells.height = Math.round(size.height * devicePixelRatio);
    return context;
  }

  function paint() {
    if (!content || !element.clientWidth) return;
    const context = layout();
    const { rows, columns, value, dead } = content;
    const ratio = devicePixelRatio;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    const nothing = css("--panel");
    rows.forEach((_, row) => {
      columns.forEach((_, column) => {
        const share = value(row, column);
        const known = share !== null && share !== undefined;
        context.fillStyle = known && share > 0 ? `rgb(${sequential(share)})` : nothing;
        const [x, y, width, height] = placeOf(row, column);
        const gap = width > 6 && height > 6 ? 1 : 0;
        context.fillRect(x, y, width - gap, height - gap);
        if (!known && width > 6 && height > 6) {
          context.fillStyle = css("--quiet");
          context.fillRect(x + width / 2 - 1, y + height / 2 - 1, 1.5, 1.5);
        }
      });
    });
    label(context, rows, columns);
    if (dead) for (const column of dead) cross(context, column);
    point();
  }

  function point() {
    if (!box) return;
    const context = canvas.getContext("2d");
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, canvas.width, canvas.height);
    context.drawImage(cells, 0, 0);
    context.setTransform(devicePixelRatio, 0, 0, devicePixelRatio, 0, 0);
    cursor(context);
  }

  function placeOf(row, column) {
    const [x, next] = [column, column + 1].map((each) => snapped(box.left + each * box.width));
    const [y, below] = [row, row + 1].map((each) => snapped(HEAD + each * box.height));
    return [x, y, next - x, below - y];
  }

  const snapped = (value) => Math.round(value * devicePixelRatio) / devicePixelRatio;

  function label(context, rows, columns) {
    context.font = FONT;
    context.fillStyle = css("--quiet");
    context.textBaseline = "middle";
    context.textAlign = "right";
    const each = Math.ceil(12 / box.height);
    rows.forEach((name_, row) => {
      if (row % each === 0)
        context.fillText(fitted(context, name_, box.left - 6), box.left - 5, HEAD + (row + 0.5) * box.height);
    });
    context.textAlign = "center";
    context.textBaseline = "alphabetic";
    const widest = Math.max(...columns.map((each_) => context.measureText(each_).width), 1) + 8;
    const every = nice(Math.ceil(widest / box.width));
    columns.forEach((name_, column) => {
      if (column % every === 0)
        context.fillText(
          name_,
          Math.max(box.left + (column + 0.5) * box.width, 6),
          HEAD + box.height * rows.length + 12,
        );
    });
  }

  // An expert that nobody uses: a cross below its column, so that colour alone does not say it.
  function cross(context, column) {
    const [x, , width] = placeOf(0, column);
    const size = Math.min(3, Math.max(1.2, width / 2 - 0.5));
    const [middle, top] = [x + width / 2, HEAD + box.height * content.rows.length + 3];
    context.strokeStyle = css("--bad");
    context.lineWidth = 1.2;
    context.beginPath();
    context.moveTo(middle - size, top - size);
    context.lineTo(middle + size, top + size);
    context.moveTo(middle + size, top - size);
    context.lineTo(middle - size, top + size);
    context.stroke();
  }

  function cursor(context) {
    if (!content.rows.length || !content.columns.length) return;
    const [x, y, width, height] = placeOf(at.row, at.column);
    context.lineWidth = 1;
    context.strokeStyle = css("--paper");
    context.strokeRect(x - 0.5, y - 0.5, width + 1, height + 1);
    context.strokeStyle = css("--ink");
    context.strokeRect(x - 1.5, y - 1.5, width + 3, height + 3);
  }

  function say() {
    if (!content?.rows.length || !content.columns.length) return show(words, "", null);
    show(words, content.words(at.row, at.column), content.exact(at.row, at.column));
  }

  function move(row, column, quiet = false) {
    if (!content?.rows.length || !content.columns.length) return;
    at.row = Math.max(0, Math.min(content.rows.length - 1, row));
    at.column = Math.max(0, Math.min(content.columns.length - 1, column));
    point();
    say();
    if (!quiet) onMove?.(at.row, at.column);
  }

  const STEPS = {
    ArrowLeft: [0, -1],
    ArrowRight: [0, 1],
    ArrowUp: [-1, 0],
    ArrowDown: [1, 0],
    Home: [0, -Infinity],
    End: [0, Infinity],
    PageUp: [-Infinity, 0],
    PageDown: [Infinity, 0],
  };
  canvas.addEventListener("keydown", (event) => {
    const step = STEPS[event.key];
    if (!step || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    const far = event.shiftKey ? 8 : 1;
    move(at.row + step[0] * far, at.column + step[1] * far);
  });
  const pointed = (event) => {
    if (!box || !content) return;
    const [x, y] = [event.offsetX - box.left, event.offsetY - HEAD];
    if (x < 0 || y < 0 || y >= box.height * content.rows.length || x >= box.width * content.columns.length) return;
    const [row, column] = [Math.floor(y / box.height), Math.floor(x / box.width)];
    if (row !== at.row || column !== at.column) move(row, column);
  };
  canvas.addEventListener("pointermove", pointed);
  canvas.addEventListener("pointerdown", pointed);

  let width = 0;
  const sizes = new ResizeObserver(() => {
    if (element.clientWidth !== width) paint();
    width = element.clientWidth;
  });
  sizes.observe(element);
  dark.addEventListener("change", paint);

  return {
    element,
    at,
    move,
    draw(next) {
      content = next;
      at.row = Math.max(0, Math.min(at.row, next.rows.length - 1));
      at.column = Math.max(0, Math.min(at.column, next.columns.length - 1));
      paint();
      say();
    },
    destroy() {
      sizes.disconnect();
      dark.removeEventListener("change", paint);
    },
  };
}

function fitted(context, text, width) {
  if (context.measureText(text).width <= width) return text;
  let short = text;
  while (short && context.measureText(`${short}…`).width > width) short = short.slice(0, -1);
  return `${short}…`;
}

const nice = (least) => [1, 2, 4, 8, 16, 32, 64, 128].find((each) => each >= least) ?? 256;

// What the colours mean: from `low` to `high` in words, and what stands for none.
export function scale(low, high, none = "none") {
  const colours = h("canvas", { width: 100, height: 10, class: "colours", "aria-hidden": "true" });
  const context = colours.getContext("2d");
  for (let x = 0; x < 100; x++) {
    context.fillStyle = `rgb(${sequential(x / 99)})`;
    context.fillRect(x, 0, 1, 10);
  }
  return h(
    "span",
    { class: "quiet scale" },
    h("span", { class: "none", "aria-hidden": "true" }),
    ` ${none} · ${low} `,
    colours,
    ` ${high}`,
  );
}
