"""The table on a device of torch's, by torch's operations. A view of it is a copy on the device.

Letters: U distinct rows of a batch, B instances, W id columns, N rows, C columns of a group, S columns of all groups,
X floats of a record, R rows.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from smes.arrays import F32, I64
from smes.model.table import Cells, RowGradients
from smes.model.table_layout import ColumnGroup, RecordLayout
from smes.model.table_view import UndoLog, weights_by_group


class DeviceTable:
    """:class:`smes.model.table.RecordTable` on a device: records [R, X] that grow by doubling.

    Args:
        groups: The groups of columns.
        device: Where the records live.
    """

    def __init__(self, groups: Sequence[ColumnGroup], device: torch.device) -> None:
        self.layout = RecordLayout(groups)
        self.num_rows = 0
        self._records = torch.zeros(0, self.layout.width, device=device)
        self._touched = torch.zeros(0, dtype=torch.bool, device=device)

    def reset(self, rows_N: I64, weights: Mapping[str, F32]) -> None:
        weights_by_group(self.layout, weights, len(rows_N))
        if not len(rows_N):
            return
        born = np.empty((len(rows_N), self.layout.width), np.float32)
        for name, place in self.layout.places.items():
            born[:, place.weights] = weights[name]
            born[:, place.accumulators] = place.group.config.initial_accumulator
        self._write(torch.from_numpy(rows_N), int(rows_N.max()) + 1, torch.from_numpy(born))

    def cells(self, rows_U: Tensor, cells_BW: Tensor) -> Cells:
        def read() -> list[Tensor]:
            rows_BW = rows_U[cells_BW]
            return [self._records[:, place.weights][rows_BW] for place in self.layout.places.values()]

        return Cells(list(self.layout.places), read, cells_BW)

    def weights(self, rows_N: Tensor) -> Tensor:
        return self._records[:, : self.layout.num_weights].index_select(0, rows_N)

    def cells_of(self, weights_US: Tensor, cells_BW: Tensor) -> Cells:
        def read() -> list[Tensor]:
            return [weights_US[:, place.weights][cells_BW] for place in self.layout.places.values()]

        return Cells(list(self.layout.places), read, cells_BW)

    def gradients(self, num_rows: int, cells: Cells, scale: Tensor, of_requests: Cells | None = None) -> RowGradients:
        sums_US = self._records.new_zeros(num_rows, self.layout.num_weights)
        for part in (cells, of_requests):
            for name, place in self.layout.places.items():
                gradient = None if part is None else part.gradients[name]
                if part is not None and gradient is not None:
                    by_cell_NC = gradient.reshape(-1, place.group.columns)
                    sums_US[:, place.weights].index_add_(0, part.cells_BW.view(-1), by_cell_NC)
        sums_US *= scale
        return RowGradients(sums_US, sums_US.square().sum())

    def summed(self, num_rows: int, places_N: Tensor, parts_NS: Tensor) -> RowGradients:
        sums_US = parts_NS.new_zeros(num_rows, parts_NS.shape[1]).index_add_(0, places_N, parts_NS)
        return RowGradients(sums_US, sums_US.square().sum())

    @torch.no_grad()
    def update(
        self,
        rows_U: Tensor,
        gradients: RowGradients,
        taken: Tensor | None = None,
        *,
        keep_U: Tensor | None = None,
        rate_U: Tensor | None = None,
    ) -> None:
        record_UX = self._records.index_select(0, rows_U)
        sums_US = gradients.sums_US if taken is None else torch.where(taken, gradients.sums_US, 0.0)
        for place in self.layout.places.values():
            config, gradient_UC = place.group.config, sums_US[:, place.weights]
            square = gradient_UC.square()
            if config.row_wise:
                square = square.mean(dim=1, keepdim=True)
            accumulator = record_UX[:, place.accumulators]
            if keep_U is not None:
                keep = keep_U if taken is None else torch.where(taken, keep_U, 1.0)
                first = config.initial_accumulator
                accumulator.copy_(first + (accumulator - first) * keep.unsqueeze(1))
            accumulator += square
            step_UC = gradient_UC / (accumulator.sqrt() + 1e-10) * config.learning_rate
            if rate_U is not None:
                step_UC = step_UC * rate_U.unsqueeze(1)
            record_UX[:, place.weights] -= step_UC
        self._records.index_copy_(0, rows_U, record_UX)
        self._touched.index_fill_(0, rows_U, True)

    def values(self, rows_N: I64) -> dict[str, F32]:
        return weights_of(self._records, rows_N, self.layout)

    def view(self) -> "DeviceView":
        return DeviceView(self._records[: self.num_rows].clone(), self.layout)

    def open_view(self, undo: UndoLog) -> "DeviceView":
        records = self._records[: undo.num_rows].clone()
        records[torch.from_numpy(undo.rows)] = torch.from_numpy(undo.records).to(records.device)
        return DeviceView(records, self.layout)

    def take_touched(self) -> I64:
        rows: I64 = self._touched.nonzero().squeeze(1).cpu().numpy()
        self._touched.zero_()
        return rows

    def put_records(self, start: int, records_NX: F32) -> None:
        if records_NX.shape[1:] != (self.layout.width,):
            raise ValueError(f"records of {records_NX.shape[1:]} floats, expected {self.layout.width}")
        stop = start + len(records_NX)
        self._write(torch.arange(start, stop), stop, torch.from_numpy(records_NX))

    def _write(self, rows_N: Tensor, num_rows: int, records_NX: Tensor) -> None:
        if num_rows > len(self._records):
            capacity = max(num_rows, 2 * len(self._records), 1024)
            self._records = _grown(self._records, capacity)
            self._touched = _grown(self._touched, capacity)
        self.num_rows = max(self.num_rows, num_rows)
        rows = self._sent(rows_N)
        self._records.index_copy_(0, rows, self._sent(records_NX))
        self._touched.index_fill_(0, rows, True)

    def _sent(self, tensor: Tensor) -> Tensor:
        """A copy on the device, without waiting for it."""
        device = self._records.device
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class DeviceView:
    """A view of a table on a device: a copy there.

    Args:
        records_RX: The copy.
        layout: What a record holds.
    """

    def __init__(self, records_RX: Tensor, layout: RecordLayout) -> None:
        self.num_rows = len(records_RX)
        self._records = records_RX
        self._layout = layout

    def weights(self, rows_N: I64) -> dict[str, F32]:
        return weights_of(self._records, rows_N, self._layout)

    def records(self, start: int, stop: int) -> F32:
        records: F32 = self._records[start:stop].cpu().numpy().copy()
        return records

    def undo(self) -> UndoLog:
        """All rows count as changed: what changed on the device is not written down there."""
        rows = np.arange(self.num_rows)
        return UndoLog(self.num_rows, rows, self.records(0, self.num_rows))

    def close(self) -> None:
        self._records = self._records[:0].clone()


def weights_of(records_RX: Tensor, rows_N: I64, layout: RecordLayout) -> dict[str, F32]:
    """Copies of the weights of some records, on the CPU, by group."""
    weights = records_RX[:, : layout.num_weights][torch.from_numpy(rows_N).to(records_RX.device)].cpu().numpy()
    return {name: np.ascontiguousarray(weights[:, place.weights]) for name, place in layout.places.items()}


def _grown(old: Tensor, capacity: int) -> Tensor:
    new = old.new_zeros((capacity, *old.shape[1:]))
    new[: len(old)] = old
    return new
