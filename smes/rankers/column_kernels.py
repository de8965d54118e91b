"""The compiled loops of columns, for the CPU, without torch as :mod:`smes.rankers.sparse.routing_kernels`.

Letters: B instances, C columns.
"""

import numpy as np
from numba import njit


@njit(cache=True, nogil=True, fastmath={"contract", "reassoc", "nsz"})
def sums_of_columns(  # type: ignore[no-untyped-def]  # numba infers the types
    x_BC, near_C, sum_C, squares_C, most_C
):  # pragma: no cover - compiled
    rows, columns = x_BC.shape
    for b in range(rows):
        for c in range(columns):
            difference = x_BC[b, c] - near_C[c]
            sum_C[c] += difference
            squares_C[c] += difference * difference
            most_C[c] = max(most_C[c], np.abs(difference))


@njit(cache=True, nogil=True)
def merge_weighted(  # type: ignore[no-untyped-def]  # numba infers the types
    x_BC, weight_BC, horizon, count_C, mean_C, variance_C
):  # pragma: no cover - compiled
    """As :meth:`smes.rankers.ranker.RunningMoments.observe` with weights."""
    B, C = x_BC.shape
    new_C, batch_C, spread_C = np.zeros(C), np.zeros(C), np.zeros(C)
    for b in range(B):
        for c in range(C):
            new_C[c] += weight_BC[b, c]
            batch_C[c] += weight_BC[b, c] * x_BC[b, c]
    for c in range(C):
        batch_C[c] /= max(new_C[c], 1e-12)
    for b in range(B):
        for c in range(C):
            difference = x_BC[b, c] - batch_C[c]
            spread_C[c] += weight_BC[b, c] * difference * difference
    for c in range(C):
        total = count_C[c] + new_C[c]
        share = new_C[c] / max(total, 1e-12)
        delta = batch_C[c] - mean_C[c]
        variance = share * spread_C[c] / max(new_C[c], 1e-12) + share * (1 - share) * delta * delta
        variance_C[c] = (1 - share) * variance_C[c] + variance
        mean_C[c] += share * delta
        count_C[c] = min(total, horizon)


def compile_column_kernels() -> None:
    """Compile the loops now, as they are called, so that no batch waits for it."""
    x_BC = np.zeros((1, 1), np.float32)
    sums_of_columns(x_BC, *(np.zeros(1, np.float32) for _ in range(4)))
    merge_weighted(np.zeros((1, 1)), np.zeros((1, 1)), 1e6, *(np.zeros(1) for _ in range(3)))
