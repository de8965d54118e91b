"""What operators decided about serving: the record that is in force, and those of before.

Scorers serve the current snapshot unless a decision names another one. A decision is a record in Redis:

============== ====== ====================================================================
``decision``   string the decision in force, none before the first
``decisions``  hash   number → decision, of the newest ones
============== ====== ====================================================================

A record is JSON; with keys, a line feed and its signature follow (:mod:`feature_store.signing`). Every decision has a
higher number than the one before: at least the server's time in milliseconds, so that numbers grow even over a server
that came back empty. A reader refuses a record of a lower number than it has read, so that nobody takes a decision back
by writing an older one. It also refuses that a pin is gone: only ``unpin`` ends one.

A pin and a rollback hold until the next decision. What ``promote`` and ``unpin`` put into service stays until the next
publication. :mod:`feature_store.operator` decides.
"""

import json
from collections.abc import Callable, Mapping
from typing import Annotated, Literal, cast

import msgspec
import redis
from msgspec import Meta, structs

from feature_store.damage import Damage, reason_of, shown
from feature_store.manifest import MAX_REASON, Count, Lineage, Manifest, Milliseconds, SnapshotKeys, Text, member
from feature_store.reading import SnapshotReader
from feature_store.redis_reads import beginning
from feature_store.signing import Signer
from smes.errors import PinError, SnapshotError, SnapshotForged, SnapshotNotFound
from smes_io.clock import wall_clock_ms

MAX_DECISIONS = 200
"""Decisions that are kept."""

MAX_DECISION_BYTES = 32 * 1024
_FUTURE_MS = 100_000_000_000
"""Three years: a number so far ahead of the clock is none of ours."""

Action = Literal["pin", "unpin", "rollback", "promote"]
_EFFECTS: dict[Action, str] = {
    "pin": "is pinned",
    "unpin": "is in service, and what is published after it",
    "rollback": "is pinned; what was published after it is rolled back",
    "promote": "is in service, until the next publication",
}


