"""Columns that grow by doubling, their rows addressed by an id map."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


class GrowingColumns:
    """Equally long arrays with room for at least as many rows as were reserved.

    Attributes:
        arrays: Column name → array; replaced by a longer copy when it grows.
    """

    def __init__(self, empty: dict[str, NDArray[Any]]) -> None:
        self.arrays = empty

    def reserve(self, rows: int) -> None:
        """Make room for ``rows`` rows in all; new ones are zero."""
        capacity = len(next(iter(self.arrays.values())))
        if rows <= capacity:
            return
        capacity = max(rows, 2 * capacity)
        for name, old in self.arrays.items():
            new = np.zeros((capacity, *old.shape[1:]), old.dtype)
            new[: len(old)] = old
            self.arrays[name] = new
