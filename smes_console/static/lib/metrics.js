// The metrics of tasks: what each is called, what it means, and which value is better.

import { number, percent } from "./format.js";

export const METRICS = {
  gauc_windowed: {
    title: "GAUC",
    level: 0.5,
    better: "higher is better",
    hint: "Windowed GAUC: AUC within a request or a user of one window, by frozen weights",
  },
  auc: {
    title: "AUC",
    level: 0.5,
    better: "higher is better",
    hint: "Share of pairs of a positive and a negative that are ordered rightly",
  },
  ne: {
    title: "NE",
    level: 1,
    better: "lower is better; 1 is the base rate",
    hint: "Normalised entropy: log loss divided by the entropy of the base rate",
  },
  calibration: {
    title: "calibration",
    level: 1,
    better: "1 is calibrated",
    hint: "Mean prediction divided by mean label",
  },
  ece: {
    title: "ECE",
    level: null,
    better: "lower is better",
    hint: "Expected calibration error over 20 groups of equal size",
  },
  base_rate: {
    title: "base rate",
    level: null,
    better: "of the stream, not of the model",
    hint: "Share of positives among the labelled examples",
  },
  xauc: {
    title: "XAUC",
    level: 0.5,
    better: "higher is better",
    hint: "Share of pairs that are ordered as their labels are",
  },
  mae: { title: "MAE", level: null, better: "lower is better", hint: "Mean absolute error, in the label's unit" },
  mean_bias: {
    title: "mean bias",
    level: 0,
    better: "0 is unbiased",
    hint: "Mean prediction minus mean label, in the label's unit",
  },
};
// Of binary tasks, in the order in which they are offered.
export const CHOICES = ["gauc_windowed", "auc", "ne", "calibration", "ece", "base_rate"];

export const textOf = (name, value) => (name === "base_rate" ? percent(value, 2) : number(value));

// How bad a value is, to sort by; the unit is of no meaning.
export function badness(name, value) {
  if (value === null) return -Infinity;
  if (name === "calibration") return Math.abs(Math.log(Math.max(value, 1e-9)));
  if (name === "mean_bias") return Math.abs(value);
  return ["gauc_windowed", "auc", "xauc", "base_rate"].includes(name) ? -value : value;
}
