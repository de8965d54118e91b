"""A growing table of weights with sparse updates by row.

Letters: R rows in use, U distinct rows of a batch, C columns, B instances, W id columns, N = B·W cells.

A step reads and updates only the rows that its batch uses, so its cost does not depend on the size of the table.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from smes.arrays import F32, I64
from smes.model.config import AdagradConfig
from smes.model.table_layout import RecordLayout
from smes.model.table_view import TableView, UndoLog


class Cells:
    """What every cell of a batch reads from the table.

    Args:
        values: Group → float32 [B, W, C].
        cells_BW: As for :meth:`RecordTable.cells`.

    Attributes:
        values: What the model computes with; it collects the gradient.
        cells_BW: As given.
    """

    def __init__(self, values: Mapping[str, Tensor], cells_BW: Tensor) -> None:
        self.values = {name: value.requires_grad_() for name, value in values.items()}
        self.cells_BW = cells_BW

    @property
    def gradients(self) -> dict[str, Tensor | None]:
        """Group → the gradient, after ``backward``; None where nothing depends on the group."""
        return {name: value.grad for name, value in self.values.items()}


@dataclass(frozen=True, slots=True)
class RowGradients:
    """Gradients of a batch by row.

    Attributes:
        sums_US: float32, the gradient of the summed loss by the weights of each distinct row of the batch.
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

    def gradients(self, rows_U: Tensor, cells: Cells, readers: "Readers | None", scale: Tensor) -> RowGradients:
        """Sum the gradients of the cells by row, after ``backward``.

        Args:
            rows_U: As for :meth:`cells`.
            cells: What that returned.
            readers: The cells grouped by row; None on a GPU.
            scale: Scalar. The gradient of the mean loss times this is the gradient of the summed loss.
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


class RowTable:
    """Weights [R, C] that grow by doubling, with their Adagrad accumulators.

    Args:
        columns: C.
        config: The update rule.
        device: Where the weights live.
    """

    def __init__(self, columns: int, config: AdagradConfig, device: torch.device) -> None:
        self.columns = columns
        self._config = config
        self._rows = 0
        self._weights = torch.zeros(0, columns, device=device)
        self._accumulators = torch.zeros(0, 1 if config.row_wise else columns, device=device)

    def __len__(self) -> int:
        return self._rows

    @property
    def weights(self) -> Tensor:
        """The rows in use; a view. float32 [R, C]."""
        return self._weights[: self._rows]

    @property
    def accumulators(self) -> Tensor:
        """Adagrad's sums of squared gradients of the rows in use; a view. float32 [R, 1 or C]."""
        return self._accumulators[: self._rows]

    def initial_accumulators(self, rows: int) -> Tensor:
        """Adagrad's sums of so many rows before their first step, on the CPU. float32 [rows, 1 or C]."""
        return torch.full((rows, self._accumulators.shape[1]), self._config.initial_accumulator)

    def append(self, weights_NC: Tensor) -> None:
        """Add rows with the given first weights, which may be on another device. float32 [N, C]."""
        start = len(self)
        self._rows = start + len(weights_NC)
        if self._rows > len(self._weights):
            capacity = max(self._rows, 2 * len(self._weights), 1024)
            self._weights = _grown(self._weights[:start], capacity, 0.0)
            self._accumulators = _grown(self._accumulators[:start], capacity, self._config.initial_accumulator)
        self._weights[start : self._rows].copy_(weights_NC, non_blocking=True)

    def gather(self, rows_U: Tensor) -> Tensor:
        """Copy some rows into a leaf tensor, which collects their gradient. int64 [U] → float32 [U, C]."""
        return self._weights.index_select(0, rows_U).requires_grad_()

    @torch.no_grad()
    def update(self, rows_U: Tensor, leaf_UC: Tensor, gradient_scale: Tensor, taken: Tensor | None = None) -> None:
        """Take one Adagrad step on some rows.

        Args:
            rows_U: Distinct rows, int64 [U].
            leaf_UC: What :meth:`gather` returned for them, after ``backward``.
            gradient_scale: Scalar. The gradient of the mean loss times this is the gradient of the summed loss.
            taken: bool scalar. If it is false, nothing changes. None: it is true.
        """
        if leaf_UC.grad is None:
            return
        gradient_UC = leaf_UC.grad * gradient_scale
        if taken is not None:
            gradient_UC = torch.where(taken, gradient_UC, 0.0)
        square = gradient_UC.square()
        if self._config.row_wise:
            square = square.mean(dim=1, keepdim=True)
        accumulator = self._accumulators.index_select(0, rows_U).add_(square)
        step_UC = gradient_UC.div_(accumulator.sqrt().add_(1e-10)).mul_(self._config.learning_rate)
        self._weights.index_copy_(0, rows_U, leaf_UC.detach() - step_UC)
        self._accumulators.index_copy_(0, rows_U, accumulator)

    def load(self, weights: Tensor, accumulators: Tensor) -> None:
        """Replace all rows by copies of the given ones.

        Args:
            weights: float32 [R, C].
            accumulators: float32 [R, 1 or C].

        Raises:
            ValueError: The columns differ.
        """
        if weights.shape[1:] != self._weights.shape[1:] or accumulators.shape[1:] != self._accumulators.shape[1:]:
            raise ValueError(f"table state of {weights.shape[1]} columns, expected {self.columns}")
        self._rows = len(weights)
        self._weights = weights.to(self._weights.device, copy=True)
        self._accumulators = accumulators.to(self._accumulators.device, copy=True)


