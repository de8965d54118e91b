"""The id table of a learner: which row each id has, and the rows' weights and accumulators.

Letters: B instances, W id columns, N rows, R rows of the table, C columns of a group, X floats of a record.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from smes.arrays import F32, I64, Arrays, prefixed, under
from smes.model.config import ModelConfig, OptimizerConfig
from smes.model.deltas import BLOCK_ROWS, RowDelta, StateArray, whole
from smes.model.frozen import FrozenRows, undo_log
from smes.model.id_rows import BatchRows, IdRows
from smes.model.ids import IdKeys, uniform_rows
from smes.model.row_keys import KeysView
from smes.model.rows_config import RowsConfig
from smes.model.table import RecordTable
from smes.model.table_layout import column_groups
from smes.model.table_view import TableView
from smes.model.tables import open_table
from smes.schema import Schema
from smes.world import ALONE, World


class IdTable:
    """Rows of weights by id. Not thread-safe, except for its views.

    Args:
        schema: Features and tasks.
        model: Which groups of columns there are, and the scale of the first embeddings.
        optimizer: How the rows learn.
        rows: Which ids get a row, and when a row is given back; None for the default.
        device: Where the rows are.
        seed: Seed of the first weights, ≥ 0.
        world: The ranks that share the rows; the table has those of this one.

    Attributes:
        rows: Which row each id has.
        records: The rows.

    Raises:
        ValueError: ``rows`` has rules for a vocabulary that the schema does not have.
    """

    def __init__(
        self,
        schema: Schema,
        model: ModelConfig,
        optimizer: OptimizerConfig,
        rows: RowsConfig | None,
        device: torch.device,
        seed: int,
        world: World = ALONE,
    ) -> None:
        self._world = world
        self._schema, self._model, self._optimizer, self._config = schema, model, optimizer, rows
        self._device, self._seed = device, seed
        self._groups = column_groups(model, optimizer, schema.num_tasks)
        self._empty()
        self._bear(self.rows.required)

    @property
    def columns(self) -> dict[str, int]:
        """Group of columns → C."""
        return {group.name: group.columns for group in self._groups}

    def assign(self, ids_BW: I64, event_time_ms: int) -> BatchRows:
        """Find the rows of a batch that will be trained on; those of new ids are born.

        Args:
            ids_BW: int64 [B, W].
            event_time_ms: The latest event time of the batch, Unix milliseconds.
        """
        batch = self.rows.assign(ids_BW, event_time_ms)
        self._bear(batch.born)
        return batch

    def give(self, keys_K: I64, times_K: I64, vocabulary_K: I64, event_time_ms: int) -> tuple[I64, I64]:
        """As :meth:`IdRows.give`; the rows of new ids are born."""
        rows_K, born = self.rows.give(keys_K, times_K, vocabulary_K, event_time_ms)
        self._bear(born)
        return rows_K, born

    def embeddings(self, ids_BW: I64) -> Tensor | None:
        """The embedding that each id reads now; nothing changes. float32 [B, W, D]; None without embeddings."""
        if "embedding" not in self.columns:
            return None
        rows = self.rows.find(ids_BW).ravel()
        return torch.from_numpy(self.records.values(rows)["embedding"]).view(*ids_BW.shape, -1).to(self._device)

    def values(self) -> dict[str, Tensor]:
        """Copies of what serving needs: ``keys``, int64 [N], and each group's weights, float32 [N, C], of used rows."""
        rows = np.flatnonzero(self.rows.used)
        arrays = {"keys": self.rows.keys(rows), **self.records.values(rows)}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def skip_delta(self) -> None:
        """Let :meth:`take_delta` count from now on."""
        self.records.take_touched()
        self.rows.note_removed()

    def take_delta(self) -> RowDelta:
        """What changed since the last call; see :meth:`smes.model.learner.Learner.take_delta`."""
        rows = np.sort(self.records.take_touched())
        rows = rows[self.rows.used[rows]]
        return RowDelta(self.rows.keys(rows), self.records.values(rows), self.rows.take_removed())

    def full_view(self, dense: Mapping[str, Tensor]) -> "TableSnapshot":
        """The rows as they are now, together with these dense weights."""
        return TableSnapshot(dense, self.columns, len(self.rows), self.rows.view(), self.records.view())

    def freeze(self) -> FrozenRows:
        """The rows as they are now, for scoring while training goes on."""
        return FrozenRows(self.rows, self.rows.view(), self.records.view())

    def thaw(self, state: Arrays) -> FrozenRows:
        """The rows that a :meth:`FrozenRows.state` was taken from; this table is as it was at that moment.

        Raises:
            ValueError: The table does not have the rows of the state.
        """
        return FrozenRows(self.rows, *self.views_of(state))

    def views_of(self, state: Arrays) -> tuple[KeysView, TableView]:
        """The views of a :meth:`thaw`."""
        undo = undo_log(state)
        if undo.num_rows > self.rows.num_rows:
            raise ValueError(f"frozen rows: {undo.num_rows}, expected at most the {self.rows.num_rows} of the table")
        keys = self.rows.view(undo.num_rows)
        keys.restore(state["keys.rows"], state["keys.keys"], state["keys.used"])
        return keys, self.records.open_view(undo)

    def state_view(self) -> tuple[dict[str, StateArray], tuple[TableView, KeysView]]:
        """The whole table as it is now, piece by piece, and what to close afterwards.

        - ``table.keys``: int64 [R], the key of each row; 0 for a free row;
        - ``table.records``: float32 [R, X], whole records;
        - ``rows.*``: which rows are free, and what is known of the ids' frequency and age.
        """
        keys, records = self.rows.view(), self.records.view()
        arrays = {name: whole(array) for name, array in prefixed("rows.", self.rows.state()).items()}
        return arrays | self.pieces(keys, records), (records, keys)

    def pieces(self, keys: KeysView, records: TableView) -> dict[str, StateArray]:
        """``table.keys`` and ``table.records`` of a :meth:`state_view`, at the moment of these views."""
        num_rows, width = keys.num_rows, self.records.layout.width

        def blocks() -> Iterator[tuple[int, int]]:
            return ((start, min(start + BLOCK_ROWS, num_rows)) for start in range(0, num_rows, BLOCK_ROWS))

        return {
            "table.keys": StateArray(
                np.dtype(np.int64), (num_rows,), lambda: (keys.block(*block)[0] for block in blocks())
            ),
            "table.records": StateArray(
                np.dtype(np.float32), (num_rows, width), lambda: (records.records(*block) for block in blocks())
            ),
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from the arrays of a :meth:`state_view`.

        Raises:
            KeyError: An array is missing.
            ValueError: The arrays are of another schema, model, or number of shared rows.
        """
        keys: I64 = state["table.keys"].numpy()
        records: F32 = state["table.records"].numpy()
        expected = (len(keys), self.records.layout.width)
        if records.shape != expected:
            raise ValueError(f"table.records: {records.shape}, expected {expected}: of another schema or model")
        self._empty()
        self.rows.load_state(keys, {name: tensor.numpy() for name, tensor in under("rows.", state).items()})
        for start in range(0, len(keys), BLOCK_ROWS):
            self.records.put_records(start, records[start : start + BLOCK_ROWS])

    def load_values(self, state: Mapping[str, Tensor], shared_rows: I64) -> None:
        """Continue from :meth:`values`, with accumulators as if nothing was seen.

        Args:
            state: The values, of N rows. Those of other ranks are left out.
            shared_rows: How many shared rows each vocabulary had; those that it does not have now are left out.

        Raises:
            KeyError: An array is missing.
            ValueError: The arrays are of another schema or model.
        """
        keys: I64 = state["keys"].numpy()
        weights: dict[str, F32] = {name: state[name].numpy() for name in self.columns}
        before = IdKeys(self._schema, shared_rows)
        if not np.isin(before.required[self.rows.owns(before.required)], keys).all():
            raise ValueError(f"keys of an id table: expected the default rows of {', '.join(before.vocabularies)}")
        self._empty()
        self._bear(self.rows.required)
        kept = self.rows.owns(keys) & ~np.isin(keys, np.setdiff1d(before.required, self.rows.ids.required))
        rows = self.rows.adopt(keys[kept])
        if len(np.unique(rows)) != len(rows):
            raise ValueError(f"keys of an id table: {len(rows) - len(np.unique(rows))} occur twice")
        self.records.reset(rows, {name: array[kept] for name, array in weights.items()})

    def _empty(self) -> None:
        """A table without any row but the names of those that every table has."""
        optimizer = self._optimizer
        self.rows = IdRows(
            self._schema,
            self._config,
            half_life_s=optimizer.accumulator_half_life_s,
            frequency_power=optimizer.frequency_power,
            world=self._world,
        )
        self.records: RecordTable = open_table(self._groups, self._device)

    def _bear(self, rows_N: I64) -> None:
        """Give rows their first weights, which depend on key and seed alone."""
        if len(rows_N):
            keys = self.rows.keys(rows_N)
            scale = {"embedding": self._model.embedding_scale, "wide": 0.0}
            weights = {name: uniform_rows(keys, n, scale[name], self._seed) for name, n in self.columns.items()}
            self.records.reset(rows_N, weights)


class TableSnapshot:
    """A :class:`smes.model.deltas.FullView` of a table.

    Args:
        dense: Copies of the dense weights.
        columns: Group → C.
        num_rows: How many rows have an id.
        keys: The keys of that moment.
        table: The rows of that moment.
    """

    def __init__(
        self, dense: Mapping[str, Tensor], columns: Mapping[str, int], num_rows: int, keys: KeysView, table: TableView
    ) -> None:
        self.dense, self.columns, self.num_rows = dense, columns, num_rows
        self._keys, self._table = keys, table

    def blocks(self) -> Iterator[tuple[I64, dict[str, F32]]]:
        for start in range(0, self._keys.num_rows, BLOCK_ROWS):
            keys, used = self._keys.block(start, min(start + BLOCK_ROWS, self._keys.num_rows))
            if used.any():
                yield keys[used], self._table.weights(start + np.flatnonzero(used))

    def close(self) -> None:
        self._keys.close()
        self._table.close()
