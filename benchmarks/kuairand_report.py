"""What the figures on KuaiRand say: one flat object of JSON, and tables in Markdown.

``X_gain`` is SMES minus the dense ranker that is best in X, in X's unit, with ``X_gain_ci_low`` and ``X_gain_ci_high``;
of the entropy it is that ranker minus SMES, so that a positive gain is always good for SMES. Keys of ``_pct`` are in %.
``same_learning_X_gain``: against the dense rankers that learn as SMES's default does.
A figure that is undefined is null: GAUC of a task without any group of both classes.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from benchmarks.bootstrap import Interval, Paired
from benchmarks.kuairand_quality import LogFigures
from benchmarks.quality_config import Comparison, settings_of

Flat = dict[str, float | int | str | None]


def flat_figures(comparison: Comparison, figures: LogFigures) -> Flat:
    """Every figure with its ranker's name as prefix; the headlines without. Keys of rankers not run are left out."""
    smes, best, tasks = comparison.smes, figures.best_dense(comparison), figures.tasks
    flat: Flat = {"impressions": figures.impressions}
    flat |= {"dense_tasks": ",".join(tasks.named(tasks.dense)), "rare_tasks": ",".join(tasks.named(tasks.rare))}
    for task, positives, rate in zip(tasks.names, tasks.positives, tasks.base_rates, strict=True):
        flat |= {f"{task}_positives": positives, f"{task}_base_rate": rate}
    if smes in figures.rankers:
        flat |= {"seeds": len(figures.rankers[smes].auc_KT), "smes_flops": figures.rankers[smes].cost.flops}
        flat |= _against(figures, smes, best, "best_dense") if best else {}
        if best:
            flat |= {"best_dense": best, "best_dense_flops": figures.rankers[best].cost.flops}
        for other, word in ((comparison.linear, "linear"), (comparison.paper, "paper")):
            flat |= _against(figures, smes, other, word) if other in figures.rankers else {}
        flat |= _headlines(comparison, figures) | _against_home(comparison, figures)
    rare_best = figures.best(comparison, figures.auc, tasks.rare)
    for name in figures.rankers:
        flat |= {f"{name}_{key}": value for key, value in _of_ranker(figures, name).items()}
        if best and name != best:
            flat |= _percent(f"{name}_vs_best_dense", figures.gauc.gain(name, best, tasks.dense))
        if rare_best and name != rare_best:
            difference = figures.auc.difference(name, rare_best, tasks.rare)
            flat |= _interval(f"{name}_rare_auc_vs_rare_best_dense", difference)
    return {key: None if isinstance(value, float) and np.isnan(value) else value for key, value in flat.items()}


def _headlines(comparison: Comparison, figures: LogFigures) -> Flat:
    """SMES against the dense ranker that is best in the very figure: both headlines, and every task's AUC."""
    tasks, flat = figures.tasks, Flat()
    for part, of_part in (("dense", tasks.dense), ("rare", tasks.rare)):
        for word, figure in (("auc", figures.auc), ("gauc", figures.gauc), ("ne", figures.ne)):
            flat |= _gain(comparison, figures, f"{part}_{word}", figure, of_part)
    flat["rare_best_dense"] = flat.pop("rare_auc_best_dense", None)
    by_name: dict[str, tuple[int, ...]] = {name: (tasks.names.index(name),) for name in tasks.named(tasks.defined)}
    if "click" in by_name and "long_view" in by_name:
        by_name["click_long_view"] = by_name["click"] + by_name["long_view"]
    for name, of_name in by_name.items():
        flat |= _gain(comparison, figures, f"{name}_auc", figures.auc, of_name)
    same = replace(comparison, dense=comparison.dense_same_learning)
    for part, of_part in (("dense", tasks.dense), ("rare", tasks.rare)):
        flat |= _gain(same, figures, f"same_learning_{part}_auc", figures.auc, of_part)
    return flat


