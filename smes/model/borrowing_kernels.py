"""The compiled loops behind :mod:`smes.model.borrowing`, without torch as :mod:`smes.model.task_kernels`.

Letters: B instances, T tasks.
"""

import math

import numpy as np
from numba import njit


@njit(cache=True, nogil=True, error_model="numpy")
def add_pairs(  # type: ignore[no-untyped-def]  # numba infers the types
    label_BT, weight_BT, horizon, count_TT, sum_TT, product_TT
):  # pragma: no cover - compiled
    """Add a batch to the sums over pairs of labels, which fade from ``horizon`` labels on."""
    B, T = label_BT.shape
    present_T = np.empty(T)
    for b in range(B):
        for t in range(T):
            present_T[t] = 1.0 if weight_BT[b, t] > 0 else 0.0
        for t in range(T):
            weight = weight_BT[b, t]
            if weight != 0:
                for s in range(T):
                    count_TT[t, s] += weight * present_T[s]
                weighted = weight * label_BT[b, t]
                if weighted != 0:
                    for s in range(T):
                        sum_TT[t, s] += weighted * present_T[s]
                        product_TT[t, s] += weighted * present_T[s] * label_BT[b, s]
    for t in range(T):
        for s in range(T):
            if count_TT[t, s] > horizon:
                fade = horizon / count_TT[t, s]
                count_TT[t, s] *= fade
                sum_TT[t, s] *= fade
                product_TT[t, s] *= fade


@njit(cache=True, nogil=True, error_model="numpy")
def solve_pairs(  # type: ignore[no-untyped-def]  # numba infers the types
    count_TT, sum_TT, product_TT, is_binary_T, ratio, ridge, weight_TT
):  # pragma: no cover - compiled
    """Solve for the β of all tasks with one Cholesky factor; if there is none, β stays what it was.

    In the order of their positives, the tasks that lend to a task are the first so many. A leading block of the factor
    is the factor of the leading block, so each task's system is a part of the whole one.
    """
    T = len(is_binary_T)
    order_T = np.empty(T, np.int64)
    for t in range(T):  # by insertion: those of equally many keep their order
        place = t
        key = sum_TT[t, t] if is_binary_T[t] else -1.0
        while place > 0:
            before = order_T[place - 1]
            if (sum_TT[before, before] if is_binary_T[before] else -1.0) >= key:
                break
            order_T[place] = before
            place -= 1
        order_T[place] = t
    lenders_T = np.zeros(T, np.int64)  # of the i-th task in order: how many lend to it
    most = 0
    for i in range(T):
        t = order_T[i]
        if is_binary_T[t] and sum_TT[t, t] > 0:
            for j in range(T):
                s = order_T[j]
                if is_binary_T[s] and sum_TT[s, s] >= ratio * sum_TT[t, t]:
                    lenders_T[i] = j + 1
            most = max(most, lenders_T[i])
    if most == 0:
        weight_TT[:] = 0
        return
    covariance_TT = np.zeros((T, T))
    for i in range(T):
        for j in range(T):
            t, s = order_T[i], order_T[j]
            if is_binary_T[t] and is_binary_T[s]:
                mean_t = sum_TT[t, s] / max(count_TT[t, s], 1e-12)
                mean_s = sum_TT[s, t] / max(count_TT[s, t], 1e-12)
                covariance_TT[i, j] = product_TT[t, s] / max(count_TT[t, s], 1e-12) - mean_t * mean_s
    factor_TT = np.zeros((T, T))
    for i in range(T):
        for j in range(i + 1):
            entry = covariance_TT[i, j]
            if i == j:
                entry += ridge * entry + 1e-9
            for k in range(j):
                entry -= factor_TT[i, k] * factor_TT[j, k]
            if i > j:
                factor_TT[i, j] = entry / factor_TT[j, j]
            elif entry > 0:
                factor_TT[i, i] = math.sqrt(entry)
            else:
                return
    weight_TT[:] = 0
    for i in range(T):
        solved_T = np.zeros(T)
        lenders = lenders_T[i]
        for j in range(lenders):
            entry = covariance_TT[j, i]
            for k in range(j):
                entry -= factor_TT[j, k] * solved_T[k]
            solved_T[j] = entry / factor_TT[j, j]
        for j in range(lenders - 1, -1, -1):
            entry = solved_T[j]
            for k in range(j + 1, lenders):
                entry -= factor_TT[k, j] * solved_T[k]
            solved_T[j] = entry / factor_TT[j, j]
        for j in range(lenders):
            weight_TT[order_T[i], order_T[j]] = solved_T[j]


@njit(cache=True, nogil=True, error_model="numpy")
def add_borrowed(  # type: ignore[no-untyped-def]  # numba infers the types
    rate_BT, base_T, weight_TT, least, logits_BT
):  # pragma: no cover - compiled
    """Add ``logit(E) − logit(μ)`` to the logits of the tasks that borrow; ``base_T`` is the logit of μ."""
    B, T = rate_BT.shape
    mean_T = np.empty(T, np.float32)
    for t in range(T):
        mean_T[t] = 1.0 / (1.0 + math.exp(-base_T[t]))
    for t in range(T):
        borrows = False
        for s in range(T):
            borrows |= weight_TT[t, s] != 0
        if not borrows:
            continue
        mean = mean_T[t]
        own = math.log(mean / (np.float32(1) - mean))
        low = mean * np.float32(least)
        high = min(mean / np.float32(least), (np.float32(1) + mean) * np.float32(0.5))
        for b in range(B):
            expected = mean
            for s in range(T):
                if weight_TT[t, s] != 0:
                    expected += (rate_BT[b, s] - mean_T[s]) * weight_TT[t, s]
            if expected != expected:
                logits_BT[b, t] = expected
                continue
            expected = min(max(expected, low), high)
            logits_BT[b, t] += np.float32(math.log(expected / (np.float32(1) - expected)) - own)


def compile_borrowing_kernels() -> None:
    """Run each loop once, as it is called, so that no batch waits for it."""
    sums_TT, one_TT, yes_T = np.ones((1, 1)), np.ones((1, 1), np.float32), np.ones(1, np.bool_)
    add_pairs(sums_TT, sums_TT, 1e7, sums_TT.copy(), sums_TT.copy(), sums_TT.copy())
    solve_pairs(sums_TT, sums_TT, sums_TT, yes_T, 3.0, 0.1, one_TT.copy())
    add_borrowed(one_TT, np.ones(1, np.float32), one_TT, 0.1, one_TT.copy())