@dataclass(frozen=True, slots=True)
class Readers:
    """The cells of a batch, grouped by the distinct row that they read (:func:`smes.model.ids.readers`).

    Attributes:
        order: int64 [N], the cells that read row 0, then those that read row 1, and so on.
        start_U: int64, where the cells of each row begin in ``order``.
    """

    order: Tensor
    start_U: Tensor


def read_cells(leaf_UC: Tensor, cells_BW: Tensor, readers: Readers | None) -> Tensor:
    """Read one row for every cell. [U, C] → [B, W, C].

    The gradient of a row is the sum over the cells that read it. With ``readers``, backward gathers these cells by row.
    On the CPU that takes a seventh of the time of ``index_add_``, which backward uses without ``readers``. On a GPU
    ``index_add_`` is fast, and gathering would sum the thousands of cells that read a default row one by one.

    Args:
        leaf_UC: From :meth:`RowTable.gather`.
        cells_BW: int64, the row that each cell reads.
        readers: The same cells, grouped by row; None for ``index_add_``.
    """
    if readers is None:
        rows_NC = leaf_UC.index_select(0, cells_BW.view(-1))
    else:
        order, start_U = readers.order, readers.start_U
        rows_NC = _ReadCells.apply(leaf_UC, cells_BW.view(-1), order, start_U)  # type: ignore[no-untyped-call]  # torch
    return rows_NC.view(*cells_BW.shape, leaf_UC.shape[1])


class _ReadCells(torch.autograd.Function):
    """``index_select`` whose backward gathers, by ``embedding_bag``, instead of scattering."""

    @staticmethod
    def forward(ctx: Any, leaf_UC: Tensor, cells: Tensor, order: Tensor, start_U: Tensor) -> Tensor:
        ctx.save_for_backward(order, start_U)
        return leaf_UC.index_select(0, cells)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (of_cells_NC,) = gradients
        order, start_U = ctx.saved_tensors
        return F.embedding_bag(order, of_cells_NC.contiguous(), start_U, mode="sum"), None, None, None


def _grown(old: Tensor, capacity: int, fill: float) -> Tensor:
    """A copy with ``capacity`` rows, the new ones filled with ``fill``."""
    new = old.new_full((capacity, old.shape[1]), fill)
    new[: len(old)] = old
    return new
