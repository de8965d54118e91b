"""Loads payloads: which ones lead to a version, and the verified bytes of each.

Only plain reading commands of Redis, as :mod:`feature_store.reading`.
"""

import hashlib
from collections.abc import Iterator, Mapping

import redis

from feature_store.manifest import ChunkNames, Manifest, SnapshotKeys, member, split_member
from feature_store.objects import Objects
from feature_store.reading import SnapshotReader
from feature_store.redis_reads import is_wrong_type, missing
from smes.errors import SnapshotDamaged, SnapshotError, SnapshotNotFound
from smes_io.redis_client import translated


class SnapshotLoader:
    """Finds and reads payloads.

    Args:
        client: A client that returns bytes.
        keys: Names of the keys.
        reader: Reads manifests.
        objects: Where the chunks are that are not in Redis; None: all are.
    """

    def __init__(
        self, client: redis.Redis, keys: SnapshotKeys, reader: SnapshotReader, objects: Objects | None = None
    ) -> None:
        self._client, self._objects = client, objects
        self._keys = keys
        self._reader = reader

    def chain(self, manifest: Manifest, have: int | None) -> tuple[Manifest, ...]:
        """See :meth:`feature_store.snapshots.SnapshotStore.chain`."""
        if manifest.kind == "full" or manifest.parent == have:
            return (manifest,)
        name = member(manifest.lineage, manifest.version)
        with translated(self._client, f"the way to snapshot {name} was looked up"):
            versions = self._listed(manifest)
            if manifest.version not in versions and name not in self._reader.names("held"):
                raise SnapshotNotFound(f"snapshot {name}: retention removed it")
            names = [member(manifest.lineage, version) for version in versions]
            listed = {found.version: found for found in self._reader.manifests(names)} | {manifest.version: manifest}
            bases = {found.version: found for found in self._reader.manifests(names, "bases")}
        return _shortest(manifest, have, listed, bases)

    def pieces(self, manifest: Manifest) -> Iterator[bytes]:
        """See :meth:`feature_store.snapshots.SnapshotStore.pieces`."""
        name = f"snapshot {member(manifest.lineage, manifest.version)}"
        if manifest.chunks_in == "objects" and self._objects is None:
            raise SnapshotError(f"{name}: its chunks are objects, expected feature_store.chunks.url to say where")
        names = self._keys.chunks(manifest)
        for i, (key, chunk) in enumerate(zip(names.keys or names.objects, manifest.chunks, strict=True)):
            which = f"{name}: chunk {i} of {len(manifest.chunks)}"
            with translated(self._client, f"{name} was loaded"):
                piece = self._chunk(manifest, key, chunk.bytes, which)
                if not piece:
                    raise self._missing(manifest, which)
            if len(piece) != chunk.bytes:
                more = "at least " if len(piece) > chunk.bytes else ""
                raise SnapshotDamaged(f"{which}: {more}{len(piece)} bytes, expected {chunk.bytes}")
            digest = hashlib.sha256(piece).hexdigest()
            if digest != chunk.sha256:
                raise SnapshotDamaged(f"{which}: SHA-256 {digest[:12]}…, expected {chunk.sha256[:12]}…")
            yield piece

    def _listed(self, manifest: Manifest) -> list[int]:
        """The loadable versions of a lineage up to that of the manifest."""
        named = (split_member(name) for name in self._reader.names("index"))
        return [v for lineage, v in filter(None, named) if lineage == manifest.lineage and v <= manifest.version]

    def missing(self, names: ChunkNames) -> int:
        """How many of these chunks are gone."""
        if self._objects is None:
            return missing(self._client, names.keys) + len(names.objects)
        return missing(self._client, names.keys) + self._objects.missing(names.objects)

    def _chunk(self, manifest: Manifest, key: str, expected_bytes: int, which: str) -> bytes:
        """A chunk, one byte more of it if it is too long, nothing if it is gone."""
        if self._objects is not None and manifest.chunks_in == "objects":
            return self._objects.read(key, expected_bytes)
        try:
            piece = self._client.getrange(key, 0, expected_bytes)
        except redis.ResponseError as error:
            if not is_wrong_type(error):
                raise
            raise SnapshotDamaged(f"{which}: another kind of value, expected {expected_bytes} bytes") from error
        assert isinstance(piece, bytes), "the client must return bytes (decode_responses=False)"
        return piece

    def _missing(self, manifest: Manifest, which: str) -> SnapshotError:
        name = member(manifest.lineage, manifest.version)
        listed = any(self._client.zscore(self._keys.key(key), name) is not None for key in ("index", "held"))
        if listed:
            kept = [*self._reader.manifests([name]), *self._reader.manifests([name], "bases")]
            listed = any(found.upload == manifest.upload for found in kept)
        if not listed:
            return SnapshotNotFound(f"snapshot {name}: retention removed it")
        return SnapshotDamaged(f"{which}: missing, though the snapshot is listed (evicted by a maxmemory-policy?)")


def _shortest(
    manifest: Manifest, have: int | None, listed: Mapping[int, Manifest], bases: Mapping[int, Manifest]
) -> tuple[Manifest, ...]:
    """The way with the fewest bytes to this version: from the newest base, or from version ``have``."""
    deltas: list[Manifest] = []
    whole: list[Manifest] | None = None  # the newest base and the deltas after it
    at: Manifest = manifest
    while True:
        if whole is None and (at.kind == "full" or at.version in bases):
            whole = [at if at.kind == "full" else bases[at.version], *reversed(deltas)]
        if at.kind == "full" or (have is None and whole is not None):
            break
        deltas.append(at)
        assert at.parent is not None, "a delta has a parent"
        if at.parent == have and (whole is None or _bytes(deltas) <= _bytes(whole)):
            return tuple(reversed(deltas))
        if at.parent not in listed:
            break
        at = listed[at.parent]
    if whole is None:
        raise SnapshotError(
            f"snapshot {member(manifest.lineage, manifest.version)}: {member(at.lineage, at.parent or 0)} is not "
            f"listed, expected every version back to one with a full payload"
        )
    return tuple(whole)


def _bytes(manifests: list[Manifest]) -> int:
    return sum(manifest.total_bytes for manifest in manifests)
