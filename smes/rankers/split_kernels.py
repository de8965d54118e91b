"""The compiled loops of a training step on a split input, without torch as :mod:`smes.rankers.column_kernels`.

Letters: N instances, R requests, B rows of a part of the input, C its columns, I input width, O and Q outputs of the
encoder's and the routers' map, M of both.
"""

import numpy as np
from numba import njit

from smes.arrays import F32, F64, I64, Bool


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


@njit(cache=True, nogil=True)
def take_side(
    encoder_OI: F32,
    down_QI: F32,
    mean_I: F64,
    variance_I: F64,
    columns_C: I64,
    weight_MC: F32,
    down_CQ: F32,
    scale_C: F32,
    shift_C: F32,
    bias_M: F32,
) -> None:  # pragma: no cover - compiled
    """The columns of the maps that one part of the input reads, the norm folded into the routers'.

    Args:
        encoder_OI, down_QI: The maps.
        mean_I, variance_I: Of the norm (:meth:`smes.rankers.ranker.RunningMoments.affine`).
        columns_C: Which of the I columns these are.
        weight_MC: Gets both maps, the encoder's first.
        down_CQ: Gets the routers' by itself.
        scale_C, shift_C: Get the norm.
        bias_M: Gets added what the norm subtracts.
    """
    first = len(encoder_OI)
    for c in range(len(columns_C)):
        mean = mean_I[columns_C[c]]
        scale = 1.0 / np.sqrt(max(variance_I[columns_C[c]], 1e-24 * mean * mean + 1e-60))
        scale_C[c], shift_C[c] = scale, -mean * scale
    for o in range(first):
        for c in range(len(columns_C)):
            weight_MC[o, c] = encoder_OI[o, columns_C[c]]
    for q in range(len(down_QI)):
        bias = np.float64(0)
        for c in range(len(columns_C)):
            weight = down_QI[q, columns_C[c]]
            weight_MC[first + q, c] = weight * scale_C[c]
            down_CQ[c, q] = weight
            bias += weight * shift_C[c]
        bias_M[first + q] += bias


@njit(cache=True, nogil=True)
def put_side(
    of_weight_MC: F32,
    scale_C: F32,
    shift_C: F32,
    total_M: F32,
    columns_C: I64,
    encoder_OI: F32,
    down_QI: F32,
) -> None:  # pragma: no cover - compiled
    """The gradients by the columns of the maps, from those by what :func:`take_side` made of them.

    Args:
        of_weight_MC: The gradient by both maps.
        scale_C, shift_C, columns_C: As there.
        total_M: The sum of the gradient by the product over all instances.
        encoder_OI, down_QI: Get the gradients.
    """
    first = len(encoder_OI)
    for o in range(first):
        for c in range(len(columns_C)):
            encoder_OI[o, columns_C[c]] = of_weight_MC[o, c]
    for q in range(len(down_QI)):
        for c in range(len(columns_C)):
            down_QI[q, columns_C[c]] = of_weight_MC[first + q, c] * scale_C[c] + total_M[first + q] * shift_C[c]


@njit(cache=True, nogil=True, fastmath={"contract", "reassoc", "nsz"})
def unclip_gradients(
    x_BC: F32,
    scale_C: F32,
    shift_C: F32,
    clip: np.float32,
    down_CQ: F32,
    beyond_B: Bool,
    of_y_BM: F32,
    columns_C: I64,
    of_x_BC: F32,
    down_QI: F32,
) -> None:  # pragma: no cover - compiled
    """Put right the gradients of ``(x · scale + shift) W`` for values that are clipped (``add_clipped``).

    Args:
        x_BC, scale_C, shift_C, clip, down_CQ, beyond_B: As there; W is ``down_CQ``.
        of_y_BM: The gradient by the product, in the last Q columns.
        columns_C: As for :func:`take_side`.
        of_x_BC, down_QI: The gradients by x and W, as if nothing was clipped.
    """
    outputs = down_CQ.shape[1]
    first = of_y_BM.shape[1] - outputs
    for b in range(x_BC.shape[0]):
        if beyond_B[b]:
            for c in range(x_BC.shape[1]):
                z = x_BC[b, c] * scale_C[c] + shift_C[c]
                if np.abs(z) > clip:
                    excess, through = (clip if z > 0 else -clip) - z, np.float32(0)
                    for q in range(outputs):
                        through += of_y_BM[b, first + q] * down_CQ[c, q]
                        down_QI[q, columns_C[c]] += excess * of_y_BM[b, first + q]
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
    two, wide, beyond = np.zeros((2, 1), np.float32), np.zeros(2, np.float32), np.zeros(1, np.bool_)
    take_side(row, row, moments, moments, places, two, row, one, one, wide)
    put_side(two, one, one, wide, places, row, row)
    unclip_gradients(row, one, one, np.float32(1), row, beyond, two[:1], places, row, row)
    observe_columns(row, np.ones(1, np.float32), places, 1e6, moments, moments.copy(), moments.copy())
