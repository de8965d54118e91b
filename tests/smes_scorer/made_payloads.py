"""Payloads for the scorer's tests: those of a learner, and those of models whose scores show their version."""

import json
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch

from feature_store.manifest import Manifest
from feature_store.payload import Block, Precision, read_payload, write_payload
from feature_store.snapshots import SnapshotStore
from smes.arrays import F32, I64
from smes.model.deltas import RowDelta
from smes.model.learner import Learner
from smes.schema import Schema
from smes_scorer.loading import TableModel, load_table_model


def marks_of(learner: Learner, version: int, lineage: str = "a") -> dict[str, str]:
    """The metadata of a learner's payload."""
    return {
        "schema": json.dumps(learner.schema.to_dict()),
        "schema_hash": learner.schema.hash,
        "model": json.dumps(learner.config.to_dict()),
        "lineage": lineage,
        "version": str(version),
    }


def full_payload(
    learner: Learner,
    version: int,
    *,
    lineage: str = "a",
    marks: Mapping[str, str] | None = None,
    changed: Mapping[str, torch.Tensor] | None = None,
    precision: Precision = "fp32",
) -> bytes:
    """All weights of a learner; ``marks`` instead of its metadata, and ``changed`` tensors instead of its own."""
    tensors = {**learner.serving_state(), **(changed or {})}
    keys: I64 = tensors.pop("table.keys").numpy()
    columns = {n.removeprefix("table."): t.numpy() for n, t in tensors.items() if n.startswith("table.")}
    dense = {n: t for n, t in tensors.items() if n.startswith("dense.")}
    return _written(marks or marks_of(learner, version, lineage), dense, keys, columns, None, precision)


def delta_payload(
    learner: Learner,
    version: int,
    delta: RowDelta,
    *,
    lineage: str = "a",
    changed: Mapping[str, torch.Tensor] | None = None,
    precision: Precision = "fp32",
) -> bytes:
    """The dense weights of a learner, and a delta of its table."""
    dense = {**learner.dense_serving_state(), **(changed or {})}
    marks = marks_of(learner, version, lineage)
    return _written(marks, dense, delta.keys, delta.columns, delta.removed, precision)


def version_payload(version: int, metadata: Mapping[str, str], *, of_model: int | None = None) -> bytes:
    """The full payload of a model that shows its version."""
    dense = {"dense.version": torch.tensor(version if of_model is None else of_model)}
    return _written(metadata, dense, np.zeros(0, np.int64), {}, None, "fp32")


def loaded(*payloads: bytes, learner: Learner, before: TableModel | None = None) -> TableModel:
    """The model of the last payload, as the scorer loads it."""
    return load_table_model((read_payload([p], len(p)) for p in payloads), learner.schema, before)


def loaded_from(store: SnapshotStore, manifest: Manifest, schema: Schema) -> TableModel:
    """The model of a published version, as a scorer that starts late loads it."""
    return load_table_model((read_payload(store.pieces(m), m.total_bytes) for m in store.chain(manifest)), schema)


def _written(
    marks: Mapping[str, str],
    dense: Mapping[str, torch.Tensor],
    keys: I64,
    columns: Mapping[str, F32],
    removed: I64 | None,
    precision: Precision,
) -> bytes:
    groups = {name: values.shape[1] for name, values in columns.items()} if len(keys) else {}

    def blocks() -> Iterator[Block]:
        yield keys, dict(columns)

    made: Iterable[Block] = () if not len(keys) else blocks()
    payload = write_payload(marks, dense, groups, len(keys), lambda: made, removed=removed, precision=precision)
    return payload.joined()
