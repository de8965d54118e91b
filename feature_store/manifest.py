"""What a published snapshot is, and how to verify its bytes (:mod:`feature_store.payload`)."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from smes.errors import SnapshotError


@dataclass(frozen=True, slots=True)
class Chunk:
    """One piece of a payload: its length and the SHA-256 of its bytes in hex."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a published snapshot is and how to verify it.

    Attributes:
        lineage: One uninterrupted history of weights.
        version: Step number that it was cut at, 0 … 2^53 - 1, growing within a lineage.
        parent: The version published before it in the lineage, None for the first.
        schema_hash: :attr:`smes.schema.Schema.hash` of the schema it was trained with.
        step: Optimiser steps behind the weights.
        positions: Topic → partition (decimal digits) → next record to read, at the moment of the cut.
        event_time_ms: Event time reached, Unix milliseconds.
        created_ms: Wall time of the cut, Unix milliseconds.
        total_bytes: Length of the payload.
        chunks: The pieces in order.
        upload: Names the upload whose chunks these are, so that two writers never mix theirs.
        kind: ``full``: the payload holds every weight.
        metrics: What the trainer measured; plain JSON values (NaN becomes null).
        feedback_arrivals: (arrival at the log in Unix milliseconds, how many) of the feedback trained since the
            parent; the scorer computes freshness from it.
    """

    lineage: str
    version: int
    parent: int | None
    schema_hash: str
    step: int
    created_ms: int
    total_bytes: int
    chunks: tuple[Chunk, ...]
    upload: str
    event_time_ms: int | None = None
    kind: str = "full"
    positions: dict[str, dict[str, int]] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    feedback_arrivals: tuple[tuple[int, int], ...] = ()

    def to_json(self) -> bytes:
        """Compact UTF-8 JSON from which :meth:`from_json` builds an equal manifest (NaN metrics come back as None)."""
        return json.dumps(_finite(asdict(self)), separators=(",", ":"), allow_nan=False).encode()

    @classmethod
    def from_json(cls, text: bytes | str) -> "Manifest":
        """Read a manifest, strictly: every field present, of its type, and no other.

        Raises:
            SnapshotError: Names the field and what was expected.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise SnapshotError(f"snapshot manifest: no JSON: {error}") from error
        names = {f.name for f in fields(cls)}
        if not isinstance(data, dict) or data.keys() != names:
            found = sorted(data) if isinstance(data, dict) else type(data).__name__
            raise SnapshotError(f"snapshot manifest: expected an object with {sorted(names)}, got {found}")
        manifest = cls(
            lineage=_text(data, "lineage"),
            version=_integer(data, "version"),
            parent=_optional_integer(data, "parent"),
            schema_hash=_text(data, "schema_hash"),
            step=_integer(data, "step"),
            created_ms=_integer(data, "created_ms"),
            total_bytes=_integer(data, "total_bytes"),
            chunks=_chunks(data["chunks"]),
            upload=_text(data, "upload"),
            event_time_ms=_optional_integer(data, "event_time_ms"),
            kind=_text(data, "kind"),
            positions=_positions(data["positions"]),
            metrics=_object(data, "metrics"),
            feedback_arrivals=_arrivals(data["feedback_arrivals"]),
        )
        manifest._check()
        return manifest

    def _check(self) -> None:
        if self.kind != "full":
            raise _wrong("kind", "'full'", self.kind)
        if sum(chunk.bytes for chunk in self.chunks) != self.total_bytes:
            raise _wrong("total_bytes", f"the sum of the chunks, {sum(c.bytes for c in self.chunks)}", self.total_bytes)


def _wrong(name: str, expected: str, got: object) -> SnapshotError:
    return SnapshotError(f"snapshot manifest: {name}: expected {expected}, got {got!r}")


def _is_integer(value: object, minimum: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def _integer(data: Mapping[str, Any], name: str) -> int:
    value = data[name]
    if not _is_integer(value):
        raise _wrong(name, "a non-negative integer", value)
    return int(value)


def _optional_integer(data: Mapping[str, Any], name: str) -> int | None:
    return None if data[name] is None else _integer(data, name)


def _text(data: Mapping[str, Any], name: str) -> str:
    value = data[name]
    if not isinstance(value, str) or not value:
        raise _wrong(name, "a non-empty text", value)
    return value


def _object(data: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = data[name]
    if not isinstance(value, dict):
        raise _wrong(name, "an object", value)
    return value


def _chunks(value: object) -> tuple[Chunk, ...]:
    if not isinstance(value, list) or not value:
        raise _wrong("chunks", "a non-empty list", value)
    chunks = []
    for position, chunk in enumerate(value):
        if not isinstance(chunk, dict) or chunk.keys() != {"bytes", "sha256"}:
            raise _wrong(f"chunks[{position}]", "an object with bytes and sha256", chunk)
        if not _is_integer(chunk["bytes"]) or not isinstance(chunk["sha256"], str) or len(chunk["sha256"]) != 64:
            raise _wrong(f"chunks[{position}]", "a length and 64 hex digits", chunk)
        chunks.append(Chunk(**chunk))
    return tuple(chunks)


def _positions(value: object) -> dict[str, dict[str, int]]:
    if not isinstance(value, dict):
        raise _wrong("positions", "topic → partition → position", value)
    for topic, partitions in value.items():
        if not isinstance(partitions, dict) or not all(map(_is_integer, partitions.values())):
            raise _wrong(f"positions[{topic!r}]", "partition → non-negative position", partitions)
    return value


def _arrivals(value: object) -> tuple[tuple[int, int], ...]:
    if not isinstance(value, list):
        raise _wrong("feedback_arrivals", "a list of [arrival_ms, count]", value)
    for pair in value:
        if not isinstance(pair, list) or len(pair) != 2 or not all(map(_is_integer, pair)):
            raise _wrong("feedback_arrivals", "pairs of non-negative integers", pair)
    return tuple((arrival_ms, count) for arrival_ms, count in value)


def _finite(value: Any) -> Any:
    """JSON has no NaN: an undefined metric (an AUC without positives) is null; NumPy scalars become Python's."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value
