"""Checkpoints on disk: everything that a restart needs, one safetensors file each.

The order of a commit: write the file beside its final name and flush it to the disk, then rename it, then flush the
folder. A file with the final name is whole; a crash in between leaves the previous checkpoint in force.
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from smes.arrays import Arrays
from smes.errors import CheckpointError, SchemaMismatch

_logger = logging.getLogger(__name__)

FORMAT = 2
"""Number of the format: names and meaning of the arrays and of the metadata. Any other number is refused."""

_NAME_OF_FORMAT_1 = "smes-checkpoint-1"  # what stood in the metadata before formats were numbers


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The whole state of training at one moment between two steps.

    Attributes:
        lineage: The lineage that the weights belong to.
        step: Steps taken.
        schema_hash: Hash of the schema trained with.
        model: Model configuration, plain data.
        arrays: State of every part, names prefixed ``learner.``, ``stream.``, ``evaluation.``, ``experts.``,
            ``trainer.``.
    """

    lineage: str
    step: int
    schema_hash: str
    model: dict[str, Any]
    arrays: Arrays


class CheckpointDirectory:
    """The checkpoints in one folder.

    Args:
        directory: The folder; created if missing.
        keep: How many of the newest are kept.

    Raises:
        CheckpointError: The folder cannot be created.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        self._directory, self._keep = directory, keep
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"checkpoint folder {directory}: cannot be made: {error.strerror}") from error

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write a checkpoint durably, then remove those beyond ``keep``.

        Raises:
            CheckpointError: The disk refused it; earlier checkpoints stay valid.
        """
        metadata = {
            "format": str(FORMAT),
            "lineage": checkpoint.lineage,
            "step": str(checkpoint.step),
            "schema_hash": checkpoint.schema_hash,
            "model": json.dumps(checkpoint.model, sort_keys=True),
        }
        path = self._directory / f"step-{checkpoint.step:012d}.safetensors"
        try:
            _write_durably(path, save(checkpoint.arrays, metadata))
            for old in self._paths()[self._keep :]:
                old.unlink()
        except OSError as error:
            raise CheckpointError(f"checkpoint {path}: not written: {error.strerror or error}") from error
        return path

    def newest(self, *, schema_hash: str, model: dict[str, Any]) -> Checkpoint | None:
        """The newest checkpoint that is not damaged; None if the folder has no checkpoint.

        Raises:
            SchemaMismatch: It was trained with another schema.
            CheckpointError: It has another format, it was trained with another model configuration, or all checkpoints
                are damaged.
        """
        damaged = []
        for path in self._paths():
            try:
                return read_checkpoint(path, schema_hash=schema_hash, model=model)
            except (SafetensorError, KeyError, ValueError, OSError) as error:
                _logger.warning("checkpoint %s cannot be read, trying the one before it: %s", path, error)
                damaged.append(f"{path.name} ({error})")
        if damaged:
            raise CheckpointError(f"checkpoint folder {self._directory}: none can be read: {'; '.join(damaged)}")
        return None

    def _paths(self) -> list[Path]:
        """Newest first by time of modification: after a fork of the lineage a lower step may be the newer one."""
        paths = self._directory.glob("step-*.safetensors")
        return sorted(paths, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)


def read_checkpoint(path: Path, *, schema_hash: str, model: dict[str, Any]) -> Checkpoint:
    """Read one checkpoint.

    Args:
        path: Its file.
        schema_hash: Hash of the configured schema.
        model: The configured model, plain data.

    Raises:
        SchemaMismatch: It was trained with another schema.
        CheckpointError: It has another format, or was trained with another model configuration.
        SafetensorError, KeyError, ValueError, OSError: The file is damaged or missing.
    """
    with safe_open(path, framework="np") as file:
        metadata = file.metadata() or {}
        if (written := _format(metadata)) != str(FORMAT):
            raise CheckpointError(f"checkpoint {path}: format {written}, expected {FORMAT}")
        if metadata["schema_hash"] != schema_hash:
            raise SchemaMismatch(f"checkpoint {path}", expected=schema_hash, got=metadata["schema_hash"])
        trained = json.loads(metadata["model"])
        if changed := _differences(trained, json.loads(json.dumps(model))):
            raise CheckpointError(
                f"checkpoint {path}: trained with another model configuration (differs in: {', '.join(changed)}); "
                "expected the same, or an empty checkpoint folder"
            )
        return Checkpoint(
            lineage=metadata["lineage"],
            step=int(metadata["step"]),
            schema_hash=metadata["schema_hash"],
            model=trained,
            arrays={name: file.get_tensor(name) for name in file.keys()},  # noqa: SIM118 - no dict
        )


def _format(metadata: Mapping[str, str]) -> str:
    """The format's number as it was written."""
    written = metadata.get("format", "none")
    return "1" if written == _NAME_OF_FORMAT_1 else written


def _differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Dotted keys whose values differ, sorted."""
    ours, theirs = dict(_leaves(one)), dict(_leaves(other))
    missing = object()
    return sorted(key for key in {*ours, *theirs} if ours.get(key, missing) != theirs.get(key, missing))


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _write_durably(path: Path, content: bytes) -> None:
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