def _gain(comparison: Comparison, figures: LogFigures, key: str, figure: Paired, tasks: Sequence[int]) -> Flat:
    rival = figures.best(comparison, figure, tasks)
    if rival is None:
        return {}
    ours, theirs = (rival, comparison.smes) if figure is figures.ne else (comparison.smes, rival)
    return {f"{key}_best_dense": rival, **_interval(f"{key}_gain", figure.difference(ours, theirs, tasks))}


def _against_home(comparison: Comparison, figures: LogFigures) -> Flat:
    """SMES's executed operations against those of the smallest HoME, and of the one best in the rare tasks."""
    homes = [n for n in comparison.dense if n in figures.rankers and _family(comparison, n) == "home"]
    if not homes:
        return {}
    flops = {name: figures.rankers[name].cost.flops for name in homes}
    best = max(homes, key=lambda name: _mean(figures.auc, name, figures.tasks.rare or figures.tasks.dense) or 0)
    ours = figures.rankers[comparison.smes].cost.flops
    return {
        "flops_vs_home": ours / min(flops.values()),
        "flops_vs_best_home": ours / flops[best],
        "best_home": best,
    }


def _family(comparison: Comparison, name: str) -> str:
    return str(settings_of(comparison, name, {}).get("model.ranker", "smes"))


def _against(figures: LogFigures, ours: str, theirs: str, word: str) -> Flat:
    """SMES against another one."""
    tasks = figures.tasks
    flat = _percent(f"gain_vs_{word}", figures.gauc.gain(ours, theirs, tasks.dense))
    flat |= _percent(f"gain_single_vs_{word}", figures.single.gain(ours, theirs, tasks.dense))
    if tasks.rare:
        flat |= _interval(f"rare_auc_gain_vs_{word}", figures.auc.difference(ours, theirs, tasks.rare))
    for t in tasks.defined:
        flat[f"auc_{tasks.names[t]}_gain_vs_{word}"] = figures.auc.difference(ours, theirs, [t]).value
    for t in tasks.dense:
        flat |= _percent(f"gauc_{tasks.names[t]}_gain_vs_{word}", figures.gauc.gain(ours, theirs, [t]))
    return flat


def _of_ranker(figures: LogFigures, name: str) -> Flat:
    one, tasks = figures.rankers[name], figures.tasks
    flat: Flat = {
        "gauc": _mean(figures.gauc, name, tasks.dense),
        "gauc_single": _mean(figures.single, name, tasks.dense),
        "gauc_single_sd": _deviation(one.gauc_KT[:, tasks.dense].mean(axis=1)),
        "dense_auc": _mean(figures.auc, name, tasks.dense),
        "dense_ne": _mean(figures.ne, name, tasks.dense),
        "rare_auc": _mean(figures.auc, name, tasks.rare),
        "rare_auc_sd": _deviation(one.auc_KT[:, tasks.rare].mean(axis=1)) if tasks.rare else None,
        "rare_gauc": _mean(figures.gauc, name, tasks.rare),
        "rare_ne": _mean(figures.ne, name, tasks.rare),
        **one.cost.flat(),
        "impressions_per_s": one.impressions_per_s,
    }
    for word, figure in (("gauc", figures.gauc), ("auc", figures.auc), ("ne", figures.ne)):
        flat |= {f"{word}_{task}": float(v) for task, v in zip(tasks.names, figure.value_T(name), strict=True)}
    return flat


