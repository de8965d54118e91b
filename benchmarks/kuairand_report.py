"""What the figures on KuaiRand say: one flat object of JSON, and a table in Markdown."""

import numpy as np

from benchmarks.bootstrap import Interval
from benchmarks.kuairand_quality import LogFigures
from benchmarks.kuairand_runs import TASKS
from benchmarks.quality_config import Comparison

Flat = dict[str, float | int | str | None]


def flat_figures(comparison: Comparison, figures: LogFigures) -> Flat:
    """Every figure with its ranker's name as prefix; the headline without. Keys of rankers not run are left out."""
    smes, best, linear = comparison.smes, figures.best_dense(comparison), comparison.linear
    flat: Flat = {"impressions": figures.impressions}
    if smes in figures.rankers:
        flat |= {"seeds": len(figures.rankers[smes].seeds_ST), "smes_flops": figures.rankers[smes].cost.flops}
        flat |= _against(figures, smes, best, "best_dense") if best else {}
        if best:
            flat |= {"best_dense": best, "best_dense_flops": figures.rankers[best].cost.flops}
        if linear in figures.rankers:
            flat |= _against(figures, smes, linear, "linear")
        if comparison.paper in figures.rankers:
            flat |= _against(figures, smes, comparison.paper, "paper")
    for name in figures.rankers:
        flat |= {f"{name}_{key}": value for key, value in _of_ranker(figures, name).items()}
        if best and name != best:
            flat |= _interval(f"{name}_vs_best_dense", figures.gauc.gain(name, best))
    return flat


def markdown(comparison: Comparison, figures: LogFigures) -> str:
    """Two tables, ready for ``docs/quality.md``."""
    best = figures.best_dense(comparison)
    seeds = len(next(iter(figures.rankers.values())).seeds_ST)
    against = f"against `{best}`, %" if best else "–"
    lines = [
        f"{figures.impressions:,} impressions, {seeds} model seeds; mean GAUC over {', '.join(TASKS)}.",
        "",
        f"| ranker | mean GAUC | one seed | {against} | kFLOP | parameters | experts run | "
        + " | ".join(f"AUC {task}" for task in TASKS)
        + " |",
        "|---" * (7 + len(TASKS)) + "|",
    ]
    for name, one in figures.rankers.items():
        flat = _of_ranker(figures, name)
        gain = "–" if best is None or name == best else _shown(figures.gauc.gain(name, best))
        active = "–" if one.cost.active_experts is None else f"{one.cost.active_experts:.1f}"
        auc = " | ".join(f"{flat[f'auc_{task}']:.4f}" for task in TASKS)
        lines.append(
            f"| `{name}` | {flat['gauc']:.4f} | {flat['gauc_single']:.4f} ± {flat['gauc_single_sd']:.4f} | {gain} "
            f"| {one.cost.flops / 1e3:,.0f} | {one.cost.parameters:,} | {active} | {auc} |"
        )
    return "\n".join([*lines, "", *_by_task(figures, best), ""])


def _by_task(figures: LogFigures, best: str | None) -> list[str]:
    """GAUC of every task, and its difference to the best dense ranker."""
    positives = next(iter(figures.rankers.values())).positives_T
    heads = [f"{task} ({count:,} positives)" for task, count in zip(TASKS, positives, strict=True)]
    lines = ["| GAUC | " + " | ".join(heads) + " |", "|---" * (1 + len(TASKS)) + "|"]
    for name in figures.rankers:
        cells = []
        for t, value in enumerate(figures.gauc.gauc_T(name)):
            gain = "" if best is None or name == best else f" ({_shown(figures.gauc.gain(name, best, t))})"
            cells.append(f"{value:.4f}{gain}")
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return lines


def _against(figures: LogFigures, ours: str, theirs: str, word: str) -> Flat:
    """SMES against another one."""
    flat = _interval(f"gain_vs_{word}", figures.gauc.gain(ours, theirs))
    flat |= _interval(f"gain_single_vs_{word}", figures.single.gain(ours, theirs))
    flat |= {f"auc_{t}_gain_vs_{word}": figures.auc(ours, t) - figures.auc(theirs, t) for t in TASKS}
    for t, task in enumerate(TASKS):
        flat |= _interval(f"gauc_{task}_gain_vs_{word}", figures.gauc.gain(ours, theirs, t))
    return flat


def _of_ranker(figures: LogFigures, name: str) -> Flat:
    one = figures.rankers[name]
    each = one.seeds_ST.mean(axis=1)
    flat: Flat = {
        "gauc": figures.gauc.mean(name),
        "gauc_single": float(each.mean()),
        "gauc_single_sd": float(np.std(each, ddof=1)) if len(each) > 1 else 0.0,
        **one.cost.flat(),
        "impressions_per_s": one.impressions_per_s,
    }
    flat |= {f"gauc_{task}": float(value) for task, value in zip(TASKS, figures.gauc.gauc_T(name), strict=True)}
    return flat | {f"auc_{task}": figures.auc(name, task) for task in TASKS}


def _interval(name: str, interval: Interval) -> Flat:
    return {f"{name}_pct": interval.value, f"{name}_ci_low_pct": interval.low, f"{name}_ci_high_pct": interval.high}


def _shown(interval: Interval) -> str:
    return f"{interval.value:+.2f} [{interval.low:+.2f}, {interval.high:+.2f}]"
