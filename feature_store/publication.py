"""A snapshot's manifest, the keys of the snapshots in Redis, and how a snapshot is written and removed.

The manifest says what a published snapshot is and how to verify its bytes (:mod:`feature_store.payload`).

The keys are :class:`SnapshotKeys`, all under ``{namespace}:snapshots:``

================== ======= ==========================================================================
``current``        string  ``lineage:version`` of the snapshot that serving should load
``manifests``      hash    ``lineage:version`` → manifest JSON; kept longer than the chunks, for freshness
``index``          zset    ``lineage:version`` of every loadable snapshot, in order of publication
``history``        zset    ``lineage:version`` of every manifest kept, in order of publication
``sequence``       integer number of publications so far
``uploads``        hash    upload → lineage, chunks and begin (JSON) of an unfinished upload
``chunk:{u}:{i}``  string  chunk i of upload u; expires unless its upload is committed
``lease``          string  who may publish (:mod:`feature_store.lease`)
``fencing``        string  the last fencing number given out
================== ======= ==========================================================================

The channel ``published`` announces every ``lineage:version``.

A publication writes the ``uploads`` entry, then the chunks, which expire. Then one script makes the chunks permanent,
writes the manifest, moves ``current`` and announces the snapshot. So readers see the snapshot before or all of this
one, whenever the publisher dies.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import redis
from msgspec import Meta

from feature_store.lease import LEASE_FUNCTIONS, Leases
from smes.errors import SnapshotError, SnapshotStale

LARGEST_INTEGER = 2**53 - 1
"""JSON readers and Lua keep integers exactly up to here."""

Count = Annotated[int, Meta(ge=0, le=LARGEST_INTEGER)]
Text = Annotated[str, Meta(min_length=1)]


class Chunk(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One piece of a payload: its length and the SHA-256 of its bytes in lower-case hex."""

    bytes: Count
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a published snapshot is and how to verify it. In JSON, every field is present.

    Attributes:
        lineage: One uninterrupted history of weights.
        version: Number of the step after which the weights were cut, growing within a lineage.
        parent: The version published before it in the lineage, None for the first.
        schema_hash: :attr:`smes.schema.Schema.hash` of the schema it was trained with.
        step: Optimiser steps behind the weights.
        created_ms: Wall time of the cut, Unix milliseconds.
        total_bytes: Length of the payload, the sum of the chunks.
        chunks: The pieces in order.
        upload: Names the upload that wrote these chunks, so that the uploads of two writers never mix.
        event_time_ms: Event time reached, Unix milliseconds; None before the first example.
        kind: ``full``: the payload holds every weight.
        positions: Topic → partition (decimal digits) → next record to read, at the moment of the cut.
        metrics: What the trainer measured: plain JSON values (NaN becomes null).
        feedback_arrivals: (arrival at the log in Unix milliseconds, number of events) of the feedback trained since
            the parent. The scorer computes freshness from it.
    """

    lineage: Text
    version: Count
    parent: Count | None
    schema_hash: Text
    step: Count
    created_ms: Count
    total_bytes: Count
    chunks: Annotated[tuple[Chunk, ...], Meta(min_length=1)]
    upload: Text
    event_time_ms: Count | None
    kind: Literal["full"]
    positions: dict[str, dict[str, Count]]
    metrics: dict[str, Any]
    feedback_arrivals: tuple[tuple[Count, Count], ...]

    def to_json(self) -> bytes:
        """Compact JSON from which :meth:`from_json` builds an equal manifest (NaN metrics come back as None)."""
        # Not msgspec's encoder: it writes floats and non-ASCII text in another way.
        return json.dumps(_plain(self), separators=(",", ":"), allow_nan=False).encode()

    @classmethod
    def from_json(cls, text: bytes | str) -> "Manifest":
        """Read a manifest strictly: every field is present and of its type, and there is no other field.

        Raises:
            SnapshotError: The message names the field and what was expected.
        """
        try:
            manifest = _DECODER.decode(text)
        except msgspec.ValidationError as error:
            raise SnapshotError(f"snapshot manifest: {_by_field(str(error))}") from error
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise SnapshotError(f"snapshot manifest: expected JSON: {error}") from error
        total_bytes = sum(chunk.bytes for chunk in manifest.chunks)
        if manifest.total_bytes != total_bytes:
            raise SnapshotError(
                f"snapshot manifest: total_bytes: expected the sum of the chunks, {total_bytes}, "
                f"got {manifest.total_bytes}"
            )
        return manifest


_DECODER = msgspec.json.Decoder(Manifest)


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


# Commits an upload in one atomic step.
#
# KEYS: current, manifests, index, history, sequence, uploads, lease, fencing.
# ARGV: lineage, version, manifest JSON, upload, number of chunks, prefix of the chunk keys, channel, fencing number.
# Returns
#   'ok'         committed, now or by an earlier call whose answer the client lost;
#   'fenced …'   another publisher holds or held the lease (as taken() has it), nothing was changed;
#   'stale V'    the lineage's current version V is this one or a later one, nothing was changed;
#   'lost I'     chunk I (or, with I = 0, the whole upload) is gone, nothing was announced.
_COMMIT = f"""{LEASE_FUNCTIONS}
local current, manifests, index, history, sequence, uploads, lease, fencing = unpack(KEYS)
local lineage, version, manifest, upload, chunks, prefix, channel, number = unpack(ARGV)
local member = lineage .. ':' .. version
local other = taken(lease, fencing, number)
if other then return 'fenced ' .. other end
if redis.call('HEXISTS', uploads, upload) == 0 then
    if redis.call('HGET', manifests, member) == manifest then return 'ok' end
    return 'lost 0'
