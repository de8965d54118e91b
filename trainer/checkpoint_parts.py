"""A checkpoint of several ranks: a file for each rank, and a manifest that is written when all of them are on disk.

A folder that all ranks share holds::

    step-000000000900-00000012.7c1f03aa.rank-0-of-2.safetensors
    step-000000000900-00000012.7c1f03aa.rank-1-of-2.safetensors
    step-000000000900-00000012.ranks.json

Parts without a manifest are no checkpoint: a rank was killed, or its disk was full. The number in the middle is of one
attempt alone, so that a process of an earlier run that still writes somewhere never replaces what a manifest names.

A part is a file as of :mod:`trainer.checkpoint_file`. Rank k's has its rows of the id table and its partitions of the
stream (:data:`SHARDED`), rank 0's everything else, too. The manifest is JSON::

    {"format": 6, "sequence": 12, "step": 900,
     "parts": [{"name": "step-….safetensors", "checksum": "…"}, …],
     "checksum": "…"}

with the parts in the order of the ranks. The checksum of a part is that of its metadata, which has one of every array;
that of the manifest is the SHA-256 of everything else in it.
"""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smes.errors import CheckpointError
from trainer.checkpoint_file import DAMAGED, FORMAT, replacing, verified_metadata

SHARDED = ("learner.table.", "learner.rows.", "stream.")
"""What the names of arrays begin with of which every rank has its own. Everything else only rank 0 writes."""

_VISIBLE_S, _LOOK_S = 30.0, 0.1  # a network file system may show a file of another machine later


@dataclass(frozen=True, slots=True)
class Part:
    """One rank's file.

    Attributes:
        name: In the folder.
        checksum: Of its metadata.
    """

    name: str
    checksum: str


def part_name(stem: str, attempt: str, rank: int, ranks: int) -> str:
    """Name of a rank's file.

    Args:
        stem: Name of the checkpoint, without an ending.
        attempt: Names one attempt to write it: hexadecimal digits.
        rank, ranks: Which rank of how many.
    """
    return f"{stem}.{attempt}.rank-{rank}-of-{ranks}.safetensors"


def part_metadata(rank: int, ranks: int) -> dict[str, str]:
    """What the metadata of a part says beside that of every checkpoint."""
    return {"rank": str(rank), "ranks": str(ranks)}


def write_manifest(path: Path, names: Sequence[str], sequence: int, step: int) -> None:
    """Write the manifest of parts that are on disk. From then on there is the checkpoint.

    Args:
        path: Its file.
        names: Of the parts, in the order of the ranks.
        sequence, step: Of the checkpoint; every part must be of it.

    Raises:
        OSError: The disk refused it; nothing is left behind.
        KeyError, ValueError: A part is damaged, missing, or of another moment.
    """
    parts = []
    for rank, name in enumerate(names):
        part = path.with_name(name)
        metadata = _visible(part)
        expected = {"sequence": str(sequence), "step": str(step), **part_metadata(rank, len(names))}
        found = {key: metadata.get(key, "") for key in expected}
        if found != expected:
            raise ValueError(f"{name}: {found}, expected {expected}")
        parts.append({"name": name, "checksum": metadata["checksum"]})
    manifest = {"format": FORMAT, "sequence": sequence, "step": step, "parts": parts}
    with replacing(path) as file:
        file.write(json.dumps({**manifest, "checksum": _checksum(manifest)}, indent=1).encode())


def read_manifest(path: Path, sequence: int) -> list[Part]:
    """The parts that a manifest names, in the order of the ranks.

    Raises:
        CheckpointError: It has another format.
        KeyError, ValueError, OSError: It is damaged or missing.
    """
    manifest = json.loads(path.read_bytes())
    if not isinstance(manifest, dict):
        raise ValueError(f"a {type(manifest).__name__}, expected an object")
    checksum = manifest.pop("checksum")
    if checksum != _checksum(manifest):
        raise ValueError(f"checksum of the manifest: {checksum}, expected {_checksum(manifest)}")
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"checkpoint {path}: format {manifest['format']}, expected {FORMAT}")
    if manifest["sequence"] != sequence:
        raise ValueError(f"sequence number in the name: {sequence}, expected {manifest['sequence']}")
    return [Part(part["name"], part["checksum"]) for part in manifest["parts"]]


def _visible(path: Path) -> dict[str, str]:
    """The metadata of a file that another machine has written."""
    deadline_s = time.monotonic() + _VISIBLE_S
    while True:
        try:
            return verified_metadata(path)
        except DAMAGED:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(_LOOK_S)


def _checksum(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
