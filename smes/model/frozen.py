"""The trainer's weights as they were at one moment, for scoring while training goes on.

Letters: N instances, W id columns, C columns of a group.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smes.arrays import I64, Arrays, prefixed
from smes.model.deltas import StateArray
from smes.model.id_rows import IdRows
from smes.model.row_keys import KeysView
from smes.model.table_view import TableView, UndoLog


class FrozenRows:
    """Rows as they were: a :class:`smes.model.serving.RowReader` that copies of the table only what changed since.

    Args:
        rows: Which row each id has now.
        keys: Which key each row had then.
        table: The rows' weights then.
    """

    def __init__(self, rows: IdRows, keys: KeysView, table: TableView) -> None:
        self._rows, self._keys, self._table = rows, keys, table

    def read(self, ids_NW: I64, columns_W: I64 | None = None) -> dict[str, Tensor]:
        """As :meth:`smes.model.serving.RowReader.read`. Call it from the thread that trains."""
        rows_NW = self._rows.find_as_of(self._keys, ids_NW, columns_W)
        return _weights(self._table, rows_NW)

    def found(self, ids_NW: I64) -> "FoundRows":
        """Find the rows of these ids. Call it from the thread that trains; the result may read them on any thread."""
        return FoundRows(self._rows.find_as_of(self._keys, ids_NW), self._table)

    def state(self) -> Arrays:
        """What changed since, for :meth:`smes.model.learner.Learner.thaw`. Nothing writes to these arrays any more."""
        rows, keys, used = self._keys.log()
        undo = self._table.undo()
        return {
            "num_rows": np.array([self._keys.num_rows]),
            "keys.rows": rows,
            "keys.keys": keys,
            "keys.used": used,
            "undo.rows": undo.rows,
            "undo.records": undo.records,
        }

    def close(self) -> None:
        """Keep nothing any more. May be called twice."""
        self._keys.close()
        self._table.close()


class FoundRows:
    """The rows of some ids: a :class:`smes.model.serving.RowReader` for these alone, until the rows are closed.

    Args:
        rows_NW: int64, the rows that were found.
        table: The rows' weights then.
    """

    def __init__(self, rows_NW: I64, table: TableView) -> None:
        self._rows_NW, self._table = rows_NW, table

    def read(self, ids_NW: I64, columns_W: I64 | None = None) -> dict[str, Tensor]:
        """As :meth:`smes.model.serving.RowReader.read`."""
        assert columns_W is None, "all columns were looked up"
        assert ids_NW.shape == self._rows_NW.shape, "these ids were looked up"
        return _weights(self._table, self._rows_NW)


def _weights(table: TableView, rows_NW: I64) -> dict[str, Tensor]:
    weights = table.weights(rows_NW.ravel())
    return {name: torch.from_numpy(w).view(*rows_NW.shape, w.shape[1]) for name, w in weights.items()}


def undo_log(state: Mapping[str, NDArray[Any]]) -> UndoLog:
    """The table's part of a :meth:`FrozenRows.state`."""
    return UndoLog(int(state["num_rows"][0]), state["undo.rows"], state["undo.records"])


@dataclass(frozen=True, slots=True)
class FrozenWeights:
    """All weights as they were at one moment.

    Attributes:
        dense: ``dense.*``, copies.
        rows: The id table.
    """

    dense: Mapping[str, Tensor]
    rows: FrozenRows

    def state(self) -> Arrays:
        """What :meth:`smes.model.learner.Learner.thaw` makes the same weights of, in a learner of the same state."""
        dense: Arrays = {name: tensor.numpy() for name, tensor in self.dense.items()}
        return dense | prefixed("rows.", self.rows.state())

    def close(self) -> None:
        """Keep nothing any more. May be called twice."""
        self.rows.close()


@dataclass(frozen=True, slots=True)
class KeptState:
    """A learner's whole state at one moment: to score with, and to go back to.

    Attributes:
        arrays: What :meth:`smes.model.learner.Learner.load_state` takes; those of the table are read when asked for.
        weights: The weights of that moment.
    """

    arrays: Mapping[str, StateArray]
    weights: FrozenWeights

    def tensors(self) -> dict[str, Tensor]:
        """The whole state in memory."""
        return {name: torch.from_numpy(array.read()) for name, array in self.arrays.items()}

    def state(self) -> Arrays:
        """What :meth:`smes.model.learner.Learner.keep_again` makes the same of, in a learner of the same state."""
        small = {name: array.read() for name, array in self.arrays.items() if not name.startswith("table.")}
        return small | prefixed("then.", self.weights.rows.state())
