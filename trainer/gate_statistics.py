"""The statistics of the publish gate: tests of one task's scores against its labels, and how much they vary.

Letters: N examples, T tasks, K tails of a stretch.

For a calibrated score p of a binary label y, the sum of (y − p) and the sum of (y − p)·logit(p) have mean 0 and known
variances: these are the score tests of intercept and slope in D. R. Cox, "Two further applications of a model for
binary regression", Biometrika 45, 1958. The second one falls when the ranking gets worse, whatever the base rate. For a
regression label the same sums are taken with the value in the place of the logit, and with the squares of the residuals
as variances. Sums of stretches add up, so that a long history is kept in a few numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from smes.arrays import F32, F64, I64, Arrays, Bool

SLOWEST = 0.01
"""The least share that the newest look has in a running average."""

_CLIP = 1e-6
_LARGEST_NOISE = 25.0
N, Y, P, V, A, AL, ALL, RL, VL, VLL = range(10)
"""What is summed: examples, labels, scores, variances of the residuals, weights a of the slope, a·l, a·l², residual·l,
variance·l, variance·l², where l is the logit of a binary score, or a regression value."""
SUMS = 10


def terms(scores: F32, labels: F32, mask: Bool, binary: Bool) -> F64:
    """What each example adds to the sums.

    Args:
        scores: float32 [N, T], finite where ``mask`` is true.
        labels: float32 [N, T].
        mask: bool [N, T]; other cells add nothing.
        binary: bool [T].

    Returns:
        float64 [N, 10, T].
    """
    y = np.where(mask, labels, 0.0).astype(np.float64)
    p = np.where(mask, scores, 0.5).astype(np.float64)
    clipped = np.where(binary, np.clip(p, _CLIP, 1 - _CLIP), 0.5)
    p = np.where(binary, clipped, p)
    logit = np.where(binary, np.log(clipped / (1 - clipped)), p)
    r = y - p
    v = np.where(binary, p * (1 - p), r * r)
    a = np.where(binary, v, 1.0)
    stacked = np.stack(
        [np.ones_like(y), y, p, v, a, a * logit, a * logit**2, r * logit, v * logit, v * logit**2], axis=1
    )
    result: F64 = stacked * mask[:, None, :]
    return result


def slope(sums_ST: F64) -> tuple[F64, F64, F64]:
    """The score of the slope, its information, and its variance, each [T]."""
    s = sums_ST
    with np.errstate(invalid="ignore", divide="ignore"):
        middle = np.where(s[A] > 0, s[AL] / s[A], 0.0)
    score = s[RL] - middle * (s[Y] - s[P])
    information = np.maximum(s[ALL] - middle * s[AL], 0.0)
    variance = np.maximum(s[VLL] - 2 * middle * s[VL] + middle**2 * s[V], 0.0)
    return score, information, variance


def signed_deviance(observed: F64, expected: F64, n: F64) -> F64:
    """How many standard errors a count of positives lies above its expectation, by the deviance of a binomial.

    It keeps the tails of small counts right, where a plain z does not. float64 [T] each; expectations are clipped to
    (0, n).
    """
    mu = np.clip(expected, 1e-9, np.maximum(n - 1e-9, 1e-9))
    k = np.clip(observed, 0.0, n)
    with np.errstate(divide="ignore", invalid="ignore"):
        up = np.where(k > 0, k * np.log(k / mu), 0.0)
        down = np.where(n - k > 0, (n - k) * np.log((n - k) / (n - mu)), 0.0)
    result: F64 = np.sign(k - mu) * np.sqrt(np.maximum(2 * (up + down), 0.0))
    return result


def odds_ratio(observed: F64, expected: F64, n: F64) -> F64:
    """(observed : not observed) / (expected : not expected), with half an example added to each. [T]."""
    mu = np.clip(expected, 0.0, n)
    result: F64 = ((observed + 0.5) * (n - mu + 0.5)) / ((np.maximum(n - observed, 0) + 0.5) * (mu + 0.5))
    return result


def is_beyond(ratio: float, most: float) -> bool:
    """Whether a ratio is further from 1 than ``most`` is, above or below."""
    return bool(ratio > most or ratio < 1 / most)


def losses(scores: F32, labels: F32, *, binary: bool) -> F64:
    """Log loss of binary scores, absolute error of regression values. float [N] each → float64 [N]."""
    p, y = scores.astype(np.float64), labels.astype(np.float64)
    if not binary:
        result: F64 = np.abs(p - y)
        return result
    p = np.clip(p, _CLIP, 1 - _CLIP)
    loss: F64 = -np.where(y > 0.5, np.log(p), np.log1p(-p))
    return loss


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two models on the same examples.

    Attributes:
        candidate, served: The figure of each.
        z: Standard errors by which the candidate is worse; 0 where it cannot be told.
    """

    candidate: float
    served: float
    z: float


_UNKNOWN = Comparison(float("nan"), float("nan"), 0.0)
_FEWEST = 30  # examples of which a standard error is taken


