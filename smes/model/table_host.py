"""The table in the host's memory.

Letters: U distinct rows of a batch, B instances, W id columns, N rows, C columns of a group, S columns of all groups,
X floats of a record.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from smes.arrays import F32, I64
from smes.model.table import Cells, RowGradients
from smes.model.table_kernels import (
    adagrad,
    add_gradients,
    mark,
    read_cells,
    read_rows,
    scale_and_square,
    take_marked,
    write_rows,
)
from smes.model.table_layout import ColumnGroup, RecordLayout
from smes.model.table_view import HostView, UndoLog, columns_of, empty_weights, weights_by_group
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
        self._columns = columns_of(self.layout)
        all_weights = np.array([self.layout.num_weights])
        self._whole = self._columns._replace(weight_G=np.zeros(1, np.int64), columns_G=all_weights)
        self._records = ReservedArray(np.float32, self.layout.width)
        self._touched = ReservedArray(np.uint64)
        self._turns = Turns()
        self._views: list[HostView] = []

    def reset(self, rows_N: I64, weights: Mapping[str, F32]) -> None:
        weights_by_group(self.layout, weights, len(rows_N))
        if not len(rows_N):
            return
        with self._turns.turn():
            self._grow(int(rows_N.max()) + 1)
            self._before_change(rows_N)
            given = tuple(np.ascontiguousarray(weights[name], np.float32).reshape(-1) for name in self.layout.places)
            write_rows(self._flat, self.layout.width, rows_N, self._columns, given)

    def cells(self, rows_U: Tensor, cells_BW: Tensor) -> Cells:
        def read() -> list[Tensor]:
            values = [torch.empty(*cells_BW.shape, place.group.columns) for place in self.layout.places.values()]
            outs = tuple(value.numpy().reshape(-1) for value in values)
            read_cells(self._flat, self.layout.width, rows_U.numpy(), cells_BW.numpy().reshape(-1), self._columns, outs)
            return values

        return Cells(list(self.layout.places), read, cells_BW)

    def weights(self, rows_N: Tensor) -> Tensor:
        weights = torch.empty(len(rows_N), self.layout.num_weights)
        read_rows(self._flat, self.layout.width, rows_N.numpy(), self._whole, (weights.numpy().reshape(-1),))
        return weights

    def cells_of(self, weights_US: Tensor, cells_BW: Tensor) -> Cells:
        def read() -> list[Tensor]:
            values = [torch.empty(*cells_BW.shape, place.group.columns) for place in self.layout.places.values()]
            outs = tuple(value.numpy().reshape(-1) for value in values)
            flat, places = weights_US.numpy().reshape(-1), np.arange(len(weights_US))
            read_cells(flat, self.layout.num_weights, places, cells_BW.numpy().reshape(-1), self._columns, outs)
            return values

        return Cells(list(self.layout.places), read, cells_BW)

    def gradients(self, num_rows: int, cells: Cells, scale: Tensor, of_requests: Cells | None = None) -> RowGradients:
        sums = np.zeros((num_rows, self.layout.num_weights), np.float32)
        for part in (cells, of_requests):
            for name, place in self.layout.places.items():
                gradient = None if part is None else part.gradients[name]
                if part is not None and gradient is not None and gradient.numel():
                    flat, strides = _flat(gradient)
                    add_gradients(part.cells_BW.numpy(), flat, strides, place.weights.start, place.group.columns, sums)
        square = scale_and_square(sums.reshape(-1), np.float32(scale))
        return RowGradients(torch.from_numpy(sums), torch.tensor(square, dtype=torch.float32))

    def summed(self, num_rows: int, places_N: Tensor, parts_NS: Tensor) -> RowGradients:
        width = self.layout.num_weights
        sums = np.zeros((num_rows, width), np.float32)
        add_gradients(places_N.numpy().reshape(-1, 1), parts_NS.numpy().reshape(-1), (width, width), 0, width, sums)
        square = scale_and_square(sums.reshape(-1), np.float32(1))
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
            self._before_change(rows)
            adagrad(self._flat, self.layout.width, rows, sums, self._columns, keep, rate)

    def values(self, rows_N: I64) -> dict[str, F32]:
        rows_N = np.ascontiguousarray(rows_N, np.int64)
        result, outs = empty_weights(self.layout, len(rows_N))
        read_rows(self._flat, self.layout.width, rows_N, self._columns, outs)
        return result

    def view(self) -> HostView:
        return self._opened(self.num_rows)

    def open_view(self, undo: UndoLog) -> HostView:
        view = self._opened(undo.num_rows)
        view.restore(undo)
        return view

    def take_touched(self) -> I64:
        rows: I64 = take_marked(self._touched.array[: _words(self.num_rows)])  # the array may be far longer
        return rows

    def put_records(self, start: int, records_NX: F32) -> None:
        if records_NX.shape[1:] != (self.layout.width,):
            raise ValueError(f"records of {records_NX.shape[1:]} floats, expected {self.layout.width}")
        rows = np.arange(start, start + len(records_NX))
        with self._turns.turn():
            self._grow(start + len(rows))
            self._before_change(rows)
            self._records.array[start : start + len(rows)] = records_NX

    @property
    def _flat(self) -> F32:
        flat: F32 = self._records.array.reshape(-1)
        return flat

    def _grow(self, rows: int) -> None:
        self._records.reserve(rows)
        self._touched.reserve(_words(rows))
        self.num_rows = max(self.num_rows, rows)

    def _before_change(self, rows_N: I64) -> None:
        self._views = [view for view in self._views if view.open]
        for view in self._views:
            view.before_change(rows_N)
        mark(self._touched.array, rows_N)

    def _opened(self, num_rows: int) -> HostView:
        view = HostView(self._records, num_rows, self.layout, self._turns)
        self._views.append(view)
        return view


def _flat(gradient_BWC: Tensor) -> tuple[F32, tuple[int, int]]:
    """A gradient's memory, and how far apart in it instances and id columns are; copied only if it must be."""
    batch, columns, width = gradient_BWC.shape
    if gradient_BWC.stride(2) != 1:
        gradient_BWC = gradient_BWC.contiguous()
    strides = gradient_BWC.stride(0), gradient_BWC.stride(1)
    extent = (batch - 1) * strides[0] + (columns - 1) * strides[1] + width
    flat: F32 = gradient_BWC.as_strided((extent,), (1,)).numpy()
    return flat, strides


def _words(rows: int) -> int:
    """Words of 64 bits, a bit for each row."""
    return (rows + 63) // 64
