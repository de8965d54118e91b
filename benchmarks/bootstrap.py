"""AUC within groups by user, and the paired bootstrap over users of its weighted mean.

GAUC is a ratio of sums over groups, ``Σ w·AUC / Σ w``. A resample draws users with replacement, takes all groups of a
drawn user as often as it was drawn, and takes the ratio again: exact, for every ranker with the same draws.

Letters: N examples, G groups, U users, T tasks, S rankers, R resamples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from smes.arrays import F32, I64, Bool
from smes.metrics import group_auc

F64 = NDArray[np.float64]
_AT_ONCE = 64  # resamples of one matrix product


@dataclass(frozen=True)
class GroupedAuc:
    """AUC of every group and task.

    Attributes:
        user_G: Whose group it is.
        auc_GT: 0 where a class is missing.
        weight_GT: Labelled examples; 0 where a class is missing.
    """

    user_G: I64
    auc_GT: F64
    weight_GT: F64

    @classmethod
    def of(
        cls, group_N: I64, user_N: I64, scores_NT: F32 | F64, labels_NT: F32, mask_NT: Bool | None = None
    ) -> "GroupedAuc":
        """Of scored examples.

        Args:
            group_N: Group of each example, any ids; all examples of a group are of one user.
            user_N: User of each example.
            scores_NT: Any increasing function of the probability.
            labels_NT: 0 or 1.
            mask_NT: False where there is no label; None for labels everywhere.
        """
        groups, first_G, group_N = np.unique(group_N, return_index=True, return_inverse=True)
        group_N = group_N.ravel().astype(np.int64)
        shape = (len(groups), scores_NT.shape[1])
        auc_GT, weight_GT = np.zeros(shape), np.zeros(shape)
        for t in range(shape[1]):
            rows = slice(None) if mask_NT is None else mask_NT[:, t]
            score_N = cast(F32, scores_NT[rows, t])  # any float type will do; averages must not be rounded into ties
            auc, examples, which = group_auc(group_N[rows], score_N, labels_NT[rows, t])
            auc_GT[which, t], weight_GT[which, t] = auc, examples
        return cls(user_N[first_G], auc_GT, weight_GT)

    @classmethod
    def mean(cls, several: Sequence["GroupedAuc"]) -> "GroupedAuc":
        """The mean AUC, group by group, over model seeds that scored the same examples."""
        auc_GT = np.mean([one.auc_GT for one in several], axis=0)
        return cls(several[0].user_G, auc_GT, several[0].weight_GT)

    def by_user(self) -> "UserTotals":
        return UserTotals.of([self])


@dataclass(frozen=True)
class UserTotals:
    """What each user adds to the two sums of a GAUC.

    Attributes:
        user_U: Ascending.
        weighted_UT: Σ weight · AUC over the user's groups.
        weight_UT: Σ weight.
    """

    user_U: I64
    weighted_UT: F64
    weight_UT: F64

    @classmethod
    def of(cls, parts: Sequence[GroupedAuc]) -> "UserTotals":
        """Over all groups of all parts (windows, say)."""
        user_G = np.concatenate([part.user_G for part in parts])
        users, index_G = np.unique(user_G, return_inverse=True)
        shape = (len(users), parts[0].auc_GT.shape[1])
        weighted_UT, weight_UT = np.zeros(shape), np.zeros(shape)
        for t in range(shape[1]):
            weight = np.concatenate([part.weight_GT[:, t] for part in parts])
            auc = np.concatenate([part.auc_GT[:, t] for part in parts])
            weight_UT[:, t] = np.bincount(index_G.ravel(), weight, len(users))
            weighted_UT[:, t] = np.bincount(index_G.ravel(), weight * auc, len(users))
        return cls(users, weighted_UT, weight_UT)

    @property
    def gauc_T(self) -> F64:
        """NaN for a task without any group of both classes."""
        return _ratio(self.weighted_UT.sum(axis=0), self.weight_UT.sum(axis=0))


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure and the bounds of its 95 % bootstrap interval, in one unit."""

    value: float
    low: float
    high: float


