"""Array types by short names, columns that grow, and the names of nested state."""

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

I64 = NDArray[np.int64]
I32 = NDArray[np.int32]
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Bool = NDArray[np.bool_]
Arrays = dict[str, NDArray[Any]]
"""Named arrays: columns, or the state of a part."""

_V = TypeVar("_V")


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


def prefixed(prefix: str, state: Mapping[str, _V]) -> dict[str, _V]:
    """The state of a part under names that begin with ``prefix``, such as ``"join."``."""
    return {f"{prefix}{name}": value for name, value in state.items()}


def under(prefix: str, state: Mapping[str, _V]) -> dict[str, _V]:
    """The inverse of :func:`prefixed`: what stands under ``prefix``, by the names without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
