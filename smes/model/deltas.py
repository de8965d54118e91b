"""What changed in the id table between two versions, and the whole table as one version has it.

Rows have no numbers here: a row is named by the key of its id (:mod:`smes.model.ids`). A full table and the deltas
after it give the table of the last delta, bit for bit.

Letters: N rows that changed, M rows that went, C columns of a group.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from smes.arrays import F32, I64, Bool

if TYPE_CHECKING:
    from torch import Tensor

BLOCK_ROWS = 16_384
"""How many rows a block of a full table has at most: a reader holds the table's lock for one block at a time."""


@dataclass(frozen=True, slots=True)
class RowDelta:
    """What changed in the id table since another version.

    Attributes:
        keys: int64 [N], distinct.
        columns: Group of columns (``embedding``, ``wide``) → the weights of these rows, float32 [N, C].
        removed: int64 [M], distinct: keys that have no row any more; none of them is in ``keys``. The table that the
            delta is applied to need not have them.
    """

    keys: I64
    columns: Mapping[str, F32]
    removed: I64

    def __len__(self) -> int:
        """N."""
        return len(self.keys)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return self.keys.nbytes + self.removed.nbytes + sum(column.nbytes for column in self.columns.values())


def merged(older: RowDelta, newer: RowDelta) -> RowDelta:
    """One delta that changes a table as two do, one after the other.

    Args:
        older: Applied first.
        newer: Applied after it; of the same groups of columns.
    """
    kept = ~_among(older.keys, np.concatenate([newer.keys, newer.removed]))
    removed = np.union1d(older.removed, newer.removed)
    return RowDelta(
        keys=np.concatenate([older.keys[kept], newer.keys]),
        columns={name: np.concatenate([column[kept], newer.columns[name]]) for name, column in older.columns.items()},
        removed=removed[~_among(removed, newer.keys)],
    )


class FullView(Protocol):
    """The weights of one moment, while training goes on. Any thread may read it, one at a time."""

    @property
    def dense(self) -> "Mapping[str, Tensor]":
        """``dense.*``, copies."""

    @property
    def columns(self) -> Mapping[str, int]:
        """Group of columns → C."""

    @property
    def num_rows(self) -> int:
        """How many rows :meth:`blocks` gives in all."""

    def blocks(self) -> Iterator[tuple[I64, dict[str, F32]]]:
        """The rows that have an id, at most :data:`BLOCK_ROWS` at a time: keys int64 [N], columns float32 [N, C]."""

    def close(self) -> None:
        """Let the table forget what it kept for this view. May be called more than once, from any thread."""


@dataclass(frozen=True, slots=True)
class StateArray:
    """One array of a state that is read piece by piece.

    Attributes:
        dtype, shape: Of the whole array.
        pieces: Returns an iterator over the array's pieces, split along its first axis, in order. May be called again.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[NDArray[Any]]]

    def read(self) -> NDArray[Any]:
        """The whole array."""
        array: NDArray[Any] = (
            np.concatenate([np.zeros((0, *self.shape[1:]), self.dtype), *self.pieces()])
            if self.shape
            else next(self.pieces())
        )
        return array


class _Closing(Protocol):
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class StateView:
    """The whole state of a learner at one moment, while training goes on. Any thread may read it, one at a time.

    Attributes:
        arrays: The names and arrays that :meth:`smes.model.learner.Learner.load_state` expects.
        views: What keeps that moment.
    """

    arrays: Mapping[str, StateArray]
    views: Sequence[_Closing]

    def close(self) -> None:
        """Let the table forget what it kept for this view. May be called more than once, from any thread."""
        for view in self.views:
            view.close()


def whole(array: NDArray[Any]) -> StateArray:
    """An array in memory, as one piece. Nothing may write to it any more."""
    return StateArray(array.dtype, array.shape, lambda: iter([array]))


def _among(keys: I64, others: I64) -> Bool:
    result: Bool = np.isin(keys, others)
    return result
