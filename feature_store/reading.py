"""Reads the snapshots' keys within bounds. What is broken there is noted and stepped over.

Only plain reading commands, so that a scorer can use a replica and needs no right to run scripts.
"""

import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import cast

import redis

from feature_store.damage import Damage, Reason, reason_of, shown
from feature_store.manifest import (
    LARGEST_INTEGER,
    LATEST_MS,
    MAX_MANIFEST_BYTES,
    Manifest,
    SnapshotKeys,
    member,
    split_member,
)
from feature_store.pointer import Pointer, Pointers
from feature_store.redis_reads import beginning, is_wrong_type
from feature_store.signing import Signer
from smes.errors import SnapshotError, SnapshotForged, SnapshotNotFound
from smes_io.redis_client import address

MAX_NAMES = 10_000
_MAX_READ_BYTES = 64 * 1024 * 1024  # manifests read at once
_SLICE = 100
_MAX_FENCED_BYTES = 250
_FENCED = re.compile(r"([0-9]{1,15}):([0-9]{1,15}):([0-9]{0,16}):([A-Za-z0-9._:-]{1,150})")


class SnapshotReader:
    """Reads pointer, names and manifests. Redis' errors pass through, but for keys of the wrong type.

    Args:
        client: A client that returns bytes.
        keys: Names of the keys.
        damage: Where what is broken is noted.
        signer: Verifies what is read; None: nothing is signed.
    """

    def __init__(self, client: redis.Redis, keys: SnapshotKeys, damage: Damage, signer: Signer | None = None) -> None:
        self._client = client
        self._keys = keys
        self._damage = damage
        self._pointers = Pointers(client, keys, signer)
        self._signer = self._pointers.signer
        self._order = 0  # the highest of a pointer
        self.pointer_problem: str | None = None
        """What was wrong with the pointer when it was last read, None when nothing was."""

    def pointer(self) -> str | None:
        """The name that the pointer holds, None if there is no pointer or if it is broken."""
        self.pointer_problem = None
        raw = self.raw_pointer()
        if not raw:
            return None
        try:
            pointer = Pointer.read(raw, self._signer)
        except SnapshotError as error:
            self._pointer_is_broken(str(error), reason_of(error, "pointer"))
            return None
        if self._signer.active and pointer.order < self._order:
            what = f"{pointer.name}, signed before what was read last, expected what was signed after it"
            self._pointer_is_broken(what, "older")
            return None
        self._order = pointer.order
        return pointer.name

    def raw_pointer(self) -> bytes:
        """The beginning of what the pointer holds, empty if there is none. Its own length is not trusted."""
        return self._pointers.raw()

    def fenced(self) -> tuple[int, str]:
        """How often somebody without the lease tried to publish, and a message that names the last one."""
        key = self._keys.key("fenced")
        text = beginning(self._client, key, _MAX_FENCED_BYTES).decode(errors="replace")
        found = _FENCED.fullmatch(text)
        if found is None:
            if text:
                self._damage.note(f"Redis key {key}: {shown(text)}, expected tries:at:number:lineage:version")
            return 0, ""
        at = datetime.fromtimestamp(min(int(found[2]), LATEST_MS) / 1000, UTC).isoformat(timespec="milliseconds")
        who = f"the lease with number {found[3]}" if found[3] else "no lease"
        return int(found[1]), f"{found[4]}, published with {who} at {at}: another publisher has the lease"

    def current(self) -> Manifest | None:
        """The manifest that the pointer names. If that is broken, the newest that can be read; None without any.

        Raises:
            SnapshotNotFound: There is a pointer, but no manifest.
            SnapshotError: There is something, but no manifest that can be read.
        """
        pointer, gone = self.pointer(), False
        if pointer is not None:
            try:
                return self.manifest(pointer)
            except SnapshotError as error:
                gone = isinstance(error, SnapshotNotFound)
                what = f"{pointer}, expected a snapshot with a manifest: {error}"
                self._pointer_is_broken(what, reason_of(error, "pointer" if gone else "manifest"))
        for manifest in self.newest_first(self.names("index")[-_SLICE:]):
            if self.pointer_problem is None:
                if self.raw_pointer():
                    return self.current()  # the first publication came between the two reads
                name = member(manifest.lineage, manifest.version)
                self._pointer_is_broken(f"missing, expected {name}, which was published last")
            return manifest
        if self.pointer_problem is not None:
            raise (SnapshotNotFound if gone else SnapshotError)(self.pointer_problem)
        return None

    def newest_first(self, names: Sequence[str]) -> Iterator[Manifest]:
        """What can be read of these names, which are in order of publication.

        With keys, the names are not trusted: whoever can write to the store can reorder them, and can list what was
        published aside. So the order is that of the signed times, and held versions are left out.
        """
        if not self._signer.active:
            for name in reversed(names):
                yield from self.manifests([name])
            return
        published = [manifest for manifest in self.manifests(names) if manifest.held is None]
        yield from sorted(published, key=lambda manifest: manifest.published_ms, reverse=True)

    def names(self, key: str) -> list[str]:
        """The newest names in ``index`` or ``history``, at most 10,000, in order of publication."""
        kept = []
        for raw in self.raw_names(key):
            if split_member(raw) is None:
                self._damage.note(f"Redis key {self._keys.key(key)}: {shown(raw)}, expected lineage:version")
            else:
                kept.append(raw.decode())
        return kept

    def raw_names(self, key: str) -> list[bytes]:
        """As :meth:`names`, with what is broken among them."""
        name = self._keys.key(key)
        try:
            return cast("list[bytes]", self._client.zrange(name, -MAX_NAMES, -1))
        except redis.ResponseError as error:
            if not is_wrong_type(error):
                raise
            self._damage.note(f"Redis key {name}: another kind of value, expected a sorted set")
            return []

    def orders(self) -> dict[str, int]:
        """The newest names in ``index``, at most 10,000: their place in the order of publications, ascending."""
        key = self._keys.key("index")
        try:
            raw = self._client.zrange(key, -MAX_NAMES, -1, withscores=True)
        except redis.ResponseError as error:
            if not is_wrong_type(error):
                raise
            self._damage.note(f"Redis key {key}: another kind of value, expected a sorted set")
            return {}
        places = cast("list[tuple[bytes, float]]", raw)
        return {
            name.decode(): int(order)
            for name, order in places
            if split_member(name) is not None and 0 <= order <= LARGEST_INTEGER
        }

    def manifests(self, names: Sequence[str], key: str = "manifests") -> tuple[Manifest, ...]:
        """The manifests of these names, in their order, without those that are gone or broken.

        Where they are more than is read at once, the first ones are left out.

        Args:
            names: ``lineage:version`` each, oldest first.
            key: ``manifests``, or ``bases``: those of full payloads of versions that were published as deltas.
        """
        found: list[Manifest] = []
        total_bytes = 0
        for stop in range(len(names), 0, -_SLICE):
            some = names[max(0, stop - _SLICE) : stop]
            sizes = dict(zip(some, self._sizes(some, key), strict=True))
            readable = [name for name in some if 0 < sizes[name] <= MAX_MANIFEST_BYTES]
            for name in some:
                if sizes[name] > MAX_MANIFEST_BYTES:
                    self._damage.note(
                        f"{self._place(name, key)}: {sizes[name]} bytes, expected at most {MAX_MANIFEST_BYTES}",
                        "manifest",
                    )
            total_bytes += sum(sizes[name] for name in readable)
            if total_bytes > _MAX_READ_BYTES:
                self._damage.note(
                    f"Redis key {self._keys.key(key)}: over {_MAX_READ_BYTES} bytes in {len(names)} manifests, "
                    f"expected less; keep fewer (max_manifests)"
                )
                break
            found[:0] = self._read(readable, key)
        return tuple(found)

    def manifest(self, name: str) -> Manifest:
        """The manifest of one name.

        Raises:
            SnapshotNotFound: There is none.
            SnapshotError: It is broken; the message names key and field.
        """
        (size,) = self._sizes([name])
        if size > MAX_MANIFEST_BYTES:
            raise SnapshotError(f"{self._place(name)}: {size} bytes, expected at most {MAX_MANIFEST_BYTES}")
        text = self._client.hget(self._keys.key("manifests"), name) if size else None
        if text is None:
            raise SnapshotNotFound(f"snapshot {name}: not in Redis at {address(self._client)}")
        return self._parsed(name, text)

    def _read(self, names: Sequence[str], key: str) -> Iterator[Manifest]:
        texts = self._client.hmget(self._keys.key(key), list(names)) if names else []
        for name, text in zip(names, texts, strict=True):
            if text is not None:
                try:
                    yield self._parsed(name, text, key)
                except SnapshotError as error:
                    self._damage.note(str(error), reason_of(error, "manifest"))

    def _parsed(self, name: str, text: bytes | str, key: str = "manifests") -> Manifest:
        try:
            manifest = Manifest.from_json(text)
            manifest.verify(self._signer, "base" if key == "bases" else "manifest", _encoded(text))
        except SnapshotError as error:
            kind = SnapshotForged if isinstance(error, SnapshotForged) else SnapshotError
            raise kind(f"{self._place(name, key)}: {error}") from error
        if (found := member(manifest.lineage, manifest.version)) != name:
            raise SnapshotError(f"{self._place(name, key)}: the manifest of {found}, expected that of {name}")
        if key == "bases" and manifest.kind != "full":
            raise SnapshotError(f"{self._place(name, key)}: kind: {manifest.kind}, expected full")
        return manifest

    def _sizes(self, names: Sequence[str], of: str = "manifests") -> list[int]:
        """Bytes of these manifests, 0 where there is none."""
        key = self._keys.key(of)
        pipeline = self._client.pipeline(transaction=False)
        for name in names:
            pipeline.hstrlen(key, name)
        try:
            return [int(size) for size in pipeline.execute()]
        except redis.ResponseError as error:
            if "WRONGTYPE" not in str(error):
                raise
            self._damage.note(f"Redis key {key}: another kind of value, expected a hash")
            return [0] * len(names)

    def _place(self, name: str, key: str = "manifests") -> str:
        return f"Redis key {self._keys.key(key)}, {name}"

    def _pointer_is_broken(self, what: str, reason: Reason = "pointer") -> None:
        self.pointer_problem = self._damage.note(f"Redis key {self._keys.key('current')}: {what}", reason)


def _encoded(text: bytes | str) -> bytes:
    return text.encode() if isinstance(text, str) else text
