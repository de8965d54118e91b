"""The table's part of a training step as it was before the table of records: what the present one is compared with.

An id map that keeps ids and rows in arrays of their own; marks by row to find a batch's distinct rows; a counting sort
of cells by row; weights and accumulators in tensors of their own, read and written by several operations of torch.

Letters: R rows of the table, U distinct rows of a batch, C columns, B instances, W id columns, N = B·W cells.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numba import njit
from torch import Tensor

from smes.arrays import I64
from smes.model.config import AdagradConfig
from smes.scatter import scatter

ABSENT = -1
_MAX_LOAD = 0.6


class IdMapBefore:
    """int64 id → row, 16 bytes a slot, doubled at once."""

    def __init__(self) -> None:
        self._slot_id = np.zeros(2048, np.int64)
        self._slot_row = np.full(2048, ABSENT, np.int64)
        self._len = 0

    def __len__(self) -> int:
        return self._len

    def find(self, ids: I64) -> I64:
        rows: I64 = _find(self._slot_id, self._slot_row, ids)
        return rows

    def insert(self, ids: I64) -> I64:
        slots = len(self._slot_id)
        if self._len + len(ids) > slots * _MAX_LOAD:
            while self._len + len(ids) > slots * _MAX_LOAD:
                slots *= 2
            used = self._slot_row != ABSENT
            old_ids, old_rows = self._slot_id[used], self._slot_row[used]
            self._slot_id, self._slot_row = np.zeros(slots, np.int64), np.full(slots, ABSENT, np.int64)
            _place(self._slot_id, self._slot_row, old_ids, old_rows)
        rows: I64
        rows, self._len = _insert(self._slot_id, self._slot_row, ids, self._len)
        return rows


class DistinctBefore:
    """Finds the distinct rows of a batch by a mark for each row of the table."""

    def __init__(self, rows: int) -> None:
        self._seen_in, self._position = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
        self._batch = 0

    def __call__(self, rows_BW: I64) -> tuple[I64, I64]:
        self._batch += 1
        distinct_U, cells = _distinct(rows_BW.ravel(), self._seen_in, self._position, self._batch)
        return distinct_U, cells.reshape(rows_BW.shape)


class WeightsBefore:
    """Weights [R, C] and their Adagrad accumulators.

    Attributes:
        weights: As given; written to.
    """

    def __init__(self, weights: Tensor, config: AdagradConfig) -> None:
        columns = 1 if config.row_wise else weights.shape[1]
        self._config, self.weights = config, weights
        self._accumulators = torch.full((len(weights), columns), config.initial_accumulator)

    def gather(self, rows_U: Tensor) -> Tensor:
        return self.weights.index_select(0, rows_U).requires_grad_()

    @torch.no_grad()
    def update(self, rows_U: Tensor, leaf_UC: Tensor, gradient_scale: Tensor) -> None:
        assert leaf_UC.grad is not None
        gradient_UC = leaf_UC.grad * gradient_scale
        square = gradient_UC.square()
        if self._config.row_wise:
            square = square.mean(dim=1, keepdim=True)
        accumulator = self._accumulators.index_select(0, rows_U).add_(square)
        step_UC = gradient_UC.div_(accumulator.sqrt().add_(1e-10)).mul_(self._config.learning_rate)
        self.weights.index_copy_(0, rows_U, leaf_UC.detach() - step_UC)
        self._accumulators.index_copy_(0, rows_U, accumulator)


def read_cells(leaf_UC: Tensor, cells_BW: Tensor, order: Tensor, start_U: Tensor) -> Tensor:
    """[U, C] → [B, W, C]. ``order`` and ``start_U`` are the cells grouped by row."""
    rows_NC: Tensor = _ReadCells.apply(leaf_UC, cells_BW.view(-1), order, start_U)  # type: ignore[no-untyped-call]
    return rows_NC.view(*cells_BW.shape, leaf_UC.shape[1])


class _ReadCells(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, leaf_UC: Tensor, cells: Tensor, order: Tensor, start_U: Tensor) -> Tensor:
        ctx.save_for_backward(order, start_U)
        return leaf_UC.index_select(0, cells)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (of_cells_NC,) = gradients
        order, start_U = ctx.saved_tensors
        return F.embedding_bag(order, of_cells_NC.contiguous(), start_U, mode="sum"), None, None, None


def square_sum(leaf_UC: Tensor, gradient_scale: Tensor) -> Tensor:
    """The sum of squares of the gradient, which tells whether it is finite."""
    assert leaf_UC.grad is not None
    flat = leaf_UC.grad.reshape(-1)
    return torch.dot(flat, flat) * gradient_scale.square()


@njit(cache=True, nogil=True)
def readers(cells: I64, num_rows: int) -> tuple[I64, I64]:
    """The cells grouped by row: a counting sort."""
    end = np.zeros(num_rows, np.int64)
    for cell in cells:
        end[cell] += 1
    start = np.empty(num_rows, np.int64)
    total = 0
    for row in range(num_rows):
        start[row] = total
        total += end[row]
        end[row] = start[row]
    order = np.empty(len(cells), np.int64)
    for i in range(len(cells)):
        order[end[cells[i]]] = i
        end[cells[i]] += 1
    return order, start


@njit(cache=True, nogil=True)
def _distinct(rows: I64, seen_in: I64, position: I64, batch: int) -> tuple[I64, I64]:
    distinct = np.empty(len(rows), np.int64)
    cells = np.empty(len(rows), np.int64)
    count = 0
    for i in range(len(rows)):
        row = rows[i]
        if seen_in[row] != batch:
            seen_in[row] = batch
            position[row] = count
            distinct[count] = row
            count += 1
        cells[i] = position[row]
    return distinct[:count].copy(), cells


@njit(cache=True, inline="always")
def _home(key: int, mask: int) -> np.int64:
    return np.int64(scatter(np.uint64(key)) & np.uint64(mask))


@njit(cache=True, nogil=True)
def _find(slot_id: I64, slot_row: I64, ids: I64) -> I64:
    mask = len(slot_id) - 1
    rows = np.empty(len(ids), np.int64)
    for i in range(len(ids)):
        slot = _home(ids[i], mask)
        while slot_row[slot] != ABSENT and slot_id[slot] != ids[i]:
            slot = (slot + 1) & mask
        rows[i] = slot_row[slot]
    return rows


@njit(cache=True, nogil=True)
def _insert(slot_id: I64, slot_row: I64, ids: I64, count: int) -> tuple[I64, int]:
    mask = len(slot_id) - 1
    rows = np.empty(len(ids), np.int64)
    for i in range(len(ids)):
        slot = _home(ids[i], mask)
        while slot_row[slot] != ABSENT and slot_id[slot] != ids[i]:
            slot = (slot + 1) & mask
        if slot_row[slot] == ABSENT:
            slot_id[slot] = ids[i]
            slot_row[slot] = count
            count += 1
        rows[i] = slot_row[slot]
    return rows, count


@njit(cache=True, nogil=True)
def _place(slot_id: I64, slot_row: I64, ids: I64, rows: I64) -> None:
    mask = len(slot_id) - 1
    for i in range(len(ids)):
        slot = _home(ids[i], mask)
        while slot_row[slot] != ABSENT:
            slot = (slot + 1) & mask
        slot_id[slot] = ids[i]
        slot_row[slot] = rows[i]
