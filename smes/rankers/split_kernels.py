"""The compiled loops of a training step on a split input, without torch as :mod:`smes.rankers.column_kernels`.

Letters: N instances, R requests, B rows of a part of the input, C its columns, I input width, O outputs of all maps, Q
of the routers'.
"""

import numpy as np
from numba import njit

from smes.arrays import F32, F64, I64


@njit(cache=True, nogil=True)
def sum_runs(x_NC: F32, starts_R: I64, out_RC: F32) -> None:  # pragma: no cover - compiled
    """Sum the rows of each request, in order."""
    for r in range(len(starts_R)):
        end = starts_R[r + 1] if r + 1 < len(starts_R) else len(x_NC)
        for c in range(x_NC.shape[1]):
            out_RC[r, c] = x_NC[starts_R[r], c]
        for n in range(starts_R[r] + 1, end):
            for c in range(x_NC.shape[1]):
                out_RC[r, c] += x_NC[n, c]


@njit(cache=True, nogil=True, fastmath={"contract", "reassoc", "nsz"})
def unclip_gradients(
    x_BC: F32,
    scale_C: F32,
    shift_C: F32,
    clip: np.float32,
    weight_CQ: F32,
    of_y_BO: F32,
    first: int,
    of_x_BC: F32,
    of_weight_CQ: F32,
) -> None:  # pragma: no cover - compiled
    """Put right the gradients of ``(x · scale + shift) W`` for values that are clipped (``add_clipped``).

    Args:
        x_BC, scale_C, shift_C, clip, weight_CQ: As there.
        of_y_BO: The gradient by the product, in the Q columns from ``first`` on.
        first: See there.
        of_x_BC, of_weight_CQ: Those by x and W, as if nothing was clipped.
    """
    for b in range(x_BC.shape[0]):
        most = np.float32(0)
        for c in range(x_BC.shape[1]):
            most = max(most, np.abs(x_BC[b, c] * scale_C[c] + shift_C[c]))
        if most > clip:
            for c in range(x_BC.shape[1]):
                z = x_BC[b, c] * scale_C[c] + shift_C[c]
                if np.abs(z) > clip:
                    excess, through = (clip if z > 0 else -clip) - z, np.float32(0)
                    for q in range(weight_CQ.shape[1]):
                        through += of_y_BO[b, first + q] * weight_CQ[c, q]
                        of_weight_CQ[c, q] += excess * of_y_BO[b, first + q]
                    of_x_BC[b, c] -= through * scale_C[c]


@njit(cache=True, nogil=True, fastmath={"contract", "reassoc", "nsz"})
def observe_columns(
    x_BC: F32, times_B: F32, columns_C: I64, horizon: float, count_I: F64, mean_I: F64, variance_I: F64
) -> None:  # pragma: no cover - compiled
    """Take rows into the running moments of some columns; see :class:`smes.rankers.ranker.RunningMoments`.

    Args:
        x_BC: The rows.
        times_B: How often each of them counts.
        columns_C: Which of the I columns these are.
        horizon, count_I, mean_I, variance_I: The moments, which change.
    """
    columns = len(columns_C)
    near_C = np.empty(columns, np.float32)
    for c in range(columns):
        near_C[c] = mean_I[columns_C[c]] if count_I[columns_C[c]] > 0 else x_BC[0, c]
    sum_C, squares_C, rows = np.zeros(columns, np.float32), np.zeros(columns, np.float32), 0.0
    for b in range(len(x_BC)):
        times = times_B[b]
        rows += times
        for c in range(columns):
            difference = x_BC[b, c] - near_C[c]
            sum_C[c] += times * difference
            squares_C[c] += times * difference * difference
    for c in range(columns):
        i = columns_C[c]
        batch = np.float64(sum_C[c]) / rows
        spread = max(np.float64(squares_C[c]) / rows - batch * batch, 0.0)
        total = count_I[i] + rows
        share = rows / total
        delta = near_C[c] + batch - mean_I[i]
        variance_I[i] = (1 - share) * variance_I[i] + share * spread + share * (1 - share) * delta * delta
        mean_I[i] += share * delta
        count_I[i] = min(total, horizon)


def compile_split_kernels() -> None:
    """Compile the loops now, as they are called, so that no batch waits for them."""
    one, row, places, moments = np.zeros(1, np.float32), np.zeros((1, 1), np.float32), np.zeros(1, np.int64), np.ones(1)
    sum_runs(row, places, row)
    unclip_gradients(row, one, one, np.float32(1), row, row, 0, row, row)
    observe_columns(row, one + 1, places, 1e6, moments, moments.copy(), moments.copy())
