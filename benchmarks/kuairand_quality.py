"""Rankers on a KuaiRand folder: from runs to figures.

GAUC is windowed, within (user, window), of the scores of frozen weights averaged over the model seeds; ``seeds`` says
what each seed reaches by itself. AUC is progressive, of single seeds. The *best dense ranker* is the one of the highest
mean GAUC, whatever it executes: chosen on the figures that are compared, which favours it, not SMES.

Letters: N examples, T tasks (those of :data:`benchmarks.kuairand_runs.TASKS`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.bootstrap import F64, GroupedAuc, PairedGauc, UserTotals
from benchmarks.flops import MeanCost
from benchmarks.kuairand_runs import TASKS, LogColumns, LogRun
from benchmarks.quality_config import Comparison
from benchmarks.run_cache import RunCache
from smes.arrays import F32

_NO_LABEL = 2


@dataclass(frozen=True)
class LogRanker:
    """One ranker.

    Attributes:
        seeds_ST: GAUC by seed and task, of every seed by itself.
        auc_ST: AUC by seed and task.
        positives_T: How many positives there are of each task.
        cost: What an instance costs.
        impressions_per_s: Of the whole backtest, one thread, beside whatever else ran.
    """

    seeds_ST: F64
    auc_ST: F64
    positives_T: list[int]
    cost: MeanCost
    impressions_per_s: float


@dataclass(frozen=True)
class LogFigures:
    """All rankers.

    Attributes:
        rankers: By name.
        impressions: Trained on, by each.
        gauc: Of seed-averaged scores.
        single: Mean over seeds of what each reaches by itself.
    """

    rankers: Mapping[str, LogRanker]
    impressions: int
    gauc: PairedGauc
    single: PairedGauc

    def best_dense(self, comparison: Comparison) -> str | None:
        """The dense ranker of the highest mean GAUC; None where none was run."""
        return max((n for n in comparison.dense if n in self.rankers), key=self.gauc.mean, default=None)

    def auc(self, name: str, task: str) -> float:
        """Mean over the seeds."""
        return float(self.rankers[name].auc_ST[:, TASKS.index(task)].mean())


def log_figures(runs: Sequence[LogRun], cache: RunCache, resamples: int) -> LogFigures:
    """Figures from runs that the cache has; window by window, so that memory does not grow with the log."""
    by_ranker: dict[str, list[LogRun]] = {}
    for run in runs:
        by_ranker.setdefault(run.ranker, []).append(run)
    rankers: dict[str, LogRanker] = {}
    averaged: dict[str, UserTotals] = {}
    single: dict[str, UserTotals] = {}
    for name, of_seeds in by_ranker.items():
        averaged[name], single[name], seeds_ST = _gauc([run.columns(cache) for run in of_seeds])
        rankers[name] = _ranker(of_seeds, cache, seeds_ST)
    impressions = int(cache.load(runs[0]).facts["trained"])
    return LogFigures(rankers, impressions, PairedGauc.of(averaged, resamples), PairedGauc.of(single, resamples))


def _gauc(seeds: Sequence[LogColumns]) -> tuple[UserTotals, UserTotals, F64]:
    """(of seed-averaged scores, mean over seeds of AUCs, GAUC by seed and task)."""
    averaged: list[GroupedAuc] = []
    single: list[GroupedAuc] = []
    sums_S2T = np.zeros((len(seeds), 2, len(TASKS)))
    for rows in seeds[0].windows():
        scores_SNT = [np.asarray(one.scores[rows]) for one in seeds]
        mean_NT: F64 = np.stack(scores_SNT).mean(axis=0, dtype=np.float64)
        averaged.append(_grouped(seeds[0], rows, mean_NT))
        each = [_grouped(seeds[0], rows, scores_NT) for scores_NT in scores_SNT]
        single.append(GroupedAuc.mean(each))
        for s, one in enumerate(each):
            sums_S2T[s, 0] += (one.auc_GT * one.weight_GT).sum(axis=0)
            sums_S2T[s, 1] += one.weight_GT.sum(axis=0)
    return UserTotals.of(averaged), UserTotals.of(single), sums_S2T[:, 0] / sums_S2T[:, 1]


def _grouped(columns: LogColumns, rows: slice, scores_NT: F32 | F64) -> GroupedAuc:
    labels_NT = np.asarray(columns.labels[rows])
    return GroupedAuc.of(
        np.asarray(columns.group[rows]),
        np.asarray(columns.user[rows]),
        scores_NT,
        (labels_NT == 1).astype(np.float32),
        labels_NT != _NO_LABEL,
    )


def _ranker(runs: Sequence[LogRun], cache: RunCache, seeds_ST: F64) -> LogRanker:
    facts = [cache.load(run).facts for run in runs]
    # A task with one class only has no AUC: a log of a few thousand impressions.
    auc_ST = np.array([[one["tasks"][task]["auc"] for task in TASKS] for one in facts], np.float64)
    return LogRanker(
        seeds_ST,
        auc_ST,
        [facts[0]["tasks"][task]["positives"] for task in TASKS],
        MeanCost.of(facts),
        sum(one["trained"] for one in facts) / sum(one["seconds"] for one in facts),
    )
