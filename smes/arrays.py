"""Short names of array types, arrays that grow, and the names of nested state."""

from collections.abc import Mapping
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

I64 = NDArray[np.int64]
U64 = NDArray[np.uint64]
I32 = NDArray[np.int32]
I8 = NDArray[np.int8]
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Bool = NDArray[np.bool_]
Arrays = dict[str, NDArray[Any]]
"""Named arrays: the columns of a table, or the state of one part."""

_V = TypeVar("_V")
_A = TypeVar("_A", bound=NDArray[Any])


def grown(array: _A, rows: int) -> _A:
    """The array if it has ``rows`` rows or more; otherwise a copy with at least twice as many rows, the new ones zero.

    The length at least doubles, so that N rows that are added one after the other cost O(N) copies in all.
    """
    if rows <= len(array):
        return array
    longer = np.zeros((max(rows, 2 * len(array)), *array.shape[1:]), array.dtype)
    longer[: len(array)] = array
    return cast(_A, longer)


class GrowingColumns:
    """Columns of equal length that grow together, by :func:`grown`.

    Attributes:
        arrays: Column name → array. An array is replaced by a longer copy when it grows: do not keep references.
    """

    def __init__(self, empty: dict[str, NDArray[Any]]) -> None:
        self.arrays = empty

    def reserve(self, rows: int) -> None:
        """Make room for ``rows`` rows in total. New rows are zero."""
        if rows > len(next(iter(self.arrays.values()))):
            for name, array in self.arrays.items():
                self.arrays[name] = grown(array, rows)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, the room for more rows included."""
        return sum(array.nbytes for array in self.arrays.values())


def prefixed(prefix: str, state: Mapping[str, _V]) -> dict[str, _V]:
    """The state of one part, with ``prefix`` (such as ``"join."``) before every name."""
    return {f"{prefix}{name}": value for name, value in state.items()}


def under(prefix: str, state: Mapping[str, _V]) -> dict[str, _V]:
    """The inverse of :func:`prefixed`: the entries whose names begin with ``prefix``, by their names without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
