"""How a snapshot is written to Redis and removed from it.

The keys are :class:`feature_store.manifest.SnapshotKeys`, all under ``{namespace}:snapshots:``; the braces
are part of the key: a hash tag, so that one server of a Redis Cluster has all of them.

================== ======= ==========================================================================
``current``        string  which snapshot serving should load (:mod:`feature_store.pointer`)
``manifests``      hash    ``lineage:version`` → manifest JSON; kept longer than the chunks, for freshness
``bases``          hash    ``lineage:version`` → manifest JSON of the full payload of a version that is a delta
``index``          zset    ``lineage:version`` of every loadable snapshot, in order of publication
``history``        zset    ``lineage:version`` of every manifest kept, in order of publication
``held``           zset    ``lineage:version`` of what was published aside, not to be served, in order of publication
``decision``       string  what an operator decided about serving (:mod:`feature_store.pins`)
``decisions``      hash    number → decision, of the newest ones
``sequence``       integer number of publications so far
``uploads``        hash    upload → lineage, chunks and begin (JSON) of an unfinished upload; ``{upload}/{k}`` →
                           likewise, of what rank k of a training uploads of it, k ≥ 1
``chunk:{u}:{i}``  string  chunk i of upload u; expires unless its upload is committed
``lease``          string  who may publish (:mod:`feature_store.lease`)
``fencing``        string  the last fencing number given out
``fenced``         string  the last try to publish without the lease, and the number of such tries
================== ======= ==========================================================================

The channel ``published`` announces every ``lineage:version`` that is published, or that an operator put into service.

A publication writes the ``uploads`` entry, then the chunks, which expire. Then one script makes the chunks permanent,
writes the manifest, moves ``current`` and announces the snapshot. So readers see the snapshot before or all of this
one, whenever the publisher dies. A delta is committed only while ``current`` names the version that it applies to. A
base is written likewise, but its script neither moves ``current`` nor announces anything: nothing new is served by it.

Several ranks of a training write a version together: each uploads a part, and rank 0 commits all parts in that script.
Chunks may also be objects (:mod:`feature_store.objects`). Those do not expire: the entry in ``uploads`` says whose they
are, and what no entry and no manifest names is swept away.

No script loops over more than a bounded number of keys, so that none keeps Redis from answering others. All keys that a
script touches are given to it as its KEYS. A key of the wrong kind is put aside, as ``{key}:broken``, for a day.
"""

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Annotated, Any, TypeVar, cast

import msgspec
import redis
from msgspec import Meta

from feature_store.commit_scripts import COMMIT, COMMIT_BASE, MEND, REMOVE_CHUNKS
from feature_store.damage import Damage, shown
from feature_store.lease import Leases
from feature_store.manifest import (
    LARGEST_INTEGER,
    MAX_CHUNKS,
    Chunk,
    ChunkNames,
    Manifest,
    SnapshotKeys,
    member,
    object_name,
    part_of,
    split_member,
    stale,
)
from feature_store.objects import Objects
from feature_store.pieces import Payload, in_chunks
from feature_store.pointer import Pointers
from feature_store.redis_reads import server_ms
from feature_store.signing import Signer
from smes.errors import FeatureStoreError, SnapshotError, SnapshotGap, SnapshotNotFound
from smes_io.redis_client import FEATURE_STORE, retry_during_outage

__all__ = ["LARGEST_INTEGER", "Chunk", "Manifest", "Publication", "SnapshotKeys", "member", "split_member", "stale"]

_T = TypeVar("_T")
_SLICE = 200  # keys that one call looks at
_SCAN_S = 1.0
_MAX_PAGES = 50  # of unfinished uploads, looked at before a publication


class _Begun(msgspec.Struct, frozen=True):
    """An unfinished upload."""

    lineage: Annotated[str, Meta(max_length=128)]
    chunks: Annotated[int, Meta(ge=0, le=MAX_CHUNKS)]
    begun_s: Annotated[int, Meta(ge=0, le=LARGEST_INTEGER)]
    objects: bool = False


_BEGUN = msgspec.json.Decoder(_Begun)


