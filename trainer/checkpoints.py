"""Checkpoints: everything that a restart needs, one safetensors file each, on disk.

The order of a commit: the file is written beside its final name and flushed to the disk, then renamed, then the folder
is flushed. A file that bears the final name is whole; a crash in between leaves the previous checkpoint in force.
"""

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from smes.errors import CheckpointError, SchemaMismatch

_logger = logging.getLogger(__name__)
_FORMAT = "smes-checkpoint-1"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """All of one moment, between two steps.

    Attributes:
        lineage: The lineage the weights belong to.
        step: Steps taken.
        schema_hash: Schema trained with.
        model: Model configuration, plain data.
        arrays: State of every part, names prefixed ``learner.``, ``stream.``, ``evaluation.``, ``experts.``,
            ``trainer.``.
    """

    lineage: str
    step: int
    schema_hash: str
    model: dict[str, Any]
    arrays: dict[str, NDArray[Any]]


class CheckpointDirectory:
    """The checkpoints in one folder.

    Args:
        directory: Made when missing.
        keep: Newest ones kept.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        self._directory, self._keep = directory, keep
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"checkpoint folder {directory}: cannot be made: {error.strerror}") from error

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write one durably, then remove those beyond ``keep``.

        Raises:
            CheckpointError: The disk refused it; the checkpoints before it stand.
        """
        metadata = {
            "format": _FORMAT,
            "lineage": checkpoint.lineage,
            "step": str(checkpoint.step),
            "schema_hash": checkpoint.schema_hash,
            "model": json.dumps(checkpoint.model, sort_keys=True),
        }
        path = self._directory / f"step-{checkpoint.step:012d}.safetensors"
        partial = path.with_suffix(".partial")
        try:
            with partial.open("wb") as file:
                file.write(save(checkpoint.arrays, metadata))
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            folder = os.open(self._directory, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
            for old in self._paths()[self._keep :]:
                old.unlink()
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise CheckpointError(f"checkpoint {path}: not written: {error.strerror or error}") from error
        return path

    def newest(self, *, schema_hash: str, model: dict[str, Any]) -> Checkpoint | None:
        """The newest checkpoint that can be read, None where there is none.

        Raises:
            SchemaMismatch: It was trained with another schema.
            CheckpointError: It was trained with another model configuration, or none of those there can be read.
        """
        damaged = []
        for path in self._paths():
            try:
                return self._read(path, schema_hash, model)
            except (SafetensorError, KeyError, ValueError, OSError) as error:
                _logger.warning("checkpoint %s cannot be read, trying the one before it: %s", path, error)
                damaged.append(f"{path.name} ({error})")
        if damaged:
            raise CheckpointError(f"checkpoint folder {self._directory}: none can be read: {'; '.join(damaged)}")
        return None

    def _paths(self) -> list[Path]:
        """Newest first by modification: after a fork of the lineage a lower step may be the newer one."""
        paths = self._directory.glob("step-*.safetensors")
        return sorted(paths, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)

    @staticmethod
    def _read(path: Path, schema_hash: str, model: dict[str, Any]) -> Checkpoint:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(f"format {metadata.get('format')!r}, expected {_FORMAT!r}")
            if metadata["schema_hash"] != schema_hash:
                raise SchemaMismatch(f"checkpoint {path}", expected=schema_hash, got=metadata["schema_hash"])
            trained = json.loads(metadata["model"])
            if trained != json.loads(json.dumps(model)):
                changed = sorted(k for k in {*trained, *model} if trained.get(k) != model.get(k))
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
