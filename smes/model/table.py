"""From ids to table rows, and the growing tables of weights with row-wise sparse updates.

All id, bag and sequence features share one id table. It finds an id by its *key*, a 64-bit hash of the id and its
vocabulary's salt. The hash is a bijection for each vocabulary, so two ids of one vocabulary never get the same key. Ids
of two vocabularies do only if the xor of the ids equals the xor of the salts. In practice this never happens for small
ids. For n hashed ids the chance that any pair collides is about n²/2⁶⁵: 3 in a million for 10 million ids.

Rows 0 … V-1 are the *default rows*, one per vocabulary. A missing value reads the default row, and so does, in serving,
an id that was never trained on.

Only the rows that a batch touches are read, given a gradient and written, so the cost of a step does not depend on the
size of the tables.

Letters: R rows in use, U distinct rows of a batch, C columns of a table, B instances, W id columns
(:attr:`Schema.id_width`), V vocabularies.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numba import njit
from torch import Tensor

from smes.arrays import F32, I64, GrowingColumns, grown
from smes.hashing import GOLDEN, scatter
from smes.id_map import ABSENT, IdMap
from smes.model.config import AdagradConfig
from smes.schema import MISSING, Schema


class IdRows:
    """Which row of the table each id has.

    Args:
        schema: Its id, bag and sequence features give the columns and the vocabularies.
        keys: What :meth:`keys` of an earlier instance returned, to continue from it.

    Raises:
        ValueError: ``keys`` do not begin with the default rows of the schema's vocabularies.
    """

    def __init__(self, schema: Schema, keys: I64 | None = None) -> None:
        vocabularies = list(dict.fromkeys(f.vocabulary_name for f in schema.id_features))
        salts = np.array([_salt(v) for v in vocabularies], np.int64)
        index = {v: i for i, v in enumerate(vocabularies)}
        default_rows = [index[f.vocabulary_name] for f in schema.id_features]
        self._default_row_W = np.array(per_column(schema, default_rows), np.int64)
        self._salt_W = salts[self._default_row_W]
        defaults = _mix(np.full((1, len(salts)), MISSING, np.int64), salts)
        if keys is not None and not np.array_equal(keys[: len(defaults)], defaults):
            raise ValueError(f"keys of an id table: expected the default rows of {vocabularies} first")
        self._keys = np.array(defaults if keys is None else keys, np.int64)
        self._map = IdMap.from_keys(self._keys)

    def __len__(self) -> int:
        """Number of rows in use, the default rows included."""
        return len(self._map)

    def insert(self, ids_BW: I64) -> I64:
        """Look up every id's row; new ids get the next rows, in order of appearance. int64 [B, W] → int64 [B, W]."""
        known = len(self._map)
        keys = _mix(ids_BW, self._salt_W)
        rows = self._map.insert(keys)
        if len(self._map) > known:
            self._note_keys(keys, rows, known)
        return rows.reshape(ids_BW.shape)

    def find(self, ids_BW: I64) -> I64:
        """Look up every id's row, the default row of its vocabulary for unknown ids. int64 [B, W] → int64 [B, W]."""
        rows_BW = self._map.find(_mix(ids_BW, self._salt_W)).reshape(ids_BW.shape)
        return np.where(rows_BW == ABSENT, self._default_row_W, rows_BW)

    def keys(self, start: int = 0) -> I64:
        """The keys of the rows from ``start`` on, in row order; a view. int64 [len - start]."""
        return self._keys[start : len(self)]

    def _note_keys(self, keys: I64, rows: I64, known: int) -> None:
        self._keys = grown(self._keys, len(self))
        new = rows >= known
        self._keys[rows[new]] = keys[new]


class DistinctRows:
    """Finds the distinct rows of a batch in one pass: the first time that a row occurs, it is marked with the batch."""

    def __init__(self) -> None:
        self._by_row = GrowingColumns({"batch": np.zeros(1024, np.int64), "position": np.zeros(1024, np.int64)})
        self._batch = 0

    def __call__(self, rows_BW: I64, num_rows: int) -> tuple[I64, I64]:
        """Find the distinct rows of a batch.

        Args:
            rows_BW: int64 [B, W], each below ``num_rows``.
            num_rows: Rows of the table.

        Returns:
            (the distinct rows in order of appearance, int64 [U]; for each cell the place of its row among them,
            int64 [B, W]).
        """
        self._by_row.reserve(num_rows)
        self._batch += 1
        marks = self._by_row.arrays
        distinct_U, cells = _distinct(rows_BW.ravel(), marks["batch"], marks["position"], self._batch)
        return distinct_U, cells.reshape(rows_BW.shape)


