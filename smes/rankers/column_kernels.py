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


@njit(cache=True, nogil=True, error_model="numpy")
def fold_columns(  # type: ignore[no-untyped-def]  # numba infers the types
    x_BC, count_C, mean_C, variance_C, clip, far, horizon, observe, weight_QC,
    folded_QC, bias_Q, scale_C, shift_C, exact_C,
):  # fmt: skip  # pragma: no cover - compiled
    """See :func:`smes.rankers.folded.read_folded`; writes the last five, and the moments if ``observe``.

    Returns:
        How many columns are exact.
    """
    B, C = x_BC.shape
    near_C = np.empty(C, np.float32)
    for c in range(C):
        near_C[c] = mean_C[c] if count_C[c] > 0 else x_BC[0, c]
    sum_C, squares_C, most_C = np.zeros(C, np.float32), np.zeros(C, np.float32), np.zeros(C, np.float32)
    sums_of_columns(x_BC, near_C, sum_C, squares_C, most_C)
    exact = 0
    factor_C, summand_C = np.empty(C, np.float32), np.empty(C, np.float32)
    for c in range(C):
        scale = 1.0 / np.sqrt(max(variance_C[c], 1e-24 * mean_C[c] * mean_C[c] + 1e-60))
        shift = -mean_C[c] * scale
        reach = (most_C[c] + abs(near_C[c] - mean_C[c])) * scale
        scale_C[c], shift_C[c] = scale, shift
        exact_C[c] = reach > clip or abs(shift) > far
        exact += exact_C[c]
        factor_C[c], summand_C[c] = (0.0, 0.0) if exact_C[c] else (scale, shift)
    for q in range(len(weight_QC)):
        bias = 0.0
        for c in range(C):
            folded_QC[q, c] = weight_QC[q, c] * factor_C[c]
        for c in range(C):
            bias += weight_QC[q, c] * summand_C[c]
        bias_Q[q] = bias
    if observe:
        for c in range(C):
            batch = np.float64(sum_C[c] / np.float32(B))
            spread = max(np.float64(squares_C[c] / np.float32(B)) - batch * batch, 0.0)
            total = count_C[c] + B
            share = B / total
            delta = near_C[c] + batch - mean_C[c]
            variance_C[c] = (1 - share) * variance_C[c] + share * spread + share * (1 - share) * delta * delta
            mean_C[c] += share * delta
            count_C[c] = min(total, horizon)
    return exact


@njit(cache=True, nogil=True, fastmath={"contract", "reassoc", "nsz"})
def unfold_gradient(  # type: ignore[no-untyped-def]  # numba infers the types
    of_folded_QC, of_bias_Q, scale_C, shift_C, exact_C, of_weight_QC
):  # pragma: no cover - compiled
    """The gradient by the weights of :func:`fold_columns`, from those by what it made of them; 0 for exact columns."""
    for q in range(len(of_folded_QC)):
        for c in range(len(scale_C)):
            of_weight = of_folded_QC[q, c] * scale_C[c] + of_bias_Q[q] * shift_C[c]
            of_weight_QC[q, c] = np.float32(0) if exact_C[c] else of_weight


@njit(cache=True, nogil=True, error_model="numpy")
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
    one_C, moments, exact_C = np.ones(1, np.float32), tuple(np.ones(1) for _ in range(3)), np.zeros(1, np.bool_)
    fold_columns(x_BC, *moments, 8.0, 64.0, 1e5, True, x_BC, x_BC.copy(), one_C, one_C.copy(), one_C.copy(), exact_C)
    unfold_gradient(x_BC, one_C, one_C, one_C, exact_C, x_BC.copy())
    merge_weighted(np.zeros((1, 1)), np.zeros((1, 1)), 1e6, *(np.zeros(1) for _ in range(3)))
