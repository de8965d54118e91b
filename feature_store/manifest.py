"""A snapshot's manifest, and the names of a snapshot and of its keys.

What is read from a store is not trusted: every field has bounds, so that no number of a manifest overflows later, and
no text of one fills the memory.
"""

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta

from feature_store.feedback_times import FeedbackRow
from feature_store.signing import MAX_SIGNATURE_BYTES, Signer
from smes.errors import SnapshotError, SnapshotStale
from smes_io.redis_access import key_prefix

LARGEST_INTEGER = 2**53 - 1
"""JSON readers and Lua keep integers exactly up to here."""

LATEST_MS = 7_258_118_400_000
"""The year 2200. A time beyond it is none."""

MAX_CHUNKS = 4096
MAX_MANIFEST_BYTES = 4 * 1024 * 1024
MAX_METRICS_BYTES = 1024 * 1024
MAX_PARTS = 1024
"""Ranks that may write one snapshot together."""

MAX_CARRIED_FROM = 64
"""Schemas before, of a lineage; older ones are forgotten."""

MAX_REASON = 1000
"""Characters of a reason that is stored."""

_MAX_CHUNK_BYTES = 512 * 1024 * 1024  # Redis' own limit for a value
_MAX_DEPTH = 16
_LARGEST_METRIC = 2**63 - 1

Count = Annotated[int, Meta(ge=0, le=LARGEST_INTEGER)]
Milliseconds = Annotated[int, Meta(ge=0, le=LATEST_MS)]
Text = Annotated[str, Meta(min_length=1, max_length=300)]
Lineage = Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9._-]*\Z")]
Position = Annotated[int, Meta(ge=0, le=2**63 - 1)]  # of a Redis stream with foreign entries, far beyond a count
Partitions = Annotated[dict[Annotated[str, Meta(pattern=r"^[0-9]{1,10}\Z")], Position], Meta(max_length=65_536)]


