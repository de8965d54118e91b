"""What the worlds' figures say: one flat object of JSON, and a table in Markdown."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from benchmarks import rare_report
from benchmarks.bootstrap import Interval
from benchmarks.quality_config import Comparison
from benchmarks.world_quality import WorldFigures

Flat = dict[str, float | int | str | None]

_EARLY = ("tenth", "third")
_WORST_LOW = (
    "gain_pct",
    "gain_ci_low_pct",
    "gain_any_pct",
    "gain_any_ci_low_pct",
    "gain_single_pct",
    "gain_single_ci_low_pct",
    "gain_early_pct",
    "gain_early_ci_low_pct",
    "oracle_share",
    "over_paper_pct",
    "over_paper_ci_low_pct",
    "worst_task_gain",
)
"""Figures of a world of which the lowest over the worlds is given; of ``e*_over_e*`` as well."""


def flat_figures(comparison: Comparison, worlds: Sequence[WorldFigures], seeds: int) -> Flat:
    """Every figure, with the name of its world and its ranker as prefix; and the worst over the worlds.

    A figure that is not defined, because a task has no positives, is None.
    """
    of_rare = worlds[0].stream.is_rare
    over_all = "rare_world" if of_rare else "world"
    flat: Flat = {f"{over_all}_seeds": seeds, f"{over_all}_impressions": worlds[0].stream.impressions}
    own = [_headline(comparison, one) for one in worlds]
    for one, headline in zip(worlds, own, strict=True):
        world = one.stream.world
        flat |= {f"{world}_{key}": value for key, value in headline.items()}
        flat[f"{world}_oracle_gauc"] = float(one.oracle["end"].mean())
        for name in one.rankers:
            flat |= {f"{world}_{name}_{key}": value for key, value in _of_ranker(comparison, one, name).items()}
    flat |= rare_report.flat_figures(comparison, worlds) if of_rare else _worst(own)
    return {key: None if isinstance(value, float) and not np.isfinite(value) else value for key, value in flat.items()}


def _worst(own: Sequence[Flat]) -> Flat:
    """The worst over the worlds, of figures that all of them have."""
    flat = Flat()
    for key in dict.fromkeys(key for headline in own for key in headline):
        values = [v for headline in own if isinstance(v := headline.get(key), (int, float))]
        if len(values) < len(own):
            continue
        if key in _WORST_LOW or "_over_e" in key:
            flat[f"world_{key}"] = min(values)
        elif key in ("tasks_behind", "calibration_error"):
            flat[f"world_{key}"] = max(values)
    return flat


def _headline(comparison: Comparison, one: WorldFigures) -> Flat:
    """SMES against the others; without the keys of rankers that were not run."""
    smes, gauc, flat = comparison.smes, one.gauc["end"], Flat()
    for (few, small), (many, large) in _neighbours(comparison.experts):
        if small in one.rankers and large in one.rankers:
            flat |= _interval(f"e{many}_over_e{few}", gauc.gain(large, small))
    flat |= {f"e{count}_gauc": gauc.mean(name) for count, name in comparison.experts.items() if name in one.rankers}
    if smes not in one.rankers:
        return flat
    flat["smes_flops"] = one.rankers[smes].cost.flops
    flat["calibration_error"] = float(one.rankers[smes].calibration_error.mean())
    if comparison.linear in one.rankers:
        flat["oracle_share"] = one.oracle_share(smes, comparison.linear)
    if comparison.paper in one.rankers:
        flat |= _interval("over_paper", gauc.gain(smes, comparison.paper))
    return flat | _against_dense(comparison, one)


def _against_dense(comparison: Comparison, one: WorldFigures) -> Flat:
    smes, gauc, flat = comparison.smes, one.gauc["end"], Flat()
    any_dense = one.best_dense(comparison)
    if any_dense is not None:
        flat |= {"best_any_dense": any_dense, "best_any_dense_flops": one.rankers[any_dense].cost.flops}
        flat |= _interval("gain_any", gauc.gain(smes, any_dense))
    flops = one.rankers[smes].cost.flops
    best = one.best_dense(comparison, at_least=flops)
    if best is None:
        return flat
    flat |= {"best_dense": best, "best_dense_flops": one.rankers[best].cost.flops}
    flat |= _interval("gain", gauc.gain(smes, best)) | _interval("gain_single", one.single["end"].gain(smes, best))
    behind = gauc.gauc_T(smes) < gauc.gauc_T(best)
    flat["tasks_behind"] = int(behind.sum())
    flat["worst_task_gain"] = float((gauc.gauc_T(smes) - gauc.gauc_T(best)).min())
    early = {}
    for part in _EARLY:
        rival = one.best_dense(comparison, part, at_least=flops)
        assert rival is not None, "operations do not depend on the part"
        early[part] = one.gauc[part].gain(smes, rival)
        flat |= _interval(f"gain_{part}", early[part])
    worst = min(early.values(), key=lambda interval: interval.value)
    return flat | {"gain_early_pct": worst.value, "gain_early_ci_low_pct": min(i.low for i in early.values())}


def _of_ranker(comparison: Comparison, one: WorldFigures, name: str) -> Flat:
    figures = one.rankers[name]
    flat: Flat = {
        "gauc": one.gauc["end"].mean(name),
        "gauc_single": float(figures.seeds_ST.mean()),
        "gauc_single_sd": _deviation(figures.seeds_ST.mean(axis=1).tolist()),
        **figures.cost.flat(),
        "calibration_error": float(figures.calibration_error.mean()),
        "calibration_ratio": float(figures.calibration_ratio.mean()),
        "impressions_per_s": figures.impressions_per_s,
    }
    flat |= {f"gauc_{part}": one.gauc[part].mean(name) for part in _EARLY}
    flat |= {f"gauc_task{t}": float(value) for t, value in enumerate(one.gauc["end"].gauc_T(name))}
    if comparison.linear in one.rankers:
        flat["oracle_share"] = one.oracle_share(name, comparison.linear)
    return flat


def markdown(comparison: Comparison, one: WorldFigures) -> str:
    """The tables of one world, ready for ``docs/``."""
    stream, smes = one.stream, comparison.smes
    lines = [
        f"### World `{stream.world}`",
        "",
        f"{stream.impressions:,} impressions, world seed {stream.world_seed}, "
        f"{len(next(iter(one.rankers.values())).seeds_ST)} model seeds.",
        "",
        "| ranker | GAUC | one seed | at 1/10 | at 1/3 | of the way | "
        f"`{smes}` is better by, % | kFLOP | parameters | experts run | error of p |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, figures in one.rankers.items():
        flat = _of_ranker(comparison, one, name)
        gain = "–" if name == smes or smes not in one.rankers else _shown(one.gauc["end"].gain(smes, name))
        share = f"{flat['oracle_share']:.2f}" if "oracle_share" in flat else "–"
        cost = figures.cost
        active = "–" if cost.active_experts is None else f"{cost.active_experts:.1f}"
        lines.append(
            f"| `{name}` | {flat['gauc']:.4f} | {flat['gauc_single']:.4f} ± {flat['gauc_single_sd']:.4f} "
            f"| {flat['gauc_tenth']:.4f} | {flat['gauc_third']:.4f} | {share} | {gain} | {cost.flops / 1e3:,.0f} "
            f"| {cost.parameters:,} | {active} | {flat['calibration_error']:.4f} |"
        )
    oracle = {part: f"{values.mean():.4f}" for part, values in one.oracle.items()}
    lines.append(f"| oracle | {oracle['end']} | | {oracle['tenth']} | {oracle['third']} | 1 | | | | | 0 |")
    lines += ["", *_by_task(comparison, one), ""]
    return "\n".join([*lines, *(rare_report.markdown(comparison, one) if stream.is_rare else [])])


def _by_task(comparison: Comparison, one: WorldFigures) -> list[str]:
    """A sentence on the tasks, where there is a rival."""
    if comparison.smes not in one.rankers:
        return []
    best = one.best_dense(comparison, at_least=one.rankers[comparison.smes].cost.flops)
    if best is None:
        return [f"No dense ranker executes as much as `{comparison.smes}`."]
    ours, theirs = (one.gauc["end"].gauc_T(name) for name in (comparison.smes, best))
    pairs = " · ".join(f"{a:.4f} / {b:.4f}" for a, b in zip(ours, theirs, strict=True))
    return [f"Best dense ranker at no less FLOPs: `{best}`. By task, `{comparison.smes}` / `{best}`: {pairs}."]


def _interval(name: str, interval: Interval) -> Flat:
    return {f"{name}_pct": interval.value, f"{name}_ci_low_pct": interval.low, f"{name}_ci_high_pct": interval.high}


def _shown(interval: Interval) -> str:
    return f"{interval.value:+.2f} [{interval.low:+.2f}, {interval.high:+.2f}]"


def _deviation(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _neighbours(experts: Mapping[int, str]) -> list[tuple[tuple[int, str], tuple[int, str]]]:
    ordered = sorted(experts.items())
    return list(pairwise(ordered))