def readers(cells_BW: I64, num_rows: int) -> tuple[I64, I64]:
    """Group the cells of a batch by the row that they read (a counting sort).

    Args:
        cells_BW: int64, the row that each cell reads, from 0 to U - 1. Every row is read by at least one cell.
        num_rows: U.

    Returns:
        (the indices of the flattened cells, first those that read row 0, then those that read row 1, and so on, each in
        ascending order, int64 [B·W]; where the cells of each row begin, int64 [U]).
    """
    order, start_U = _readers(cells_BW.ravel(), num_rows)
    return order, start_U


def per_column(schema: Schema, values: Iterable[int]) -> list[int]:
    """Repeat one value per id feature for each of the feature's columns."""
    return [value for f, value in zip(schema.id_features, values, strict=True) for _ in range(f.width)]


def pool_weights(schema: Schema, ids_BW: I64) -> F32 | None:
    """Weights with which the sum over a feature's columns is the mean over its ids.

    A bag without any id reads the default row of its vocabulary, through its first column. So does a sequence that
    accompanies another one. In a sequence with a query, all weights are 0 if it has no ids: the default row of its
    vocabulary belongs to the queried feature.

    Returns:
        float32 [B, W]; None for a schema without bags and sequences.
    """
    if not any(f.is_list for f in schema.id_features):
        return None
    weight_BW = np.ones(ids_BW.shape, np.float32)
    for feature in schema.id_features:
        if feature.is_list:
            columns = schema.id_slices[feature.name]
            present = ids_BW[:, columns] != MISSING
            if feature.query is None:
                present[~present.any(axis=1), 0] = True
            count = np.maximum(present.sum(axis=1, keepdims=True, dtype=np.float32), 1)
            weight_BW[:, columns] = present / count
    return weight_BW


def uniform_rows(keys_N: I64, columns: int, scale: float, seed: int = 0) -> F32:
    """Make the first weights of rows, uniform in ±``scale``. float32 [N, columns].

    A weight depends only on the row's key, its column and the seed (≥ 0), through SplitMix64. So a row starts with the
    same weights whatever ids came before it, and also after a restart.
    """
    salt = _mix(np.array([[seed]], np.int64), np.zeros(1, np.int64))[0]  # 0 for seed 0
    result: F32 = _uniform(np.ascontiguousarray(keys_N) ^ salt, columns, np.float32(scale))
    return result


def _salt(vocabulary: str) -> int:
    return int.from_bytes(hashlib.blake2b(vocabulary.encode(), digest_size=8).digest(), "little", signed=True)


@njit(cache=True, nogil=True)
def _mix(ids_BW: I64, salt_W: I64) -> I64:  # pragma: no cover - compiled
    rows, columns = ids_BW.shape
    keys = np.empty(rows * columns, np.int64)
    for b in range(rows):
        for w in range(columns):
            keys[b * columns + w] = np.int64(scatter(np.uint64(ids_BW[b, w] ^ salt_W[w])))
    return keys


@njit(cache=True, nogil=True)
def _uniform(keys_N: I64, columns: int, scale: np.float32) -> F32:  # pragma: no cover - compiled
    weights = np.empty((len(keys_N), columns), np.float32)
    for n in range(len(keys_N)):
        for c in range(columns):
            bits = scatter(np.uint64(keys_N[n]) + np.uint64(c + 1) * GOLDEN)
            unit = np.float32(np.int64(bits >> np.uint64(40))) * np.float32(2.0**-23) - np.float32(1.0)
            weights[n, c] = unit * scale
    return weights


@njit(cache=True, nogil=True)
def _distinct(rows: I64, seen_in: I64, position: I64, batch: int) -> tuple[I64, I64]:  # pragma: no cover - compiled
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


@njit(cache=True, nogil=True)
def _readers(cells: I64, num_rows: int) -> tuple[I64, I64]:  # pragma: no cover - compiled
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
    def update(self, rows_U: Tensor, leaf_UC: Tensor, gradient_scale: Tensor) -> None:
        """Take one Adagrad step on some rows.

        Args:
            rows_U: Distinct rows, int64 [U].
            leaf_UC: What :meth:`gather` returned for them, after ``backward``.
            gradient_scale: Scalar. The gradient of the mean loss times this is the gradient of the summed loss.
        """
        if leaf_UC.grad is None:
            return
        gradient_UC = leaf_UC.grad * gradient_scale
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
    """The cells of a batch, grouped by the distinct row that they read (:func:`smes.model.table.readers`).

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
        rows_NC = _ReadCells.apply(leaf_UC, cells_BW.view(-1), readers.order, readers.start_U)  # type: ignore[no-untyped-call]  # torch has no type
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
