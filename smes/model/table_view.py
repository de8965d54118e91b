"""Views of a table: its rows as they were at one moment, without a copy of the table.

A view keeps an *undo log*: before a row changes for the first time after the view was opened, its record is kept. The
view reads a row from the log if it is there, else from the table.
"""

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from smes.arrays import F32, I32, I64
from smes.model.table_kernels import Columns, read_as_of, records_as_of, save_records
from smes.model.table_layout import RecordLayout
from smes.model.turns import Turns
from smes.reserved import ReservedArray

BLOCK_ROWS = 16_384
"""Rows that a view reads at a time; a step waits for at most one such block."""


class UndoLog:
    """What a view kept up to one moment; later changes do not show. Good after the view was closed, too.

    Attributes:
        num_rows: Rows of the table when the view was opened.
        rows: int64 [L], the rows that changed since, each once.
        records: float32 [L, X], what they were before.
    """

    def __init__(self, num_rows: int, rows: I64, records: F32) -> None:
        self.num_rows = num_rows
        self.rows = rows
        self.records = records


class TableView(Protocol):
    """The rows of a table at the moment when the view was opened.

    Any one thread may read it while another one trains. All rows asked for are below ``num_rows``.

    Attributes:
        num_rows: Rows of the table at that moment.
    """

    num_rows: int

    def weights(self, rows_N: I64) -> dict[str, F32]:
        """Weights by group. int64 [N] → float32 [N, C] each."""
        ...

    def records(self, start: int, stop: int) -> F32:
        """Whole records, weights and accumulators, of rows ``start`` … ``stop`` - 1. float32 [stop - start, X]."""
        ...

    def undo(self) -> UndoLog:
        """What changed since, for a checkpoint of the view (:meth:`RecordTable.open_view`). Copies nothing."""
        ...

    def close(self) -> None:
        """Keep nothing any more. May be called twice, and from any thread."""
        ...


class HostView:
    """A view of a table in the host's memory (:class:`smes.model.table_host.HostTable` opens it)."""

    def __init__(self, live: ReservedArray, num_rows: int, layout: RecordLayout, turns: Turns) -> None:
        self.num_rows = num_rows
        self._live = live
        self._layout = layout
        self._columns = columns_of(layout)
        self._turns = turns
        self._places = ReservedArray(np.int32, largest_bytes=4 * num_rows)
        self._places.reserve(num_rows)
        self._rows = ReservedArray(np.int64)
        self._log = ReservedArray(np.float32, layout.width)
        self._length = 0
        self.open = True

    @property
    def _place(self) -> I32:
        """0 for a row that has not changed; else 1 + its place in the log."""
        place: I32 = self._places.array[: self.num_rows]
        return place

    def before_change(self, rows_N: I64) -> None:
        """Keep the records of rows that are about to change. For the table, which holds the lock."""
        room = self._length + len(rows_N)
        for array in (self._rows, self._log):
            array.reserve(room)
        self._length = save_records(
            self._live.array.reshape(-1),
            self._layout.width,
            rows_N,
            self._place,
            self._rows.array,
            self._log.array.reshape(-1),
            self._length,
        )

    def restore(self, undo: UndoLog) -> None:
        """Begin with what an earlier view kept."""
        self._length = len(undo.rows)
        for array, kept in ((self._rows, undo.rows), (self._log, undo.records)):
            array.reserve(self._length)
            array.array[: self._length] = kept
        self._place[undo.rows] = np.arange(1, self._length + 1)

    def weights(self, rows_N: I64) -> dict[str, F32]:
        rows_N = np.ascontiguousarray(rows_N, np.int64)
        result, outs = empty_weights(self._layout, len(rows_N))
        for begin in range(0, len(rows_N), BLOCK_ROWS):
            stop = min(begin + BLOCK_ROWS, len(rows_N))
            block = tuple(
                out[begin * place.group.columns : stop * place.group.columns]
                for out, place in zip(outs, self._layout.places.values(), strict=True)
            )
            with self._turns.turn():
                live, log = self._memory()
                rows = rows_N[begin:stop]
                read_as_of(live, self._layout.width, log, self._place, rows, self._columns, block)
        return result

    def records(self, start: int, stop: int) -> F32:
        result = np.empty((stop - start, self._layout.width), np.float32)
        for begin in range(start, stop, BLOCK_ROWS):
            out = result[begin - start : min(begin + BLOCK_ROWS, stop) - start].reshape(-1)
            with self._turns.turn():
                live, log = self._memory()
                records_as_of(live, self._layout.width, log, self._place, begin, out)
        return result

    def undo(self) -> UndoLog:
        with self._turns.turn():
            length = self._length
            return UndoLog(self.num_rows, self._rows.array[:length], self._log.array[:length])

    def close(self) -> None:
        with self._turns.turn():
            self.open = False
            self._places = ReservedArray(np.int32)
            self._rows = ReservedArray(np.int64)
            self._log = ReservedArray(np.float32, self._layout.width)

    def _memory(self) -> tuple[F32, F32]:
        """The records and the log, flat."""
        assert self.open, "a view that is not closed"
        return self._live.array.reshape(-1), self._log.array.reshape(-1)


def columns_of(layout: RecordLayout) -> Columns:
    """A layout as compiled loops take it."""
    places = layout.places.values()
    return Columns(
        weight_G=np.array([place.weights.start for place in places]),
        columns_G=np.array([place.group.columns for place in places]),
        accumulator_G=np.array([place.accumulators.start for place in places]),
        row_wise_G=np.array([place.group.config.row_wise for place in places]),
        rate_G=np.array([place.group.config.learning_rate for place in places], np.float32),
        first_G=np.array([place.group.config.initial_accumulator for place in places], np.float32),
    )


def empty_weights(layout: RecordLayout, rows: int) -> tuple[dict[str, F32], tuple[F32, ...]]:
    """Room for weights of rows: by group, float32 [N, C]; and the same memory, flat."""
    result = {name: np.empty((rows, place.group.columns), np.float32) for name, place in layout.places.items()}
    return result, tuple(array.reshape(-1) for array in result.values())


def weights_by_group(layout: RecordLayout, weights: Mapping[str, F32], rows: int) -> None:
    """Check first weights of rows.

    Raises:
        ValueError: A group is missing, unknown, or of another shape.
    """
    expected = {name: (rows, place.group.columns) for name, place in layout.places.items()}
    given = {name: tuple(array.shape) for name, array in weights.items()}
    if given != expected:
        raise ValueError(f"weights of table rows: {given}, expected {expected}")