class Decision(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an operator decided.

    Attributes:
        number: Grows from decision to decision.
        action: What was asked for.
        lineage, version: What is to be in service.
        current: ``lineage:version`` of what was current then, None if that was not known.
        before: ``lineage:version`` of what was in service before, likewise.
        rolled_back: Versions whose place in the order of publications is above the first and up to the second of these
            numbers were rolled back; None: the decision is no rollback.
        why: The reason that was given, may be empty.
        by: Who decided.
        at_ms: When, Unix milliseconds.
    """

    number: Count
    action: Action
    lineage: Lineage
    version: Count
    current: Text | None
    before: Text | None
    rolled_back: tuple[Count, Count] | None
    why: Annotated[str, Meta(max_length=MAX_REASON)]
    by: Text
    at_ms: Milliseconds

    @property
    def pins(self) -> bool:
        """Whether it holds until the next decision, whatever is published."""
        return self.action in ("pin", "rollback")

    @property
    def name(self) -> str:
        """``lineage:version`` of what is to be in service."""
        return member(self.lineage, self.version)

    @property
    def effect(self) -> str:
        """What it does, in words."""
        return f"{self.name} {_EFFECTS[self.action]}"

    def holds(self, current: str | None) -> bool:
        """Whether it says what is served while this is current."""
        return self.pins or (current is not None and current == self.current)

    def text(self, signer: Signer) -> bytes:
        """What to write: signed if there are keys."""
        record = json.dumps(structs.asdict(self), separators=(",", ":")).encode()
        signature = signer.sign("pin", record)
        return record if signature is None else record + b"\n" + signature.encode()

    @classmethod
    def read(cls, raw: bytes, signer: Signer) -> "Decision":
        """Read a record.

        Raises:
            SnapshotForged: It is not signed as it should be.
            SnapshotError: It is no decision.
        """
        record, _, signature = raw.partition(b"\n")
        if len(raw) > MAX_DECISION_BYTES:
            raise SnapshotError(f"{shown(raw)}, expected at most {MAX_DECISION_BYTES} bytes")
        signer.verify("pin", record, signature.decode(errors="replace") or None)
        try:
            return _DECODER.decode(record)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise SnapshotError(f"{shown(raw)}, expected a decision about serving: {error}") from error


_DECODER = msgspec.json.Decoder(Decision)


class Pins:
    """Reads decisions, and says by them what is to be served. Only plain reading commands.

    Args:
        client: A client that returns bytes.
        keys: Names of the keys.
        reader: Reads manifests and the pointer.
        damage: Where what is broken is noted.
        signer: Verifies decisions; None: nothing is signed.
        now_ms: Wall clock, Unix milliseconds.
    """

    def __init__(
        self,
        client: redis.Redis,
        keys: SnapshotKeys,
        reader: SnapshotReader,
        damage: Damage,
        signer: Signer | None = None,
        now_ms: Callable[[], int] = wall_clock_ms,
    ) -> None:
        self._client, self._keys, self._reader, self._damage = client, keys, reader, damage
        self._signer = signer or Signer(keys.namespace)
        self._now_ms = now_ms
        self.last: Decision | None = None
        """The decision that was read or made last, None if there was none."""
        self._read: tuple[bytes, Decision | None] = (b"", None)

    def decision(self) -> Decision | None:
        """The decision in force, None before the first.

        Raises:
            SnapshotForged: It is not signed as it should be.
            PinError: It is broken, gone, or older than what was read before.
        """
        place, raw = f"Redis key {self._keys.key('decision')}", self.raw()
        if self.last is not None and self._read == (raw, self.last):
            return self.last
        found = [decision for decision in (self.last, self.newest()) if decision is not None]
        known = max(found, key=lambda decision: decision.number, default=None)
        raw = self.raw()  # after the history, which it is to be as new as
        if not raw:
            if known is not None and known.pins:
                raise PinError(f"{place}: missing, expected decision {known.number}, which pins {known.name}, or later")
            return None
        try:
            decision = self._checked(raw)
        except SnapshotForged as error:
            raise SnapshotForged(f"{place}: {error}") from error
        except SnapshotError as error:
            raise PinError(f"{place}: {error}") from error
        if known is not None and decision.number < known.number:
            raise PinError(f"{place}: decision {decision.number}, expected {known.number} or later")
        self.last, self._read = decision, (raw, decision)
        return decision

    def to_serve(self) -> Manifest | None:
        """The manifest of what scorers are to serve, None before the first publication.

        Raises:
            SnapshotForged: The decision in force is not signed as it should be.
            PinError: It is broken, or what it names cannot be read.
            SnapshotNotFound, SnapshotError: As :meth:`feature_store.reading.SnapshotReader.current`.
        """
        decision = self.decision()
        if decision is None:
            return self._reader.current()
        if not decision.pins and not decision.holds(self._reader.pointer()):
            return self._reader.current()
        if decision.pins:
            self._reader.pointer_problem = None
        try:
            return self._reader.manifest(decision.name)
        except SnapshotForged:
            raise
        except SnapshotError as error:
            what = "pinned" if decision.pins else "promoted"
            gone = "it is gone" if isinstance(error, SnapshotNotFound) else str(error)
            raise PinError(f"snapshot {decision.name}: {what} by {decision.by}, but {gone}") from error

    def may_go_back_to(self, manifest: Manifest) -> bool:
        """Whether the decision that was read last allows an older version than the one in service."""
        return self.last is not None and self.last.name == member(manifest.lineage, manifest.version)

    def in_service(self, current: str | None) -> str | None:
        """``lineage:version`` of what the newest readable decision says is served while this is current."""
        decision = self.newest_known()
        return decision.name if decision is not None and decision.holds(current) else current

    def newest_known(self) -> Decision | None:
        """The decision in force; where its record is broken, the newest that can be read."""
        try:
            return self.decision()
        except SnapshotError as error:
            self._damage.note(str(error), reason_of(error, "pin"))
            known = [decision for decision in (self.last, self.newest()) if decision is not None]
            return max(known, key=lambda decision: decision.number, default=None)

    def is_broken(self) -> bool:
        """Whether the record of the decision in force cannot be read, or is missing."""
        try:
            self.decision()
        except SnapshotError:
            return True
        return False

    def newest(self) -> Decision | None:
        """The newest decision of the history that can be read."""
        history = self.history()
        return history[-1] if history else None

    def history(self) -> tuple[Decision, ...]:
        """The newest decisions, by number. Broken ones are noted and left out."""
        found = []
        for number, raw in self._raw_history().items():
            place = f"Redis key {self._keys.key('decisions')}, {shown(number)}"
            try:
                decision = self._checked(raw)
                if number != str(decision.number).encode():
                    raise SnapshotError(f"decision {decision.number}, expected {shown(number)}")
                found.append(decision)
            except SnapshotError as error:
                self._damage.note(f"{place}: {error}", reason_of(error, "pin"))
        return tuple(sorted(found, key=lambda decision: decision.number))

    def rolled_back(self, orders: Mapping[str, int]) -> set[str]:
        """Which of these versions were rolled back, and not put into service by a decision since.

        Args:
            orders: ``lineage:version`` → place in the order of publications.
        """
        names: set[str] = set()
        for decision in self.history():
            if decision.rolled_back is not None:
                after, up_to = decision.rolled_back
                names |= {name for name, order in orders.items() if after < order <= up_to}
            if decision.action != "unpin":
                names.discard(decision.name)
        return names

    def fallbacks(self) -> tuple[Manifest, ...]:
        """What a scorer without a model may serve if it cannot load what is to be served, the best first.

        With a pin: the pinned version, then those published before it, the newest first. Without: all versions, the
        newest first. Never one that was rolled back.
        """
        orders = self._reader.orders()
        names, back = list(orders), self.rolled_back(orders)
        decision = self.newest_known()
        if decision is not None and decision.pins and decision.name in orders:
            names = names[: names.index(decision.name) + 1]
        names = [name for name in names if name not in back]
        if not self._signer.active:
            return self._reader.manifests(names)[::-1]
        pinned = decision.name if decision is not None and decision.pins else ""
        found = self._reader.newest_first(names)
        return tuple(sorted(found, key=lambda manifest: member(manifest.lineage, manifest.version) != pinned))

    def kept(self, *, replaced: bool) -> set[str]:
        """``lineage:version`` of what retention keeps for decisions.

        What is in service, what was in service before the decision in force, and what a rollback would go back to.

        Args:
            replaced: Whether the current snapshot is about to be replaced, so that a rollback would go back to it.
        """
        decision, current = self.newest_known(), self._reader.pointer()
        if decision is not None and decision.holds(current):
            names = {decision.name, decision.before, self.before(decision.name, self._reader.orders())}
        else:
            names = {current, None if replaced else self.before(current, self._reader.orders())}
        return {name for name in names if name is not None}

    def before(self, name: str | None, orders: Mapping[str, int]) -> str | None:
        """The version published before this one, without those that were rolled back; None if there is none.

        Args:
            name: ``lineage:version``.
            orders: As of :meth:`rolled_back`, ascending.
        """
        if name is None or name not in orders:
            return None
        names, back = list(orders), self.rolled_back(orders)
        return next((old for old in reversed(names[: names.index(name)]) if old not in back), None)

    def raw(self) -> bytes:
        """The beginning of the record in force, empty if there is none. Its own length is not trusted."""
        return beginning(self._client, self._keys.key("decision"), MAX_DECISION_BYTES)

    def _checked(self, raw: bytes) -> Decision:
        decision = Decision.read(raw, self._signer)
        if decision.number > self._now_ms() + _FUTURE_MS:
            raise SnapshotError(f"decision {decision.number}, expected the time in milliseconds")
        return decision

    def _raw_history(self) -> dict[bytes, bytes]:
        key = self._keys.key("decisions")
        try:
            if (count := self._client.hlen(key)) > 2 * MAX_DECISIONS:
                self._damage.note(f"Redis key {key}: {count} fields, expected at most {MAX_DECISIONS}")
                return {}
            if not count:
                return {}
            numbers = cast("list[bytes]", self._client.hkeys(key))
            sizes = self._client.pipeline(transaction=False)
            for number in numbers:
                sizes.hstrlen(key, number)
            fitting = [n for n, size in zip(numbers, sizes.execute(), strict=True) if size <= MAX_DECISION_BYTES]
            texts = cast("list[bytes | None]", self._client.hmget(key, fitting) if fitting else [])
        except redis.ResponseError as error:
            if "WRONGTYPE" not in str(error):
                raise
            self._damage.note(f"Redis key {key}: another kind of value, expected a hash")
            return {}
        return {number: text for number, text in zip(fitting, texts, strict=True) if text is not None}
