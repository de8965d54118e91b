"""From a snapshot's payload to the model that serves it.

A request reads one :class:`ServedModel` and answers with it alone, so that its answer is of one version.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from feature_store.manifest import Manifest
from feature_store.payload import decode
from smes.arrays import F32, I64
from smes.errors import SchemaMismatch, SnapshotError
from smes.model.config import ModelConfig
from smes.model.serving import ServingModel
from smes.schema import Schema


class Scorable(Protocol):
    """Scores instances; never changes, so any number of threads may call it."""

    def score(self, ids: I64, numerics: F32) -> F32:
        """float32 [N, T] for int64 [N, W] and float32 [N, F]."""
        ...


Load = Callable[[bytes, Schema], Scorable]
"""Builds a model from a snapshot's payload for the configured schema."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A snapshot that was loaded and warmed up: the model together with the version it is. Immutable."""

    model: Scorable
    manifest: Manifest

    @property
    def key(self) -> tuple[str, int]:
        """Lineage and version."""
        return self.manifest.lineage, self.manifest.version


def load_serving_model(payload: bytes, schema: Schema) -> ServingModel:
    """The :class:`smes.model.serving.ServingModel` of a payload.

    Raises:
        SnapshotError: The payload is of another format or damaged, or its tensors do not fit its model configuration.
        SchemaMismatch: It was trained with another schema.
    """
    tensors, metadata = decode(payload)
    if metadata.get("schema_hash") != schema.hash:
        raise SchemaMismatch("snapshot payload", expected=schema.hash, got=str(metadata.get("schema_hash")))
    try:
        config = ModelConfig.from_dict(json.loads(metadata["model"]))
    except (KeyError, TypeError, ValueError) as error:
        raise SnapshotError(f"snapshot payload: model configuration: {error}") from error
    try:
        return ServingModel(schema, config, tensors)
    except ValueError as error:
        raise SnapshotError(f"snapshot payload: {error}") from error
