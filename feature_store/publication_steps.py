"""The steps of a publication around its upload: what it leads on from, room for it, and what may fail beside it."""

import logging
import secrets
import threading
from collections.abc import Callable, Collection

import redis

from feature_store.config import SnapshotStoreConfig
from feature_store.damage import Damage
from feature_store.manifest import LARGEST_INTEGER, Chunk, Manifest, SnapshotKeys, member, split_member, stale
from feature_store.pieces import Payload, chunk_sizes
from feature_store.publication import Publication
from feature_store.reading import SnapshotReader
from feature_store.redis_reads import missing
from feature_store.retention import Retention
from smes.errors import FeatureStoreUnavailable, SnapshotError, SnapshotGap
from smes_io.redis_client import not_now

_logger = logging.getLogger(__name__)


class PublicationSteps:
    """What a publication does around its upload. Safe to share between threads.

    Args:
        client: A client that returns bytes.
        keys: Names of the keys.
        reader: Reads what is current.
        publication: Uploads and commits.
        retention: Makes room, and knows the chains.
        config: Sizes.
        damage: Where what is broken is noted.
    """

    def __init__(
        self,
        client: redis.Redis,
        keys: SnapshotKeys,
        reader: SnapshotReader,
        publication: Publication,
        retention: Retention,
        config: SnapshotStoreConfig,
        damage: Damage,
    ) -> None:
        self._client, self._keys, self._reader = client, keys, reader
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
        keys = [*(chain[0].base_chunks or chain[0].chunks), *(key for version in chain[1:] for key in version.chunks)]
        if gone := missing(self._client, keys):
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
        described: Callable[[str, tuple[Chunk, ...]], Manifest],
        commit: Callable[[Manifest], Manifest],
        *,
        replaces: bool,
    ) -> Manifest:
        """Make room, upload and commit.

        Args:
            name: ``lineage:version``.
            payload: What is uploaded.
            described: Makes the manifest of an upload's name and chunks.
            commit: Commits an upload; gives its manifest, signed.
            replaces: Whether the version takes the place of what is current.

        Raises:
            SnapshotError: No reader would accept the manifest; or as ``commit``.
        """
        upload = f"{name}:{secrets.token_hex(4)}"
        # What no reader would accept is not even uploaded.
        sizes = chunk_sizes(payload.total_bytes, self._config.chunk_bytes)
        Manifest.from_json(described(upload, tuple(Chunk(size, "0" * 64) for size in sizes)).to_json())
        lineage, publication = name.rpartition(":")[0], self._publication
        with self._bookkeeper:
            self.bookkeeping("abandoned uploads were removed", lambda: publication.remove_abandoned(lineage))
            self.bookkeeping("room was made", lambda: self._retention.make_room(payload.total_bytes, replaces=replaces))
        try:
            manifest = commit(described(upload, publication.upload(name, upload, payload, sizes)))
        except BaseException:
            publication.abandon(upload, len(sizes))
            raise
        return manifest

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
