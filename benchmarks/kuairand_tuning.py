"""Tuning on KuaiRand: every ranker's trials on the first days of the log, the same number for each.

A trial is judged by the sum of both headlines: mean windowed GAUC over the dense tasks plus mean AUC over the rare
ones, mean over the seeds, all on these days. Both are areas, 0 … 1. Which tasks are rare follows from the base rates in
these days. Where there is no rare task, the first headline decides alone. A trial with an undefined figure loses.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.kuairand_runs import LogRun, impressions_before
from benchmarks.kuairand_tasks import TaskSplit
from benchmarks.quality_config import Comparison, Settings, settings_of
from benchmarks.run_cache import RunCache, run_missing

TUNING_DAYS = 7.0
"""What the final figures are of begins before and ends after; settings are never looked at beyond this."""


@dataclass(frozen=True)
class TrialFigures:
    """Attributes: dense, mean windowed GAUC of the dense tasks; rare, mean AUC of the rare ones, 0 where none is."""

    dense: float
    rare: float

    @property
    def total(self) -> float:
        return self.dense + self.rare


def tune_log(
    comparison: Comparison, names: Sequence[str], log: Path, seeds: int, cache: RunCache, processes: int
) -> dict[str, Settings]:
    """The best trial of every ranker that has trials: of the highest sum of both headlines, mean over the seeds."""
    trials = {
        (name, n): LogRun(name, {**settings_of(comparison, name, {}), **trial}, log, limit=None, seed=0)
        for name in names
        for n, trial in enumerate(comparison.rankers[name].trials)
    }
    if not trials:
        raise ValueError(f"--tune: none of {list(names)} has trials, expected one at least")
    limit = impressions_before(next(iter(trials.values())).config, log, TUNING_DAYS)
    print(f"tuning on the first {TUNING_DAYS:g} days: {limit:,} impressions", flush=True)
    runs = {key: [replace(run, limit=limit, seed=seed) for seed in range(seeds)] for key, run in trials.items()}
    run_missing([run for of_seeds in runs.values() for run in of_seeds], cache, processes)
    figures = {key: trial_figures(of_seeds, cache) for key, of_seeds in runs.items()}
    best: dict[str, Settings] = {}
    for name in dict.fromkeys(name for name, _ in trials):
        own = comparison.rankers[name].trials
        for n, trial in enumerate(own):
            one = figures[name, n]
            print(f"{name} {trial}: GAUC dense {one.dense:.4f}, AUC rare {one.rare:.4f}, sum {one.total:.4f}")
        best[name] = own[int(np.nanargmax([figures[name, n].total for n in range(len(own))]))]
    return best


def trial_figures(runs: Sequence[LogRun], cache: RunCache) -> TrialFigures:
    """Both headlines of one trial, from what the runs of its seeds report; a task that is undefined makes them NaN."""
    facts = [cache.load(run).facts["tasks"] for run in runs]
    split = TaskSplit.of(runs[0].tasks, facts[0])
    dense, rare = (
        np.array([[one[task][key] for task in split.named(part)] for one in facts], np.float64)
        for part, key in ((split.dense, "gauc_windowed"), (split.rare, "auc"))
    )
    return TrialFigures(float(dense.mean()), float(rare.mean()) if rare.size else 0.0)
