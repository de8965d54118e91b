"""From a snapshot's payload to the model that serves it."""

import json

from smes.errors import SchemaMismatch, SnapshotError
from smes.model_config import ModelConfig
from smes.schema import Schema
from smes.serving import ServingModel
from smes.snapshot import decode


def load_serving_model(payload: bytes, schema: Schema) -> ServingModel:
    """The :class:`smes.serving.ServingModel` of a payload.

    Raises:
        SnapshotError: The payload is damaged, or its tensors do not fit its own model configuration.
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
