"""AUC and normalised entropy of pooled examples, and their paired bootstrap over users and positives.

A task with a few hundred positives is uncertain in two ways: other users might have come, and the same users might have
given their few positives to other impressions. So a resample draws on two levels. First it draws as many users as there
are, with replacement. Then, for each time that a user was drawn, it draws as many positives of a task as the user has,
with replacement among the user's own. A user's negatives count as often as the user was drawn. All rankers get the same
draws, and all tasks the same users. Because it draws on both levels, it gives somewhat wider intervals than a bootstrap
over users alone.

AUC of a resample is the weighted one, exact, ties half::

    Σ_p w_p · (Σ_n c_n · [s_n < s_p] + ½ Σ_n c_n · [s_n = s_p])  /  (Σ_p w_p · Σ_n c_n)

over positives p and negatives n, with w_p the draws of a positive, c_n those of the negative's user, s the scores.
Every model's scores are sorted once per task. One walk in the order of the scores then adds up the draws of the
negatives passed so far, for 64 resamples at once. Normalised entropy is the log loss with the same weights, divided by
the entropy of the resample's own base rate. The time is linear in examples, models, tasks and resamples. Memory: 5
bytes for each labelled example and model, and 8 for each user and each positive and model; one task at a time.

Letters: N labelled examples of one task, P positives among them, U users, M models, R resamples, L the resamples that
are taken at once. Row 0 of R is not a resample but the data themselves: every user and positive once.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from benchmarks.bootstrap import F64
from smes.arrays import F32, I64, Bool

U8 = NDArray[np.uint8]
_AT_ONCE = 64  # a user's draws fill one cache line
_SMALLEST = 1e-7  # of a probability in the log loss, as in smes.metrics


@dataclass(frozen=True)
class TaskExamples:
    """The labelled examples of one task.

    Attributes:
        user_N: Index of the user, 0 … ``users`` - 1.
        positive_N: Whether the label is 1.
        users: U, of the whole log.
        task: Number of the task: tells its draws of positives from another task's.
    """

    user_N: I64
    positive_N: Bool
    users: int
    task: int


def resampled_auc_and_ne(
    examples: TaskExamples, scores: Callable[[int], F32], models: int, resamples: int, seed: int = 0
) -> tuple[F64, F64]:
    """AUC and normalised entropy of every model: the data's in row 0, then those of R resamples.

    Args:
        examples: Of the task.
        scores: Number of a model, 0 … ``models`` - 1 → its probabilities, float32 [N].
        models: M.
        resamples: R; 0 for the data alone.
        seed: Of the draws.

    Returns:
        (AUC [1 + R, M], normalised entropy [1 + R, M]); NaN where a class is missing.

    Raises:
        ValueError: A score is not finite.
    """
    # Positives by user, so that a user's own lie side by side.
    place_P = np.flatnonzero(examples.positive_N)
    place_P = place_P[np.argsort(examples.user_N[place_P], kind="stable")]
    negatives_U: F64 = np.bincount(examples.user_N[~examples.positive_N], minlength=examples.users).astype(np.float64)
    who_N = examples.user_N.astype(np.int32)
    who_N[place_P] = -1 - np.arange(len(place_P), dtype=np.int32)
    loss_MU, loss_MP = np.empty((models, examples.users)), np.empty((models, len(place_P)))
    walks: list[tuple[NDArray[np.int32], Bool]] = []
    for m in range(models):
        score_N = scores(m)
        if not np.isfinite(score_N).all():
            raise ValueError(f"scores of model {m}: {(~np.isfinite(score_N)).sum()} are not finite, expected none")
        walks.append(_walk(who_N, score_N))
        loss_MU[m], loss_MP[m] = _log_losses(examples, place_P, score_N)

    auc_RM, ne_RM = np.empty((1 + resamples, models)), np.empty((1 + resamples, models))
    for first in range(0, 1 + resamples, _AT_ONCE):
        drawn_UL = draw_users(examples.users, first, seed)
        drawn_PL = draw_positives(examples.user_N[place_P], drawn_UL, first, seed, examples.task)
        positives_L = drawn_PL.sum(axis=0, dtype=np.float64)
        negatives_L = negatives_U @ drawn_UL.astype(np.float64)
        pairs_ML = np.stack([_twice_pairs(who, tied, drawn_UL, drawn_PL) for who, tied in walks]) / 2
        loss_ML = loss_MU @ drawn_UL.astype(np.float64) + loss_MP @ drawn_PL.astype(np.float64)
        rows = slice(first, min(first + _AT_ONCE, 1 + resamples))
        with np.errstate(invalid="ignore", divide="ignore"):
            auc_RM[rows] = (pairs_ML / (positives_L * negatives_L)).T[: rows.stop - first]
            ne_RM[rows] = (loss_ML / _total_entropy(positives_L, negatives_L)).T[: rows.stop - first]
    undefined_R = ~np.isfinite(auc_RM).all(axis=1)
    ne_RM[undefined_R] = np.nan
    return auc_RM, ne_RM


def _walk(who_N: NDArray[np.int32], score_N: F32) -> tuple[NDArray[np.int32], Bool]:
    """(who, whether the score is that of the one before), both in the order of the scores."""
    order = np.argsort(score_N, kind="stable")
    score_N = score_N[order]
    tied_N = np.zeros(len(order), np.bool_)
    tied_N[1:] = score_N[1:] == score_N[:-1]
    return who_N[order], tied_N


def _log_losses(examples: TaskExamples, place_P: I64, score_N: F32) -> tuple[F64, F64]:
    """(sum over each user's negatives [U], of each positive [P])."""
    p_N = np.clip(score_N.astype(np.float64), _SMALLEST, 1 - _SMALLEST)
    negative = ~examples.positive_N
    of_users = np.bincount(examples.user_N[negative], -np.log1p(-p_N[negative]), examples.users)
    return of_users.astype(np.float64), -np.log(p_N[place_P])


def _total_entropy(positives_L: F64, negatives_L: F64) -> F64:
    """Entropy of the base rate, times the examples."""
    total_L = positives_L + negatives_L
    entropy: F64 = -(positives_L * np.log(positives_L / total_L) + negatives_L * np.log(negatives_L / total_L))
    return entropy


def draw_users(users: int, first: int, seed: int) -> U8:
    """How often each user is drawn in resamples ``first`` … ; uint8 [U, L]."""
    rng = np.random.default_rng((seed, first))
    drawn_LU = np.stack([np.bincount(rng.integers(users, size=users), minlength=users) for _ in range(_AT_ONCE)])
    if first == 0:
        drawn_LU[0] = 1
    return np.ascontiguousarray(drawn_LU.T, np.uint8)


def draw_positives(user_P: I64, drawn_UL: U8, first: int, seed: int, task: int) -> U8:
    """How often each positive is drawn; uint8 [P, L].

    Args:
        user_P: Whose it is, ascending.
        drawn_UL: Of the same resamples.
        first, seed, task: Where the draws begin.
    """
    rng = np.random.default_rng((seed, first, 1 + task))
    drawn_LP = np.zeros((_AT_ONCE, len(user_P)), np.uint8)
    _, begin, own = np.unique(user_P, return_index=True, return_counts=True)
    begin_P, own_P = np.repeat(begin, own), np.repeat(own, own)
    for drawn_P, times_P in zip(drawn_LP, drawn_UL[user_P].T, strict=True):
        # Each of the user's positives gives one draw for each time that the user was drawn.
        of = np.repeat(np.arange(len(user_P)), times_P)
        drawn = begin_P[of] + (rng.random(len(of)) * own_P[of]).astype(np.int64)
        drawn_P[:] = np.bincount(drawn, minlength=len(user_P))
    if first == 0:
        drawn_LP[0] = 1
    return np.ascontiguousarray(drawn_LP.T)


@njit(cache=True)
def _twice_pairs(who_N: NDArray[np.int32], tied_N: Bool, drawn_UL: U8, drawn_PL: U8) -> I64:
    """Twice the weighted pairs in which a positive is above a negative, ties half. int64 [L]."""
    below_L = np.zeros(_AT_ONCE, np.int64)  # draws of the negatives with lower scores
    level_L = np.zeros(_AT_ONCE, np.int64)  # of those with the same score
    pairs_L = np.zeros(_AT_ONCE, np.int64)
    start = 0
    while start < len(who_N):
        stop = start + 1
        while stop < len(who_N) and tied_N[stop]:
            stop += 1
        who = who_N[start]
        if stop > start + 1:
            level_L[:] = 0
            for i in range(start, stop):
                if who_N[i] >= 0:
                    for r in range(_AT_ONCE):
                        level_L[r] += drawn_UL[who_N[i], r]
            for i in range(start, stop):
                if who_N[i] < 0:
                    for r in range(_AT_ONCE):
                        pairs_L[r] += drawn_PL[-1 - who_N[i], r] * (2 * below_L[r] + level_L[r])
            for r in range(_AT_ONCE):
                below_L[r] += level_L[r]
        elif who >= 0:
            for r in range(_AT_ONCE):
                below_L[r] += drawn_UL[who, r]
        else:
            for r in range(_AT_ONCE):
                pairs_L[r] += drawn_PL[-1 - who, r] * 2 * below_L[r]
        start = stop
    return pairs_L
