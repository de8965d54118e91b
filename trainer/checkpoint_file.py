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
``rank``        in a part of a checkpoint of several ranks (:mod:`trainer.checkpoint_parts`) only: decimal digits
``ranks``       likewise: how many ranks there were
``checksum``    SHA-256 of all the other metadata
=============== ====================================================================================

So a bit that flips anywhere in the file is noticed, and the message names what it belongs to.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from smes.arrays import Arrays
from smes.errors import CheckpointError, ModelMismatch, SchemaMismatch
from smes.model.deltas import StateArray
from smes.schema import Schema
from smes.schema_difference import describe_difference_from
from smes_io.tensor_pieces import LENGTH_BYTES, MAX_HEADER_BYTES, TensorInfo, read_header, write_header

FORMAT = 6
"""Number of the format: names and meaning of the arrays and of the metadata. Any other number is refused."""

_NAME_OF_FORMAT_1 = "smes-checkpoint-1"  # what stood in the metadata before formats were numbers
_CHECKSUM, _ARRAYS = "checksum", "arrays"
_NO_DIGEST = hashlib.sha256().hexdigest()  # as long as any
_HASHED_AT_ONCE = 16 * 1024 * 1024
_LARGE_BYTES = 64 * 1024 * 1024

_HOW = "smes train --change-schema goes on from it, smes schema diff shows with what"

DAMAGED = (KeyError, ValueError, OSError)
"""What :func:`read_checkpoint` raises for a file that is damaged or missing."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The whole state of training at one moment between two steps, as it was read.

    Attributes:
        lineage: The lineage that the weights belong to.
        step: Steps taken.
        schema: The schema trained with, plain data.
        schema_hash: Its hash.
        model: Model configuration, plain data.
        arrays: State of every part, names prefixed ``learner.``, ``stream.``, ``evaluation.``, ``experts.``,
            ``trainer.``. Large ones are pages of the file, which take memory while they are read; writing to them
            changes a copy.
        on_disk: Whether it is on disk as it is. If not, other ranks have written it, or one of another schema was
            carried over: write it before the first step.
    """

    lineage: str
    step: int
    schema: dict[str, Any]
    schema_hash: str
    model: dict[str, Any]
    arrays: Arrays
    on_disk: bool = True


@dataclass(frozen=True, slots=True)
class CheckpointView:
    """The whole state of training at one moment, read piece by piece while training goes on.

    Attributes:
        lineage, step, schema, schema_hash, model: As of :class:`Checkpoint`.
        arrays: Likewise, piece by piece.
        close: Called when it was written or could not be.
    """

    lineage: str
    step: int
    schema: dict[str, Any]
    schema_hash: str
    model: dict[str, Any]
    arrays: Mapping[str, StateArray]
    close: Callable[[], None] = field(default=lambda: None)


