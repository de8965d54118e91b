"""What operators may do with serving: pin a version, go back to one, promote one, follow the trainer again.

With ``dry_run``, an action writes nothing, and its decision says what would be decided now.

Each action writes a decision (:mod:`feature_store.pins`), keeps it in a bounded history and wakes every scorer, in one
atomic step. If something was published or decided since the operator's process looked, it looks again.
"""

from collections.abc import Callable
from dataclasses import dataclass

import redis
from msgspec import structs

from feature_store.commit_scripts import DECIDE
from feature_store.loading import SnapshotLoader
from feature_store.manifest import (
    LARGEST_INTEGER,
    LATEST_MS,
    MAX_REASON,
    ChunkNames,
    Manifest,
    SnapshotKeys,
    member,
    split_member,
)
from feature_store.pins import MAX_DECISIONS, Action, Decision, Pins
from feature_store.pointer import Pointers
from feature_store.reading import SnapshotReader
from feature_store.redis_reads import server_ms
from feature_store.signing import Signer
from smes.errors import SnapshotError, SnapshotNotFound
from smes_io.redis_client import FEATURE_STORE, retry_during_outage, translated

_TRIES = 50  # a trainer may publish several times a second


@dataclass(frozen=True, slots=True)
class _Found:
    """The state that a decision is made from."""

    raw: bytes
    raw_pointer: bytes
    current: str | None
    service: str | None
    orders: dict[str, int]


