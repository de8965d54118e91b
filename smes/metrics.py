"""Streaming metrics in bounded memory, and AUC within groups.

Letters: N examples, G groups.

AUC comes from a histogram of logits with 8,192 bins of width 0.004 from -16 to 16. Scores in one bin count as ties, so
AUC is wrong by at most half of the pairs that lie within one bin.

A score that is not finite is no score. It is counted, and the metrics of examples with such a score among them are
undefined (NaN): whatever was left out or put in its place would look like a figure of the model.

Sources. Normalised entropy: He et al., "Practical Lessons from Predicting Clicks on Ads at Facebook" (2014). GAUC
weighted by impressions: HoME (arXiv 2408.05430). XAUC: Zhan et al., "Deconfounding Duration Bias in Watch-time
Prediction for Video Recommendation" (2022). Our ECE uses bins of equal mass, because bins of equal width would put
nearly all examples of a sparse task into one bin.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smes.arrays import F32, F64, I64, U64, Bool
from smes.metric_kernels import count_scores

_BINS = 8192
_MAX_LOGIT = 16.0
_EPSILON = 1e-7
_ECE_BINS = 20


@dataclass(frozen=True, slots=True)
class BinaryReport:
    """Metrics of one binary task.

    A metric is NaN where it is undefined: a class is missing, there are no examples, or some were not scored.

    Attributes:
        examples: Number of labelled examples.
        positives: Number of examples with label 1.
        auc: Area under the ROC curve, 0 … 1.
        ne: Normalised entropy: log loss divided by the entropy of the base rate. A value below 1 is better than
            always predicting the base rate.
        ece: Expected calibration error over 20 bins of equal mass, 0 … 1.
        calibration: Mean prediction divided by mean label; 1 is calibrated.
        not_scored: How many of the examples had no finite score.
    """

    examples: int
    positives: int
    auc: float
    ne: float
    ece: float
    calibration: float
    not_scored: int = 0


class BinaryTally:
    """Running AUC, normalised entropy and calibration of one binary task, in constant memory."""

    def __init__(self) -> None:
        self._counts = np.zeros((2, _BINS), np.int64)  # negatives, positives by logit bin
        self._predicted = np.zeros(_BINS, np.float64)  # sum of predictions by logit bin
        self._sums = np.zeros(_BINS, np.float64)  # of the examples being added; zeros in between
        self._log_loss = 0.0
        self._not_scored = np.zeros(2, np.int64)  # negatives, positives

    def add(self, probability: F32, label: F32) -> None:
        """Add scored examples. float [N] in 0 … 1 (not finite: not scored), float [N] of 0 or 1."""
        scored = np.isfinite(probability)
        if not scored.all():
            self._not_scored += np.bincount((label[~scored] > 0.5).astype(np.int64), minlength=2)
            probability, label = probability[scored], label[scored]
        if len(label) == 0:
            return
        p = np.clip(probability.astype(np.float64), _EPSILON, 1 - _EPSILON)
        positive = label > 0.5
        log_p, log_rest = np.log(p), np.log1p(-p)
        logit = log_p - log_rest
        bin_N = np.clip(((logit + _MAX_LOGIT) * (_BINS / (2 * _MAX_LOGIT))).astype(np.int64), 0, _BINS - 1)
        count_scores(bin_N, p, positive, self._counts, self._predicted, self._sums)
        self._log_loss -= float(np.where(positive, log_p, log_rest).sum())

    def report(self) -> BinaryReport:
        """Compute the metrics of all examples added so far."""
        negatives, positives = (int(n) for n in self._counts.sum(axis=1) + self._not_scored)
        examples, not_scored = negatives + positives, int(self._not_scored.sum())
        nan = float("nan")
        if examples == 0 or not_scored:
            return BinaryReport(examples, positives, nan, nan, nan, nan, not_scored)
        rate = positives / examples
        entropy = -sum(r * np.log(r) for r in (rate, 1 - rate) if r > 0)
        return BinaryReport(
            examples,
            positives,
            auc=self._auc() if positives and negatives else nan,
            ne=self._log_loss / examples / entropy if entropy > 0 else nan,
            ece=self._ece(),
            calibration=float(self._predicted.sum()) / positives if positives else nan,
        )

    def _auc(self) -> float:
        negatives, positives = self._counts
        below = np.cumsum(negatives) - negatives
        pairs = float((positives * (below + negatives / 2)).sum())
        return pairs / (float(positives.sum()) * float(negatives.sum()))

    def _ece(self) -> float:
        # Neighbouring histogram bins merged into groups of about equal mass.
        in_bin = self._counts.sum(axis=0)
        middle = np.cumsum(in_bin) - in_bin / 2
        group = np.minimum((middle / in_bin.sum() * _ECE_BINS).astype(np.int64), _ECE_BINS - 1)
        predicted = np.bincount(group, weights=self._predicted, minlength=_ECE_BINS)
        positives = np.bincount(group, weights=self._counts[1], minlength=_ECE_BINS)
        return float(np.abs(predicted - positives).sum() / in_bin.sum())

    def state(self) -> dict[str, NDArray[Any]]:
        """Copies of the arrays from which :meth:`load_state` continues."""
        log_loss = np.array([self._log_loss])
        arrays = {"counts": self._counts, "predicted": self._predicted, "not_scored": self._not_scored}
        return {name: array.copy() for name, array in arrays.items()} | {"log_loss": log_loss}

    def load_state(self, state: dict[str, NDArray[Any]]) -> None:
        """Replace everything added so far with a :meth:`state`."""
        self._counts, self._predicted = state["counts"].copy(), state["predicted"].copy()
        self._log_loss = float(state["log_loss"][0])
        # A state of before scores were looked at has none.
        self._not_scored = state.get("not_scored", np.zeros(2, np.int64)).copy()

    def since(self, state: dict[str, NDArray[Any]]) -> "BinaryTally":
        """What was added since a :meth:`state` was taken."""
        added = BinaryTally()
        added.load_state({name: array - state[name] for name, array in self.state().items()})
        return added


class RegressionTally:
    """Running XAUC, mean absolute error and mean bias of one regression task, in constant memory.

    XAUC is the share of pairs of examples whose predictions are ordered as their labels are. It is estimated from pairs
    within each batch that is added: every example with the next one and with the one half a batch away.
    """

    def __init__(self) -> None:
        # Examples, examples with a label above 0, sum of absolute errors, concordant pairs, pairs, sum of errors.
        self._sums = np.zeros(6, np.float64)
        self._not_scored = np.zeros(2, np.int64)  # with label 0, with a label above 0

    def add(self, value: F32, label: F32) -> None:
        """Add scored examples. float [N] (not finite: not scored), float [N], both in the label's unit."""
        scored = np.isfinite(value)
        if not scored.all():
            self._not_scored += np.bincount((label[~scored] > 0).astype(np.int64), minlength=2)
            value, label = value[scored], label[scored]
        n = len(label)
        if n == 0:
            return
        concordant = pairs = 0.0
        for shift in {1, n // 2} if n > 1 else ():
            label_order = np.sign(label - np.roll(label, shift))
            value_order = np.sign(value - np.roll(value, shift))
            comparable = label_order != 0
            pairs += float(comparable.sum())
            concordant += float((label_order == value_order)[comparable].sum())
            concordant += float((value_order == 0)[comparable].sum()) / 2
        error = (value.astype(np.float64) - label).sum()
        self._sums += (n, (label > 0).sum(), np.abs(value - label).sum(), concordant, pairs, error)

    @property
    def examples(self) -> int:
        """Number of labelled examples."""
        return int(self._sums[0]) + self.not_scored

    @property
    def positives(self) -> int:
        """Number of examples with a label above 0."""
        return int(self._sums[1] + self._not_scored[1])

    @property
    def not_scored(self) -> int:
        """How many of the examples had no finite score."""
        return int(self._not_scored.sum())

    @property
    def mean_absolute_error(self) -> float:
        """In the label's unit; NaN before the first example, and where some were not scored."""
        return self._ratio(2, 0)

    @property
    def mean_bias(self) -> float:
        """Mean prediction minus mean label, in the label's unit; NaN as for the error."""
        return self._ratio(5, 0)

    @property
    def xauc(self) -> float:
        """0 … 1; NaN before the first comparable pair, and where some examples were not scored."""
        return self._ratio(3, 4)

    def _ratio(self, above: int, below: int) -> float:
        defined = self._sums[below] > 0 and not self.not_scored
        return float(self._sums[above] / self._sums[below]) if defined else float("nan")

    def state(self) -> dict[str, NDArray[Any]]:
        """Copies of the arrays from which :meth:`load_state` continues."""
        return {"sums": self._sums.copy(), "not_scored": self._not_scored.copy()}

    def load_state(self, state: dict[str, NDArray[Any]]) -> None:
        """Replace everything added so far with a :meth:`state`."""
        self._sums = state["sums"].copy()
        self._not_scored = state.get("not_scored", np.zeros(2, np.int64)).copy()

    def since(self, state: dict[str, NDArray[Any]]) -> "RegressionTally":
        """What was added since a :meth:`state` was taken."""
        added = RegressionTally()
        added.load_state({name: array - state[name] for name, array in self.state().items()})
        return added


def group_auc(group: I64, score: F32, label: F32) -> tuple[F64, I64, I64]:
    """Compute AUC within each group. Ties count half. Groups without both classes are left out.

    The AUC of a group with a score that is not finite is NaN.

    Args:
        group: int64 [N], the id of each example's group.
        score: float32 [N].
        label: float [N] of 0 or 1.

    Returns:
        (AUC [G], number of examples [G], group id [G]), ordered by group id.
    """
    if len(group) == 0:
        return np.zeros(0), np.zeros(0, np.int64), np.zeros(0, np.int64)
    numbered = group.min() >= 0 and group.max() < 2 ** (64 - _GROUP_BIT)
    names, number = (group, group) if numbered else np.unique(group, return_inverse=True)
    packed = np.sort(_in_order(number.astype(np.uint64), score, label > 0.5))
    positive = (packed & np.uint64(1)).astype(np.bool_)
    by_score, by_group = packed >> np.uint64(1), packed >> np.uint64(_GROUP_BIT)
    new_group = np.flatnonzero(np.r_[True, by_group[1:] != by_group[:-1]])
    new_tie: Bool = np.r_[True, by_score[1:] != by_score[:-1]]
    tie = np.cumsum(new_tie) - 1
    tie_start = np.flatnonzero(new_tie)
    tie_size = np.diff(np.r_[tie_start, len(group)])
    rank = (tie_start + (tie_size + 1) / 2)[tie]  # average rank over the whole array, from 1
    examples = np.diff(np.r_[new_group, len(group)])
    positives = np.add.reduceat(positive, new_group, dtype=np.int64)
    rank_sum = np.add.reduceat(np.where(positive, rank, 0.0), new_group) - positives * new_group
    negatives = examples - positives
    both = (positives > 0) & (negatives > 0)
    auc = (rank_sum[both] - positives[both] * (positives[both] + 1) / 2) / (positives[both] * negatives[both])
    found = by_group[new_group][both].astype(np.int64)
    group_ids: I64 = found if numbered else names[found]
    auc[np.isin(group_ids, group[~np.isfinite(score)])] = np.nan
    return auc, examples[both].astype(np.int64), group_ids


_GROUP_BIT = 33  # below it: 32 bits of the score, one of the label


def _in_order(group: U64, score: F32, is_positive: Bool) -> U64:
    """Numbers whose order is that of (group, score), equal scores equal but for their lowest bit, the label.

    One sort of numbers takes a fraction of the time of two sorts that carry places along. Groups are below 2**31.
    """
    bits = (score + np.float32(0)).astype(np.float32).view(np.uint32)  # -0 becomes 0
    # Floats are in the order of their bits; of negative ones all bits, of others the sign are turned.
    turned = np.where(bits >> np.uint32(31), ~bits, bits | np.uint32(1 << 31))
    ordered: U64 = group << np.uint64(_GROUP_BIT)
    ordered |= turned.astype(np.uint64) << np.uint64(1)
    ordered |= is_positive.astype(np.uint64)
    return ordered
