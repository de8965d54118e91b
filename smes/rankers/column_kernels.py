"""The compiled loop behind :mod:`smes.rankers.kernels`, without torch as :mod:`smes.rankers.sparse.routing_kernels`."""

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


def compile_column_kernels() -> None:
    """Compile the loop now, as it is called, so that no batch waits for it."""
    x_BC = np.zeros((1, 1), np.float32)
    sums_of_columns(x_BC, *(np.zeros(1, np.float32) for _ in range(4)))
