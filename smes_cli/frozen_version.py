"""The weights of one version, as they are: out of Redis, or out of a folder of checkpoints."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer

from feature_store.folding import read_weights
from smes.arrays import under
from smes.errors import CheckpointError, SchemaMismatch, SnapshotError
from smes.model.config import ModelConfig
from smes.model.serving import ServingModel
from smes.schema import Schema
from smes.schema_difference import describe_difference_from
from smes_cli.building import build_learner
from smes_cli.config import Config
from smes_cli.snapshot_places import none_published, snapshot_store, typed_version
from trainer.checkpoints import CheckpointDirectory


@dataclass(frozen=True, slots=True)
class FrozenVersion:
    """Weights that never change, and what they are of.

    Attributes:
        lineage: Of the weights.
        version: The steps behind them.
        source: Where they are from, for people.
        schema, model: What they were trained with.
        tensors: A :meth:`smes.model.learner.Learner.serving_state`.
    """

    lineage: str
    version: int
    source: str
    schema: Schema
    model: ModelConfig
    tensors: dict[str, torch.Tensor]

    @property
    def name(self) -> str:
        """``lineage:version``."""
        return f"{self.lineage}:{self.version}"

    def serving_model(self) -> ServingModel:
        """A model that scores with them."""
        return ServingModel.from_state(self.schema, self.model, self.tensors)

    def require_schema(self, schema: Schema) -> None:
        """Check that they were trained with a schema.

        Raises:
            SchemaMismatch: With another one; the message says in what they differ.
        """
        if schema.hash != self.schema.hash:
            difference = describe_difference_from(json.dumps(self.schema.to_dict()), schema)
            raise SchemaMismatch(self.source, expected=schema.hash, got=self.schema.hash, difference=difference)

    def described(self) -> dict[str, Any]:
        """For a report."""
        return {"lineage": self.lineage, "version": self.version, "schema": self.schema.hash}


def frozen_version(
    config: Config, version: str | None, lineage: str | None, checkpoint: Path | None, log: Path | None = None
) -> FrozenVersion:
    """The weights that ``--version`` or ``--checkpoint`` names.

    Args:
        config: Says where Redis is; a checkpoint must be of its schema and model.
        version: ``VERSION`` or ``LINEAGE:VERSION`` in Redis.
        lineage: Its lineage; None: that of the version in service.
        checkpoint: A folder of checkpoints, whose newest counts.
        log: The log that the command is given, by which built-in schemas are recognised.

    Raises:
        ValueError: Not exactly one of the two is named.
        SnapshotError, CheckpointError, SchemaMismatch: There are no such weights, or they cannot be read.
    """
    if (version is None) == (checkpoint is None):
        raise ValueError("expected either --version (in Redis) or --checkpoint (a folder of checkpoints)")
    if checkpoint is not None and lineage is not None:
        raise ValueError(f"--lineage {lineage}: expected --version beside it; a checkpoint has one lineage")
    if checkpoint is not None:
        return _of_checkpoint(config, checkpoint, config.schema_file(log).schema)
    assert version is not None, "checked above"
    return _of_snapshot(config, version, lineage)


def _of_snapshot(config: Config, text: str, lineage: str | None) -> FrozenVersion:
    try:
        version, lineage = typed_version(text, lineage)
    except typer.BadParameter as error:
        raise ValueError(f"--version {error}") from error
    store = snapshot_store(config)
    if lineage is None:
        served = store.to_serve()
        if served is None:
            raise none_published(config)
        lineage = served.lineage
    source = f"snapshot {lineage}:{version}"
    tensors, metadata = read_weights(store, store.get(lineage, version))
    try:
        schema = Schema.from_dict(json.loads(metadata["schema"]))
        model = ModelConfig.from_dict(json.loads(metadata["model"]))
    except (KeyError, TypeError, ValueError) as error:
        raise SnapshotError(f"{source}: schema and model of its payload: {error}") from error
    return FrozenVersion(lineage, version, source, schema, model, tensors)


def _of_checkpoint(config: Config, folder: Path, schema: Schema) -> FrozenVersion:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder, expected one with a checkpoint")
    found = CheckpointDirectory(folder, keep=1).newest(schema=schema, model=config.model.to_dict(), only=("learner.",))
    if found is None:
        raise CheckpointError(f"{folder}: no checkpoint in it, expected one")
    learner = build_learner(config, schema)
    try:
        learner.load_state({n: torch.from_numpy(array) for n, array in under("learner.", found.arrays).items()})
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"checkpoint of step {found.step} in {folder}: {error}") from error
    source = f"checkpoint of step {found.step} in {folder}"
    return FrozenVersion(found.lineage, found.step, source, schema, learner.config, learner.serving_state())
