"""Where a learner's rows are: all in one rank's table, or shared out among the ranks by the hash of the key.

Between two ranks travel, for a batch: the distinct keys to their owners (:meth:`Rows.assign`); the weights of their
rows to the ranks that read them (:meth:`Rows.cells`); their gradients back to the owners (:meth:`Rows.gradients`), who
sum them in the order of the ranks and update the rows. Accumulators stay where they are.

Letters: B instances, W id columns, K distinct keys of a rank's batch, A rows that ranks ask for, U distinct rows of a
rank, N ranks, S columns of all groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from smes.arrays import I64, Bool
from smes.id_map import ABSENT
from smes.model.devices import RankBatch
from smes.model.id_rows import BatchRows
from smes.model.id_rows_kernels import distinct
from smes.model.id_table import IdTable
from smes.model.shards import Routes, owner_of
from smes.model.table import Cells, RowGradients
from smes.world import World


class Rows(Protocol):
    """The rows that batches read and change. All ranks call the same methods in the same order."""

    def assign(self, ids_BW: I64, event_time_ms: int) -> BatchRows:
        """Find the rows of a batch that will be trained on; those of new ids are born.

        Args:
            ids_BW: int64 [B, W].
            event_time_ms: The latest event time of the batch, Unix milliseconds; 0 for a rank without examples.
        """
        ...

    def cells(self, batch: RankBatch) -> tuple[Cells, Cells | None]:
        """What the cells of a batch read; of a batch in two parts those of its items, and those of its requests."""
        ...

    def gradients(
        self, batch: RankBatch, cells: Cells, scale: Tensor, of_requests: Cells | None = None
    ) -> RowGradients:
        """Sum the gradients of the cells by row, after ``backward``; see :meth:`RecordTable.gradients`.

        Of several ranks, each gets the sums over all ranks for its own rows.
        """
        ...


class LocalRows:
    """:class:`Rows` of one rank.

    Args:
        table: The rows.
    """

    def __init__(self, table: IdTable) -> None:
        self._table = table

    def assign(self, ids_BW: I64, event_time_ms: int) -> BatchRows:
        return self._table.assign(ids_BW, event_time_ms)

    def cells(self, batch: RankBatch) -> tuple[Cells, Cells | None]:
        records, parts = self._table.records, batch.requests
        if parts is None:
            return records.cells(batch.rows_U, batch.cells_BW), None
        item, request = parts.item.cells_BW, parts.request.cells_BW
        return records.cells(batch.rows_U, item), records.cells(batch.rows_U, request)

    def gradients(
        self, batch: RankBatch, cells: Cells, scale: Tensor, of_requests: Cells | None = None
    ) -> RowGradients:
        return self._table.records.gradients(len(batch.rows_U), cells, scale, of_requests)


class ShardedRows:
    """:class:`Rows` of several ranks.

    Rows are assigned as one rank would assign them for the batches of all ranks, put one behind the other.

    Args:
        table: The rows of this rank.
        world: The ranks.
    """

    def __init__(self, table: IdTable, world: World) -> None:
        self._table, self._world = table, world

    def assign(self, ids_BW: I64, event_time_ms: int) -> BatchRows:
        ids, rows = self._table.rows.ids, self._table.rows
        keys_K, cells, times_K, first_K = distinct(ids.own(ids_BW))
        vocabulary_K = ids.vocabulary_W[first_K % ids_BW.shape[1]]
        order, wanted_N = self._by_owner(keys_K)
        asked = self._ask(np.stack([keys_K, times_K, vocabulary_K], axis=1)[order], wanted_N, event_time_ms)
        keys_U, place_A, _, first_U = distinct(asked.keys)
        times_U = np.bincount(place_A, asked.times, len(keys_U)).astype(np.int64)
        rows_U, born = self._table.give(keys_U, times_U, asked.vocabulary[first_U], asked.event_time_ms)
        place_K = np.empty(len(keys_K), np.int64)
        place_K[order] = np.arange(len(keys_K))
        rows_A, asked_N = rows_U[place_A], asked.lengths
        if rows.turns_away:
            has_row = self._answer(rows_A != ABSENT, asked_N, wanted_N)
            others = order[~has_row]
            shared = ids.required[ids.required_place(keys_K[others], vocabulary_K[others])]
            kept = order[has_row]
            keys_F, place_F, _, _ = distinct(np.concatenate([keys_K[kept], shared]))
            more = keys_F[len(kept) :]  # shared rows that no missing value of the batch reads
            order_F, wanted_N = self._by_owner(keys_F)
            at_F = np.empty(len(keys_F), np.int64)
            at_F[order_F] = np.arange(len(keys_F))
            place_K[kept], place_K[others] = at_F[place_F[: len(kept)]], at_F[place_F[len(kept) :]]
            order_M, more_N = self._by_owner(more)
            parts = torch.split(torch.from_numpy(more[order_M]), more_N.tolist())
            got = [rows.rows_of(part.numpy()) for part in self._world.exchange(parts)]
            had = np.split(rows_A, np.cumsum(asked_N)[:-1])
            of_rank = [np.concatenate([part[part != ABSENT], extra]) for part, extra in zip(had, got, strict=True)]
            rows_A, asked_N = np.concatenate(of_rank), np.array([len(part) for part in of_rank])
        rows_U, place_A, _, _ = distinct(rows_A)
        keep_U, rate_U = rows.touch(rows_U)
        routes = Routes(torch.from_numpy(place_A), tuple(asked_N.tolist()), tuple(wanted_N.tolist()))
        return BatchRows(rows_U, place_K[cells].reshape(ids_BW.shape), born, keep_U, rate_U, routes)

    def cells(self, batch: RankBatch) -> tuple[Cells, Cells | None]:
        records, parts, routes = self._table.records, batch.requests, _routes(batch)
        asked_AS = records.weights(batch.rows_U[routes.asked_A])
        weights_KS = self._world.trade(asked_AS, routes.asked_N, routes.wanted_N)
        if parts is None:
            return records.cells_of(weights_KS, batch.cells_BW), None
        item, request = parts.item.cells_BW, parts.request.cells_BW
        return records.cells_of(weights_KS, item), records.cells_of(weights_KS, request)

    def gradients(
        self, batch: RankBatch, cells: Cells, scale: Tensor, of_requests: Cells | None = None
    ) -> RowGradients:
        records, routes = self._table.records, _routes(batch)
        own = records.gradients(sum(routes.wanted_N), cells, scale, of_requests)
        parts_AS = self._world.trade(own.sums_US, routes.wanted_N, routes.asked_N)
        return records.summed(len(batch.rows_U), routes.asked_A, parts_AS)

    def _by_owner(self, keys_N: I64) -> tuple[I64, I64]:
        """Order of the keys by owner, and within one as they stand; how many each rank owns."""
        owners = owner_of(keys_N, self._world.size)
        return np.argsort(owners, kind="stable"), np.bincount(owners, minlength=self._world.size)

    def _ask(self, columns_K3: I64, wanted_N: I64, event_time_ms: int) -> "_Asked":
        """Send keys, how often they occur and their vocabularies to their owners; each part begins with the time."""
        time = torch.tensor([[event_time_ms, 0, 0]])
        parts = torch.split(torch.from_numpy(columns_K3), wanted_N.tolist())
        came = self._world.exchange([torch.cat([time, part]) for part in parts])
        columns = torch.cat([part[1:] for part in came]).numpy()
        keys, times, vocabulary = (np.ascontiguousarray(columns[:, i]) for i in range(3))
        lengths = np.array([len(part) - 1 for part in came])
        return _Asked(keys, times, vocabulary, lengths, max(int(part[0, 0]) for part in came))

    def _answer(self, answers_A: Bool, asked_N: Sequence[int] | I64, wanted_N: I64) -> Bool:
        """Send back something on each key. bool [A] → bool [K], in the order in which the keys were sent."""
        values = torch.from_numpy(answers_A.astype(np.uint8))
        came: Bool = self._world.trade(values, list(asked_N), wanted_N.tolist()).numpy().astype(np.bool_)
        return came


@dataclass(frozen=True, slots=True)
class _Asked:
    """What the ranks ask of one of them, rank by rank.

    Attributes:
        keys, times, vocabulary: int64 [A], keys, how often each occurs in the rank's batch, and their vocabularies.
        lengths: int64 [N], how many of them come from each rank.
        event_time_ms: The latest event time of all batches.
    """

    keys: I64
    times: I64
    vocabulary: I64
    lengths: I64
    event_time_ms: int


def _routes(batch: RankBatch) -> Routes:
    assert batch.routes is not None, "a batch that sharded rows prepared"
    return batch.routes
