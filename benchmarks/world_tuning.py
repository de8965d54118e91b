"""Tuning in the worlds: every ranker's trials on worlds of another seed, the same number for each."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from benchmarks.quality_config import Comparison, Settings, settings_of
from benchmarks.run_cache import RunCache, run_missing
from benchmarks.world_quality import world_figures
from benchmarks.world_runs import Stream, TruthRun, WorldRun

_OTHER_SEED = 1_000
"""Added to the world's seed: nothing of what is tuned on is in what is reported."""


def tune_worlds(
    comparison: Comparison, names: Sequence[str], streams: Sequence[Stream], cache: RunCache, processes: int
) -> dict[str, Settings]:
    """The best trial of every ranker that has trials: of the highest GAUC over the last quarter, mean over the worlds.

    One setting for all worlds: nobody knows beforehand which one they are in.
    """
    tuned_on = [replace(stream, world_seed=stream.world_seed + _OTHER_SEED) for stream in streams]
    tuned = [name for name in names if comparison.rankers[name].trials]
    runs = [
        _run(comparison, name, trial, on)
        for on in tuned_on
        for name in tuned
        for trial in comparison.rankers[name].trials
    ]
    run_missing([*(TruthRun(on) for on in tuned_on), *runs], cache, processes)
    best: dict[str, Settings] = {}
    for name in tuned:
        gauc = []
        for trial in comparison.rankers[name].trials:
            ends = [
                world_figures([_run(comparison, name, trial, on)], cache, 1).gauc["end"].mean(name) for on in tuned_on
            ]
            gauc.append(float(np.mean(ends)))
            print(f"{name} {trial}: GAUC {gauc[-1]:.4f} ({' '.join(f'{end:.4f}' for end in ends)})")
        best[name] = comparison.rankers[name].trials[int(np.argmax(gauc))]
    return best


def _run(comparison: Comparison, name: str, trial: Settings, stream: Stream) -> WorldRun:
    return WorldRun(name, {**settings_of(comparison, name, {}, stream.world), **trial}, stream, seed=0)
