"""Model snapshots in Redis, as the trainer publishes them and the scorer loads them.

:class:`SnapshotWatcher` notices a new one by notification, and by polling in case a notification is lost.

:mod:`feature_store.publication` has the keys and the atomic steps that write and remove a snapshot.
"""

import hashlib
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import redis

from feature_store.config import SnapshotStoreConfig
from feature_store.damage import Damage, shown
from feature_store.lease import Lease
from feature_store.manifest import (
    LARGEST_INTEGER,
    LATEST_MS,
    MAX_CHUNKS,
    Chunk,
    Manifest,
    SnapshotKeys,
    member,
    split_member,
    stale,
    storable_metrics,
)
from feature_store.publication import Publication
from feature_store.reading import SnapshotReader, is_wrong_type
from feature_store.watcher import SnapshotWatcher
from smes.errors import FeatureStoreUnavailable, SnapshotError, SnapshotNotFound
from smes_io.redis_client import not_now, translated

__all__ = ["SnapshotStore", "SnapshotWatcher"]

_MAX_SEARCHES = 3  # for the chunks of broken snapshots, before one publication
_logger = logging.getLogger(__name__)


class SnapshotStore:
    """Publishes snapshots and reads them back. One publisher per lineage, any number of readers.

    Args:
        client: A client that returns bytes (see :func:`smes_io.redis_client.connect`).
        namespace: Prefix of every key.
        config: Sizes and retention.
        outage_timeout_s: How long a publication and the lease are tried while the server is away or is a replica.
    """

    def __init__(
        self,
        client: redis.Redis,
        namespace: str = "smes",
        config: SnapshotStoreConfig | None = None,
        *,
        outage_timeout_s: float = 2.0,
    ) -> None:
        self._client = client
        self._config = config or SnapshotStoreConfig()
        self._keys = SnapshotKeys(namespace)
        self.damage = Damage()
        """What was found broken in the store."""
        self._reader = SnapshotReader(client, self._keys, self.damage)
        self._publication = Publication(client, self._keys, self._config.upload_ttl_s, outage_timeout_s, self.damage)

    def publish(
        self,
        payload: bytes,
        *,
        lineage: str,
        version: int,
        schema_hash: str,
        step: int,
        created_ms: int,
        event_time_ms: int | None = None,
        positions: Mapping[str, Mapping[str, int]] | None = None,
        metrics: Mapping[str, Any] | None = None,
        feedback_arrivals: tuple[tuple[int, int], ...] = (),
        fencing: int | None = None,
    ) -> Manifest:
        """Store a payload and make it the current snapshot; readers see all of it or nothing.

        Args:
            payload: Bytes of :func:`feature_store.payload.encode`.
            lineage, version, schema_hash, step, created_ms, event_time_ms, positions, metrics, feedback_arrivals:
                As in :class:`feature_store.publication.Manifest`. The lineage's current version becomes its ``parent``.
            fencing: :attr:`feature_store.lease.Lease.number` of the publisher's lease; None is allowed while nobody
                holds one.

        Raises:
            ValueError: The payload is empty, or lineage or version have the wrong form.
            LeaseHeld: No fencing number was given, and somebody holds the lease; nothing was changed.
            LeaseLost: Another publisher took the lease over; nothing was changed.
            SnapshotStale: The lineage's current version is this one or a later one; nothing was changed.
            SnapshotError: Another publisher of the lineage removed this upload.
            FeatureStoreError: Redis refused, for instance because its memory is full.
            FeatureStoreUnavailable: Redis gave no answer in time.
        """
        _check_cut(payload, lineage, version)
        self._publication.leases.check(fencing)
        with translated(self._client, f"snapshot {member(lineage, version)} was published"):
            self._bookkeeping("the keys were mended", self._publication.mend)
            manifest = Manifest(
                lineage=lineage,
                version=version,
                parent=self._parent(lineage, version),
                schema_hash=schema_hash,
                step=step,
                created_ms=min(max(created_ms, 0), LATEST_MS),
                total_bytes=len(payload),
                chunks=_chunks_of(payload, self._config.chunk_bytes),
                upload=f"{member(lineage, version)}:{secrets.token_hex(4)}",
                event_time_ms=event_time_ms if event_time_ms is None or 0 <= event_time_ms <= LATEST_MS else None,
                kind="full",
                positions={topic: dict(partitions) for topic, partitions in (positions or {}).items()},
                metrics=storable_metrics(metrics or {}),
                feedback_arrivals=_storable_arrivals(feedback_arrivals),
            )
            self._write(manifest, payload, fencing)
        return manifest

    def acquire(self, holder: str, ttl_s: float) -> Lease:
        """Take the right to publish in this namespace. While it runs, nobody else can publish.

        Args:
            holder: Names the holder to others, for instance host and process; 1 … 200 characters.
            ttl_s: The lease ends so long after it was last renewed, at most an hour.

        Raises:
            ValueError: An argument is out of range.
            LeaseHeld: Somebody else holds it; the message says who, since when and until when.
            FeatureStoreUnavailable: Redis gave no answer in time.
        """
        return self._publication.leases.acquire(holder, ttl_s)

    @property
    def pointer_problem(self) -> str | None:
        """What was wrong with the pointer to the current snapshot when it was last read, None when nothing was."""
        return self._reader.pointer_problem

    def pointer(self) -> str | None:
        """``lineage:version`` of the current snapshot, None before the first or if it is broken. One small read."""
        with translated(self._client, "the current snapshot was looked up"):
            return self._reader.pointer()

    def current(self) -> Manifest | None:
        """Manifest of the current snapshot, None before the first.

        If the pointer or the manifest that it names is broken, it is the newest that can be read, and
        :attr:`pointer_problem` says what is broken. The next publication mends it.

        Raises:
            SnapshotNotFound: There is a pointer, but no manifest.
            SnapshotError: There is something, but no manifest that can be read.
        """
        with translated(self._client, "the current snapshot was looked up"):
            return self._reader.current()

    def get(self, lineage: str, version: int) -> Manifest:
        """Manifest of one snapshot. Its payload may be removed already.

        Raises:
            SnapshotNotFound: There is no such manifest.
            SnapshotError: It is broken.
        """
        name = member(lineage, version)
        with translated(self._client, f"the manifest of snapshot {name} was read"):
            return self._reader.manifest(name)

    def list(self) -> tuple[Manifest, ...]:
        """Manifests of the snapshots that can be loaded, in order of publication. Broken ones are left out."""
        with translated(self._client, "snapshots were listed"):
            return self._reader.manifests(self._reader.names("index"))

    def manifests_between(self, lineage: str, after_version: int, up_to: int) -> tuple[Manifest, ...]:
        """Manifests of a lineage with ``after_version < version <= up_to``, ascending.

        Manifests older than ``max_manifests`` publications are gone, and broken ones are left out. ``parent`` shows
        where one is missing.
        """
        with translated(self._client, f"manifests of {lineage} were read"):
            kept = (split_member(name) for name in self._reader.names("history"))
            versions = sorted(v for name, v in filter(None, kept) if name == lineage and after_version < v <= up_to)
            return self._reader.manifests([member(lineage, version) for version in versions])

    def load(self, manifest: Manifest) -> bytes:
        """The payload of a snapshot, every chunk verified against the manifest.

        Raises:
            SnapshotNotFound: Retention removed it (load the current one instead).
            SnapshotError: A chunk is missing, or has another length or checksum; the message names the chunk.
        """
        name = f"snapshot {member(manifest.lineage, manifest.version)}"
        pieces = []
        for i, (key, chunk) in enumerate(zip(self._keys.chunks(manifest), manifest.chunks, strict=True)):
            which = f"{name}: chunk {i} of {len(manifest.chunks)}"
            with translated(self._client, f"{name} was loaded"):
                piece = self._chunk(key, chunk.bytes, which)
            if not piece:
                raise self._missing(manifest, which)
            if len(piece) != chunk.bytes:
                more = "at least " if len(piece) > chunk.bytes else ""
                raise SnapshotError(f"{which}: {more}{len(piece)} bytes, expected {chunk.bytes}")
            digest = hashlib.sha256(piece).hexdigest()
            if digest != chunk.sha256:
                raise SnapshotError(f"{which}: SHA-256 {digest[:12]}…, expected {chunk.sha256[:12]}…")
            pieces.append(piece)
        return b"".join(pieces)

    def _write(self, manifest: Manifest, payload: bytes, fencing: int | None) -> None:
        Manifest.from_json(manifest.to_json())  # what no reader would accept is not published
        lineage, publication = manifest.lineage, self._publication
        self._bookkeeping("abandoned uploads were removed", lambda: publication.remove_abandoned(lineage))
        self._bookkeeping("room was made", lambda: self._make_room(len(payload)))
        try:
            publication.upload(manifest, payload)
            publication.commit(manifest, fencing)
        except BaseException:
            publication.abandon(manifest)
            raise

    def _parent(self, lineage: str, version: int) -> int | None:
        try:
            served = self._reader.current()
        except SnapshotError:  # noted; this publication mends it
            return None
        if served is None or served.lineage != lineage:
            return None
        if served.version >= version:
            raise stale(lineage, version, served.version)
        return served.version

    def _make_room(self, new_bytes: int) -> None:
        """Remove the oldest snapshots until one more of ``new_bytes`` fits. The current one always stays."""
        pointer = self._reader.raw_pointer()
        listed = self._reader.raw_names("index")
        kept = self._reader.manifests([name.decode() for name in listed if split_member(name) is not None])
        whole = {member(m.lineage, m.version).encode() for m in kept}
        self._forget([name for name in listed if name not in whole and name != pointer])
        oldest = kept[: len(kept) - max(1, self._config.min_retained - 1)]
        removable = [m for m in oldest if member(m.lineage, m.version).encode() != pointer]
        surplus_bytes = sum(m.total_bytes for m in kept) + new_bytes - self._config.retain_bytes
        self._publication.trim(removable, surplus_bytes)
        junk = [name for name in self._reader.raw_names("history") if split_member(name) is None]
        for name in junk[:_MAX_SEARCHES]:
            self.damage.note(f"Redis key {self._keys.key('history')}: {shown(name)}, expected lineage:version")
        self._publication.forget("history", junk)
        self._publication.trim_history(self._config.max_manifests, self._reader.raw_names("index"))

    def _forget(self, broken: Sequence[bytes]) -> None:
        """Remove what is no name, and snapshots whose manifest is gone or broken, which nobody can load."""
        for name in broken[:_MAX_SEARCHES]:
            place = f"Redis key {self._keys.key('index')}: {shown(name)}"
            self.damage.note(f"{place}, expected the name of a snapshot whose manifest can be read")
            if split_member(name) is not None:
                self._publication.remove_chunks_of(name)
        self._publication.forget("index", broken)

    def _bookkeeping(self, doing: str, call: Callable[[], None]) -> None:
        """Do what a publication can go on without. An outage is not that."""
        try:
            call()
        except (redis.ConnectionError, redis.TimeoutError, FeatureStoreUnavailable):
            raise
        except Exception as error:
            if not_now(error):
                raise
            self.damage.note(f"Redis keys {self._keys.key('*')}: {error}, expected no error while {doing}")
            _logger.debug("bookkeeping failed", exc_info=True)

    def _chunk(self, key: str, expected_bytes: int, which: str) -> bytes:
        """A chunk, one byte more of it if it is too long, nothing if it is gone."""
        try:
            piece = self._client.getrange(key, 0, expected_bytes)
        except redis.ResponseError as error:
            if not is_wrong_type(error):
                raise
            raise SnapshotError(f"{which}: another kind of value, expected {expected_bytes} bytes") from error
        assert isinstance(piece, bytes), "the client must return bytes (decode_responses=False)"
        return piece

    def _missing(self, manifest: Manifest, which: str) -> SnapshotError:
        name = member(manifest.lineage, manifest.version)
        with translated(self._client, f"snapshot {name} was loaded"):
            listed = self._client.zscore(self._keys.key("index"), name) is not None
        if not listed:
            return SnapshotNotFound(f"snapshot {name}: retention removed it")
        return SnapshotError(f"{which}: missing, though the snapshot is listed (evicted by a maxmemory-policy?)")


def _check_cut(payload: bytes, lineage: str, version: int) -> None:
    if not payload:
        raise ValueError("snapshot payload: expected at least one byte")
    if split_member(member(lineage, 0)) is None:
        raise ValueError(f"lineage {lineage!r}, expected 1 … 128 letters, digits, dots, underscores or hyphens")
    if not 0 <= version <= LARGEST_INTEGER:
        raise ValueError(f"version {version}, expected 0 … {LARGEST_INTEGER}")


def _chunks_of(payload: bytes, chunk_bytes: int) -> tuple[Chunk, ...]:
    view = memoryview(payload)
    size = max(chunk_bytes, -(-len(view) // MAX_CHUNKS))
    pieces = (view[start : start + size] for start in range(0, len(view), size))
    return tuple(Chunk(len(piece), hashlib.sha256(piece).hexdigest()) for piece in pieces)


def _storable_arrivals(arrivals: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """The arrivals that a manifest can hold: freshness leaves times out that are none."""
    return tuple((ms, count) for ms, count in arrivals if 0 <= ms <= LATEST_MS and 0 <= count <= LARGEST_INTEGER)