def compare_losses(candidate: F32, served: F32, labels: F32, *, binary: bool) -> Comparison:
    """Paired test of the losses: their differences, example by example. float [N] each.

    Of a rare label the differences hardly vary until a positive comes, which then counts much. So their variance is
    taken to be at least what it is on average where the version in service is right.
    """
    n = len(labels)
    if n < _FEWEST:
        return _UNKNOWN
    ours, theirs = losses(candidate, labels, binary=binary), losses(served, labels, binary=binary)
    difference = ours - theirs
    variance = float(difference.var(ddof=1)) * n
    if binary:
        p, q = (np.clip(scores.astype(np.float64), _CLIP, 1 - _CLIP) for scores in (served, candidate))
        if max(float(labels.sum()), float(p.sum())) < _FEWEST_OF_A_CLASS:
            return _UNKNOWN
        variance = max(variance, float((p * (1 - p) * (_logit(p) - _logit(q)) ** 2).sum()))
    z = float(difference.sum() / np.sqrt(variance)) if variance > 0 else 0.0
    return Comparison(float(ours.mean()), float(theirs.mean()), z)


def _logit(p: F64) -> F64:
    result: F64 = np.log(p / (1 - p))
    return result


_FEWEST_OF_A_CLASS = 20


def compare_auc(candidate: F32, served: F32, labels: F32) -> Comparison:
    """Paired test of two AUCs on the same examples.

    Source: E. R. DeLong, D. M. DeLong, D. L. Clarke-Pearson, "Comparing the areas under two or more correlated receiver
    operating characteristic curves", Biometrics 44, 1988; by ranks as in X. Sun, W. Xu, "Fast implementation of
    DeLong's algorithm", IEEE Signal Processing Letters 21, 2014.
    """
    positive = labels > 0.5
    m, n = int(positive.sum()), int((~positive).sum())
    if min(m, n) < _FEWEST_OF_A_CLASS:
        return _UNKNOWN
    above, below = zip(*(_placements(scores, positive) for scores in (candidate, served)), strict=True)
    ours, theirs = (float(values.mean()) for values in above)
    error = np.sqrt((above[1] - above[0]).var(ddof=1) / m + (below[1] - below[0]).var(ddof=1) / n)
    return Comparison(ours, theirs, float((theirs - ours) / error) if error > 0 else 0.0)


def _placements(scores: F32, positive: Bool) -> tuple[F64, F64]:
    """For each positive the share of negatives below it, for each negative the share of positives above it."""
    negatives, positives = np.sort(scores[~positive]), np.sort(scores[positive])

    def below(values: F32, others: F32) -> F64:
        counts = np.searchsorted(others, values, "left") + np.searchsorted(others, values, "right")
        return counts / (2.0 * len(others))

    return below(scores[positive], negatives), 1.0 - below(scores[~positive], positives)


def largest_shares(users: I64, positive: Bool, lengths: Sequence[int]) -> tuple[I64, I64]:
    """How often the user who appears most often does so, in each tail: in all examples, and in each task's positives.

    Args:
        users: int64 [N], oldest first.
        positive: bool [N, T].
        lengths: Of the K tails.

    Returns:
        (int64 [K, 1 + T] of that user, int64 [K, 1 + T] of all); entry 0 is of all examples.
    """
    place = np.unique(users, return_inverse=True)[1].ravel()
    counted = np.concatenate([np.ones((len(users), 1), np.bool_), positive], axis=1)
    most = np.zeros((len(lengths), counted.shape[1]), np.int64)
    total = np.zeros_like(most)
    for k, length in enumerate(lengths):
        tail, tail_place = counted[-length:], place[-length:]
        total[k] = tail.sum(axis=0)
        for column in range(counted.shape[1]):
            if total[k, column]:
                most[k, column] = np.bincount(tail_place[tail[:, column]]).max()
    return most, total


class UsualNoise:
    """How much statistics have varied over usual stretches, in units of their standard errors.

    Args:
        tails: Lengths of stretches, each of which has noise of its own.
        shape: Of the statistics of one stretch.
    """

    def __init__(self, tails: int, shape: tuple[int, ...] = ()) -> None:
        self._variance: F64 = np.ones((tails, *shape))
        self._looks = np.zeros(tails, np.int64)

    def errors(self, tail: int) -> F64:
        """By what the standard errors of a stretch are to be multiplied, at least 1. float64 of the shape."""
        errors: F64 = np.sqrt(self._variance[tail])
        return errors

    def learn(self, tail: int, z: F64) -> None:
        """Take in the statistics of a usual stretch, in standard errors. NaN counts as 0."""
        self._looks[tail] += 1
        rate = max(1.0 / (self._looks[tail] + 1), SLOWEST)
        squares = np.minimum(np.nan_to_num(z) ** 2, _LARGEST_NOISE)
        self._variance[tail] = np.maximum(1.0, (1 - rate) * self._variance[tail] + rate * squares)

    def state(self) -> Arrays:
        """Copies of the arrays from which :meth:`load_state` goes on."""
        return {"variance": self._variance.copy(), "looks": self._looks.copy()}

    def load_state(self, state: Arrays) -> None:
        """The inverse of :meth:`state`."""
        self._variance, self._looks = state["variance"].copy(), state["looks"].copy()
