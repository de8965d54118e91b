"""A growing table of weights with sparse updates by row: what every table can do, wherever it is.

A row is one record: the weights of all groups of columns side by side, then their accumulators. A step reads and
updates only the records that its batch uses, once each, so its cost hardly depends on the size of the table.

Letters: U distinct rows of a batch, B instances, W id columns, N rows, or the B·W cells of a batch, C columns of a
group, S columns of all groups, X floats of a record.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from smes.arrays import F32, I64
from smes.model.table_layout import RecordLayout
from smes.model.table_view import TableView, UndoLog


class Cells:
    """What every cell of a batch reads from the table.

    Args:
        names: The groups.
        read: Reads the values of each of them, float32 [B, W, C].
        cells_BW: As for :meth:`RecordTable.cells`.

    Attributes:
        values: Group → what the model computes with.
        gradients: Group → its gradient, after ``backward``; None where nothing depends on the group. It may be spread
            over memory in any way, and elements of it may share memory.
        cells_BW: As given.
    """

    def __init__(self, names: Sequence[str], read: Callable[[], Sequence[Tensor]], cells_BW: Tensor) -> None:
        self.gradients: dict[str, Tensor | None] = dict.fromkeys(names)
        self.cells_BW = cells_BW
        wanted = torch.zeros((), device=cells_BW.device, requires_grad=True)
        values = _Read.apply(wanted, read, self.gradients)  # type: ignore[no-untyped-call]  # torch
        self.values: dict[str, Tensor] = dict(zip(names, values, strict=True))


class _Read(torch.autograd.Function):
    """Values whose gradients are kept as backward makes them. Those of leaf tensors it would copy."""

    @staticmethod
    def forward(
        ctx: Any, wanted: Tensor, read: Callable[[], Sequence[Tensor]], gradients: dict[str, Tensor | None]
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.gradients = gradients
        return tuple(read())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, None, None]:
        ctx.gradients.update(zip(ctx.gradients, gradients, strict=True))
        return None, None, None


@dataclass(frozen=True, slots=True)
class RowGradients:
    """Gradients of a batch by row.

    Attributes:
        sums_US: float32, the gradient of the summed loss by the weights of each distinct row of the batch (of several
            ranks, of each row of this one that the batches of all ranks read).
        square: float32 scalar, the sum of the squares of ``sums_US``: not finite if one of them is not.
    """

    sums_US: Tensor
    square: Tensor


class RecordTable(Protocol):
    """Rows of weights with their accumulators, one record a row, on one device. Not thread-safe, except for its views.

    Attributes:
        layout: What a record holds.
        num_rows: Rows that exist, used or free.
    """

    layout: RecordLayout
    num_rows: int

    def reset(self, rows_N: I64, weights: Mapping[str, F32]) -> None:
        """Let rows be born: they get first weights and first accumulators. The table grows to hold them, in place.

        Args:
            rows_N: Distinct rows.
            weights: Group → float32 [N, C].

        Raises:
            ValueError: A group is missing, unknown or of another shape.
        """
        ...

    def cells(self, rows_U: Tensor, cells_BW: Tensor) -> Cells:
        """Read the row of every cell.

        Args:
            rows_U: int64, the distinct rows of the batch.
            cells_BW: int64, the place of each cell's row in ``rows_U``.
        """
        ...

    def weights(self, rows_N: Tensor) -> Tensor:
        """Copies of the weights of some rows, all groups side by side, on the table's device. int64 [N] → [N, S]."""
        ...

    def cells_of(self, weights_US: Tensor, cells_BW: Tensor) -> Cells:
        """Read for every cell a row that came from elsewhere.

        Args:
            weights_US: float32, from :meth:`weights` of tables of this layout.
            cells_BW: int64, the place of each cell's row among them.
        """
        ...

    def gradients(self, num_rows: int, cells: Cells, scale: Tensor, of_requests: Cells | None = None) -> RowGradients:
        """Sum the gradients of the cells by row, after ``backward``.

        Args:
            num_rows: U, of how many distinct rows the cells read.
            cells: What :meth:`cells` or :meth:`cells_of` returned.
            scale: Scalar. The gradient of the mean loss times this is the gradient of the summed loss.
            of_requests: Cells that instances of a request share, if they were read for themselves.
        """
        ...

    def summed(self, num_rows: int, places_N: Tensor, parts_NS: Tensor) -> RowGradients:
        """Sum gradients of rows, in their order.

        Args:
            num_rows: U.
            places_N: int64, which of the U rows each of them is of.
            parts_NS: float32.
        """
        ...

    def update(
        self,
        rows_U: Tensor,
        gradients: RowGradients,
        taken: Tensor | None = None,
        *,
        keep_U: Tensor | None = None,
        rate_U: Tensor | None = None,
    ) -> None:
        """Take one Adagrad step on some rows.

        Args:
            rows_U: Distinct rows, int64 [U].
            gradients: Of these rows.
            taken: bool scalar. If it is false, nothing changes (but the rows may count as touched). None: it is true.
            keep_U: float32, the share that each row's accumulators keep, before the step, of what they have above
                their first value. None: all of it.
            rate_U: float32, a factor on each row's learning rate. None: 1.
        """
        ...

    def values(self, rows_N: I64) -> dict[str, F32]:
        """Copies of weights, on the CPU. int64 [N] → group → float32 [N, C]."""
        ...

    def view(self) -> TableView:
        """The table as it is now, for reading from another thread."""
        ...

    def open_view(self, undo: UndoLog) -> TableView:
        """Open a view again. The table must be as it was when ``undo`` was taken from the view."""
        ...

    def take_touched(self) -> I64:
        """The rows that were reset or updated since the last call, each once. int64 [N]."""
        ...

    def put_records(self, start: int, records_NX: F32) -> None:
        """Write whole records from row ``start`` on (:meth:`TableView.records`), in a table that grows for them.

        Raises:
            ValueError: The records have another width.
        """
        ...
