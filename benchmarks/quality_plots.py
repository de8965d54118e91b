"""Plots of the comparisons, as PNG. Needs matplotlib (the ``bench`` extra)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.quality_config import Comparison
from benchmarks.world_quality import WorldFigures


def plot_worlds(comparison: Comparison, worlds: Sequence[WorldFigures], path: Path) -> None:
    """Learning curves: GAUC by request, mean over the tasks, against impressions seen; a panel a world."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(worlds), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
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
    figure.savefig(path, dpi=130)
