"""The steps of a publication around its upload: what it leads on from, room for it, and what may fail beside it."""

import logging
import secrets
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass

import redis

from feature_store.config import SnapshotStoreConfig
from feature_store.damage import Damage
from feature_store.loading import SnapshotLoader
from feature_store.manifest import (
    LARGEST_INTEGER,
    Chunk,
    Manifest,
    Part,
    SnapshotKeys,
    member,
    part_of,
    split_member,
    stale,
)
from feature_store.parts import OtherParts, UploadedPart
from feature_store.pieces import Payload, chunk_sizes
from feature_store.publication import Publication
from feature_store.reading import SnapshotReader
from feature_store.retention import Retention
from smes.errors import FeatureStoreUnavailable, SnapshotError, SnapshotGap
from smes_io.redis_client import not_now

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Upload:
    """What was uploaded.

    Attributes:
        name: Of the upload.
        chunks: Of all parts.
        parts: As a manifest has them; none if one process uploaded it.
    """

    name: str
    chunks: tuple[Chunk, ...]
    parts: tuple[Part, ...] = ()

    @property
    def total_bytes(self) -> int:
        """Of all chunks."""
        return sum(chunk.bytes for chunk in self.chunks)


class PublicationSteps:
    """What a publication does around its upload. Safe to share between threads.

    Args:
        keys: Names of the keys.
        reader: Reads what is current.
        loader: Looks for chunks.
        publication: Uploads and commits.
        retention: Makes room, and knows the chains.
        config: Sizes.
        damage: Where what is broken is noted.
    """

    def __init__(
        self,
        keys: SnapshotKeys,
        reader: SnapshotReader,
        loader: SnapshotLoader,
        publication: Publication,
        retention: Retention,
        config: SnapshotStoreConfig,
        damage: Damage,
    ) -> None:
        self._keys, self._reader, self._loader = keys, reader, loader
        self._publication, self._retention, self._config, self._damage = publication, retention, config, damage
        self._bookkeeper = threading.Lock()  # of the retention

    def parent(self, lineage: str, version: int) -> int | None:
        """The version that the next one of a lineage leads on from; None if another lineage or nothing is current.

        Raises:
            SnapshotStale: The lineage's current version is this one or a later one.
        """
        try:
            served = self._reader.current()
        except SnapshotError:  # noted; this publication mends it
            return None
        if served is None or served.lineage != lineage:
            return None
        if served.version >= version:
            raise stale(lineage, version, served.version)
        return served.version

    def check_delta(self, name: str, lineage: str, parent: int | None, applies_to: Collection[int]) -> None:
        """Check that a delta leads on from what is current, and that this can be loaded by what starts late."""
        if parent is None or parent not in applies_to:
            raise SnapshotGap(
                f"snapshot {name}: {'another lineage' if parent is None else member(lineage, parent)} is current, "
                f"expected version {' or '.join(str(v) for v in sorted(applies_to)[-3:])}, to which it applies"
            )
        with self._bookkeeper:
            chain = self._retention.chain_of(member(lineage, parent))
        if chain is None:
            raise SnapshotGap(f"snapshot {name}: a version before {parent} is not listed, expected every one")
        chunks = sum((version.chunks for version in chain[1:]), chain[0].base_chunks or chain[0].chunks)
        if gone := self._loader.missing(chunks):
            raise SnapshotGap(
                f"snapshot {name}: {gone} chunks of the versions that it leads on from are missing, expected all "
                f"(evicted by a maxmemory-policy?)"
            )

    def drop_held(self, name: str, *, one_more: bool) -> None:
        """Remove held versions that are too many, and this one; see :class:`feature_store.retention.Retention`."""
        with self._bookkeeper:
            self.bookkeeping("held ones were removed", lambda: self._retention.drop_held(name, one_more))

    def forget(self, name: str) -> None:
        """Read a version again before the next publication, because it has got a base."""
        with self._bookkeeper:
            self._retention.forget(name)

    def write(
        self,
        name: str,
        payload: Payload,
        described: Callable[[Upload], Manifest],
        commit: Callable[[Manifest], Manifest],
        *,
        replaces: bool,
        others: OtherParts | None = None,
    ) -> Manifest:
        """Make room, upload and commit.

        Args:
            name: ``lineage:version``.
            payload: What is uploaded.
            described: Makes the manifest of an upload.
            commit: Commits an upload; gives its manifest, signed.
            replaces: Whether the version takes the place of what is current.
            others: The other ranks, which upload parts of it; None: the payload is all.

        Raises:
            SnapshotError: No reader would accept the manifest; or as ``commit``.
        """
        upload = f"{name}:{secrets.token_hex(4)}"
        # What no reader would accept is not even uploaded.
        parts = 1 + (others.count if others else 0)
        sizes = chunk_sizes(payload.total_bytes, self._config.chunk_bytes, parts)
        uploads = [part_of(upload, part) for part in range(parts)]
        Manifest.from_json(described(Upload(upload, tuple(Chunk(size, "0" * 64) for size in sizes))).to_json())
        lineage, publication = name.rpartition(":")[0], self._publication
        with self._bookkeeper:
            self.bookkeeping("abandoned uploads were removed", lambda: publication.remove_abandoned(lineage))
            # Rows are dealt out to the ranks by hash, so that the parts are about as long as each other.
            room = parts * payload.total_bytes
            self.bookkeeping("room was made", lambda: self._retention.make_room(room, replaces=replaces))
        publication.expect(uploads)
        try:
            if others is not None:
                others.begin(upload)
            own = UploadedPart(publication.upload(name, upload, payload, sizes), payload.num_rows)
            all_parts = [own, *(others.wait() if others else ())]
            chunks = tuple(chunk for part in all_parts for chunk in part.chunks)
            made = described(Upload(upload, chunks, tuple(part.part for part in all_parts) if others else ()))
            if others is not None:
                Manifest.from_json(made.to_json())
            manifest = commit(made)
        except BaseException:
            if others is not None:
                others.abandon()
            publication.abandon(upload, len(sizes), parts)
            raise
        return manifest

    def write_part(self, upload: str, payload: Payload, part: int, parts: int) -> UploadedPart:
        """Upload the part of rank ``part``; see :meth:`feature_store.snapshots.SnapshotStore.upload_part`."""
        name, own = upload.rpartition(":")[0], part_of(upload, part)
        sizes = chunk_sizes(payload.total_bytes, self._config.chunk_bytes, parts)
        try:
            return UploadedPart(self._publication.upload(name, own, payload, sizes), payload.num_rows)
        except BaseException:
            self._publication.abandon(own, len(sizes))
            raise

    def bookkeeping(self, doing: str, call: Callable[[], None]) -> None:
        """Do what a publication can go on without. An outage is not that."""
        try:
            call()
        except (redis.ConnectionError, redis.TimeoutError, FeatureStoreUnavailable):
            raise
        except Exception as error:
            if not_now(error):
                raise
            self._damage.note(f"Redis keys {self._keys.key('*')}: {error}, expected no error while {doing}")
            _logger.debug("bookkeeping failed", exc_info=True)


def check_cut(payload: Payload, lineage: str, version: int) -> None:
    """Check what is to be published.

    Raises:
        ValueError: The payload is empty, or lineage or version have the wrong form.
    """
    if not payload.total_bytes:
        raise ValueError("snapshot payload: expected at least one byte")
    if split_member(member(lineage, 0)) is None:
        raise ValueError(f"lineage {lineage!r}, expected 1 … 128 letters, digits, dots, underscores or hyphens")
    if not 0 <= version <= LARGEST_INTEGER:
        raise ValueError(f"version {version}, expected 0 … {LARGEST_INTEGER}")
