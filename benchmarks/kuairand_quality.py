"""Rankers on a KuaiRand folder: from runs to figures.

GAUC is windowed, within (user, window), of the scores of frozen weights averaged over the model seeds; ``single`` says
what each seed reaches by itself. AUC and normalised entropy are progressive, of single seeds, averaged over the seeds.
There are two headlines: the mean over the dense tasks and the mean over the rare ones, see
:mod:`benchmarks.kuairand_tasks`. The *best dense ranker* of a figure is the one that is best in this very figure,
whatever it executes: chosen on what is compared, which favours it, not SMES. Intervals of GAUC are by a paired
bootstrap over users, those of AUC and entropy over users and positives (:mod:`benchmarks.auc_bootstrap`).

Letters: N examples, T binary tasks, S rankers, K model seeds, R resamples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.auc_bootstrap import TaskExamples, resampled_auc_and_ne
from benchmarks.bootstrap import F64, GroupedAuc, Paired, PairedGauc, UserTotals
from benchmarks.flops import MeanCost
from benchmarks.kuairand_runs import LogColumns, LogRun
from benchmarks.kuairand_tasks import TaskSplit
from benchmarks.quality_config import Comparison
from benchmarks.run_cache import RunCache
from smes.arrays import F32, I64

_NO_LABEL = 2


@dataclass(frozen=True)
class LogRanker:
    """One ranker.

    Attributes:
        gauc_KT: GAUC by seed and task, of every seed by itself.
        auc_KT: AUC by seed and task.
        cost: What an instance costs.
        impressions_per_s: Of the whole backtest, one thread, beside whatever else ran.
    """

    gauc_KT: F64
    auc_KT: F64
    cost: MeanCost
    impressions_per_s: float


@dataclass(frozen=True)
class LogFigures:
    """All rankers.

    Attributes:
        rankers: By name.
        impressions: Trained on, by each.
        tasks: The binary tasks, and which of them are rare.
        gauc: Of seed-averaged scores.
        single: Mean over seeds of what each reaches by itself.
        auc: Mean over seeds.
        ne: Mean over seeds.
    """

    rankers: Mapping[str, LogRanker]
    impressions: int
    tasks: TaskSplit
    gauc: PairedGauc
    single: PairedGauc
    auc: Paired
    ne: Paired

    def best_dense(self, comparison: Comparison) -> str | None:
        """The dense ranker of the highest mean GAUC over the dense tasks; None where none was run."""
        return self.best(comparison, self.gauc, self.tasks.dense)

    def best(self, comparison: Comparison, figure: Paired, tasks: Sequence[int]) -> str | None:
        """The dense ranker that is best in the mean of one figure over these tasks; the lowest of the entropy.

        None where no dense ranker was run, or the figure is undefined.
        """
        sign = -1 if figure is self.ne else 1
        means = {n: sign * figure.mean(n, tasks) for n in comparison.dense if n in self.rankers} if tasks else {}
        return max(means, key=means.__getitem__, default=None) if np.isfinite(list(means.values())).all() else None


def log_figures(runs: Sequence[LogRun], cache: RunCache, resamples: int) -> LogFigures:
    """Figures from runs that the cache has.

    GAUC goes window by window, so that its memory does not grow with the log; AUC goes task by task.

    Raises:
        ValueError: The log has no dense task, or a run has a step that was not taken.
    """
    by_ranker: dict[str, list[LogRun]] = {}
    for run in runs:
        by_ranker.setdefault(run.ranker, []).append(run)
    tasks = TaskSplit.of(runs[0].tasks, cache.load(runs[0]).facts["tasks"])
    if not tasks.dense:
        raise ValueError(f"{runs[0].log}: base rates {tasks.base_rates}, expected a task of 1 % and more")
    columns = {name: [run.columns(cache) for run in of_seeds] for name, of_seeds in by_ranker.items()}
    averaged: dict[str, UserTotals] = {}
    single: dict[str, UserTotals] = {}
    gauc_KT: dict[str, F64] = {}
    for name, seeds in columns.items():
        averaged[name], single[name], gauc_KT[name] = _gauc(seeds)
    auc, ne, auc_SKT = _progressive(columns, resamples)
    rankers = {
        name: _ranker(of_seeds, cache, gauc_KT[name], auc_KT)
        for (name, of_seeds), auc_KT in zip(by_ranker.items(), auc_SKT, strict=True)
    }
    impressions = int(cache.load(runs[0]).facts["trained"])
    return LogFigures(
        rankers,
        impressions,
        tasks,
        PairedGauc.of(averaged, resamples),
        PairedGauc.of(single, resamples),
        auc,
        ne,
    )


def _gauc(seeds: Sequence[LogColumns]) -> tuple[UserTotals, UserTotals, F64]:
    """(of seed-averaged scores, mean over seeds of AUCs, GAUC by seed and task)."""
    averaged: list[GroupedAuc] = []
    single: list[GroupedAuc] = []
    each: list[list[GroupedAuc]] = [[] for _ in seeds]
    for rows in seeds[0].windows():
        scores_KNT = [np.asarray(one.frozen[rows]) for one in seeds]
        mean_NT: F64 = np.stack(scores_KNT).mean(axis=0, dtype=np.float64)
        averaged.append(_grouped(seeds[0], rows, mean_NT))
        for of_seed, scores_NT in zip(each, scores_KNT, strict=True):
            of_seed.append(_grouped(seeds[0], rows, scores_NT))
        single.append(GroupedAuc.mean([of_seed[-1] for of_seed in each]))
    gauc_KT = np.array([UserTotals.of(of_seed).gauc_T for of_seed in each])
    return UserTotals.of(averaged), UserTotals.of(single), gauc_KT


def _grouped(columns: LogColumns, rows: slice, scores_NT: F32 | F64) -> GroupedAuc:
    labels_NT = np.asarray(columns.labels[rows])
    return GroupedAuc.of(
        np.asarray(columns.group[rows]),
        np.asarray(columns.user[rows]),
        scores_NT,
        (labels_NT == 1).astype(np.float32),
        labels_NT != _NO_LABEL,
    )


def _progressive(rankers: Mapping[str, Sequence[LogColumns]], resamples: int) -> tuple[Paired, Paired, F64]:
    """(AUC, normalised entropy, AUC by ranker, seed and task)."""
    seeds = [one for of_ranker in rankers.values() for one in of_ranker]
    users, user_N = np.unique(seeds[0].user, return_inverse=True)
    labels_NT = np.asarray(seeds[0].labels)
    shape = (1 + resamples, len(rankers), -1, labels_NT.shape[1])
    auc, ne = np.empty((2, 1 + resamples, len(seeds), labels_NT.shape[1]))
    for t in range(labels_NT.shape[1]):
        rows = np.flatnonzero(labels_NT[:, t] != _NO_LABEL)
        examples = TaskExamples(user_N.ravel()[rows], labels_NT[rows, t] == 1, len(users), t)

        def scores(m: int, rows: I64 = rows, t: int = t) -> F32:
            return np.asarray(seeds[m].progressive[rows, t])

        auc[:, :, t], ne[:, :, t] = resampled_auc_and_ne(examples, scores, len(seeds), resamples)
    auc_RSKT, ne_RSKT = auc.reshape(shape), ne.reshape(shape)
    names = tuple(rankers)
    auc_RST, ne_RST = auc_RSKT.mean(axis=2), ne_RSKT.mean(axis=2)
    return Paired(names, auc_RST[0], auc_RST[1:]), Paired(names, ne_RST[0], ne_RST[1:]), auc_RSKT[0]


def _ranker(runs: Sequence[LogRun], cache: RunCache, gauc_KT: F64, auc_KT: F64) -> LogRanker:
    facts = [cache.load(run).facts for run in runs]
    return LogRanker(
        gauc_KT,
        auc_KT,
        MeanCost.of(facts),
        sum(one["trained"] for one in facts) / sum(one["seconds"] for one in facts),
    )
