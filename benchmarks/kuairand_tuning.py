"""Tuning on KuaiRand: every ranker's trials on the first days of the log, the same number for each."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.kuairand_runs import TASKS, LogRun, impressions_before
from benchmarks.quality_config import Comparison, Settings, settings_of
from benchmarks.run_cache import RunCache, run_missing

TUNING_DAYS = 7.0
"""What the final figures are of begins before and ends after; settings are never looked at beyond this."""


def tune_log(
    comparison: Comparison, names: Sequence[str], log: Path, seeds: int, cache: RunCache, processes: int
) -> dict[str, Settings]:
    """The best trial of every ranker that has trials: of the highest mean windowed GAUC over tasks and seeds."""
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
    gauc = {key: _mean_gauc(of_seeds, cache) for key, of_seeds in runs.items()}
    best: dict[str, Settings] = {}
    for name in dict.fromkeys(name for name, _ in trials):
        own = comparison.rankers[name].trials
        for n, trial in enumerate(own):
            print(f"{name} {trial}: GAUC {gauc[name, n]:.4f}")
        best[name] = own[int(np.argmax([gauc[name, n] for n in range(len(own))]))]
    return best


def _mean_gauc(runs: Sequence[LogRun], cache: RunCache) -> float:
    tasks = [cache.load(run).facts["tasks"] for run in runs]
    return float(np.mean([[one[task]["gauc_windowed"] for task in TASKS] for one in tasks]))
