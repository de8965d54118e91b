"""From the payloads that lead to a version to its model.

A full payload makes a table, block by block as it arrives. A delta becomes a shadow before the table of the version
that it follows (:mod:`smes.model.serving_rows`). Payloads are not trusted: everything is checked before it is used, and
nothing larger than what has arrived is allocated.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from feature_store.payload import PayloadContent
from smes.arrays import F32, I64, Bool
from smes.errors import SchemaMismatch, SnapshotError
from smes.model.config import ModelConfig
from smes.model.deltas import RowDelta
from smes.model.fitting import fitting_config
from smes.model.ids import IdKeys
from smes.model.serving import Explained, ServingModel, check_required, group_columns, required_keys
from smes.model.serving_rows import ServingTable, Shadow, TableRows
from smes.schema import Schema
from smes.schema_difference import describe_difference_from
from smes_scorer.versions import Scorable

_MOST_SHADOWS = 8
"""More are merged: a reader looks into each of them. There are several only while a request takes long."""


class Load(Protocol):
    """Makes the model of a version."""

    def __call__(self, payloads: Iterable[PayloadContent], schema: Schema, before: Scorable | None) -> Scorable:
        """The model of the last payload.

        Args:
            payloads: One or more, in order, each read to its end before the next is asked for: a full one first, or
                deltas that follow ``before``. What asking or reading raises passes through.
            schema: The schema of the versions.
            before: The model that the first payload follows, if it is a delta. It stays as it is.

        Raises:
            SmesError: No model can be made of these bytes.
        """
        ...


@dataclass(frozen=True)
class TableModel:
    """A version's dense model with its rows in a table that other versions share.

    Attributes:
        model: Scores.
        rows: Those that it reads.
        keys: Of the ids of requests, which know no derived features.
    """

    model: ServingModel
    rows: TableRows
    keys: IdKeys

    @property
    def shadows(self) -> int:
        """How many changes of the table are not folded into it."""
        return len(self.rows.shadows)

    def score(self, ids: I64, numerics: F32, now_ms: I64 | int | None = None) -> F32:
        """As :meth:`smes.model.serving.ServingModel.score`."""
        return self.model.score(ids, numerics, now_ms)

    def score_requests(self, ids: I64, numerics: F32, now_ms: I64, requests: I64) -> F32:
        """As :meth:`smes_scorer.versions.OfRequests.score_requests`."""
        return self.model.score(ids, numerics, now_ms, requests=requests)

    def explain(self, ids: I64, numerics: F32, now_ms: I64 | int | None = None) -> Explained:
        """As :meth:`smes.model.serving.ServingModel.explain`."""
        return self.model.explain(ids, numerics, now_ms)

    def knows(self, ids: I64) -> Bool:
        """As :meth:`smes_scorer.versions.Knowing.knows`."""
        return self.rows.has(self.keys.own(ids)).reshape(ids.shape)

    def folded(self, up_to_version: int) -> "TableModel":
        """As :meth:`smes_scorer.versions.Foldable.folded`."""
        rows = self.rows.folded(up_to_version)
        return self if len(rows.shadows) == self.shadows else TableModel(self.model.reading(rows), rows, self.keys)


def request_keys(schema: Schema) -> IdKeys:
    """Keys of the ids of requests, which know no derived features."""
    return IdKeys(replace(schema, derived=()))


def load_table_model(
    payloads: Iterable[PayloadContent],
    schema: Schema,
    before: Scorable | None = None,
    *,
    new_table: Callable[[Mapping[str, int], int], ServingTable] = ServingTable,
) -> TableModel:
    """See :class:`Load`.

    Args:
        payloads, schema, before: As there.
        new_table: Makes an empty table of column groups, with room for so many rows.

    Raises:
        SnapshotError: A payload is damaged, or its tensors do not fit its model configuration or the table.
        SchemaMismatch: It was trained with another schema.
    """
    rows = before.rows if isinstance(before, TableModel) else None
    shared = True  # whether somebody may read the table
    last: tuple[ModelConfig, PayloadContent] | None = None
    for payload in payloads:
        config = _config_of(payload, schema)
        if payload.kind == "full":
            rows, shared = _table_of(payload, schema, config, new_table), False
        else:
            rows = _changed(rows, payload, schema, config)
            if not shared:
                rows = rows.folded(payload.version)
        last = config, payload
    assert rows is not None, "at least one payload"
    assert last is not None, "at least one payload"
    with _unfit("snapshot payload"):
        rows = rows.with_fewer_shadows(_MOST_SHADOWS)
        keys = before.keys if isinstance(before, TableModel) else request_keys(schema)
        return TableModel(ServingModel(schema, last[0], last[1].dense, rows), rows, keys)


def _config_of(payload: PayloadContent, schema: Schema) -> ModelConfig:
    metadata = payload.metadata
    if metadata.get("schema_hash") != schema.hash:
        difference = describe_difference_from(metadata.get("schema"), schema)
        got = str(metadata.get("schema_hash"))
        raise SchemaMismatch("snapshot payload", expected=schema.hash, got=got, difference=difference)
    try:
        # Checked before it is built: building a configuration of absurd size takes time and memory already.
        return ModelConfig.from_dict(fitting_config(json.loads(metadata["model"]), payload.dense))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise SnapshotError(f"snapshot payload: model configuration: {error}") from error


def _table_of(
    payload: PayloadContent,
    schema: Schema,
    config: ModelConfig,
    new_table: Callable[[Mapping[str, int], int], ServingTable],
) -> TableRows:
    """The rows of a full payload."""
    groups = _groups(payload, schema, config)
    with _unfit("snapshot payload"):
        table = new_table(groups, payload.num_rows)
    for keys, columns in payload.rows():
        with _unfit("snapshot payload"):
            table.add(keys, columns)
    with _unfit("snapshot payload"):
        rows = TableRows(required_keys(schema, payload.dense, table.num_rows), table)
        check_required(rows.keys, rows.has(rows.keys.required))
    return rows


def _changed(before: TableRows | None, payload: PayloadContent, schema: Schema, config: ModelConfig) -> TableRows:
    """The rows of a delta's version."""
    if before is None:
        raise SnapshotError(f"snapshot payload: a delta of version {payload.version}, expected a full one first")
    table = before.table
    if _groups(payload, schema, config) != table.groups:
        raise SnapshotError(f"snapshot payload: model configuration: other table columns than {table.groups} before")
    blocks = list(payload.rows())
    with _unfit("snapshot payload"):
        delta = RowDelta(
            keys=np.concatenate([np.zeros(0, np.int64), *(keys for keys, _ in blocks)]),
            columns={
                name: np.concatenate([np.zeros((0, count), np.float32), *(columns[name] for _, columns in blocks)])
                for name, count in table.groups.items()
            },
            removed=payload.removed,
        )
        shadows = before.after(Shadow(delta, payload.version, table.groups)).shadows
        rows = TableRows(required_keys(schema, payload.dense, table.num_rows + len(delta)), table, shadows)
        check_required(rows.keys, rows.has(rows.keys.required))
    return rows


def _groups(payload: PayloadContent, schema: Schema, config: ModelConfig) -> dict[str, int]:
    """The column groups of the configuration, which are those of the payload."""
    groups = group_columns(schema, config)
    if payload.num_rows and dict(payload.groups) != groups:
        raise SnapshotError(f"snapshot payload: table columns {dict(payload.groups)}, expected {groups}")
    return groups


@contextmanager
def _unfit(what: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise SnapshotError(f"{what}: {error}") from error