end
local pointer = redis.call('GET', current)
if pointer then
    local served_lineage, served_version = string.match(pointer, '^(.*):(%d+)$')
    if served_lineage == lineage and tonumber(served_version) >= tonumber(version) then
        return 'stale ' .. served_version
    end
end
for i = 0, tonumber(chunks) - 1 do
    if redis.call('PERSIST', prefix .. upload .. ':' .. i) == 0 then return 'lost ' .. i end
end
local order = redis.call('INCR', sequence)
redis.call('HSET', manifests, member, manifest)
redis.call('ZADD', index, order, member)
redis.call('ZADD', history, order, member)
redis.call('HDEL', uploads, upload)
redis.call('SET', current, member)
redis.call('PUBLISH', channel, member)
return 'ok'
"""

# Removes the chunks of an upload that is still registered as unfinished. A committed upload keeps its chunks, even if
# the publisher lost the answer to its commit and takes it for failed.
#
# KEYS: uploads. ARGV: upload, number of chunks, prefix of the chunk keys.
_REMOVE_UPLOAD = """
if redis.call('HDEL', KEYS[1], ARGV[1]) == 1 then
    for i = 0, tonumber(ARGV[2]) - 1 do redis.call('UNLINK', ARGV[3] .. ARGV[1] .. ':' .. i) end
end
"""


@dataclass(frozen=True)
class SnapshotKeys:
    """Names of the keys in the module's table."""

    namespace: str

    def key(self, name: str) -> str:
        """The key of this name in the table."""
        return f"{self.namespace}:snapshots:{name}"

    def chunk(self, upload: str, i: int) -> str:
        """The key of chunk i of an upload."""
        return self.key(f"chunk:{upload}:{i}")

    def chunks(self, manifest: Manifest) -> list[str]:
        """The keys of all chunks of a snapshot, in order."""
        return [self.chunk(manifest.upload, i) for i in range(len(manifest.chunks))]


def member(lineage: str, version: int) -> str:
    """The name of a snapshot in Redis and in messages."""
    return f"{lineage}:{version}"


def split_member(name: str) -> tuple[str, int]:
    """The inverse of :func:`member`."""
    lineage, _, version = name.rpartition(":")
    return lineage, int(version)


def stale(lineage: str, version: int, served_version: int) -> SnapshotStale:
    """The error for a version that the lineage's current version has reached already."""
    return SnapshotStale(f"snapshot {member(lineage, version)}: version {served_version} is already published")


