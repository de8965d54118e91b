"""Rankers in the synthetic worlds: from runs to figures.

GAUC is by request, of scores given before the step that trains on them, over the last quarter of the stream, and over
parts of a twentieth around its first tenth and third (of a tenth in worlds with rare tasks). It is of the scores
averaged over the model seeds; ``single`` says what one seed reaches on average. Share of the way: 0 is the linear
floor, 1 the oracle that knows the true probabilities. SMES is compared with the *best dense ranker at no less executed
operations*, chosen anew at each part; ``any`` is the best dense ranker whatever it executes.

Letters: N instances, T tasks, S seeds, P points of a learning curve.
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
from smes.metrics import BinaryTally


@dataclass(frozen=True)
class RankerFigures:
    """One ranker in one world.

    Attributes:
        seeds_ST: GAUC at the end by task, of every seed by itself.
        calibration_error: Mean |p - truth| by task over the last quarter, mean over seeds.
        calibration_ratio: Sum of p over sum of truth by task, likewise.
        auc_T: AUC over the last quarter, by task, mean over seeds; NaN where a class is missing.
        ne_T: Normalised entropy over the last quarter, likewise.
        curve_PT: GAUC by point of the curve and task, mean over seeds.
        cost: What an instance costs.
        impressions_per_s: Of training, one thread, beside whatever else ran.
    """

    seeds_ST: F64
    calibration_error: F64
    calibration_ratio: F64
    auc_T: F64
    ne_T: F64
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
        oracle_auc_T: AUC of the true probabilities over the last quarter.
        oracle_ne_T: Normalised entropy of the true probabilities over the last quarter.
        gauc: Part → GAUC of all rankers, of seed-averaged scores.
        single: The same of the mean over seeds of what each reaches by itself.
    """

    stream: Stream
    rankers: Mapping[str, RankerFigures]
    oracle: Mapping[str, F64]
    oracle_curve_PT: F64
    oracle_auc_T: F64
    oracle_ne_T: F64
    gauc: Mapping[str, PairedGauc]
    single: Mapping[str, PairedGauc]

    def best_dense(
        self,
        comparison: Comparison,
        part: str = "end",
        *,
        at_least: float = 0.0,
        tasks: Sequence[int] | None = None,
    ) -> str | None:
        """The dense ranker of the highest mean GAUC among those that execute no less; None where there is none.

        Args:
            comparison: Which rankers are dense.
            part: Of the stream.
            at_least: Operations.
            tasks: Over which the mean is; None for all.
        """
        names = [n for n in comparison.dense if n in self.rankers and self.rankers[n].cost.flops >= at_least]
        return max(names, key=lambda name: self.gauc[part].mean(name, tasks), default=None)

    def oracle_share(self, ranker: str, linear: str, tasks: Sequence[int] | None = None) -> float:
        """How far the ranker is on the way from the floor to the oracle; 1 is there. Of all tasks or some."""
        gauc, oracle_T = self.gauc["end"], self.oracle["end"]
        top = float((oracle_T if tasks is None else oracle_T[list(tasks)]).mean())
        floor = gauc.mean(linear, tasks)
        return (gauc.mean(ranker, tasks) - floor) / (top - floor)


def runs_of(
    comparison: Comparison, names: Sequence[str], stream: Stream, seeds: int, chosen: Mapping[str, Settings]
) -> list[WorldRun]:
    """All runs of one world, seed by seed, so that an interrupted comparison has whole seeds."""
    return [
        WorldRun(name, settings_of(comparison, name, chosen, stream.world), stream, seed)
        for seed in range(seeds)
        for name in names
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
        seeds_ST = np.array([one.by_user().gauc_T for one in each])  # of the last part, the end
        figures[name] = _ranker_figures(results, seeds_ST, truth, stream)
    oracle = {s: _grouped(truth, truth.arrays[f"truth_{s}"], s).by_user().gauc_T for s in PARTS}
    return WorldFigures(
        stream,
        figures,
        oracle,
        _curve(truth),
        *_auc_and_ne(truth.arrays["truth_end"], truth),
        {s: PairedGauc.of(averaged[s], resamples) for s in PARTS},
        {s: PairedGauc.of(single[s], resamples) for s in PARTS},
    )


def _ranker_figures(results: Sequence[RunResult], seeds_ST: F64, truth: RunResult, stream: Stream) -> RankerFigures:
    """What does not need the other rankers."""
    true_NT = truth.arrays["truth_end"].astype(np.float64)
    ends = [result.arrays["scores_end"] for result in results]
    auc_ST, ne_ST = zip(*(_auc_and_ne(p, truth) for p in ends), strict=True)
    return RankerFigures(
        seeds_ST,
        np.mean([np.abs(p - true_NT).mean(axis=0) for p in ends], axis=0),
        np.mean([p.sum(axis=0, dtype=np.float64) / true_NT.sum(axis=0) for p in ends], axis=0),
        np.mean(auc_ST, axis=0),
        np.mean(ne_ST, axis=0),
        np.mean([_curve(result) for result in results], axis=0),
        MeanCost.of([result.facts for result in results]),
        stream.impressions * len(results) / sum(r.facts["seconds"] for r in results),
    )


def _grouped(truth: RunResult, scores_NT: F32 | F64, part: str) -> GroupedAuc:
    columns = (truth.arrays[f"{name}_{part}"] for name in ("request", "user", "labels"))
    request_N, user_N, labels_NT = columns
    return GroupedAuc.of(request_N, user_N, scores_NT, labels_NT.astype(np.float32))


def _auc_and_ne(scores_NT: F32, truth: RunResult) -> tuple[F64, F64]:
    """AUC [T] and normalised entropy [T] over the last quarter."""
    reports = []
    for t, labels_N in enumerate(truth.arrays["labels_end"].T.astype(np.float32)):
        tally = BinaryTally()
        tally.add(scores_NT[:, t], labels_N)
        reports.append(tally.report())
    return np.array([one.auc for one in reports]), np.array([one.ne for one in reports])


def _curve(result: RunResult) -> F64:
    curve_P2T = result.arrays["curve_P2T"]
    above_PT, below_PT = curve_P2T[:, 0], curve_P2T[:, 1]
    curve_PT: F64 = np.divide(above_PT, below_PT, out=np.full_like(above_PT, np.nan), where=below_PT > 0)
    return curve_PT
