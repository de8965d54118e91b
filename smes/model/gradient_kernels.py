"""A compiled loop over the gradients of the dense weights, without torch as :mod:`smes.model.task_kernels`."""

import numpy as np
from numba import carray, njit

from smes.arrays import I64
from smes.vector_code import SUMS, floats


@njit(cache=True, nogil=True, fastmath=set(SUMS))
def sum_of_squares(addresses: I64, sizes: I64) -> np.float32:  # pragma: no cover - compiled
    """The sum of the squares of float32 numbers: not finite if one of them is not, or too large to be squared.

    Args:
        addresses: Where each array begins.
        sizes: How many numbers it has.
    """
    total = np.float32(0)
    for i in range(len(addresses)):
        values = carray(floats(addresses[i]), sizes[i])
        square = np.float32(0)
        for j in range(len(values)):
            square += values[j] * values[j]
        total += square
    return total


def compile_gradient_kernels() -> None:
    """Run the loop once, as it is called, so that no batch waits for it."""
    sum_of_squares(np.zeros(0, np.int64), np.zeros(0, np.int64))
