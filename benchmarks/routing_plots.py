"""Heat maps of the routing, as PNG. Needs matplotlib (the ``bench`` extra).

Letters: T tasks, E experts, S segments of the stream.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import PowerNorm

F64 = NDArray[np.float64]
_DPI = 130
_COLOURS = "viridis"


def load_shares(report: dict[str, Any]) -> F64:
    """A task's load on each expert over its mean load on those that it can choose: 1 is even. [S, T, E]."""
    load_STE = np.array([segment["load"] for segment in report["segments"]], np.float64)
    always_on = report["always_on"]
    choosable = (load_STE.shape[2] - always_on) / report["pools"]
    shares: F64 = load_STE / load_STE[..., always_on:].sum(axis=2, keepdims=True) * choosable
    return shares


def plot_routing(report: dict[str, Any], path: Path) -> None:
    """Tasks × experts at the end and over time; overlap of tasks; skew, dead experts and drift."""
    # Drawn without pyplot: nothing global, no display needed.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tall = 0.25 * len(report["tasks"])
    figure = Figure(figsize=(13, 6 + 3 * tall), layout="constrained")
    FigureCanvasAgg(figure)
    panels: dict[str, Axes] = figure.subplot_mosaic(
        [["experts", "overlap"], ["time", "skew"], ["time", "drift"]],
        width_ratios=[2.5, 1],
        height_ratios=[2 + tall, 2 + tall, 2 + tall],
    )
    shares_STE, segments = load_shares(report), report["segments"]
    ended = [s for s, segment in enumerate(segments) if segment["overlap"] is not None]
    last = ended[-1] if ended else len(segments) - 1
    _experts(panels["experts"], shares_STE[last], float(shares_STE.max()), report)
    _overlap(panels["overlap"], segments[last]["overlap"], report["tasks"])
    _over_time(panels["time"], shares_STE, report)
    _skew(panels["skew"], segments[: last + 1])
    _drift(panels["drift"], segments[: last + 1], report["tasks"])
    figure.savefig(path, dpi=_DPI)


def _experts(panel: "Axes", shares_TE: F64, most: float, report: dict[str, Any]) -> None:
    T, E = shares_TE.shape
    image = panel.imshow(shares_TE, aspect="auto", cmap=_COLOURS, norm=_norm(most), interpolation="nearest")
    panel.set(title="Load of each expert in the newest segment that has ended; 1 is even", xlabel="expert")
    panel.set_yticks(range(T), report["tasks"])
    always_on, pools = report["always_on"], report["pools"]
    for first in range(always_on, E, (E - always_on) // pools):
        if first:
            panel.axvline(first - 0.5, color="white", linewidth=1.0)
    panel.figure.colorbar(image, ax=panel)


def _overlap(panel: "Axes", overlap: list[list[float]] | None, tasks: list[str]) -> None:
    if overlap is None:
        panel.set_axis_off()
        return
    image = panel.imshow(np.array(overlap), aspect="auto", cmap=_COLOURS, vmin=0, vmax=1)
    panel.set(title="Overlap of two tasks (Jaccard)")
    panel.set_xticks(range(len(tasks)), tasks, rotation=90)
    panel.set_yticks([])
    panel.figure.colorbar(image, ax=panel)


def _over_time(panel: "Axes", shares_STE: F64, report: dict[str, Any]) -> None:
    S, T, E = shares_STE.shape
    edges = np.concatenate([[0], _until(report["segments"])])
    image = panel.pcolormesh(
        edges, np.arange(T * E + 1), shares_STE.reshape(S, T * E).T, cmap=_COLOURS, norm=_norm(float(shares_STE.max()))
    )
    for t in range(1, T):
        panel.axhline(t * E, color="white", linewidth=1.0)
    panel.set_yticks((np.arange(T) + 0.5) * E, report["tasks"])
    panel.invert_yaxis()
    panel.set(title=f"The same over time: {E} rows a task, one an expert", xlabel="impressions seen")
    panel.figure.colorbar(image, ax=panel)


def _skew(panel: "Axes", segments: list[dict[str, Any]]) -> None:
    until_S = _until(segments)
    panel.plot(until_S, [segment["load_skew"] for segment in segments], "k-", label="load skew (max / mean)")
    panel.plot(until_S, [len(segment["dead"]) for segment in segments], "r--", label="dead experts")
    panel.set(xlabel="impressions seen")
    panel.set_ylim(bottom=0)
    panel.legend(fontsize="small")
    panel.locator_params(axis="x", nbins=4)
    panel.grid(alpha=0.3)


def _drift(panel: "Axes", segments: list[dict[str, Any]], tasks: list[str]) -> None:
    until_S = _until(segments)
    known = [s for s, segment in enumerate(segments) if segment["drift"] is not None]
    for t, name in enumerate(tasks):
        panel.plot(until_S[known], [segments[s]["drift"][t] for s in known], linewidth=1.0, label=name)
    panel.set(ylabel="drift between segments", xlabel="impressions seen")
    panel.set_ylim(bottom=0)
    panel.legend(fontsize="x-small", ncols=2)
    panel.locator_params(axis="x", nbins=4)
    panel.grid(alpha=0.3)


def _norm(most: float) -> "PowerNorm":
    """Colours by the square root: one captured expert must not turn all others black."""
    from matplotlib.colors import PowerNorm

    return PowerNorm(0.5, vmin=0, vmax=most)


def _until(segments: list[dict[str, Any]]) -> NDArray[np.int64]:
    """Impressions seen by the end of each segment. int64 [S]."""
    return np.cumsum([segment["instances"] for segment in segments], dtype=np.int64)
