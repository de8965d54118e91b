"""The compiled loop that finds what all rows of a request have in common. It imports no torch.

Letters: N rows, R requests, C columns.
"""

import numpy as np
from numba import njit

from smes.arrays import I32, I64, Bool


@njit(cache=True, nogil=True)
def _keep_equal(values_NC, starts_R, equal_C):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    rows, columns = values_NC.shape
    left = np.arange(columns)
    count = columns
    for r in range(len(starts_R)):
        first = starts_R[r]
        end = starts_R[r + 1] if r + 1 < len(starts_R) else rows
        for n in range(first + 1, end):
            kept = 0
            for i in range(count):
                c = left[i]
                left[kept] = c
                kept += values_NC[n, c] == values_NC[first, c]
            count = kept
        if count == 0:
            break
    for i in range(count):
        equal_C[left[i]] = True


def equal_in_requests(values_NC: I64 | I32, starts_R: I64) -> Bool:
    """The columns in which all rows of each request are equal. bool [C].

    Args:
        values_NC: Integers; floats as their bits, so that a missing value equals another.
        starts_R: int64, the first row of each request; the first is 0.
    """
    equal_C: Bool = np.zeros(values_NC.shape[1], np.bool_)
    _keep_equal(np.ascontiguousarray(values_NC), starts_R, equal_C)
    return equal_C


def compile_request_kernels() -> None:
    """Compile the loop for ids and for numbers, so that no request waits for it."""
    starts_R: I64 = np.zeros(1, np.int64)
    equal_in_requests(np.zeros((2, 1), np.int64), starts_R)
    equal_in_requests(np.zeros((2, 1), np.int32), starts_R)