def write_checkpoint(
    path: Path, checkpoint: CheckpointView, sequence: int, part: Mapping[str, str] | None = None
) -> None:
    """Write a checkpoint beside its final name, flush it to the disk, rename it, and flush the folder.

    Args:
        path: Its file.
        checkpoint: What to write.
        sequence: The sequence number in its name.
        part: The metadata ``rank`` and ``ranks`` of a part; None: it is a whole checkpoint.

    Raises:
        OSError: The disk refused it; nothing is left behind.
    """
    part = part or {}
    with replacing(path) as file:
        # The widest numbers come first, so that every array lies at a multiple of its numbers' width.
        names = sorted(checkpoint.arrays, key=lambda name: (-checkpoint.arrays[name].dtype.itemsize, name))
        infos = [TensorInfo(name, checkpoint.arrays[name].dtype, checkpoint.arrays[name].shape) for name in names]
        # The digests come last; until then, as many other characters hold their place.
        header = write_header(infos, _metadata(checkpoint, sequence, dict.fromkeys(names, _NO_DIGEST), part))
        file.write(header)
        digests = {}
        for info in infos:
            sha = hashlib.sha256(_kind_of(info.dtype, info.shape))
            for piece in checkpoint.arrays[info.name].pieces():
                data = np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data
                sha.update(data)
                file.write(data)
            digests[info.name] = sha.hexdigest()
        assert file.tell() == len(header) + sum(info.nbytes for info in infos), "pieces are as long as they say"
        file.seek(0)
        file.write(write_header(infos, _metadata(checkpoint, sequence, digests, part)))


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file beside ``path`` to write to; in the end it is on the disk under that name.

    Raises:
        OSError: The disk refused it; nothing is left behind.
    """
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_checkpoint(
    path: Path,
    sequence: int,
    *,
    schema: Schema,
    model: dict[str, Any],
    only: tuple[str, ...] = ("",),
    without: tuple[str, ...] = (),
    any_schema: bool = False,
    part: Mapping[str, str] | None = None,
) -> Checkpoint:
    """Read one checkpoint, or one part of it, and verify every bit that is read.

    Args:
        path: Its file.
        sequence: The sequence number in its name.
        schema: The configured schema.
        model: The configured model, plain data.
        only: What the names of the arrays to read begin with; others are neither read nor verified.
        without: What the names of arrays begin with that are left out all the same.
        any_schema: Read it, too, if it is of another schema, whatever its model.
        part: What the metadata of a part must say; None: it is a whole checkpoint.

    Raises:
        SchemaMismatch: It was trained with another schema.
        CheckpointError: It has another format, or was trained with another model configuration.
        KeyError, ValueError, OSError: The file is damaged or missing (:data:`DAMAGED`).
    """
    infos, metadata, begin = _header(path)
    # First of all: a flipped bit must not pass for another format, schema or model.
    if _CHECKSUM in metadata:
        _expect("checksum of the metadata", metadata[_CHECKSUM], _digest_of_metadata(metadata))
    if (written := _format(metadata)) != str(FORMAT):
        raise CheckpointError(f"checkpoint {path}: format {written}, expected {FORMAT}")
    if _CHECKSUM not in metadata:
        raise ValueError("checksum of the metadata: none, expected one")
    _expect("sequence number in the name", str(sequence), metadata["sequence"])
    for key, value in (part or {}).items():
        _expect(f"{key} of a part", metadata[key], value)
    if any_schema and metadata["schema_hash"] != schema.hash:
        trained = json.loads(metadata["model"])
    else:
        trained = _compatible_model(path, metadata, schema, model)
    return Checkpoint(
        lineage=metadata["lineage"],
        step=int(metadata["step"]),
        schema=json.loads(metadata["schema"]),
        schema_hash=metadata["schema_hash"],
        model=trained,
        arrays=_verified_arrays(path, infos, begin, json.loads(metadata[_ARRAYS]), only, without),
    )


def verified_metadata(path: Path) -> dict[str, str]:
    """The metadata of a checkpoint's file. Its arrays are not read.

    Raises:
        KeyError, ValueError, OSError: It is damaged or missing (:data:`DAMAGED`).
    """
    _, metadata, _ = _header(path)
    _expect("checksum of the metadata", metadata[_CHECKSUM], _digest_of_metadata(metadata))
    return metadata


def _metadata(
    checkpoint: CheckpointView, sequence: int, digests: Mapping[str, str], part: Mapping[str, str]
) -> dict[str, str]:
    metadata = {
        "format": str(FORMAT),
        "sequence": str(sequence),
        "lineage": checkpoint.lineage,
        "step": str(checkpoint.step),
        "schema_hash": checkpoint.schema_hash,
        "schema": json.dumps(checkpoint.schema),
        "model": json.dumps(checkpoint.model, sort_keys=True),
        _ARRAYS: json.dumps(digests),
        **part,
    }
    return {**metadata, _CHECKSUM: _digest_of_metadata(metadata)}


def _header(path: Path) -> tuple[list[TensorInfo], dict[str, str], int]:
    """The arrays in the order of their bytes, the metadata, and where the arrays begin."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        begin = LENGTH_BYTES + length
        if length > MAX_HEADER_BYTES or begin > size:
            raise ValueError(f"header cut short ({size} bytes, header of {length} expected)")
        return *read_header(file.read(length), size - begin), begin


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Dotted keys whose values differ between two configurations as plain data, sorted."""
    ours, theirs = dict(_leaves(one)), dict(_leaves(other))
    missing = object()
    return sorted(key for key in {*ours, *theirs} if ours.get(key, missing) != theirs.get(key, missing))


def _compatible_model(path: Path, metadata: Mapping[str, str], schema: Schema, model: dict[str, Any]) -> dict[str, Any]:
    """The model configuration in the metadata, if it is the configured one and the schema is."""
    if (got := metadata["schema_hash"]) != schema.hash:
        difference = describe_difference_from(metadata.get("schema"), schema)
        raise SchemaMismatch(
            f"checkpoint {path}",
            expected=schema.hash,
            got=got,
            difference=f"{difference}; {_HOW}" if difference else "",
        )
    trained: dict[str, Any] = json.loads(metadata["model"])
    if changed := differences(trained, json.loads(json.dumps(model))):
        raise ModelMismatch(
            f"checkpoint {path}: trained with another model configuration (differs in: {', '.join(changed)}); "
            "expected the same, or an empty checkpoint folder"
        )
    return trained


def _verified_arrays(
    path: Path,
    infos: list[TensorInfo],
    begin: int,
    checksums: dict[str, str],
    only: tuple[str, ...],
    without: tuple[str, ...],
) -> Arrays:
    if {info.name for info in infos} != checksums.keys():
        raise ValueError(f"arrays: {len(infos)} arrays, expected the {len(checksums)} that the metadata names")
    pages = np.memmap(path, np.uint8, "c")
    arrays: Arrays = {}
    for info in infos:
        data = pages[begin : begin + info.nbytes]
        begin += info.nbytes
        if not info.name.startswith(only) or info.name.startswith(without):
            continue
        sha = hashlib.sha256(_kind_of(info.dtype, info.shape))
        for start in range(0, len(data), _HASHED_AT_ONCE):
            sha.update(data[start : start + _HASHED_AT_ONCE].data)
        _expect(f"checksum of array {info.name}", sha.hexdigest(), checksums[info.name])
        array = np.asarray(data).view(info.dtype).reshape(info.shape)
        arrays[info.name] = array.copy() if info.nbytes < _LARGE_BYTES else array
    return arrays


def _expect(what: str, got: str, expected: str) -> None:
    if got != expected:
        raise ValueError(f"{what}: {got[:12]}, expected {expected[:12]}")


def _kind_of(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    return f"{dtype.str} {list(shape)} ".encode()


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
