// Colours that colour-blind people can tell, and what stands beside a colour so that nobody needs it.

// Okabe and Ito; the order keeps neighbours apart. Yellow is left out of lines: it cannot be seen on white.
export const COLOURS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8a8a8a"];
const DASHES = [[], [6, 3], [2, 3], [9, 3, 2, 3]];

// The line of the n-th series: a colour, and from the eighth on another dash.
export function line(n) {
  return { colour: COLOURS[n % COLOURS.length], dash: DASHES[Math.floor(n / COLOURS.length) % DASHES.length] };
}

// Cividis (Nuñez, Anderton and Renslow 2018), from dark to light: reads the same with every colour vision, and in grey.
const CIVIDIS = [
  [0, 34, 78], [18, 53, 112], [59, 73, 108], [87, 93, 109], [112, 113, 115], [138, 134, 120], [165, 156, 116],
  [195, 179, 105], [225, 204, 85], [254, 232, 56],
];

// A share from 0 to 1 → [r, g, b].
export function sequential(share) {
  const at = Math.min(1, Math.max(0, share)) * (CIVIDIS.length - 1);
  const low = Math.min(CIVIDIS.length - 2, Math.floor(at));
  return CIVIDIS[low].map((value, channel) => Math.round(value + (CIVIDIS[low + 1][channel] - value) * (at - low)));
}

// A colour of the style sheet: `css("--ink")`.
export const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
