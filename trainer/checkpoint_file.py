"""One checkpoint as a file: safetensors whose metadata holds the SHA-256 of every array and of the metadata itself.

The metadata, all of it text:

=============== ====================================================================================
``format``      decimal digits of :data:`FORMAT`
``sequence``    decimal digits; checkpoints of a folder are in the order of these numbers
``lineage``     the lineage that the weights belong to
``step``        decimal digits of the steps taken
``schema_hash`` :attr:`smes.schema.Schema.hash`
``schema``      JSON of :meth:`smes.schema.Schema.to_dict`, to say in what another schema differs
``model``       JSON of the model configuration
``arrays``      JSON: name of every array → SHA-256 of its type, shape and bytes
``checksum``    SHA-256 of all the other metadata
=============== ====================================================================================

So a bit that flips anywhere in the file is noticed, and the message names what it belongs to.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from smes.arrays import Arrays
from smes.errors import CheckpointError, SchemaMismatch
from smes.schema import Schema
from smes.schema_difference import describe_difference_from

FORMAT = 3
"""Number of the format: names and meaning of the arrays and of the metadata. Any other number is refused."""

_NAME_OF_FORMAT_1 = "smes-checkpoint-1"  # what stood in the metadata before formats were numbers
_CHECKSUM, _ARRAYS = "checksum", "arrays"

DAMAGED = (SafetensorError, KeyError, ValueError, OSError)
"""What :func:`read_checkpoint` raises for a file that is damaged or missing."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The whole state of training at one moment between two steps.

    Attributes:
        lineage: The lineage that the weights belong to.
        step: Steps taken.
        schema: The schema trained with, plain data.
        schema_hash: Its hash.
        model: Model configuration, plain data.
        arrays: State of every part, names prefixed ``learner.``, ``stream.``, ``evaluation.``, ``experts.``,
            ``trainer.``.
    """

    lineage: str
    step: int
    schema: dict[str, Any]
    schema_hash: str
    model: dict[str, Any]
    arrays: Arrays


def write_checkpoint(path: Path, checkpoint: Checkpoint, sequence: int) -> None:
    """Write a checkpoint beside its final name, flush it to the disk, rename it, and flush the folder.

    Raises:
        OSError: The disk refused it; nothing is left behind.
    """
    metadata = {
        "format": str(FORMAT),
        "sequence": str(sequence),
        "lineage": checkpoint.lineage,
        "step": str(checkpoint.step),
        "schema_hash": checkpoint.schema_hash,
        "schema": json.dumps(checkpoint.schema),
        "model": json.dumps(checkpoint.model, sort_keys=True),
        _ARRAYS: json.dumps({name: _digest(array) for name, array in sorted(checkpoint.arrays.items())}),
    }
    metadata[_CHECKSUM] = _digest_of_metadata(metadata)
    _write_durably(path, save(checkpoint.arrays, metadata))


def read_checkpoint(path: Path, sequence: int, *, schema: Schema, model: dict[str, Any]) -> Checkpoint:
    """Read one checkpoint, and verify every bit of it.

    Args:
        path: Its file.
        sequence: The sequence number in its name.
        schema: The configured schema.
        model: The configured model, plain data.

    Raises:
        SchemaMismatch: It was trained with another schema.
        CheckpointError: It has another format, or was trained with another model configuration.
        SafetensorError, KeyError, ValueError, OSError: The file is damaged or missing (:data:`DAMAGED`).
    """
    with safe_open(path, framework="np") as file:
        metadata = file.metadata() or {}
        # First of all: a flipped bit must not pass for another format, schema or model.
        if _CHECKSUM in metadata:
            _expect("checksum of the metadata", metadata[_CHECKSUM], _digest_of_metadata(metadata))
        if (written := _format(metadata)) != str(FORMAT):
            raise CheckpointError(f"checkpoint {path}: format {written}, expected {FORMAT}")
        if _CHECKSUM not in metadata:
            raise ValueError("checksum of the metadata: none, expected one")
        _expect("sequence number in the name", str(sequence), metadata["sequence"])
        trained = _compatible_model(path, metadata, schema, model)
        return Checkpoint(
            lineage=metadata["lineage"],
            step=int(metadata["step"]),
            schema=schema.to_dict(),
            schema_hash=metadata["schema_hash"],
            model=trained,
            arrays=_verified_arrays(file, json.loads(metadata[_ARRAYS])),
        )


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Dotted keys whose values differ between two configurations as plain data, sorted."""
    ours, theirs = dict(_leaves(one)), dict(_leaves(other))
    missing = object()
    return sorted(key for key in {*ours, *theirs} if ours.get(key, missing) != theirs.get(key, missing))


def _compatible_model(path: Path, metadata: Mapping[str, str], schema: Schema, model: dict[str, Any]) -> dict[str, Any]:
    """The model configuration in the metadata, if it is the configured one and the schema is."""
    if (got := metadata["schema_hash"]) != schema.hash:
        difference = describe_difference_from(metadata.get("schema"), schema)
        raise SchemaMismatch(f"checkpoint {path}", expected=schema.hash, got=got, difference=difference)
    trained: dict[str, Any] = json.loads(metadata["model"])
    if changed := differences(trained, json.loads(json.dumps(model))):
        raise CheckpointError(
            f"checkpoint {path}: trained with another model configuration (differs in: {', '.join(changed)}); "
            "expected the same, or an empty checkpoint folder"
        )
    return trained


def _verified_arrays(file: Any, checksums: dict[str, str]) -> Arrays:
    arrays: Arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    if arrays.keys() != checksums.keys():
        raise ValueError(f"arrays: {len(arrays)} arrays, expected the {len(checksums)} that the metadata names")
    for name, array in arrays.items():
        _expect(f"checksum of array {name}", _digest(array), checksums[name])
    return arrays


def _expect(what: str, got: str, expected: str) -> None:
    if got != expected:
        raise ValueError(f"{what}: {got[:12]}, expected {expected[:12]}")


def _digest(array: NDArray[Any]) -> str:
    sha = hashlib.sha256(f"{array.dtype.str} {list(array.shape)} ".encode())
    sha.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return sha.hexdigest()


def _digest_of_metadata(metadata: Mapping[str, str]) -> str:
    others = {key: value for key, value in metadata.items() if key != _CHECKSUM}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()


def _format(metadata: Mapping[str, str]) -> str:
    """The format's number as it was written."""
    written = metadata.get("format", "none")
    return "1" if written == _NAME_OF_FORMAT_1 else written


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
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
