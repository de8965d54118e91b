"""The speed benchmark's table and plot."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.speed_setting import Contender
from benchmarks.step_breakdown import PARTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes  # only a run that draws needs it


def table(contenders: Sequence[Contender], figures: Mapping[str, float], ratios: Sequence[str]) -> str:
    """Markdown: a row per contender, then the ratios, then where the steps' time goes."""

    def spread(name: str, digits: int) -> str:
        low, high = figures[f"{name}_min"], figures[f"{name}_max"]
        return f"{figures[name]:,.{digits}f} ({low:,.{digits}f} – {high:,.{digits}f})"

    lines = [
        f"Machine: one large fp32 GEMM reaches {spread('gemm_gflop_per_s', 0)} GFLOP/s.",
        "",
        "| | training, samples/s | 500 candidates, ms | GFLOP a step | GFLOP/s | of one GEMM's | dense weights |",
        "|---|---|---|---|---|---|---|",
    ]
    for contender in contenders:
        n = contender.name
        lines.append(
            f"| {contender.what} (`{n}`) | {spread(f'{n}_train_per_s', 0)} | {spread(f'{n}_latency_ms', 2)} "
            f"| {figures[f'{n}_step_gflop']:.2f} | {figures[f'{n}_gflop_per_s']:,.0f} "
            f"| {figures[f'{n}_share_of_gemm']:.0%} | {figures[f'{n}_parameters']:,.0f} |"
        )
    lines += ["", "| ratio | |", "|---|---|"]
    lines += [f"| `{name}` | {spread(name, 2)} |" for name in ratios if name in figures]
    steps = [c.name for c in contenders if f"{c.name}_{PARTS[0]}_ms" in figures]
    if steps:
        lines += ["", f"| ms of a step | {' | '.join(steps)} |", f"|---|{'---|' * len(steps)}"]
        for part in PARTS:
            lines.append(f"| {part} | {' | '.join(spread(f'{name}_{part}_ms', 2) for name in steps)} |")
    return "\n".join(lines)


def draw(contenders: Sequence[Contender], figures: Mapping[str, float], path: Path) -> None:
    """One PNG: training rates, scoring latencies, step time over E, and the parts of a step.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure  # only a run that draws needs it

    figure = Figure(figsize=(13, 9), layout="constrained")
    axes = figure.subplots(2, 2)
    names = [c.name for c in contenders]
    for ax, suffix, title in (
        (axes[0, 0], "train_per_s", "Training, samples/s"),
        (axes[0, 1], "latency_ms", "Scoring 500 candidates, ms"),
    ):
        values = [figures[f"{n}_{suffix}"] for n in names]
        low = [v - figures[f"{n}_{suffix}_min"] for n, v in zip(names, values, strict=True)]
        high = [figures[f"{n}_{suffix}_max"] - v for n, v in zip(names, values, strict=True)]
        colours = ["tab:orange" if n.startswith(("smes", "wide", "paper")) else "tab:gray" for n in names]
        ax.barh(names, values, xerr=[low, high], color=colours, ecolor="black", capsize=2)
        ax.invert_yaxis()
        ax.set_title(title)
        ax.grid(axis="x", alpha=0.3)
    _draw_growth(axes[1, 0], names, figures)
    _draw_parts(axes[1, 1], [n for n in names if f"{n}_{PARTS[0]}_ms" in figures], figures)
    figure.savefig(path, dpi=110)


def _draw_growth(ax: "Axes", names: Sequence[str], figures: Mapping[str, float]) -> None:
    for kind, colour in (("smes", "tab:orange"), ("dense", "tab:gray")):
        sizes = sorted(int(E) for n in names if (E := n.removeprefix(kind)).isdigit())
        if sizes:
            ax.plot(sizes, [figures[f"{kind}{E}_step_ms"] for E in sizes], "o-", color=colour, label=kind)
            low = [figures[f"{kind}{E}_step_ms_min"] for E in sizes]
            ax.fill_between(sizes, low, [figures[f"{kind}{E}_step_ms_max"] for E in sizes], color=colour, alpha=0.2)
            ax.legend()
    ax.set(xscale="log", yscale="log", xlabel="experts", ylabel="ms", title="A training step as the pool grows")
    ax.grid(alpha=0.3)


def _draw_parts(ax: "Axes", names: Sequence[str], figures: Mapping[str, float]) -> None:
    left = [0.0] * len(names)
    for part in PARTS:
        values = [figures[f"{n}_{part}_ms"] for n in names]
        ax.barh(names, values, left=left, label=part)
        left = [at + value for at, value in zip(left, values, strict=True)]
    ax.invert_yaxis()
    ax.set(xlabel="ms", title="Where a step's time goes")
    if names:
        ax.legend(fontsize=7, ncols=2)
