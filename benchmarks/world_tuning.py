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
    trials = {
        (name, n): {**settings_of(comparison, name, {}), **trial}
        for name in names
        for n, trial in enumerate(comparison.rankers[name].trials)
    }
    runs = [WorldRun(name, settings, on, seed=0) for on in tuned_on for (name, _), settings in trials.items()]
    run_missing([*(TruthRun(on) for on in tuned_on), *runs], cache, processes)
    best: dict[str, Settings] = {}
    for name in dict.fromkeys(name for name, _ in trials):
        gauc = []
        for trial in comparison.rankers[name].trials:
            settings = {**settings_of(comparison, name, {}), **trial}
            ends = [
                world_figures([WorldRun(name, settings, on, 0)], cache, 1).gauc["end"].mean(name) for on in tuned_on
            ]
            gauc.append(float(np.mean(ends)))
            print(f"{name} {trial}: GAUC {gauc[-1]:.4f} ({' '.join(f'{end:.4f}' for end in ends)})")
        best[name] = comparison.rankers[name].trials[int(np.argmax(gauc))]
    return best