def markdown(comparison: Comparison, figures: LogFigures) -> str:
    """Tables, ready for ``docs/experiments/kuairand.md``."""
    tasks, best = figures.tasks, figures.best_dense(comparison)
    rare_best = figures.best(comparison, figures.auc, tasks.rare)
    seeds = len(next(iter(figures.rankers.values())).auc_KT)
    heads = (
        "ranker",
        "mean GAUC, dense",
        "one seed",
        f"against `{best}`, %" if best else "–",
        "mean AUC, rare",
        f"against `{rare_best}`" if rare_best else "–",
        "NE, dense",
        "NE, rare",
        "GAUC, rare",
        "kFLOP",
        "parameters",
        "experts run",
    )
    rows = []
    for name, one in figures.rankers.items():
        flat = _of_ranker(figures, name)
        dense_gain, rare_gain = "–", "–"
        if best and name != best:
            dense_gain = _shown(figures.gauc.gain(name, best, tasks.dense), 2)
        if rare_best and name != rare_best:
            rare_gain = _shown(figures.auc.difference(name, rare_best, tasks.rare), 4)
        rows.append(
            (
                f"`{name}`",
                _number(flat["gauc"]),
                f"{_number(flat['gauc_single'])} ± {_number(flat['gauc_single_sd'])}",
                dense_gain,
                f"{_number(flat['rare_auc'])} ± {_number(flat['rare_auc_sd'])}",
                rare_gain,
                *(_number(flat[key]) for key in ("dense_ne", "rare_ne", "rare_gauc")),
                f"{one.cost.flops / 1e3:,.0f}",
                f"{one.cost.parameters:,}",
                "–" if one.cost.active_experts is None else f"{one.cost.active_experts:.1f}",
            )
        )
    split = (("dense", tasks.dense), ("rare (base rate under 1 %)", tasks.rare))
    lines = [
        f"{figures.impressions:,} impressions, {seeds} model seeds.",
        *(f"{word}: {', '.join(tasks.named(part)) or 'none'}." for word, part in split),
        "",
        *_table(heads, rows),
    ]
    lines += ["", *_by_task(figures, "AUC", figures.auc, tasks.dense, best)]
    lines += ["", *_by_task(figures, "AUC", figures.auc, tasks.rare, rare_best)]
    lines += ["", *_by_task(figures, "GAUC", figures.gauc, tasks.dense, best, percent=True)]
    lines += ["", *_by_task(figures, "GAUC", figures.gauc, tasks.rare, None)]
    lines += ["", *_by_task(figures, "NE", figures.ne, tasks.defined, None)]
    return "\n".join([*lines, ""])


def _by_task(
    figures: LogFigures, title: str, figure: Paired, tasks: Sequence[int], rival: str | None, *, percent: bool = False
) -> list[str]:
    """A figure of these tasks, with its difference to a rival, in its unit or in %."""
    head = f"{title}, against `{rival}`" + (", %" if percent else "") if rival else title
    rows = []
    for name in figures.rankers:
        cells = []
        for t in tasks:
            cells.append(_number(float(figure.value_T(name)[t])))
            if rival is not None and name != rival:
                gain = figure.gain if percent else figure.difference
                cells[-1] += f" ({_shown(gain(name, rival, [t]), 2 if percent else 4)})"
        rows.append((f"`{name}`", *cells))
    counts = (f"{figures.tasks.names[t]} ({figures.tasks.positives[t]:,} positives)" for t in tasks)
    return _table((head, *counts), rows)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows)]


def _mean(figure: Paired, name: str, tasks: Sequence[int]) -> float | None:
    """None where there is no task; NaN where one is undefined."""
    return figure.mean(name, tasks) if tasks else None


def _deviation(values: np.ndarray) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _interval(name: str, interval: Interval) -> Flat:
    return {name: interval.value, f"{name}_ci_low": interval.low, f"{name}_ci_high": interval.high}


def _percent(name: str, interval: Interval) -> Flat:
    return {f"{name}_pct": interval.value, f"{name}_ci_low_pct": interval.low, f"{name}_ci_high_pct": interval.high}


def _number(value: float | int | str | None) -> str:
    return "–" if value is None or isinstance(value, str) or np.isnan(value) else f"{value:.4f}"


def _shown(interval: Interval, digits: int) -> str:
    return f"{interval.value:+.{digits}f} [{interval.low:+.{digits}f}, {interval.high:+.{digits}f}]"
