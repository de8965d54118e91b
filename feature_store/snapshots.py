"""Model snapshots in Redis, as the trainer publishes them and the scorer loads them.

A version is published as a full payload or as a delta: what changed since the version before it. A version that was
published as a delta may get a base later: a full payload of the same version. :meth:`SnapshotStore.chain` says what to
load for a version.

:class:`SnapshotWatcher` notices a new one by notification, and by polling in case a notification is lost.

:mod:`feature_store.publication` has the keys and the atomic steps that write and remove a snapshot.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

import redis
from msgspec import structs

from feature_store.config import SnapshotStoreConfig
from feature_store.damage import Damage
from feature_store.feedback_times import FeedbackRow
from feature_store.lease import Holder, Lease
from feature_store.loading import SnapshotLoader
from feature_store.manifest import (
    LATEST_MS,
    MAX_CARRIED_FROM,
    MAX_REASON,
    Manifest,
    SnapshotKeys,
    member,
    part_of,
    split_member,
    storable_arrivals,
    storable_metrics,
)
from feature_store.objects import Objects
from feature_store.operator import Operator
from feature_store.parts import OtherParts, UploadedPart
from feature_store.pieces import Payload
from feature_store.pins import Decision, Pins
from feature_store.publication import Publication
from feature_store.publication_steps import PublicationSteps, Upload, check_cut
from feature_store.reading import SnapshotReader
from feature_store.retention import Retention
from feature_store.signing import Signer
from feature_store.watcher import SnapshotWatcher
from smes_io.clock import wall_clock_ms
from smes_io.redis_client import translated

__all__ = ["SnapshotStore", "SnapshotWatcher"]


class SnapshotStore:
    """Publishes snapshots and reads them back. One publisher per lineage, any number of readers.

    One thread may publish versions while another publishes a base.

    Args:
        client: A client that returns bytes (see :func:`smes_io.redis_client.connect`).
        namespace: Prefix of every key.
        config: Sizes and retention.
        signer: Signs what is written, and verifies what is read; None: nothing is signed.
        outage_timeout_s: How long a publication and the lease are tried while the server is away or is a replica.
        objects: Where chunks go, and where those are read that are not in Redis; None: to Redis.
    """

    def __init__(
        self,
        client: redis.Redis,
        namespace: str = "smes",
        config: SnapshotStoreConfig | None = None,
        *,
        signer: Signer | None = None,
        outage_timeout_s: float = 2.0,
        objects: Objects | None = None,
    ) -> None:
        self._client = client
        self.config = config or SnapshotStoreConfig()
        """As given."""
        self._keys = SnapshotKeys(namespace)
        self._signer = signer or Signer(namespace)
        self.damage = Damage()
        """What was found broken in the store."""
        self._reader = SnapshotReader(client, self._keys, self.damage, signer)
        self._loader = SnapshotLoader(client, self._keys, self._reader, objects)
        self._chunks_in: Literal["redis", "objects"] = "redis" if objects is None else "objects"
        self._publication = Publication(
            client, self._keys, self.config.upload_ttl_s, outage_timeout_s, self.damage, signer, objects
        )
        pins = Pins(client, self._keys, self._reader, self.damage, signer)
        retention = Retention(self._keys, self._reader, self._publication, pins, self.config, self.damage)
        self._steps = PublicationSteps(
            self._keys, self._reader, self._loader, self._publication, retention, self.config, self.damage
        )
        self.pins = pins
        """What operators decided about serving."""
        self.operator = Operator(client, self._keys, self._reader, self._loader, pins, signer, outage_timeout_s)
        """Decides what is served."""

    def publish(
        self,
        payload: bytes | Payload,
        *,
        lineage: str,
        version: int,
        schema_hash: str,
        step: int,
        created_ms: int,
        applies_to: Collection[int] | None = None,
        precision: Literal["fp32", "fp16", "int8"] = "fp32",
        event_time_ms: int | None = None,
        positions: Mapping[str, Mapping[str, int]] | None = None,
        metrics: Mapping[str, Any] | None = None,
        feedback_arrivals: Sequence[FeedbackRow] = (),
        now_ms: Callable[[], int] = wall_clock_ms,
        fencing: int | None = None,
        held: str | None = None,
        carried_from: Sequence[str] = (),
        others: OtherParts | None = None,
    ) -> Manifest:
        """Store a payload and make it the current snapshot; readers see all of it or nothing.

        With ``held``, it is kept aside: what is current stays, nobody is told, and later deltas lead on from what is
        current. :meth:`held` lists what is kept so, at most ``max_held`` versions; the oldest go first. The same
        version may be published again, held or not; that replaces the one that was held.

        Args:
            payload: What :func:`feature_store.payload.write_payload` makes.
            applies_to: Versions of the lineage to each of which the payload applies as a delta; None: it is full.
            lineage, version, schema_hash, step, created_ms, precision, event_time_ms, positions, metrics,
            feedback_arrivals, carried_from:
                As in :class:`feature_store.manifest.Manifest`. The lineage's current version becomes its ``parent``.
            now_ms: Wall clock, Unix milliseconds; gives ``published_ms``.
            fencing: :attr:`feature_store.lease.Lease.number` of the publisher's lease; None is allowed while nobody
                holds one.
            held: Why it is not to be served; None: it is. If an operator promotes it, it becomes current. The
                publisher's next delta is then accepted if its ``applies_to`` names this version, too; it may, if the
                delta has all changes since the version that was current before. Otherwise SnapshotGap asks for a full
                payload.
            others: The other ranks of the training, each of which uploads a part; then the payload is that of rank 0.
                None: it is all.

        Raises:
            ValueError: The payload is empty, or lineage or version have the wrong form, or the reason is empty.
            LeaseHeld: No fencing number was given, and somebody holds the lease; nothing was changed.
            LeaseLost: Another publisher took the lease over; nothing was changed.
            SnapshotStale: The lineage's current version is this one or a later one; nothing was changed.
            SnapshotGap: A delta applies to none of what is current, or what it leads on from cannot be loaded any more;
                nothing was changed. Publish a full payload.
            SnapshotError: Another publisher of the lineage removed this upload.
            FeatureStoreError: Redis refused, for instance because its memory is full.
            FeatureStoreUnavailable: Redis, the object store or another rank gave no answer in time.
        """
        payload = Payload.of(payload) if isinstance(payload, bytes) else payload
        check_cut(payload, lineage, version)
        if held == "":
            raise ValueError("held: empty, expected why the snapshot is not to be served")
        name = member(lineage, version)
        self._publication.leases.check(fencing, name)
        with translated(self._client, f"snapshot {name} was published"):
            self._steps.bookkeeping("the keys were mended", self._publication.mend)
            parent = self._steps.parent(lineage, version)
            if applies_to is not None:
                self._steps.check_delta(name, lineage, parent, applies_to)

            def described(upload: Upload) -> Manifest:
                return Manifest(
                    lineage=lineage,
                    version=version,
                    parent=parent,
                    schema_hash=schema_hash,
                    step=step,
                    created_ms=min(max(created_ms, 0), LATEST_MS),
                    published_ms=min(max(now_ms(), 0), LATEST_MS),
                    total_bytes=upload.total_bytes,
                    chunks=upload.chunks,
                    upload=upload.name,
                    event_time_ms=event_time_ms if event_time_ms is None or 0 <= event_time_ms <= LATEST_MS else None,
                    kind="full" if applies_to is None else "delta",
                    precision=precision,
                    positions={topic: dict(partitions) for topic, partitions in (positions or {}).items()},
                    metrics=storable_metrics(metrics or {}),
                    feedback_arrivals=storable_arrivals(feedback_arrivals),
                    carried_from=tuple(carried_from)[:MAX_CARRIED_FROM],
                    held=None if held is None else held[:MAX_REASON],
                    parts=upload.parts,
                    chunks_in=self._chunks_in,
                    signature=None,
                )

            self._steps.drop_held(name, one_more=held is not None)
            return self._steps.write(
                name,
                payload,
                described,
                lambda manifest: self._publication.commit(manifest, fencing),
                replaces=held is None,
                others=others,
            )

    def publish_base(
        self,
        payload: Payload,
        of: Manifest,
        *,
        precision: Literal["fp32", "fp16", "int8"] = "fp32",
        fencing: int | None = None,
        others: OtherParts | None = None,
    ) -> Manifest:
        """Store a full payload of a version that was published as a delta. What is current stays, nobody is told.

        Args:
            payload: What :func:`feature_store.payload.write_payload` makes.
            of: The version's manifest.
            precision: Of the payload's rows.
            fencing, others: As of :meth:`publish`.

        Returns:
            The base's manifest: that of the version, but of kind ``full``, and without metrics and arrivals.

        Raises:
            SnapshotNotFound: The version cannot be loaded any more.
            LeaseHeld, LeaseLost, SnapshotError, FeatureStoreError, FeatureStoreUnavailable: As of :meth:`publish`.
        """
        name = member(of.lineage, of.version)
        self._publication.leases.check(fencing, name)

        def described(upload: Upload) -> Manifest:
            return structs.replace(
                of,
                kind="full",
                precision=precision,
                total_bytes=upload.total_bytes,
                chunks=upload.chunks,
                upload=upload.name,
                parts=upload.parts,
                chunks_in=self._chunks_in,
                metrics={},
                feedback_arrivals=(),
                held=None,
            )

        with translated(self._client, f"the base of snapshot {name} was published"):
            base = self._steps.write(
                name,
                payload,
                described,
                lambda manifest: self._publication.commit_base(manifest, fencing),
                replaces=False,
                others=others,
            )
        self._steps.forget(name)
        return base

    def upload_part(self, upload: str, payload: Payload, part: int, parts: int) -> UploadedPart:
        """Upload a rank's part of a snapshot, which rank 0 will commit. Nobody reads it before.

        Args:
            upload: What :meth:`feature_store.parts.OtherParts.begin` was given on rank 0.
            payload: The rank's part.
            part: The rank, ≥ 1.
            parts: How many ranks there are.

        Raises:
            SnapshotError: The upload was removed meanwhile.
            FeatureStoreError, FeatureStoreUnavailable: As of :meth:`publish`.
        """
        with translated(self._client, f"part {part} of snapshot {upload.rpartition(':')[0]} was uploaded"):
            return self._steps.write_part(upload, payload, part, parts)

    def abandon_part(self, upload: str, part: int) -> None:
        """Remove what :meth:`upload_part` uploaded, unless it was committed. What the store does not remove expires."""
        self._publication.abandon(part_of(upload, part))

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

    def publisher(self) -> Holder | None:
        """Who may publish now, which is the trainer; None: nobody.

        Raises:
            FeatureStoreUnavailable: Redis gave no answer in time.
        """
        return self._publication.leases.holder()

    @property
    def signed(self) -> bool:
        """Whether there are keys, so that what is unsigned is refused."""
        return self._signer.active

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

    def fenced(self) -> tuple[int, str]:
        """How often somebody without the lease tried to publish, and a message that names the last one."""
        with translated(self._client, "refused publications were looked up"):
            return self._reader.fenced()

    def to_serve(self) -> Manifest | None:
        """Manifest of what scorers are to serve: what an operator decided, else :meth:`current`.

        Raises:
            SnapshotForged: The operator's decision is not signed as it should be.
            PinError: It is broken or gone, or names a version that is.
            SnapshotNotFound, SnapshotError: As :meth:`current`.
        """
        with translated(self._client, "the snapshot to serve was looked up"):
            return self.pins.to_serve()

    def fallbacks(self) -> tuple[Manifest, ...]:
        """What may be served in place of :meth:`to_serve`: see :meth:`feature_store.pins.Pins.fallbacks`."""
        with translated(self._client, "snapshots were listed"):
            return self.pins.fallbacks()

    def rolled_back(self) -> set[str]:
        """``lineage:version`` of what was rolled back, and not put into service by a decision since."""
        with translated(self._client, "decisions were read"):
            return self.pins.rolled_back(self._reader.orders())

    def decisions(self) -> tuple[Decision, ...]:
        """The newest decisions about serving, oldest first. Broken ones are left out."""
        with translated(self._client, "decisions were read"):
            return self.pins.history()

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

    def held(self) -> tuple[Manifest, ...]:
        """Manifests of the versions that were published aside, in order of publication. Broken ones are left out."""
        with translated(self._client, "held snapshots were listed"):
            return self._reader.manifests(self._reader.names("held"))

    def manifests_between(self, lineage: str, after_version: int, up_to: int) -> tuple[Manifest, ...]:
        """Manifests of a lineage with ``after_version < version <= up_to``, ascending.

        Manifests older than ``max_manifests`` publications are gone, and broken ones are left out. ``parent`` shows
        where one is missing.
        """
        with translated(self._client, f"manifests of {lineage} were read"):
            kept = (split_member(name) for name in self._reader.names("history"))
            versions = sorted(v for name, v in filter(None, kept) if name == lineage and after_version < v <= up_to)
            return self._reader.manifests([member(lineage, version) for version in versions])

    def chain(self, manifest: Manifest, have: int | None = None) -> tuple[Manifest, ...]:
        """What to load, in order, for a version.

        Args:
            manifest: The version's, as :meth:`current`, :meth:`get` or :meth:`list` gave it.
            have: A version of the same lineage that is loaded already; None: there is none.

        Returns:
            Either deltas that lead from ``have`` to the version, or first a full payload (of the version itself or of
            an earlier one), for which nothing need be loaded, and the deltas after it; whichever has fewer bytes.

        Raises:
            SnapshotNotFound: Retention removed the version.
            SnapshotError: What it leads on from is not listed.
        """
        return self._loader.chain(manifest, have)

    def bases(self, manifests: Sequence[Manifest]) -> dict[tuple[str, int], Manifest]:
        """The bases of these versions, by lineage and version; most versions have none."""
        names = [member(manifest.lineage, manifest.version) for manifest in manifests]
        with translated(self._client, "the bases of snapshots were looked up"):
            return {(base.lineage, base.version): base for base in self._reader.manifests(names, "bases")}

    def pieces(self, manifest: Manifest) -> Iterator[bytes]:
        """The payload of a manifest that :meth:`chain` gave, chunk by chunk, each verified against the manifest.

        Raises:
            SnapshotNotFound: Retention removed it (load the current one instead).
            SnapshotError: A chunk is missing, or has another length or checksum; the message names the chunk.
        """
        return self._loader.pieces(manifest)

    def load(self, manifest: Manifest) -> bytes:
        """The payload as a whole; otherwise as :meth:`pieces`."""
        return b"".join(self.pieces(manifest))
