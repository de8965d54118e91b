"""Model snapshots in Redis, as the trainer publishes them and the scorer loads them.

:class:`SnapshotWatcher` notices a new one by notification, and by polling in case a notification is lost.

:mod:`feature_store.publication` has the keys and the atomic steps that write and remove a snapshot.
"""

import hashlib
import re
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import redis
from redis.client import PubSub

from feature_store.config import SnapshotStoreConfig
from feature_store.lease import Lease
from feature_store.publication import (
    LARGEST_INTEGER,
    Chunk,
    Manifest,
    Publication,
    SnapshotKeys,
    member,
    split_member,
    stale,
)
from smes.errors import SnapshotError, SnapshotNotFound
from smes_io.redis_client import address, translated

_LINEAGE = re.compile(r"[A-Za-z0-9._-]{1,128}")


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
        self._outage_timeout_s = outage_timeout_s
        self._config = config or SnapshotStoreConfig()
        self._keys = SnapshotKeys(namespace)
        self._publication = Publication(client, self._keys, self._config.upload_ttl_s, outage_timeout_s)

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
        manifest = Manifest(
            lineage=lineage,
            version=version,
            parent=self._parent(lineage, version),
            schema_hash=schema_hash,
            step=step,
            created_ms=created_ms,
            total_bytes=len(payload),
            chunks=_chunks_of(payload, self._config.chunk_bytes),
            upload=f"{member(lineage, version)}:{secrets.token_hex(4)}",
            event_time_ms=event_time_ms,
            kind="full",
            positions={topic: dict(partitions) for topic, partitions in (positions or {}).items()},
            metrics=dict(metrics or {}),
            feedback_arrivals=feedback_arrivals,
        )
        with translated(self._client, f"snapshot {member(lineage, version)} was published"):
            self._publication.remove_abandoned(lineage)
            self._make_room(len(payload))
            try:
                self._publication.upload(manifest, payload)
                self._publication.commit(manifest, fencing)
            except BaseException:
                self._publication.abandon(manifest)
                raise
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

    def pointer(self) -> str | None:
        """``lineage:version`` of the current snapshot, None before the first. One small read."""
        with translated(self._client, "the current snapshot was looked up"):
            pointer = self._client.get(self._keys.key("current"))
        return None if pointer is None else _text(pointer)

    def current(self) -> Manifest | None:
        """Manifest of the current snapshot, None before the first.

        Raises:
            SnapshotNotFound: The pointer names a snapshot whose manifest is gone.
            SnapshotError: The manifest is damaged.
        """
        pointer = self.pointer()
        return None if pointer is None else self._manifest(pointer)

    def get(self, lineage: str, version: int) -> Manifest:
        """Manifest of one snapshot. Its payload may be removed already.

        Raises:
            SnapshotNotFound: There is no such manifest.
        """
        return self._manifest(member(lineage, version))

    def list(self) -> tuple[Manifest, ...]:
        """Manifests of the snapshots that can be loaded, in order of publication."""
        with translated(self._client, "snapshots were listed"):
            return self._manifests([_text(name) for name in self._client.zrange(self._keys.key("index"), 0, -1)])

    def manifests_between(self, lineage: str, after_version: int, up_to: int) -> tuple[Manifest, ...]:
        """Manifests of a lineage with ``after_version < version <= up_to``, ascending.

        Manifests older than ``max_manifests`` publications are gone. ``parent`` shows where one is missing.
        """
        with translated(self._client, f"manifests of {lineage} were read"):
            kept = (split_member(_text(name)) for name in self._client.zrange(self._keys.key("history"), 0, -1))
            versions = sorted(v for name, v in kept if name == lineage and after_version < v <= up_to)
            return self._manifests([member(lineage, version) for version in versions])

    def load(self, manifest: Manifest) -> bytes:
        """The payload of a snapshot, every chunk verified against the manifest.

        Raises:
            SnapshotNotFound: Retention removed it (load the current one instead).
            SnapshotError: A chunk is missing, or has another length or checksum; the message names the chunk.
        """
        name = f"snapshot {member(manifest.lineage, manifest.version)}"
        pieces = []
        for i, (key, chunk) in enumerate(zip(self._keys.chunks(manifest), manifest.chunks, strict=True)):
            with translated(self._client, f"{name} was loaded"):
                piece = self._client.get(key)
            which = f"{name}: chunk {i} of {len(manifest.chunks)}"
            if not isinstance(piece, bytes):
                raise self._missing(manifest, which)
            if len(piece) != chunk.bytes:
                raise SnapshotError(f"{which}: {len(piece)} bytes, expected {chunk.bytes}")
            digest = hashlib.sha256(piece).hexdigest()
            if digest != chunk.sha256:
                raise SnapshotError(f"{which}: SHA-256 {digest[:12]}…, expected {chunk.sha256[:12]}…")
            pieces.append(piece)
        return b"".join(pieces)

    def _parent(self, lineage: str, version: int) -> int | None:
        pointer = self.pointer()
        if pointer is None:
            return None
        served_lineage, served_version = split_member(pointer)
        if served_lineage != lineage:
            return None
        if served_version >= version:
            raise stale(lineage, version, served_version)
        return served_version

    def _make_room(self, new_bytes: int) -> None:
        """Remove the oldest snapshots until one more of ``new_bytes`` fits. The current one always stays."""
        kept = self.list()
        current = self.pointer()
        oldest = kept[: len(kept) - max(1, self._config.min_retained - 1)]
        removable = [m for m in oldest if member(m.lineage, m.version) != current]
        surplus_bytes = sum(m.total_bytes for m in kept) + new_bytes - self._config.retain_bytes
        self._publication.trim(removable, surplus_bytes)
        self._publication.trim_history(self._config.max_manifests)

    def _manifests(self, names: Sequence[str]) -> tuple[Manifest, ...]:
        texts = self._client.hmget(self._keys.key("manifests"), list(names)) if names else []
        return tuple(Manifest.from_json(text) for text in texts if text is not None)

    def _manifest(self, name: str) -> Manifest:
        with translated(self._client, f"the manifest of snapshot {name} was read"):
            text = self._client.hget(self._keys.key("manifests"), name)
        if text is None:
            raise SnapshotNotFound(f"snapshot {name}: not in Redis at {address(self._client)}")
        return Manifest.from_json(text)

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
    if not _LINEAGE.fullmatch(lineage):
        raise ValueError(f"lineage {lineage!r}, expected 1 … 128 letters, digits, dots, underscores or hyphens")
    if not 0 <= version <= LARGEST_INTEGER:
        raise ValueError(f"version {version}, expected 0 … {LARGEST_INTEGER}")