class Chunk(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One piece of a payload: its length and the SHA-256 of its bytes in lower-case hex."""

    bytes: Annotated[int, Meta(ge=1, le=_MAX_CHUNK_BYTES)]
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one rank of a training wrote of a snapshot: how many of its chunks, and how many rows they hold."""

    chunks: Annotated[int, Meta(ge=1, le=MAX_CHUNKS)]
    rows: Annotated[int, Meta(ge=0, le=LARGEST_INTEGER)]


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a published snapshot is and how to verify it. In JSON, every field is present, but for the two of which that
    is said.

    A version that was published as a delta may have a *base*, too: a full payload of the same version, with a manifest
    of its own of kind ``full``, so that what starts late need not load the versions before.

    Attributes:
        lineage: One uninterrupted history of weights.
        version: Number of the step after which the weights were cut, growing within a lineage.
        parent: The version published before it in the lineage, None for the first. A delta applies to it.
        schema_hash: :attr:`smes.schema.Schema.hash` of the schema it was trained with.
        step: Optimiser steps behind the weights.
        created_ms: Wall time of the cut, Unix milliseconds.
        published_ms: Wall time at which its payload was in the store, just before it became current.
        total_bytes: Length of the payload, the sum of the chunks.
        chunks: The pieces in order.
        upload: Names the upload that wrote these chunks, so that the uploads of two writers never mix.
        event_time_ms: Event time reached, Unix milliseconds; None before the first example.
        kind: ``full``: the payload holds every weight; ``delta``: every dense weight, and the rows of the table that
            were born or changed since the parent, or went.
        precision: ``fp32``, ``fp16`` or ``int8``: how the payload holds the rows' weights.
        positions: Topic → partition (decimal digits) → next record to read, at the moment of the cut.
        metrics: What the trainer measured: plain JSON values (NaN becomes null).
        feedback_arrivals: The feedback trained since the parent, as :mod:`feature_store.feedback_times` has it:
            (arrival at the log in Unix milliseconds, number of events, milliseconds to joined, from there to batched,
            from there to trained). The scorer computes freshness from it.
        carried_from: Hashes of the schemas from which the lineage's weights were carried over to this one, the last one
            first. What serves a version of one of them takes this one over, with its schema, which is in the payload.
        held: Why the trainer did not put it into service; None: it did. An operator who promotes the version later does
            not change it.
        parts: Of what several ranks wrote: the part of each, in the order of the ranks; their chunks follow each other.
            Empty, and not in the JSON: one process wrote the payload.
        chunks_in: Where the chunks are: ``redis``, which is not in the JSON, or ``objects``, the object store that is
            configured.
        signature: As :mod:`feature_store.signing` has it, of the JSON with null in its place; None: unsigned. It is the
            last field, so that what was signed can be told from the text.
    """

    lineage: Lineage
    version: Count
    parent: Count | None
    schema_hash: Text
    step: Count
    created_ms: Milliseconds
    published_ms: Milliseconds
    total_bytes: Count
    chunks: Annotated[tuple[Chunk, ...], Meta(min_length=1, max_length=MAX_CHUNKS)]
    upload: Text
    event_time_ms: Milliseconds | None
    kind: Literal["full", "delta"]
    precision: Literal["fp32", "fp16", "int8"]
    positions: Annotated[dict[str, Partitions], Meta(max_length=64)]
    metrics: dict[str, Any]
    feedback_arrivals: Annotated[
        tuple[tuple[Milliseconds, Count, Milliseconds, Milliseconds, Milliseconds], ...], Meta(max_length=16_384)
    ]
    carried_from: Annotated[tuple[Text, ...], Meta(max_length=MAX_CARRIED_FROM)]
    held: Annotated[str, Meta(min_length=1, max_length=MAX_REASON)] | None
    parts: Annotated[tuple[Part, ...], Meta(max_length=MAX_PARTS)] = ()
    chunks_in: Literal["redis", "objects"] = "redis"
    signature: Annotated[str, Meta(max_length=MAX_SIGNATURE_BYTES)] | None

    def to_json(self) -> bytes:
        """Compact JSON from which :meth:`from_json` builds an equal manifest (NaN metrics come back as None)."""
        # Not msgspec's encoder: it writes floats and non-ASCII text in another way.
        plain = _plain(self)
        for field, default in _LEFT_OUT:
            if getattr(self, field) == default:
                del plain[field]
        return json.dumps(plain, separators=(",", ":"), allow_nan=False).encode()

    @property
    def part_bytes(self) -> tuple[int, ...]:
        """Bytes of each part; of one process' payload, of all of it."""
        sizes = iter(self.chunks)
        return tuple(sum(chunk.bytes for chunk in islice(sizes, part.chunks)) for part in self.parts) or (
            self.total_bytes,
        )

    def signed(self, signer: Signer, kind: Literal["manifest", "base"]) -> "Manifest":
        """The same, signed by the first key; unsigned if there is none."""
        unsigned = msgspec.structs.replace(self, signature=None)
        return msgspec.structs.replace(unsigned, signature=signer.sign(kind, unsigned.to_json()))

    def verify(self, signer: Signer, kind: Literal["manifest", "base"], text: bytes) -> None:
        """Check the signature of the text from which this manifest was read.

        Raises:
            SnapshotForged: As :meth:`feature_store.signing.Signer.verify`.
        """
        end = b'"signature":%s}'
        begin = text.removesuffix(end % json.dumps(self.signature).encode())
        signer.verify(kind, begin + end % b"null", None if len(begin) == len(text) else self.signature)

    @classmethod
    def from_json(cls, text: bytes | str) -> "Manifest":
        """Read a manifest strictly: every field is present, of its type and within bounds; there is no other field.

        Raises:
            SnapshotError: The message names the field and what was expected.
        """
        if len(text) > MAX_MANIFEST_BYTES:
            raise SnapshotError(f"snapshot manifest: {len(text)} bytes, expected at most {MAX_MANIFEST_BYTES}")
        try:
            manifest = _DECODER.decode(text)
        except msgspec.ValidationError as error:
            raise SnapshotError(f"snapshot manifest: {_by_field(str(error))}") from error
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise SnapshotError(f"snapshot manifest: expected JSON: {error}") from error
        except RecursionError as error:
            raise SnapshotError(f"snapshot manifest: expected values nested at most {_MAX_DEPTH} deep") from error
        total_bytes = sum(chunk.bytes for chunk in manifest.chunks)
        if manifest.total_bytes != total_bytes:
            raise SnapshotError(
                f"snapshot manifest: total_bytes: expected the sum of the chunks, {total_bytes}, "
                f"got {manifest.total_bytes}"
            )
        name = member(manifest.lineage, manifest.version)
        if not manifest.upload.startswith(f"{name}:"):
            # Removing the snapshot would remove another one's chunks.
            raise SnapshotError(f"snapshot manifest: upload: expected one of {name}, got {manifest.upload!r}")
        if wrong := _wrong_parts(manifest):
            raise SnapshotError(f"snapshot manifest: parts: {wrong}")
        if manifest.chunks_in == "objects" and ("/" in manifest.upload or not _UPLOAD.fullmatch(manifest.upload)):
            raise SnapshotError(f"snapshot manifest: upload: {manifest.upload!r}, expected {name}:8 hexadecimal digits")
        if manifest.kind == "delta" and (manifest.parent is None or manifest.parent >= manifest.version):
            raise SnapshotError(
                f"snapshot manifest: parent: {manifest.parent}, expected a version before {manifest.version}, to which "
                f"the delta applies"
            )
        if wrong := _wrong_in(manifest.metrics):
            raise SnapshotError(f"snapshot manifest: metrics: {wrong}")
        return manifest


_DECODER = msgspec.json.Decoder(Manifest)
_DECODER_OF_METRICS = msgspec.json.Decoder(dict[str, Any])
_LEFT_OUT = (("parts", ()), ("chunks_in", "redis"))  # of what is written as before there were such snapshots
_UPLOAD = re.compile(r"([A-Za-z0-9._-]{1,128}):([0-9]{1,16}):([0-9a-f]{8})(?:/([0-9]{1,4}))?")  # or a part of one
_NAME = re.compile(rb"([A-Za-z0-9._-]{1,128}):(0|[1-9][0-9]{0,15})")
_logger = logging.getLogger(__name__)


def storable_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics as a manifest keeps them; none if they are no JSON, nested too deep or too large."""
    why = _wrong_in(metrics)
    try:
        text = json.dumps(_plain(dict(metrics)), allow_nan=False) if why is None else ""
        if why is None and len(text) > MAX_METRICS_BYTES:
            why = f"{len(text)} bytes, expected at most {MAX_METRICS_BYTES}"
        if why is None:
            return _DECODER_OF_METRICS.decode(text)
    except (TypeError, ValueError, RecursionError, msgspec.MsgspecError) as error:
        why = f"expected JSON: {error}"
    _logger.warning("a snapshot is published without its metrics: metrics: %s", why)
    return {}


def storable_arrivals(rows: Sequence[FeedbackRow]) -> tuple[FeedbackRow, ...]:
    """The arrivals that a manifest can hold: freshness leaves times out that are none."""
    return tuple(
        row
        for row in rows
        if 0 <= row[0] <= LATEST_MS and all(0 <= n <= LARGEST_INTEGER for n in row) and sum(row[2:]) <= LATEST_MS
    )


def _wrong_in(metrics: object) -> str | None:
    """What a reader of these metrics could not hold: values nested too deep, integers too large."""
    level, depth = [metrics], 0
    while level:
        if any(isinstance(v, int) and abs(v) > _LARGEST_METRIC for v in level):
            return "expected integers of 64 bits"
        inner = [v for v in level if isinstance(v, Mapping | list | tuple)]
        if depth == _MAX_DEPTH and inner:
            return f"expected values nested at most {_MAX_DEPTH} deep"
        level = [e for v in inner for e in (v.values() if isinstance(v, Mapping) else v)]
        depth += 1
    return None


def _wrong_parts(manifest: Manifest) -> str | None:
    parts, chunks = manifest.parts, len(manifest.chunks)
    if not parts:
        return None
    if len(parts) < 2 or sum(part.chunks for part in parts) != chunks:
        return f"{len(parts)} with {sum(part.chunks for part in parts)} chunks, expected at least 2 with {chunks}"
    for i, (part, size) in enumerate(zip(parts, manifest.part_bytes, strict=True)):
        if 8 * part.rows > size:
            return f"part {i}: {part.rows} rows in {size} bytes, expected a key of 8 bytes each"
    return None


def _by_field(message: str) -> str:
    """msgspec's message with the field first: ``Expected `int`, got `str` - at `$.step``` → ``step: expected …``."""
    what, _, path = message.partition(" - at `")
    what = what[:1].lower() + what[1:]
    field = path.rstrip("`").removeprefix("$").removeprefix(".")
    return f"{field}: {what}" if field else what


def _plain(value: Any) -> Any:
    """The value as JSON has it: undefined figures (an AUC without positives) are null, NumPy scalars are Python's."""
    if isinstance(value, msgspec.Struct):
        value = msgspec.structs.asdict(value)
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value


@dataclass(frozen=True)
class SnapshotKeys:
    """Names of the keys in the module's table. All have one hash tag, so that one server of a cluster has them."""

    namespace: str

    def key(self, name: str) -> str:
        """The key of this name in the table."""
        return f"{key_prefix(self.namespace)}:snapshots:{name}"

    def chunk(self, upload: str, i: int) -> str:
        """The key of chunk i of an upload, or of a part of one."""
        return self.key(f"chunk:{upload}:{i}")

    def chunks(self, manifest: Manifest) -> "ChunkNames":
        """The names of all chunks of a snapshot, in order."""
        parts = [part.chunks for part in manifest.parts] or [len(manifest.chunks)]
        places = [(part_of(manifest.upload, k), i) for k, count in enumerate(parts) for i in range(count)]
        if manifest.chunks_in == "objects":
            return ChunkNames(objects=tuple(object_name(upload, i) for upload, i in places))
        return ChunkNames(keys=tuple(self.chunk(upload, i) for upload, i in places))


@dataclass(frozen=True)
class ChunkNames:
    """Names of chunks.

    Attributes:
        keys: Of those in Redis.
        objects: Of those in the object store, below the namespace's folder.
    """

    keys: tuple[str, ...] = ()
    objects: tuple[str, ...] = ()

    def __add__(self, other: "ChunkNames") -> "ChunkNames":
        return ChunkNames(self.keys + other.keys, self.objects + other.objects)

    def __bool__(self) -> bool:
        return bool(self.keys or self.objects)


def part_of(upload: str, part: int) -> str:
    """The name under which rank ``part`` uploads. That of rank 0 is the upload's."""
    return f"{upload}/{part}" if part else upload


def object_name(upload: str, i: int) -> str:
    """The name of the object that holds chunk i of an upload, or of a part of one: its folder, a slash, part and i.

    The folder's name begins with the version, so no lineage is taken for the name of another folder.

    Raises:
        ValueError: No upload has this name.
    """
    match = _UPLOAD.fullmatch(upload)
    if match is None:
        raise ValueError(f"upload {upload[:100]!r}, expected lineage:version:8 hexadecimal digits, and /part")
    lineage, version, token, part = match.groups("0")
    return f"{version}-{token}-of-{lineage}/{part}-{i}"


def member(lineage: str, version: int) -> str:
    """The name of a snapshot in Redis and in messages."""
    return f"{lineage}:{version}"


def split_member(name: bytes | str) -> tuple[str, int] | None:
    """The inverse of :func:`member`; None for what is no name of a snapshot."""
    match = _NAME.fullmatch(name.encode(errors="replace") if isinstance(name, str) else name)
    if match is None or int(match[2]) > LARGEST_INTEGER:
        return None
    return match[1].decode(), int(match[2])


def stale(lineage: str, version: int, served_version: int) -> SnapshotStale:
    """The error for a version that the lineage's current version has reached already."""
    return SnapshotStale(f"snapshot {member(lineage, version)}: version {served_version} is already published")