class Publication:
    """Writes and removes snapshots.

    Args:
        client: A client that returns bytes.
        keys: Names of the keys.
        upload_ttl_s: When the chunks of an unfinished upload expire.
        outage_timeout_s: How long each operation is tried while the server is away or is a replica.
        damage: Where what is broken is noted.
        signer: Signs what is written; None: nothing is signed.
        objects: Where chunks go; None: to Redis.
    """

    def __init__(
        self,
        client: redis.Redis,
        keys: SnapshotKeys,
        upload_ttl_s: int,
        outage_timeout_s: float = 2.0,
        damage: Damage | None = None,
        signer: Signer | None = None,
        objects: Objects | None = None,
    ) -> None:
        self._client, self._objects = client, objects
        self._keys = keys
        self._upload_ttl_s = upload_ttl_s
        self._outage_timeout_s = outage_timeout_s
        self._damage = damage or Damage()
        self._pointers = Pointers(client, keys, signer)
        self.leases = Leases(client, keys.key(""), outage_timeout_s)
        self._running: set[str] = set()
        self._lock = threading.Lock()  # of the line above
        self._commit_script = client.register_script(COMMIT)
        self._commit_base_script = client.register_script(COMMIT_BASE)
        self._mend_script = client.register_script(MEND)
        self._remove_script = client.register_script(REMOVE_CHUNKS)

    def mend(self) -> None:
        """Put aside what would refuse a publication: keys of the wrong kind, orders beyond all bounds."""
        names = ("sequence", "index", "history", "held", "manifests", "uploads", "bases")
        keys = [self._keys.key(name) for name in names]
        keys += [f"{key}:broken" for key in keys]
        broken = self._tried("the snapshots' keys were checked", lambda: self._mend_script(keys=keys))
        for key in broken:
            self._damage.note(f"Redis key {key.decode(errors='replace')}: mended, expected what publications write")

    def upload(self, name: str, upload: str, payload: Payload, sizes: Sequence[int]) -> tuple[Chunk, ...]:
        """Write the chunks as the payload gives its pieces; readers do not see them yet.

        Args:
            name: ``lineage:version``.
            upload: Names the upload, or a part of one. Until :meth:`commit` or :meth:`abandon`, it is not taken for an
                abandoned one.
            payload: What to write.
            sizes: Of the chunks, as :func:`feature_store.pieces.chunk_sizes` gives them.

        Raises:
            SnapshotError: The upload was removed as an abandoned one: another publisher of the lineage runs.
        """
        self.expect([upload])
        doing = f"snapshot {name} was published"
        begun = {"lineage": name.rpartition(":")[0], "chunks": len(sizes), "begun_s": self._server_s()}
        if self._objects is not None:
            begun["objects"] = True
        entry = (self._keys.key("uploads"), upload, json.dumps(begun))
        self._tried(doing, lambda: self._client.hset(*entry))
        chunks: list[Chunk] = []
        for piece in in_chunks(payload.pieces(), sizes[0]):
            self._write(doing, upload, len(chunks), piece)
            chunks.append(Chunk(len(piece), hashlib.sha256(piece).hexdigest()))
        assert [chunk.bytes for chunk in chunks] == list(sizes), "a payload is as long as it says"
        if self._objects is not None and not self._tried(doing, lambda: self._client.hexists(entry[0], upload)):
            # Whoever removed it may have looked before the last object was there.
            self._objects.remove(object_name(upload, i) for i in range(len(chunks)))
            raise SnapshotError(f"snapshot {name}: its upload was removed: another publisher of the lineage is running")
        return tuple(chunks)

    def expect(self, uploads: Iterable[str]) -> None:
        """Take these uploads, or parts that other ranks upload, for running ones from now on."""
        with self._lock:
            self._running.update(uploads)

    def _write(self, doing: str, upload: str, i: int, piece: memoryview) -> None:
        if self._objects is not None:
            self._objects.write(object_name(upload, i), bytes(piece))
            return
        key = self._keys.chunk(upload, i)
        self._tried(doing, lambda: self._client.set(key, piece, ex=self._upload_ttl_s))

    def commit(self, manifest: Manifest, fencing: int | None = None) -> Manifest:
        """Make an upload the current snapshot, or keep it aside if its manifest says that it is held; atomically.

        Args:
            manifest: What was uploaded.
            fencing: The number of the publisher's lease; None is allowed while nobody holds one.

        Returns:
            The manifest, signed.

        Raises:
            LeaseHeld, LeaseLost: As :meth:`feature_store.lease.Leases.check`.
            SnapshotStale: The lineage's current version is this one or a later one, or this one is listed.
            SnapshotGap: It is a delta, and the current version is not its parent.
            SnapshotError: A chunk is gone.
        """
        names = ["current", "manifests", "index", "history", "held", "sequence", "uploads"]
        names += ["lease", "fencing", "fenced"]
        parent = "" if manifest.kind == "full" else str(manifest.parent)
        name = member(manifest.lineage, manifest.version)
        text, forged = self._tried(f"snapshot {name} was published", lambda: self._pointers.to(name))
        more = (self._keys.key("published"), parent, "" if manifest.held is None else "held", text, forged)
        manifest = manifest.signed(self._pointers.signer, "manifest")
        self._commit(self._commit_script, names, manifest, fencing, more)
        return manifest

    def commit_base(self, manifest: Manifest, fencing: int | None = None) -> Manifest:
        """Make an upload the base of a version that was published as a delta, atomically; its manifest, signed.

        Raises:
            LeaseHeld, LeaseLost: As :meth:`feature_store.lease.Leases.check`.
            SnapshotNotFound: The version is not loadable any more.
            SnapshotError: A chunk is gone.
        """
        names = ("index", "manifests", "bases", "uploads", "lease", "fencing")
        manifest = manifest.signed(self._pointers.signer, "base")
        self._commit(self._commit_base_script, names, manifest, fencing, ())
        return manifest

    def _commit(
        self, script: Any, names: Sequence[str], manifest: Manifest, fencing: int | None, more: Sequence[str | bytes]
    ) -> None:
        name = member(manifest.lineage, manifest.version)
        keys = [*(self._keys.key(key) for key in names), *self._keys.chunks(manifest).keys]
        args: list[str | int | bytes] = [manifest.lineage, manifest.version, manifest.to_json(), manifest.upload]
        parts = [part_of(manifest.upload, part) for part in range(1, len(manifest.parts))]
        args += ["" if fencing is None else str(fencing), *more, *parts]
        answer: bytes = self._tried(f"snapshot {name} was published", lambda: script(keys=keys, args=args))
        outcome, _, detail = answer.decode(errors="replace").partition(" ")
        if outcome == "fenced":
            raise self.leases.refused(fencing, detail)
        if outcome == "stale":
            raise stale(manifest.lineage, manifest.version, int(detail))
        if outcome == "gap":
            parent = member(manifest.lineage, manifest.parent or 0)
            raise SnapshotGap(f"snapshot {name}: {detail[:200]} is current, expected {parent}, to which it applies")
        if outcome == "gone":
            raise SnapshotNotFound(f"snapshot {name}: retention removed it before its base was complete")
        if outcome != "ok":
            raise SnapshotError(
                f"snapshot {name}: chunk {detail} of {len(manifest.chunks)} was "
                f"gone before the publication was complete: another publisher of the lineage is running, Redis "
                f"restarted empty, or the upload took longer than {self._upload_ttl_s} s"
            )
        self._ended([manifest.upload, *parts])

    def abandon(self, upload: str, chunks: int | None = None, parts: int = 1) -> None:
        """Remove the chunks of a failed publication. If the store does not answer, they expire or are swept away.

        Args:
            upload: Its name, or that of a part of one.
            chunks: How many it has at most; None: as many as its entry says.
            parts: Of how many ranks it is: the others remove their own parts.
        """
        try:
            if chunks is None:
                text = self._client.hget(self._keys.key("uploads"), upload)
                begun = self._begun(upload.encode(), cast(bytes, text)) if text is not None else None
                chunks = begun.chunks if begun else 0
            self._remove(upload, chunks, objects=self._objects is not None)
        except (redis.RedisError, FeatureStoreError):
            return
        finally:
            self._ended([upload, *(part_of(upload, part) for part in range(1, parts))])

    def _ended(self, uploads: Iterable[str]) -> None:
        with self._lock:
            self._running.difference_update(uploads)

    def remove_abandoned(self, lineage: str) -> None:
        """Remove unfinished uploads: all of this lineage but those that run here, and overdue ones of others.

        A lineage has no other publisher.
        """
        now_s, cursor = self._server_s(), 0
        with self._lock:
            running = {upload.encode() for upload in self._running}
        for _ in range(_MAX_PAGES):
            cursor, page = self._client.hscan(self._keys.key("uploads"), cursor, count=_SLICE)
            for upload, text in cast("dict[bytes, bytes]", page).items():
                if upload in running:
                    continue
                begun = self._begun(upload, text)
                if begun is None or begun.lineage == lineage or abs(now_s - begun.begun_s) > self._upload_ttl_s:
                    self._remove(upload, begun.chunks if begun else 0, objects=begun is not None and begun.objects)
            if cursor == 0:
                return

    def sweep(self, kept: Callable[[], Iterable[ChunkNames]]) -> None:
        """Remove objects that neither an unfinished upload nor a snapshot has: a removal that broke off left them.

        Args:
            kept: Reads what snapshots have.
        """
        if self._objects is None:
            return
        # In this order: what is uploaded or committed meanwhile is not among the first, or is among one of the others.
        found = self._objects.folders()
        uploads = cast("list[bytes]", self._client.hkeys(self._keys.key("uploads")))
        named = {name.partition("/")[0] for chunks in kept() for name in chunks.objects}
        for upload in uploads:
            with suppress(ValueError):  # junk
                named.add(object_name(upload.decode(errors="replace"), 0).partition("/")[0])
        for folder in sorted(found - named):
            self._objects.remove_folder(folder)

    def remove(self, names: Sequence[str], chunks: ChunkNames) -> None:
        """Remove versions of one chain with their payloads and bases, in one atomic step."""
        self._remove_listed("index", "bases", names, chunks)

    def remove_held(self, names: Sequence[str], chunks: ChunkNames) -> None:
        """Remove versions that were kept aside, with their payloads and manifests, in one atomic step."""
        self._remove_listed("held", "manifests", names, chunks)

    def _remove_listed(self, listed_in: str, described_in: str, names: Sequence[str], chunks: ChunkNames) -> None:
        with self._client.pipeline(transaction=True) as pipeline:
            for some in _slices(names):
                pipeline.zrem(self._keys.key(listed_in), *some)
                pipeline.hdel(self._keys.key(described_in), *some)
            for keys in _slices(chunks.keys):
                pipeline.unlink(*keys)
            pipeline.execute()
        self._remove_objects(chunks.objects)

    def _remove_objects(self, names: Sequence[str]) -> None:
        if names and self._objects is None:
            self._damage.note(
                f"{len(names)} objects of removed snapshots, among them {names[0]}, expected feature_store.chunks.url "
                f"to say where they are; they stay"
            )
        elif self._objects is not None:
            self._objects.remove(names)

    def trim_history(self, max_manifests: int, loadable: Iterable[bytes]) -> None:
        """Remove the oldest manifests until one more fits into ``max_manifests``. Loadable snapshots keep theirs."""
        kept = set(loadable)
        surplus = cast("list[bytes]", self._client.zrange(self._keys.key("history"), 0, -max_manifests))
        for gone in _slices([name for name in surplus if name not in kept]):
            with self._client.pipeline(transaction=True) as pipeline:
                pipeline.zrem(self._keys.key("history"), *gone)
                pipeline.hdel(self._keys.key("manifests"), *gone)
                pipeline.execute()

    def forget(self, key: str, names: Sequence[bytes]) -> None:
        """Remove names from ``index`` or ``history``."""
        for some in _slices(names):
            self._client.zrem(self._keys.key(key), *some)

    def remove_chunks_of(self, name: bytes) -> None:
        """Remove the chunks of a snapshot whose manifest is gone or broken, but for objects, which :meth:`sweep` finds.

        Looks through the names of all keys, for a bounded time.
        """
        pattern = _glob_escaped(self._keys.key("chunk:")) + name.decode() + ":*"
        deadline_s, cursor = time.monotonic() + _SCAN_S, 0
        while time.monotonic() < deadline_s:
            cursor, found = self._client.scan(cursor, match=pattern, count=1000)
            for keys in _slices(found):
                self._client.unlink(*keys)
            if cursor == 0:
                return

    def _begun(self, upload: bytes, text: bytes) -> _Begun | None:
        try:
            return _BEGUN.decode(text)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            place = f"Redis key {self._keys.key('uploads')}, {shown(upload)}"
            self._damage.note(f"{place}: {shown(text)}, expected an unfinished upload: {error}")
            return None

    def _remove(self, upload: bytes | str, chunks: int, *, objects: bool) -> None:
        """Remove an unfinished upload. A committed one is no longer listed, and its chunks do not expire."""
        if not self._client.hdel(self._keys.key("uploads"), upload):
            return
        name = upload if isinstance(upload, str) else upload.decode(errors="replace")
        if objects:
            with suppress(ValueError):  # a name of junk
                self._remove_objects([object_name(name, i) for i in range(chunks)])
            return
        for keys in _slices([self._keys.chunk(name, i) for i in range(chunks)]):
            self._remove_script(keys=keys)

    def _tried(self, doing: str, call: Callable[[], _T]) -> _T:
        return retry_during_outage(self._client, doing, call, FEATURE_STORE, self._outage_timeout_s)

    def _server_s(self) -> int:
        return server_ms(self._client) // 1000


def _glob_escaped(text: str) -> str:
    """The text as a pattern of Redis that matches nothing else."""
    return "".join(f"\\{c}" if c in "\\*?[]^" else c for c in text)


def _slices(values: Sequence[_T]) -> Iterable[Sequence[_T]]:
    return (values[start : start + _SLICE] for start in range(0, len(values), _SLICE))