def resampled_gauc(rankers: Sequence[UserTotals], resamples: int, seed: int = 0) -> F64:
    """GAUC of every ranker over the same resamples of users. float64 [R, S, T].

    Args:
        rankers: Over the same stream; their groups may differ.
        resamples: R.
        seed: Of the draws.
    """
    users = np.unique(np.concatenate([one.user_U for one in rankers]))
    num_tasks = rankers[0].weight_UT.shape[1]
    sums_US2T = np.zeros((len(users), len(rankers), 2, num_tasks))
    for s, one in enumerate(rankers):
        rows = np.searchsorted(users, one.user_U)
        sums_US2T[rows, s, 0], sums_US2T[rows, s, 1] = one.weighted_UT, one.weight_UT
    columns = sums_US2T.reshape(len(users), -1)
    rng = np.random.default_rng(seed)
    out_RST = np.empty((resamples, len(rankers), num_tasks))
    for first in range(0, resamples, _AT_ONCE):
        count = min(_AT_ONCE, resamples - first)
        drawn = [np.bincount(rng.integers(len(users), size=len(users)), minlength=len(users)) for _ in range(count)]
        sums = (np.array(drawn, np.float64) @ columns).reshape(count, len(rankers), 2, num_tasks)
        out_RST[first : first + count] = _ratio(sums[:, :, 0], sums[:, :, 1])
    return out_RST


@dataclass(frozen=True)
class Paired:
    """One kind of figure of rankers side by side, on the same resamples.

    Attributes:
        names: S of them.
        value_ST: Of all data; NaN where undefined.
        resampled_RST: Of each resample.
    """

    names: tuple[str, ...]
    value_ST: F64
    resampled_RST: F64

    def value_T(self, name: str) -> F64:
        row: F64 = self.value_ST[self.names.index(name)]
        return row

    def mean(self, name: str, tasks: Sequence[int] | None = None) -> float:
        """Over the tasks, all where none are named; NaN where one of them is undefined."""
        return float(self._means(name, tasks)[0])

    def gain(self, ours: str, theirs: str, tasks: Sequence[int] | None = None) -> Interval:
        """By how much the first one's mean over the tasks is higher, in % of the second one's."""
        (a, a_R), (b, b_R) = self._means(ours, tasks), self._means(theirs, tasks)
        return relative_gain(a, b, a_R, b_R)

    def difference(self, ours: str, theirs: str, tasks: Sequence[int] | None = None) -> Interval:
        """The first one's mean over the tasks minus the second one's, in the figure's unit."""
        (a, a_R), (b, b_R) = self._means(ours, tasks), self._means(theirs, tasks)
        return _interval(a - b, a_R - b_R)

    def _means(self, name: str, tasks: Sequence[int] | None) -> tuple[float, F64]:
        """(of all data, of each resample [R])."""
        columns = slice(None) if tasks is None else list(tasks)
        s = self.names.index(name)
        return float(self.value_ST[s, columns].mean()), self.resampled_RST[:, s, columns].mean(axis=1)


class PairedGauc(Paired):
    """GAUC, on the same resamples of users."""

    @classmethod
    def of(cls, rankers: Mapping[str, UserTotals], resamples: int) -> "PairedGauc":
        totals = list(rankers.values())
        return cls(tuple(rankers), np.array([one.gauc_T for one in totals]), resampled_gauc(totals, resamples))

    def gauc_T(self, name: str) -> F64:
        return self.value_T(name)


def relative_gain(ours: float, theirs: float, ours_R: F64, theirs_R: F64) -> Interval:
    """``100 · (ours / theirs - 1)`` and the 2.5 % and 97.5 % quantiles of the same over resamples."""
    return _interval(100 * (ours / theirs - 1), 100 * (ours_R / theirs_R - 1))


def _interval(value: float, value_R: F64) -> Interval:
    """Over the resamples in which the figure is defined: a task of few positives may have none in one."""
    defined_R = value_R[np.isfinite(value_R)]
    low, high = np.quantile(defined_R, [0.025, 0.975]) if len(defined_R) else (np.nan, np.nan)
    return Interval(float(value), float(low), float(high))


def _ratio(weighted: F64, weight: F64) -> F64:
    return np.divide(weighted, weight, out=np.full_like(weighted, np.nan), where=weight > 0)
