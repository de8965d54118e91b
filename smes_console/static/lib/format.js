// Numbers and times as people read them. A dash stands for what is not known (null, undefined, NaN).

export const DASH = "–";
const known = (value) => value !== null && value !== undefined && !Number.isNaN(value);
const grouped = new Map();

// 1234.5 → "1,234.5": at most `digits` digits behind the point, exactly as many for numbers that are not whole.
export function number(value, digits = 4) {
  if (!known(value)) return DASH;
  const whole = Number.isInteger(value);
  const key = whole ? 0 : digits;
  if (!grouped.has(key)) {
    const form = { minimumFractionDigits: key, maximumFractionDigits: key };
    grouped.set(key, new Intl.NumberFormat("en-US", form));
  }
  return grouped.get(key).format(value);
}

// 1234567 → "1.23 M": three digits that say something.
export function short(value) {
  if (!known(value)) return DASH;
  const size = Math.abs(value);
  for (const [unit, name] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e4, "k"]]) {
    if (size >= unit) return `${significant(value / (name === "k" ? 1e3 : unit))} ${name}`;
  }
  return Number.isInteger(value) ? number(value) : significant(value);
}

function significant(value) {
  const size = Math.abs(value);
  return value.toFixed(size >= 100 ? 0 : size >= 10 ? 1 : 2);
}

// Per second: "1,234 /s", "0.40 /s".
export function rate(value) {
  if (!known(value)) return DASH;
  return `${value >= 100 || value === 0 ? number(Math.round(value)) : value.toFixed(value >= 10 ? 1 : 2)} /s`;
}

// Milliseconds as a time that something took: "0.8 ms", "12 ms", "1.24 s", "3 min 10 s", "2 h 5 min", "3 d 4 h".
export function duration(ms) {
  if (!known(ms)) return DASH;
  if (ms < 10) return `${ms === 0 ? 0 : ms.toFixed(1)} ms`;
  if (ms < 1000) return `${Math.round(ms)} ms`;
  if (ms < 60_000) return `${(ms / 1000).toFixed(ms < 10_000 ? 2 : 1)} s`;
  const s = Math.round(ms / 1000);
  if (s < 3600) return `${Math.floor(s / 60)} min ${s % 60} s`;
  if (s < 86_400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86_400)} d ${Math.floor((s % 86_400) / 3600)} h`;
}

// Seconds, as `duration`.
export const seconds = (s) => duration(known(s) ? s * 1000 : s);

export function bytes(value) {
  if (!known(value)) return DASH;
  for (const [unit, name] of [[2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]]) {
    if (value >= unit) return `${significant(value / unit)} ${name}`;
  }
  return `${number(value)} B`;
}

// A share of 1: 0.1234 → "12.3 %".
export function percent(share, digits = 1) {
  return known(share) ? `${(share * 100).toFixed(digits)} %` : DASH;
}

// Unix milliseconds → "2026-11-28 07:12:05", in UTC, as the commands print times.
export function utc(unixMs) {
  return known(unixMs) ? new Date(unixMs).toISOString().slice(0, 19).replace("T", " ") : DASH;
}

// Unix milliseconds → "07:12:05", in UTC.
export const clock = (unixMs) => (known(unixMs) ? utc(unixMs).slice(11) : DASH);

// "since 07:12:05 UTC", with the date where it is another day.
export function since(unixMs, nowMs = Date.now()) {
  if (!known(unixMs)) return "";
  return `since ${utc(unixMs).slice(0, 10) === utc(nowMs).slice(0, 10) ? clock(unixMs) : utc(unixMs)} UTC`;
}
