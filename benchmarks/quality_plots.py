"""Plots of the comparisons, as PNG. Needs matplotlib (the ``bench`` extra)."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.kuairand_quality import LogFigures
from benchmarks.quality_config import Comparison
from benchmarks.world_quality import WorldFigures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DPI = 130


def plot_worlds(comparison: Comparison, worlds: Sequence[WorldFigures], path: Path) -> None:
    """Learning curves: GAUC by request, mean over the tasks, against impressions seen; a panel a world."""
    figure = _figure(6 * len(worlds), 4.5)
    panels = figure.subplots(1, len(worlds), squeeze=False)[0]
    for panel, one in zip(panels, worlds, strict=True):
        points = len(one.oracle_curve_PT)
        seen_P = (np.arange(points) + 0.5) * one.stream.impressions / points
        for name, figures in one.rankers.items():
            style = "--" if name in (*comparison.dense, comparison.linear) else "-"
            panel.plot(seen_P, figures.curve_PT.mean(axis=1), style, linewidth=1.2, label=name)
        panel.plot(seen_P, one.oracle_curve_PT.mean(axis=1), ":", color="black", linewidth=1.2, label="oracle")
        panel.set(title=one.stream.world, xlabel="impressions seen", ylabel="GAUC by request, mean of the tasks")
        panel.grid(alpha=0.3)
    panels[-1].legend(fontsize="small")
    figure.savefig(path, dpi=_DPI)


def plot_log(comparison: Comparison, figures: LogFigures, path: Path) -> None:
    """Both headlines of every ranker as differences to the dense one best in each, with intervals; and its cost."""
    names, tasks = list(figures.rankers), figures.tasks
    best = figures.best_dense(comparison) or names[0]
    gains = {
        f"mean windowed GAUC of dense tasks against {best}, %": [figures.gauc.gain(n, best, tasks.dense) for n in names]
    }
    if tasks.rare:
        best = figures.best(comparison, figures.auc, tasks.rare) or names[0]
        differences = [figures.auc.difference(n, best, tasks.rare) for n in names]
        gains[f"mean AUC of rare tasks against {best}"] = differences
    rows = np.arange(len(names))[::-1]
    figure = _figure(4 + 5 * len(gains), 1.5 + 0.35 * len(names))
    *panels, right = figure.subplots(1, 1 + len(gains), sharey=True, width_ratios=[2] * len(gains) + [1])
    for panel, (title, intervals) in zip(panels, gains.items(), strict=True):
        value = np.array([interval.value for interval in intervals])
        around = np.abs(np.array([[interval.low, interval.high] for interval in intervals]).T - value)
        panel.errorbar(value, rows, xerr=around, fmt="o", markersize=4, capsize=3)
        panel.axvline(0, color="black", linewidth=0.8)
        panel.set(xlabel=f"{title},\nwith its 95 % interval", yticks=rows, yticklabels=names)
    right.barh(rows, [figures.rankers[name].cost.flops / 1e3 for name in names], height=0.6)
    right.set(xlabel="executed kFLOP an instance")
    for panel in (*panels, right):
        panel.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=_DPI)


def _figure(width: float, height: float) -> "Figure":
    # Drawn without pyplot: nothing global, no display needed.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
