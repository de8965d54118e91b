"""What the figures of worlds with rare tasks say, beyond those of every world.

``rare`` is the mean over the tasks with base rates below 1 %, ``dense`` that over the others. SMES is compared with the
dense ranker that is best on that same mean, whatever it executes, chosen anew at each part of the stream. AUC and
normalised entropy are of single models, mean over the seeds.
"""

from collections.abc import Sequence

import numpy as np

from benchmarks.bootstrap import Interval
from benchmarks.quality_config import Comparison
from benchmarks.world_quality import WorldFigures

Flat = dict[str, float | int | str | None]

_EARLY = ("tenth", "third")


def flat_figures(comparison: Comparison, worlds: Sequence[WorldFigures]) -> Flat:
    """Of each world, with its name as prefix; and the lowest over the worlds, where SMES and a dense ranker ran.

    ``rare_world_gain_*`` and ``dense_world_gain_*`` are in % of the dense ranker's GAUC. ``rare_gain_early`` is the
    lower of ``rare_gain_tenth`` and ``rare_gain_third``, which are differences of GAUC.
    """
    flat = Flat()
    lowest: dict[str, float] = {}
    for one in worlds:
        world = one.stream.world
        for name in one.rankers:
            flat |= {f"{world}_{name}_{key}": value for key, value in _of_ranker(comparison, one, name).items()}
        flat |= {f"{world}_oracle_{key}": value for key, value in _of_oracle(one).items()}
        gains = _gains(comparison, one)
        flat |= {f"{world}_{key}": value for key, value in gains.items()}
        for key, value in gains.items():
            if isinstance(value, float):
                lowest[key] = float(np.minimum(lowest.get(key, np.inf), value))  # NaN where one is
    for key, value in lowest.items():
        group, _, rest = key.partition("_gain_")
        early = rest.startswith(("tenth", "third", "early"))
        flat[key if early else f"{group}_world_gain_{rest}"] = value
    return flat


def _gains(comparison: Comparison, one: WorldFigures) -> Flat:
    """SMES against the best dense ranker; empty where one of them did not run."""
    smes, flat = comparison.smes, Flat()
    if smes not in one.rankers:
        return flat
    for group, tasks in _groups(one).items():
        best = one.best_dense(comparison, tasks=tasks)
        if best is None:
            return flat
        flat[f"{group}_best_dense"] = best
        flat |= _interval(f"{group}_gain", one.gauc["end"].gain(smes, best, tasks), "_pct")
        flat |= _interval(f"{group}_gain_single", one.single["end"].gain(smes, best, tasks), "_pct")
        early = []
        for part in _EARLY:
            rival = one.best_dense(comparison, part, tasks=tasks)
            assert rival is not None, "there is one at the end"
            early.append(one.gauc[part].difference(smes, rival, tasks))
            flat |= _interval(f"{group}_gain_{part}", early[-1])
        flat[f"{group}_gain_early"] = float(np.min([gain.value for gain in early]))
    return flat


def _of_ranker(comparison: Comparison, one: WorldFigures, name: str) -> Flat:
    figures, flat = one.rankers[name], Flat()
    for group, tasks in _groups(one).items():
        flat[f"{group}_gauc"] = one.gauc["end"].mean(name, tasks)
        flat[f"{group}_gauc_single"] = float(figures.seeds_ST[:, tasks].mean())
        flat |= {f"{group}_gauc_{part}": one.gauc[part].mean(name, tasks) for part in _EARLY}
        flat[f"{group}_auc"] = float(figures.auc_T[tasks].mean())
        flat[f"{group}_ne"] = float(figures.ne_T[tasks].mean())
        flat[f"{group}_calibration_ratio"] = float(figures.calibration_ratio[tasks].mean())
        if comparison.linear in one.rankers:
            flat[f"{group}_oracle_share"] = one.oracle_share(name, comparison.linear, tasks)
    flat |= {f"auc_task{t}": float(value) for t, value in enumerate(figures.auc_T)}
    return flat | {f"ne_task{t}": float(value) for t, value in enumerate(figures.ne_T)}