class Operator:
    """Decides what is served. Every action returns the decision that it wrote, or with ``dry_run`` would write.

    Args:
        client: A client that returns bytes.
        keys: Names of the keys.
        reader: Reads manifests and the pointer.
        loader: Finds what a version needs to be loaded.
        pins: Reads decisions.
        signer: Signs decisions; None: nothing is signed.
        outage_timeout_s: How long a decision is tried while the server is away.
    """

    def __init__(
        self,
        client: redis.Redis,
        keys: SnapshotKeys,
        reader: SnapshotReader,
        loader: SnapshotLoader,
        pins: Pins,
        signer: Signer | None = None,
        outage_timeout_s: float = 2.0,
    ) -> None:
        self._client, self._keys, self._reader, self._loader, self._pins = client, keys, reader, loader, pins
        self._pointers = Pointers(client, keys, signer)
        self._outage_timeout_s = outage_timeout_s
        self._script = client.register_script(DECIDE)

    def pin(
        self,
        version: int,
        lineage: str | None = None,
        *,
        why: str = "",
        by: str,
        dry_run: bool = False,
    ) -> Decision:
        """Keep a version in service, whatever is published, until the next decision.

        Args:
            version: A listed one.
            lineage: Its lineage; default: the lineage in service.
            why: The reason, at most 1,000 characters; what is longer is cut.
            by: Who decides.

        Raises:
            SnapshotNotFound: There is no such version.
            SnapshotError: It is held, or cannot be loaded.
            FeatureStoreUnavailable: Redis gave no answer in time.
        """

        def chosen(found: _Found) -> tuple[str, tuple[int, int] | None]:
            name = _named(found, version, lineage)
            if name not in found.orders and name in self._reader.names("held"):
                raise SnapshotError(f"snapshot {name}: held, expected one that was published; promote it first")
            return name, None

        return self._decide("pin", chosen, why, by, dry_run=dry_run)

    def unpin(self, *, why: str = "", by: str, dry_run: bool = False) -> Decision:
        """Follow what is current again.

        Raises:
            SnapshotNotFound: Nothing is current.
            SnapshotError: Nothing is pinned.
            FeatureStoreUnavailable: Redis gave no answer in time.
        """

        def chosen(found: _Found) -> tuple[str, tuple[int, int] | None]:
            if not self._pins.is_broken():
                decision = self._pins.last
                if decision is None or not decision.pins:
                    raise SnapshotError("nothing is pinned")
            if found.current is None:
                raise SnapshotNotFound("nothing is current, expected a publication before unpin")
            return found.current, None

        return self._decide("unpin", chosen, why, by, dry_run=dry_run)

    def rollback(
        self,
        version: int | None = None,
        lineage: str | None = None,
        *,
        why: str = "",
        by: str,
        dry_run: bool = False,
    ) -> Decision:
        """Put an earlier version into service and keep it there; all that was published after it is rolled back.

        Args:
            version: Default: the one that was published before the one in service, has its schema and was not rolled
                back.
            lineage: Of the version; default: with a version, the lineage in service; else any.
            why, by: As of :meth:`pin`.

        Raises:
            SnapshotNotFound: There is no such version.
            SnapshotError: It was published after the one in service, or cannot be loaded.
            FeatureStoreUnavailable: Redis gave no answer in time.
        """

        def chosen(found: _Found) -> tuple[str, tuple[int, int] | None]:
            if version is None:
                name = self._before(found, lineage)
            else:
                name = _named(found, version, lineage)
                later = found.service is not None and found.orders.get(name, -1) >= found.orders.get(found.service, 0)
                if later and found.service in found.orders:
                    raise SnapshotError(
                        f"snapshot {name}: expected a version that was published before {found.service}, which is in "
                        f"service; pin puts any version into service"
                    )
            order = found.orders.get(name, 0)
            return name, (order, max(found.orders.values(), default=order))

        return self._decide("rollback", chosen, why, by, dry_run=dry_run)

    def promote(
        self,
        version: int | None = None,
        lineage: str | None = None,
        *,
        why: str = "",
        by: str,
        dry_run: bool = False,
    ) -> Decision:
        """Put a version into service until the next publication; what was held is published with that.

        A held version that is later than the current one of its lineage becomes current, so that the trainer's next
        delta can lead on from it. Another version is served until something is published.

        Args:
            version: Default: the newest held one.
            lineage: Of the version; default: with a version, the lineage in service; else any.
            why, by: As of :meth:`pin`.

        Raises:
            SnapshotNotFound: There is no such version, or none is held.
            SnapshotError: It cannot be loaded.
            FeatureStoreUnavailable: Redis gave no answer in time.
        """

        def chosen(found: _Found) -> tuple[str, tuple[int, int] | None]:
            if version is not None:
                return _named(found, version, lineage), None
            held = [name for name in self._reader.names("held") if lineage is None or _lineage(name) == lineage]
            if not held:
                raise SnapshotNotFound("no snapshot is held, expected a version")
            return held[-1], None

        return self._decide("promote", chosen, why, by, dry_run=dry_run)

    def rolls_back(self, decision: Decision) -> tuple[str, ...]:
        """``lineage:version`` of the listed versions that a decision rolls back, in order of publication.

        Raises:
            FeatureStoreUnavailable: Redis gave no answer in time.
        """
        if decision.rolled_back is None:
            return ()
        after, up_to = decision.rolled_back
        with translated(self._client, "snapshots were listed"):
            return tuple(name for name, order in self._reader.orders().items() if after < order <= up_to)

    def _decide(
        self,
        action: Action,
        chosen: Callable[[_Found], tuple[str, tuple[int, int] | None]],
        why: str,
        by: str,
        *,
        dry_run: bool,
    ) -> Decision:
        """Choose, check that the version can be loaded, and write; again if something has changed meanwhile."""
        tried: list[Decision] = []

        def attempt() -> tuple[str, Decision]:
            for decision in tried:  # the answer to one of them may have been lost
                if self._client.hget(self._keys.key("decisions"), str(decision.number)) == self._text(decision):
                    return "ok", decision
            found = self._look()
            name, rolled_back = chosen(found)
            if action != "unpin":  # which follows what is current, as without any decision
                self._check_loadable(self._reader.manifest(name))
            place = split_member(name)
            assert place is not None, "it was built or read as a name"
            decision, moves = self._moved(
                Decision(
                    number=self._next_number(),
                    action=action,
                    lineage=place[0],
                    version=place[1],
                    current=found.current,
                    before=found.service,
                    rolled_back=rolled_back,
                    why=why[:MAX_REASON],
                    by=by[:300] or "unknown",
                    at_ms=min(server_ms(self._client), LATEST_MS),
                ),
                found,
            )
            if dry_run:
                return "ok", decision
            tried.append(decision)
            return self._write(decision, moves, found), decision

        doing = f"what is served was decided ({action})"
        for _ in range(_TRIES):
            outcome, decision = retry_during_outage(self._client, doing, attempt, FEATURE_STORE, self._outage_timeout_s)
            if outcome == "ok":
                if not dry_run:
                    self._pins.last = decision
                return decision
            if outcome == "gone":
                raise SnapshotNotFound(f"snapshot {decision.name}: retention removed it")
        raise SnapshotError(f"{action}: something was published or decided {_TRIES} times meanwhile, try again")

    def _look(self) -> _Found:
        raw, raw_pointer = self._pins.raw(), self._reader.raw_pointer()
        current = self._reader.pointer()
        return _Found(raw, raw_pointer, current, self._pins.in_service(current), self._reader.orders())

    def _moved(self, decision: Decision, found: _Found) -> tuple[Decision, bool]:
        """The decision, and whether what it promotes becomes current."""
        if decision.action != "promote" or decision.name in found.orders:
            return decision, False
        current = split_member(found.current) if found.current is not None else None
        if current is not None and (current[0] != decision.lineage or current[1] >= decision.version):
            return decision, False
        return structs.replace(decision, current=decision.name), True

    def _write(self, decision: Decision, moves: bool, found: _Found) -> str:
        text = self._pointers.to(decision.name)[0] if moves else ""
        names = ("decision", "decisions", "current", "manifests", "index", "history", "held", "sequence")
        keys = [self._keys.key(name) for name in (*names, "decision:broken", "decisions:broken")]
        args: list[str | int | bytes] = [
            found.raw,
            self._text(decision),
            str(decision.number),
            decision.name,
            found.raw_pointer,
            text,
            self._keys.key("published"),
            "held" if decision.action == "promote" else "",
            MAX_DECISIONS,
        ]
        answer: bytes = self._script(keys=keys, args=args)
        return answer.decode()

    def _text(self, decision: Decision) -> bytes:
        return decision.text(self._pointers.signer)

    def _before(self, found: _Found, lineage: str | None) -> str:
        """What a rollback goes back to."""
        if found.service is None or found.service not in found.orders:
            raise SnapshotNotFound(f"{found.service or 'nothing'} is in service and not listed, expected a version")
        schema_hash = self._reader.manifest(found.service).schema_hash
        name = self._pins.before(found.service, found.orders)
        while name is not None:
            if lineage is None or _lineage(name) == lineage:
                try:
                    if self._reader.manifest(name).schema_hash == schema_hash:
                        return name
                except SnapshotError:
                    pass  # a broken one is not gone back to
            name = self._pins.before(name, found.orders)
        raise SnapshotNotFound(
            f"no snapshot{f' of lineage {lineage}' if lineage else ''} is listed from before {found.service}, which is "
            f"in service"
        )

    def _check_loadable(self, manifest: Manifest) -> None:
        chain = self._loader.chain(manifest, None)
        if gone := self._loader.missing(sum((self._keys.chunks(part) for part in chain), ChunkNames())):
            raise SnapshotError(
                f"snapshot {member(manifest.lineage, manifest.version)}: {gone} of its chunks, or of those that it "
                f"leads on from, are missing, expected all"
            )

    def _next_number(self) -> int:
        known = [decision for decision in (self._pins.newest_known(), self._pins.newest()) if decision is not None]
        return min(max(server_ms(self._client), *(d.number + 1 for d in known), 1), LARGEST_INTEGER)


def _named(found: _Found, version: int, lineage: str | None) -> str:
    if lineage is None:
        if found.service is None:
            raise SnapshotNotFound(f"version {version}: nothing is in service, expected a lineage")
        lineage = _lineage(found.service)
    if not 0 <= version <= LARGEST_INTEGER:
        raise ValueError(f"version {version}, expected 0 … {LARGEST_INTEGER}")
    return member(lineage, version)


def _lineage(name: str) -> str:
    return name.rpartition(":")[0]
