"""What fresh weights are worth: from runs to figures, a table and a plot.

AUC and normalised entropy are of the pooled examples after the warm-up, by task, averaged over the seeds; a headline is
the mean over the tasks with a base rate of 1 % and more. Intervals are by a paired bootstrap over users and positives
(:mod:`benchmarks.auc_bootstrap`): all ages get the same draws. In the drifting world each seed has its own users, so
its resamples are drawn by seed and then averaged.

Letters: N examples, T tasks, A ages, R resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.auc_bootstrap import TaskExamples, resampled_auc_and_ne
from benchmarks.bootstrap import F64, Interval, Paired
from benchmarks.freshness_runs import AGES, ValueRun
from benchmarks.run_cache import RunCache
from smes.arrays import F32
from trainer.task_figures import RARE_BELOW

NAMES = tuple(AGES)
FRESHEST = NAMES[-1]


@dataclass(frozen=True)
class ValueFigures:
    """Of one log.

    Attributes:
        log: Its name.
        examples: Scored by each age, of all seeds.
        days: Of event time, of one seed.
        tasks: Names of the tasks of the headline.
        auc, ne: Of these tasks.
    """

    log: str
    examples: int
    days: float
    tasks: tuple[str, ...]
    auc: Paired
    ne: Paired


def value_figures(runs: Sequence[ValueRun], cache: RunCache, resamples: int) -> ValueFigures:
    """Figures from runs of one log that the cache has."""
    streams: dict[str, list[ValueRun]] = {}
    for run in runs:
        streams.setdefault(run.stream, []).append(run)
    facts = cache.load(runs[0]).facts
    auc: list[F64] = []
    ne: list[F64] = []
    examples, dense = 0, None
    for seed, of_stream in enumerate(streams.values()):
        arrays = [cache.load(run).arrays for run in of_stream]
        examples += len(arrays[0]["user"]) * len(arrays)
        if dense is None:
            rates = (arrays[0]["labels"] * arrays[0]["mask"]).sum(axis=0) / arrays[0]["mask"].sum(axis=0)
            dense = np.flatnonzero(rates >= RARE_BELOW).tolist()
        for auc_RAT, ne_RAT in _of_stream(arrays, dense, resamples, seed):
            auc.append(auc_RAT)
            ne.append(ne_RAT)
    auc_RAT, ne_RAT = np.mean(auc, axis=0), np.mean(ne, axis=0)
    return ValueFigures(
        runs[0].name,
        examples,
        facts["days"],
        tuple(facts["tasks"][t] for t in dense or []),
        Paired(NAMES, auc_RAT[0], auc_RAT[1:]),
        Paired(NAMES, ne_RAT[0], ne_RAT[1:]),
    )


def _of_stream(
    arrays: Sequence[dict[str, NDArray[Any]] | Any], tasks: Sequence[int], resamples: int, seed: int
) -> list[tuple[F64, F64]]:
    """(AUC, normalised entropy), both [1 + R, A, T], of each run over the same examples."""
    first = arrays[0]
    users, user_N = np.unique(first["user"], return_inverse=True)
    shape = (len(arrays), 1 + resamples, len(NAMES), len(tasks))
    auc, ne = np.empty(shape), np.empty(shape)
    for column, t in enumerate(tasks):
        rows = np.flatnonzero(first["mask"][:, t])
        examples = TaskExamples(user_N.ravel()[rows], first["labels"][rows, t] == 1, len(users), t)

        def scores(m: int, rows: NDArray[np.int64] = rows, t: int = t) -> F32:
            run, age = divmod(m, len(NAMES))
            of_age: F32 = arrays[run]["scores"][age, rows, t]
            return of_age

        both = resampled_auc_and_ne(examples, scores, len(arrays) * len(NAMES), resamples, seed)
        for figure, found in zip((auc, ne), both, strict=True):
            figure[..., column] = found.reshape(1 + resamples, len(arrays), len(NAMES)).swapaxes(0, 1)
    return list(zip(auc, ne, strict=True))


def value_table(figures: Sequence[ValueFigures]) -> str:
    """A table in Markdown: each age's headline, and by how much it differs from weights of every cut."""
    lines = []
    for one in figures:
        lines += [
            f"{one.log}: {one.examples:,} scored examples over {one.days:.1f} days, mean of {', '.join(one.tasks)}",
            "",
            "| weights replaced | AUC | against every cut | normalised entropy | against every cut |",
            "|---|---|---|---|---|",
        ]
        for age in NAMES:
            auc, ne = one.auc.mean(age), one.ne.mean(age)
            if age == FRESHEST:
                lines.append(f"| {age} | {auc:.4f} | | {ne:.4f} | |")
                continue
            of_auc, of_ne = one.auc.difference(age, FRESHEST), one.ne.difference(age, FRESHEST)
            lines.append(f"| {_worded(age)} | {auc:.4f} | {_shown(of_auc)} | {ne:.4f} | {_shown(of_ne)} |")
        lines.append("")
    return "\n".join(lines)


def value_json(figures: Sequence[ValueFigures]) -> dict[str, float]:
    """The figures as one flat object."""
    flat: dict[str, float] = {}
    for one in figures:
        for age in NAMES:
            for name, paired in (("auc", one.auc), ("ne", one.ne)):
                key = f"value_{one.log}_{name}_{age}".lower().replace(" ", "_")
                difference = paired.difference(age, FRESHEST)
                flat[key] = paired.mean(age)
                flat |= {f"{key}_loss": difference.value, f"{key}_low": difference.low, f"{key}_high": difference.high}
    return flat


def plot_value(figures: Sequence[ValueFigures], path: Path) -> None:
    """Both headlines against the age, as differences to weights of every cut, with intervals; a column for each log."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(figures), 6.5), layout="constrained")
    panels = figure.subplots(2, len(figures), squeeze=False, sharex=True)
    ages = [age for age in NAMES if age != FRESHEST]
    place = np.arange(len(ages))[::-1]
    for column, one in enumerate(figures):
        for panel, (name, paired) in zip(panels[:, column], (("AUC", one.auc), ("NE", one.ne)), strict=True):
            intervals = [paired.difference(age, FRESHEST) for age in ages]
            value = np.array([interval.value for interval in intervals])
            around = np.abs(np.array([[i.low, i.high] for i in intervals]).T - value)
            panel.errorbar(place, value, yerr=around, fmt="o-", markersize=4, capsize=3)
            panel.axhline(0, color="black", linewidth=0.8)
            panel.set(ylabel=f"{name} against every cut", xticks=place, xticklabels=ages)
            panel.grid(alpha=0.3)
        panels[0, column].set(title=one.log)
        panels[-1, column].set(xlabel="weights that answer are replaced every")
    figure.savefig(path, dpi=130)


def _worded(age: str) -> str:
    return age if age == "never" else f"every {age}"


def _shown(interval: Interval) -> str:
    return f"{interval.value:+.4f} ({interval.low:+.4f} … {interval.high:+.4f})"
