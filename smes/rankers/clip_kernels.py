"""The compiled loop behind a folded norm, without torch as :mod:`smes.rankers.column_kernels`.

Letters: B instances, C columns of the input, Q columns of the map, O columns of the output.
"""

import numpy as np
from numba import njit

from smes.arrays import F32, Bool


@njit(cache=True, nogil=True, fastmath={"contract", "reassoc", "nsz"})
def add_clipped(
    x_BC: F32, scale_C: F32, shift_C: F32, clip: np.float32, weight_CQ: F32, y_BO: F32, beyond_B: Bool
) -> np.float32:  # pragma: no cover - compiled
    """Correct ``(x · scale + shift) W`` where it should have been clipped first.

    Args:
        x_BC: The input.
        scale_C, shift_C: What standardises it.
        clip: Where it ends.
        weight_CQ: W.
        y_BO: The product, in the last Q columns.
        beyond_B: Gets which rows have a value that was clipped.

    Returns:
        The largest size of a value that was; 0 if none was.
    """
    largest, outputs = np.float32(0), weight_CQ.shape[1]
    first = y_BO.shape[1] - outputs
    for b in range(x_BC.shape[0]):
        count = np.float32(0)
        for c in range(x_BC.shape[1]):
            count += np.float32(np.abs(x_BC[b, c] * scale_C[c] + shift_C[c]) > clip)
        beyond_B[b] = count > 0
        if count > 0:
            for c in range(x_BC.shape[1]):
                z = x_BC[b, c] * scale_C[c] + shift_C[c]
                if np.abs(z) > clip:
                    largest = max(largest, np.abs(z))
                    excess = (clip if z > 0 else -clip) - z
                    for q in range(outputs):
                        y_BO[b, first + q] += excess * weight_CQ[c, q]
    return largest


def compile_clip_kernels() -> None:
    """Compile the loop now, as it is called, so that no request waits for it."""
    one, row = np.zeros(1, np.float32), np.zeros((1, 1), np.float32)
    add_clipped(row, one, one, np.float32(1), row, row, np.zeros(1, np.bool_))
