"""The table in the host's memory.

Letters: U distinct rows of a batch, B instances, W id columns, N rows, C columns of a group, S columns of all groups,
X floats of a record.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from smes.arrays import F32, I64
from smes.model.table import Cells, Readers, RowGradients
from smes.model.table_kernels import adagrad, gather_cells, gather_rows, mark, sum_gradients, unmark
from smes.model.table_layout import ColumnGroup, RecordLayout
from smes.model.table_view import HostView, UndoLog, weights_by_group
from smes.model.turns import Turns
from smes.reserved import ReservedArray

_NONE = np.zeros(0, np.float32)


class HostTable:
    """:class:`smes.model.table.RecordTable` in the host's memory: rows grow in place, loops are compiled.

    Args:
        groups: The groups of columns.
    """

    def __init__(self, groups: Sequence[ColumnGroup]) -> None:
        self.layout = RecordLayout(groups)
        self.num_rows = 0
        self._records = ReservedArray(np.float32, self.layout.width)
        self._touched = ReservedArray(np.uint8)
        self._touched_rows = ReservedArray(np.int64)
        self._num_touched = 0
        self._turns = Turns()
        self._views: list[HostView] = []

    def reset(self, rows_N: I64, weights: Mapping[str, F32]) -> None:
        weights_by_group(self.layout, weights, len(rows_N))
        if not len(rows_N):
            return
        with self._turns.turn():
            self._grow(int(rows_N.max()) + 1)
            self._before_change(rows_N, reset=True)
            records = self._records.array
            for name, place in self.layout.places.items():
                records[rows_N, place.weights] = weights[name]
                records[rows_N, place.accumulators] = place.group.config.initial_accumulator

    def cells(self, rows_U: Tensor, cells_BW: Tensor) -> Cells:
        records, rows, cells = self._records.array, rows_U.numpy(), cells_BW.numpy().reshape(-1)
        read = {}
        for name, place in self.layout.places.items():
            out = torch.empty(len(cells), place.group.columns)
            gather_cells(records, rows, cells, place.weights.start, out.numpy())
            read[name] = out.view(*cells_BW.shape, place.group.columns)
        return Cells(read, cells_BW)

    def gradients(self, rows_U: Tensor, cells: Cells, readers: Readers | None, scale: Tensor) -> RowGradients:
        assert readers is not None, "readers of a batch in the host's memory"
        sums = np.zeros((len(rows_U), self.layout.num_weights), np.float32)
        square = 0.0
        for name, place in self.layout.places.items():
            gradient = cells.gradients.get(name)
            if gradient is not None:
                by_cell = gradient.reshape(-1, place.group.columns).contiguous().numpy()
                order, start = readers.order.numpy(), readers.start_U.numpy()
                square += sum_gradients(order, start, by_cell, np.float32(scale), place.weights.start, sums)
        return RowGradients(torch.from_numpy(sums), torch.tensor(square, dtype=torch.float32))

    def update(
        self,
        rows_U: Tensor,
        gradients: RowGradients,
        taken: Tensor | None = None,
        *,
        keep_U: Tensor | None = None,
        rate_U: Tensor | None = None,
    ) -> None:
        if taken is not None and not taken:
            return
        rows, sums = rows_U.numpy(), gradients.sums_US.numpy()
        keep = _NONE if keep_U is None else keep_U.numpy()
        rate = _NONE if rate_U is None else rate_U.numpy()
        with self._turns.turn():
            self._before_change(rows, reset=False)
            for place in self.layout.places.values():
                config = place.group.config
                where = (place.weights.start, place.group.columns, place.accumulators.start, config.row_wise)
                rule = (np.float32(config.learning_rate), np.float32(config.initial_accumulator))
                adagrad(self._records.array, rows, sums, where, rule, keep, rate)

    def values(self, rows_N: I64) -> dict[str, F32]:
        result = {}
        for name, place in self.layout.places.items():
            out = np.empty((len(rows_N), place.group.columns), np.float32)
            gather_rows(self._records.array, np.ascontiguousarray(rows_N), place.weights.start, out)
            result[name] = out
        return result

    def view(self) -> HostView:
        return self._opened(self.num_rows)

    def open_view(self, undo: UndoLog) -> HostView:
        view = self._opened(undo.num_rows)
        view.restore(undo)
        return view

    def take_touched(self) -> I64:
        touched = self._touched_rows.array[: self._num_touched].copy()
        unmark(self._touched.array, touched)
        self._num_touched = 0
        return touched

    def put_records(self, start: int, records_NX: F32) -> None:
        if records_NX.shape[1:] != (self.layout.width,):
            raise ValueError(f"records of {records_NX.shape[1:]} floats, expected {self.layout.width}")
        rows = np.arange(start, start + len(records_NX))
        with self._turns.turn():
            self._grow(start + len(rows))
            self._before_change(rows, reset=True)
            self._records.array[start : start + len(rows)] = records_NX

    def _grow(self, rows: int) -> None:
        self._records.reserve(rows)
        self._touched.reserve((rows + 7) // 8)
        self.num_rows = max(self.num_rows, rows)

    def _before_change(self, rows_N: I64, *, reset: bool) -> None:
        self._views = [view for view in self._views if view.open]
        for view in self._views:
            view.before_change(rows_N, reset=reset)
        self._touched_rows.reserve(self._num_touched + len(rows_N))
        self._num_touched = mark(self._touched.array, rows_N, self._touched_rows.array, self._num_touched)

    def _opened(self, num_rows: int) -> HostView:
        view = HostView(self._records, num_rows, self.layout, self._turns)
        self._views.append(view)
        return view