class Publication:
    """Writes and removes snapshots. Redis' errors pass through untranslated.

    Args:
        client: A client that returns bytes.
        keys: Names of the keys.
        upload_ttl_s: When the chunks of an unfinished upload expire.
        outage_timeout_s: How long an operation on the lease is tried while the server is away.
    """

    def __init__(
        self, client: redis.Redis, keys: SnapshotKeys, upload_ttl_s: int, outage_timeout_s: float = 2.0
    ) -> None:
        self._client = client
        self._keys = keys
        self._upload_ttl_s = upload_ttl_s
        self.leases = Leases(client, keys.key(""), outage_timeout_s)
        self._commit_script = client.register_script(_COMMIT)
        self._remove_script = client.register_script(_REMOVE_UPLOAD)

    def upload(self, manifest: Manifest, payload: bytes) -> None:
        """Write the chunks; readers do not see them yet."""
        begun = {"lineage": manifest.lineage, "chunks": len(manifest.chunks), "begun_s": self._server_s()}
        self._client.hset(self._keys.key("uploads"), manifest.upload, json.dumps(begun))
        view, start = memoryview(payload), 0
        for key, chunk in zip(self._keys.chunks(manifest), manifest.chunks, strict=True):
            self._client.set(key, view[start : start + chunk.bytes], ex=self._upload_ttl_s)
            start += chunk.bytes

    def commit(self, manifest: Manifest, fencing: int | None = None) -> None:
        """Make an upload the current snapshot, atomically.

        Args:
            manifest: What was uploaded.
            fencing: The number of the publisher's lease; None is allowed while nobody holds one.

        Raises:
            LeaseHeld, LeaseLost: As :meth:`feature_store.lease.Leases.check`.
            SnapshotStale: The lineage's current version is this one or a later one.
            SnapshotError: A chunk is gone.
        """
        cut: list[str | int | bytes] = [manifest.lineage, manifest.version, manifest.to_json(), manifest.upload]
        names = ("current", "manifests", "index", "history", "sequence", "uploads", "lease", "fencing")
        number = "" if fencing is None else str(fencing)
        answer = self._commit_script(
            keys=[self._keys.key(name) for name in names],
            args=[*cut, len(manifest.chunks), self._keys.key("chunk:"), self._keys.key("published"), number],
        )
        outcome, _, detail = answer.decode(errors="replace").partition(" ")
        if outcome == "fenced":
            raise self.leases.refused(fencing, detail)
        if outcome == "stale":
            raise stale(manifest.lineage, manifest.version, int(detail))
        if outcome != "ok":
            raise SnapshotError(
                f"snapshot {member(manifest.lineage, manifest.version)}: chunk {detail} of {len(manifest.chunks)} was "
                f"gone before the publication was complete: another publisher of the lineage is running, Redis "
                f"restarted empty, or the upload took longer than {self._upload_ttl_s} s"
            )

    def abandon(self, manifest: Manifest) -> None:
        """Remove the chunks of a failed publication. If Redis does not answer, they expire."""
        try:
            self._remove(manifest.upload, len(manifest.chunks))
        except redis.RedisError:
            return

    def remove_abandoned(self, lineage: str) -> None:
        """Remove unfinished uploads: all of this lineage, which has no other publisher, and overdue ones of others."""
        now_s = self._server_s()
        for upload, text in self._client.hgetall(self._keys.key("uploads")).items():
            begun = json.loads(text)
            if begun["lineage"] == lineage or now_s - begun["begun_s"] > self._upload_ttl_s:
                self._remove(upload, begun["chunks"])

    def trim(self, removable: Sequence[Manifest], surplus_bytes: int) -> None:
        """Remove payloads, in the order given, until ``surplus_bytes`` are freed."""
        for manifest in removable:
            if surplus_bytes <= 0:
                return
            with self._client.pipeline(transaction=True) as pipeline:
                pipeline.zrem(self._keys.key("index"), member(manifest.lineage, manifest.version))
                pipeline.unlink(*self._keys.chunks(manifest))
                pipeline.execute()
            surplus_bytes -= manifest.total_bytes

    def trim_history(self, max_manifests: int) -> None:
        """Remove the oldest manifests until one more fits into ``max_manifests``. Loadable snapshots keep theirs."""
        loadable = set(self._client.zrange(self._keys.key("index"), 0, -1))
        surplus = self._client.zrange(self._keys.key("history"), 0, -max_manifests)
        gone = [name for name in surplus if isinstance(name, bytes) and name not in loadable]
        if gone:
            with self._client.pipeline(transaction=True) as pipeline:
                pipeline.zrem(self._keys.key("history"), *gone)
                pipeline.hdel(self._keys.key("manifests"), *gone)
                pipeline.execute()

    def _remove(self, upload: bytes | str, chunks: int) -> None:
        self._remove_script(keys=[self._keys.key("uploads")], args=[upload, chunks, self._keys.key("chunk:")])

    def _server_s(self) -> int:
        seconds, _ = self._client.time()
        return int(seconds)
