"""Rankers in the synthetic worlds: from runs to figures.

GAUC is by request, of scores given before the step that trains on them, over the last quarter of the stream, and over
parts of a twentieth around its first tenth and third. It is of the scores averaged over the model seeds; ``single``
says what one seed reaches on average. Share of the way: 0 is the linear floor, 1 the oracle that knows the true
probabilities. SMES is compared with the *best dense ranker at no less executed operations*, chosen anew at each
part; ``any`` is the best dense ranker whatever it executes.

Letters: N instances, T tasks, P points of a learning curve.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.bootstrap import F64, GroupedAuc, PairedGauc, UserTotals
from benchmarks.flops import MeanCost
from benchmarks.quality_config import Comparison, Settings, settings_of
from benchmarks.run_cache import RunCache, RunResult
from benchmarks.world_runs import PARTS, Stream, TruthRun, WorldRun
from smes.arrays import F32


@dataclass(frozen=True)
class RankerFigures:
    """One ranker in one world.

    Attributes:
        seeds: Mean GAUC over the tasks at the end, of every seed by itself.
        calibration_error: Mean |p - truth| by task over the last quarter, mean over seeds.
        calibration_ratio: Sum of p over sum of truth by task, likewise.
        curve_PT: GAUC by point of the curve and task, mean over seeds.
        cost: What an instance costs.
        impressions_per_s: Of training, one thread, beside whatever else ran.
    """

    seeds: list[float]
    calibration_error: F64
    calibration_ratio: F64
    curve_PT: F64
    cost: MeanCost
    impressions_per_s: float


@dataclass(frozen=True)
class WorldFigures:
    """All rankers in one world.

    Attributes:
        stream: Which world and stream.
        rankers: By name.
        oracle: Part → GAUC of the true probabilities by task.
        oracle_curve_PT: The same along the way.
        gauc: Part → GAUC of all rankers, of seed-averaged scores.
        single: The same of the mean over seeds of what each reaches by itself.
    """

    stream: Stream
    rankers: Mapping[str, RankerFigures]
    oracle: Mapping[str, F64]
    oracle_curve_PT: F64
    gauc: Mapping[str, PairedGauc]
    single: Mapping[str, PairedGauc]

    def best_dense(self, comparison: Comparison, part: str = "end", *, at_least: float = 0.0) -> str | None:
        """The dense ranker of the highest mean GAUC among those that execute no less; None where there is none."""
        names = [n for n in comparison.dense if n in self.rankers and self.rankers[n].cost.flops >= at_least]
        return max(names, key=self.gauc[part].mean, default=None)

    def oracle_share(self, ranker: str, linear: str) -> float:
        """How far the ranker is on the way from the floor to the oracle; 1 is there."""
        gauc, top = self.gauc["end"], float(self.oracle["end"].mean())
        return (gauc.mean(ranker) - gauc.mean(linear)) / (top - gauc.mean(linear))


def runs_of(
    comparison: Comparison, names: Sequence[str], stream: Stream, seeds: int, chosen: Mapping[str, Settings]
) -> list[WorldRun]:
    """All runs of one world, seed by seed, so that an interrupted comparison has whole seeds."""
    return [
        WorldRun(name, settings_of(comparison, name, chosen), stream, seed) for seed in range(seeds) for name in names
    ]


def world_figures(runs: Sequence[WorldRun], cache: RunCache, resamples: int) -> WorldFigures:
    """Figures of one world from its runs, all of which the cache has."""
    stream = runs[0].stream
    truth = cache.load(TruthRun(stream))
    by_ranker: dict[str, list[WorldRun]] = {}
    for run in runs:
        by_ranker.setdefault(run.ranker, []).append(run)
    figures: dict[str, RankerFigures] = {}
    averaged: dict[str, dict[str, UserTotals]] = {part: {} for part in PARTS}
    single: dict[str, dict[str, UserTotals]] = {part: {} for part in PARTS}
    for name, of_seeds in by_ranker.items():
        results = [cache.load(run) for run in of_seeds]
        for part in PARTS:
            scores = [result.arrays[f"scores_{part}"] for result in results]
            mean_NT: F64 = np.stack(scores).mean(axis=0, dtype=np.float64)
            averaged[part][name] = _grouped(truth, mean_NT, part).by_user()
            each = [_grouped(truth, one, part) for one in scores]
            single[part][name] = GroupedAuc.mean(each).by_user()
        seeds = [float(one.by_user().gauc_T.mean()) for one in each]  # of the last part, the end
        figures[name] = _ranker_figures(results, seeds, truth, stream)
    oracle = {s: _grouped(truth, truth.arrays[f"truth_{s}"], s).by_user().gauc_T for s in PARTS}
    return WorldFigures(
        stream,
        figures,
        oracle,
        _curve(truth),
        {s: PairedGauc.of(averaged[s], resamples) for s in PARTS},
        {s: PairedGauc.of(single[s], resamples) for s in PARTS},
    )


def _ranker_figures(
    results: Sequence[RunResult], seeds: list[float], truth: RunResult, stream: Stream
) -> RankerFigures:
    """What does not need the other rankers."""
    true_NT = truth.arrays["truth_end"].astype(np.float64)
    ends = [result.arrays["scores_end"] for result in results]
    return RankerFigures(
        seeds,
        np.mean([np.abs(p - true_NT).mean(axis=0) for p in ends], axis=0),
        np.mean([p.sum(axis=0, dtype=np.float64) / true_NT.sum(axis=0) for p in ends], axis=0),
        np.mean([_curve(result) for result in results], axis=0),
        MeanCost.of([result.facts for result in results]),
        stream.impressions * len(results) / sum(r.facts["seconds"] for r in results),
    )


def _grouped(truth: RunResult, scores_NT: F32 | F64, part: str) -> GroupedAuc:
    columns = (truth.arrays[f"{name}_{part}"] for name in ("request", "user", "labels"))
    request_N, user_N, labels_NT = columns
    return GroupedAuc.of(request_N, user_N, scores_NT, labels_NT.astype(np.float32))


def _curve(result: RunResult) -> F64:
    curve_P2T = result.arrays["curve_P2T"]
    curve_PT: F64 = curve_P2T[:, 0] / curve_P2T[:, 1]
    return curve_PT