def _of_oracle(one: WorldFigures) -> Flat:
    flat: Flat = {f"gauc_task{t}": float(value) for t, value in enumerate(one.oracle["end"])}
    for group, tasks in _groups(one).items():
        flat[f"{group}_gauc"] = float(one.oracle["end"][tasks].mean())
        flat[f"{group}_auc"] = float(one.oracle_auc_T[tasks].mean())
        flat[f"{group}_ne"] = float(one.oracle_ne_T[tasks].mean())
    return flat


def markdown(comparison: Comparison, one: WorldFigures) -> list[str]:
    """Lines of two tables: the means over rare and over dense tasks, and every task."""
    smes, groups = comparison.smes, _groups(one)
    heads = [f"{g} GAUC | one seed | at 1/10 | at 1/3 | `{smes}` is better by, %" for g in groups]
    lines = [f"| ranker | {' | '.join(heads)} | rare AUC | rare NE | Σp / Σtruth, rare |", "|---" * 14 + "|"]
    for name in one.rankers:
        flat, cells = _of_ranker(comparison, one, name), []
        for group, tasks in groups.items():
            cells += [f"{flat[f'{group}_{key}']:.4f}" for key in ("gauc", "gauc_single", "gauc_tenth", "gauc_third")]
            alone = name == smes or smes not in one.rankers
            cells.append("–" if alone else _shown(one.gauc["end"].gain(smes, name, tasks)))
        cells += [f"{flat[f'rare_{key}']:.4f}" for key in ("auc", "ne")] + [f"{flat['rare_calibration_ratio']:.2f}"]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    oracle = _of_oracle(one)
    cells = [f"{oracle['rare_gauc']:.4f}", "", *_early_oracle(one, groups["rare"]), ""]
    cells += [f"{oracle['dense_gauc']:.4f}", "", *_early_oracle(one, groups["dense"]), ""]
    lines += [f"| oracle | {' | '.join(cells)} | {oracle['rare_auc']:.4f} | {oracle['rare_ne']:.4f} | 1 |", ""]
    return [*lines, *_by_task(one), ""]


def _by_task(one: WorldFigures) -> list[str]:
    """GAUC of every task; of rare ones also AUC and normalised entropy."""
    rare = set(one.stream.rare_tasks)
    heads = [
        f"task {t} ({rate:.2%})" + (": GAUC, AUC, NE" if t in rare else "") for t, rate in enumerate(one.stream.rates)
    ]
    lines = ["| ranker | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
    rows = [(f"`{n}`", one.gauc["end"].gauc_T(n), figures.auc_T, figures.ne_T) for n, figures in one.rankers.items()]
    rows.append(("oracle", one.oracle["end"], one.oracle_auc_T, one.oracle_ne_T))
    for name, gauc_T, auc_T, ne_T in rows:
        cells = [
            f"{gauc_T[t]:.4f}" + (f", {auc_T[t]:.4f}, {ne_T[t]:.4f}" if t in rare else "") for t in range(len(gauc_T))
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _groups(one: WorldFigures) -> dict[str, list[int]]:
    rare = one.stream.rare_tasks
    return {"rare": rare, "dense": [t for t in range(len(one.stream.rates)) if t not in rare]}


def _early_oracle(one: WorldFigures, tasks: list[int]) -> list[str]:
    return [f"{one.oracle[part][tasks].mean():.4f}" for part in _EARLY]


def _interval(name: str, interval: Interval, unit: str = "") -> Flat:
    return {
        f"{name}{unit}": interval.value,
        f"{name}_ci_low{unit}": interval.low,
        f"{name}_ci_high{unit}": interval.high,
    }


def _shown(interval: Interval) -> str:
    return f"{interval.value:+.2f} [{interval.low:+.2f}, {interval.high:+.2f}]"