def _chunks_of(payload: bytes, chunk_bytes: int) -> tuple[Chunk, ...]:
    view = memoryview(payload)
    pieces = (view[start : start + chunk_bytes] for start in range(0, len(view), chunk_bytes))
    return tuple(Chunk(len(piece), hashlib.sha256(piece).hexdigest()) for piece in pieces)


def _text(value: object) -> str:
    assert isinstance(value, bytes), "the client must return bytes (decode_responses=False)"
    return value.decode()


class SnapshotWatcher:
    """Notices when the ``current`` pointer moves. For one thread; only :meth:`close` may be called from another.

    Redis may restart or be away at any time. The watcher then subscribes again. It also reads the pointer at least
    every ``poll_s``, so it sees a publication whose notification was lost.

    Args:
        client: A client that returns bytes.
        namespace: As of the :class:`feature_store.snapshots.SnapshotStore`.
        poll_s: Longest time between two reads of the pointer.
    """

    def __init__(self, client: redis.Redis, namespace: str = "smes", poll_s: float = 1.0) -> None:
        if not poll_s > 0:
            raise ValueError(f"poll_s: {poll_s}, expected more than 0")
        self._client = client
        self._keys = SnapshotKeys(namespace)
        self._poll_s = poll_s
        self._seen: bytes | None = None
        self._pubsub: PubSub | None = None
        self._closed = threading.Event()
        self.problem: str | None = None
        """Why Redis did not answer the last time, None when it did."""

    def wait(self, timeout_s: float) -> bool:
        """Wait up to ``timeout_s`` for the pointer to move; whether it moved since this last returned True.

        The first call returns True at once if anything is published.
        """
        deadline_s = time.monotonic() + timeout_s
        while not self._closed.is_set():
            if self._moved():
                return True
            remaining_s = deadline_s - time.monotonic()
            if remaining_s <= 0:
                break
            self._listen(min(remaining_s, self._poll_s))
        if self._closed.is_set():
            self._unsubscribe()
        return False

    def close(self) -> None:
        """Make a running :meth:`wait` return within ``poll_s``; idempotent."""
        self._closed.set()

    def _moved(self) -> bool:
        try:
            # Subscribe before reading the pointer, so that a publication after the read is announced.
            self._subscribe()
            pointer = self._client.get(self._keys.key("current"))
        except redis.RedisError as error:
            self._lost(error)
            return False
        self.problem = None
        assert pointer is None or isinstance(pointer, bytes)
        if pointer is None or pointer == self._seen:
            return False
        self._seen = pointer
        return True

    def _subscribe(self) -> PubSub:
        if self._pubsub is None:
            pubsub: PubSub = self._client.pubsub(ignore_subscribe_messages=True)  # type: ignore[no-untyped-call] # redis has no types here
            pubsub.subscribe(self._keys.key("published"))
            self._pubsub = pubsub
        return self._pubsub

    def _listen(self, timeout_s: float) -> None:
        """Return when a notification arrives, or after ``timeout_s``."""
        deadline_s = time.monotonic() + timeout_s
        while self._pubsub is not None and (remaining_s := deadline_s - time.monotonic()) > 0:
            try:
                if self._pubsub.get_message(timeout=remaining_s) is not None:
                    return
            except redis.RedisError as error:
                self._lost(error)
        # There is time left only if the connection was lost. Waiting spares a server that is away.
        self._closed.wait(max(0.0, deadline_s - time.monotonic()))

    def _lost(self, error: redis.RedisError) -> None:
        self.problem = f"Redis at {address(self._client)} gave no answer: {error}"
        self._unsubscribe()

    def _unsubscribe(self) -> None:
        pubsub, self._pubsub = self._pubsub, None
        if pubsub is not None:
            pubsub.close()
