"""Reading the dead-letter topic: letters, notes on replays, and what is neither.

Letters are written by :mod:`stream.dead_letters`, notes by :mod:`stream.dead_letter_replay`. The headers tell them
apart::

    codec json, kind letter    one refusal; several copies of it have the same id
    codec json, kind note      {"note": "begun" or "done", "run": …, "ids": [letters], "ends": {"topic/partition": …}}
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from smes.errors import EventLogError, EventLogUnavailable, PositionOutOfRange
from stream.codec.validation import Code
from stream.dead_letters import DeadLetter, letter_id
from stream.log.event_log import EventLog, Headers, OutRecord, Positions, Record, TopicPartition
from stream.topics import DEAD_LETTERS

_logger = logging.getLogger(__name__)
_RECORDS_PER_READ = 2000
_READ_S = 1.0

NOTE_HEADERS: Headers = (("codec", b"json"), ("kind", b"note"))


@dataclass(frozen=True, slots=True)
class StoredLetter:
    """A letter as it was read.

    Attributes:
        id: See :func:`stream.dead_letters.letter_id`.
        log: The incarnation of the partition that the event was read from.
        letter: The letter; of a long payload only the beginning.
        payload_bytes: Size of the whole payload.
        is_whole: Whether the letter has all of its payload.
        at, offset: Where the letter itself is, in the dead-letter topic.
        written_ms: When it was written, Unix milliseconds.
    """

    id: str
    log: str
    letter: DeadLetter
    payload_bytes: int
    is_whole: bool
    at: TopicPartition
    offset: int
    written_ms: int

    @property
    def number(self) -> int:
        """The id as a number: sets of these are small."""
        return int(self.id, 16)

    @property
    def place(self) -> str:
        """Where the event was: ``topic/partition/offset``, for a row of an Arrow record ``…/row``."""
        letter = self.letter
        where = f"{letter.topic}/{letter.partition}/{letter.offset}"
        return where if letter.row is None else f"{where}/{letter.row}"


@dataclass(frozen=True, slots=True)
class ReplayNote:
    """A note on a replay.

    Attributes:
        note: ``begun``: the letters' events are about to be appended. ``done``: they are in the log.
        run: Names the replay.
        ids: Of letters.
        ends: Where the topics ended before the events were appended, with ``begun``.
        at: The partition of the dead-letter topic that it is in.
        written_ms: When it was written, Unix milliseconds.
    """

    note: Literal["begun", "done"]
    run: str
    ids: tuple[str, ...]
    ends: Positions
    at: TopicPartition
    written_ms: int = 0

    def to_record(self) -> OutRecord:
        """The note as it stands in the log."""
        ends = {f"{source.topic}/{source.partition}": end for source, end in self.ends.items()}
        value = msgspec.json.encode({"note": self.note, "run": self.run, "ids": self.ids, "ends": ends})
        return OutRecord(value, NOTE_HEADERS, self.at.partition)


@dataclass(frozen=True, slots=True)
class Foreign:
    """Something in the dead-letter topic that is neither a letter nor a note of this version."""

    at: TopicPartition
    offset: int
    reason: str


Entry = StoredLetter | ReplayNote | Foreign


@dataclass(frozen=True, slots=True)
class LetterFilter:
    """Which letters are meant. An empty set, and None, mean all.

    Attributes:
        codes: Reasons.
        topics, partitions: That the events were read from.
        since_ms, until_ms: When the letters were written, Unix milliseconds; the second is not included.
        ids: Ids, or their first digits (at least four), or places (:attr:`StoredLetter.place`).
    """

    codes: frozenset[str] = frozenset()
    topics: frozenset[str] = frozenset()
    partitions: frozenset[int] = frozenset()
    since_ms: int | None = None
    until_ms: int | None = None
    ids: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for each in self.ids:
            is_digits = len(each) >= 4 and not set(each) - set("0123456789abcdef")
            if not is_digits and each.count("/") not in (2, 3):
                raise ValueError(
                    f"letter {each!r}: expected an id, at least its first four hex digits, or topic/partition/offset"
                )

    def matches(self, stored: StoredLetter) -> bool:
        """Whether this letter is meant."""
        letter = stored.letter
        return (
            (not self.codes or letter.code in self.codes)
            and (not self.topics or letter.topic in self.topics)
            and (not self.partitions or letter.partition in self.partitions)
            and (self.since_ms is None or stored.written_ms >= self.since_ms)
            and (self.until_ms is None or stored.written_ms < self.until_ms)
            and (not self.ids or any(_names(each, stored) for each in self.ids))
        )


ALL_LETTERS = LetterFilter()


def topic_bounds(log: EventLog) -> tuple[Positions, Positions]:
    """Begin and end of the dead-letter topic, of every partition; nothing where there is no such topic.

    Raises:
        EventLogUnavailable: The log cannot be reached.
    """
    try:
        log.partitions(DEAD_LETTERS)
    except EventLogUnavailable:
        raise
    except EventLogError:
        return {}, {}
    return log.begin(DEAD_LETTERS), log.end(DEAD_LETTERS)


def read_entries(log: EventLog, until: Positions | None = None) -> Iterator[Entry]:
    """Every entry of the dead-letter topic, one partition after the other.

    Args:
        log: The event log.
        until: Where to stop; None: where the topic ends now.

    Raises:
        EventLogError, EventLogUnavailable: As the log raises them.
    """
    begin, end = topic_bounds(log)
    for at, stop in sorted((until or end).items()):
        position = begin.get(at, 0)
        while position < stop:
            found, position = read_some(log, at, position, stop)
            yield from found


def read_some(log: EventLog, at: TopicPartition, position: int, stop: int) -> tuple[list[Entry], int]:
    """What one read of a partition finds from ``position`` on and before ``stop``, and the position after it.

    Raises:
        EventLogError, EventLogUnavailable: As the log raises them.
    """
    try:
        fetch = log.read({at: position}, max_records=_RECORDS_PER_READ, timeout_s=_READ_S)
    except PositionOutOfRange:
        oldest = log.begin(at.topic)[at]
        if oldest <= position:
            raise
        _logger.warning("%s/%d: what lay before %d was trimmed while it was read", at.topic, at.partition, oldest)
        return [], oldest
    entries: list[Entry] = [entry_of(record) for record in fetch.records if record.offset < stop]
    entries += [Foreign(at, each.offset, each.reason) for each in fetch.unreadable if each.offset < stop]
    return entries, fetch.positions[at]


def follow_entries(log: EventLog, positions: Positions, timeout_s: float) -> tuple[list[Entry], Positions]:
    """Read once; what is there after ``positions`` (waiting up to ``timeout_s`` for it), and the positions after it."""
    fetch = log.read(positions, max_records=_RECORDS_PER_READ, timeout_s=timeout_s)
    return [entry_of(record) for record in fetch.records], fetch.positions


def entry_of(record: Record) -> Entry:
    """What a record of the dead-letter topic is."""
    at = TopicPartition(record.topic, record.partition)
    try:
        if dict(record.headers).get("kind") == b"note":
            return _note(msgspec.json.decode(record.value, type=_WireNote), at, record.arrival_ms)
        return _stored(msgspec.json.decode(record.value, type=_WireLetter), at, record)
    except (msgspec.MsgspecError, UnicodeError, ValueError) as error:
        return Foreign(at, record.offset, f"expected a letter or a note: {str(error)[:200]}")


@dataclass(slots=True)
class LetterGroup:
    """Letters that have something in common.

    Attributes:
        code, topic: Reason and topic.
        where: What else they have in common, such as a partition or an hour; empty: nothing.
        numbers: The letters' :attr:`StoredLetter.number`.
        events: How many events they stand for.
        first_ms, last_ms: When the first and the last one was written.
        example: The last one.
    """

    code: str
    topic: str
    where: str
    example: StoredLetter
    first_ms: int
    last_ms: int = 0
    events: int = 0
    numbers: set[int] = field(default_factory=set)

    def add(self, stored: StoredLetter) -> None:
        """Count a letter; a copy counts nothing."""
        if stored.number not in self.numbers:
            self.numbers.add(stored.number)
            self.events += stored.letter.events
            self.last_ms = max(self.last_ms, stored.written_ms)
            self.first_ms = min(self.first_ms, stored.written_ms)
            self.example = stored


def _names(text: str, stored: StoredLetter) -> bool:
    return stored.place == text if "/" in text else stored.id.startswith(text)


class _WireLetter(msgspec.Struct):
    id: str
    log: str
    topic: str
    partition: int
    offset: int
    row: int | None
    code: Code
    reason: str
    field: str | None
    place: str | None
    events: int
    arrival_ms: int | None
    headers: list[tuple[str, str]] | None
    payload: bytes
    payload_bytes: int
    payload_truncated: bool


class _WireNote(msgspec.Struct):
    note: Literal["begun", "done"]
    run: str
    ids: tuple[str, ...]
    ends: dict[str, int]


def _stored(wire: _WireLetter, at: TopicPartition, record: Record) -> StoredLetter:
    headers = None if wire.headers is None else tuple((name, value.encode("latin-1")) for name, value in wire.headers)
    letter = DeadLetter(
        topic=wire.topic,
        partition=wire.partition,
        offset=wire.offset,
        row=wire.row,
        code=wire.code,
        reason=wire.reason,
        field=wire.field,
        payload=wire.payload,
        events=wire.events,
        place=wire.place,
        headers=headers,
        arrival_ms=wire.arrival_ms,
        is_excerpt=wire.payload_truncated and len(wire.payload) == wire.payload_bytes,
    )
    if wire.id != letter_id(letter, wire.log):
        raise ValueError(f"id {wire.id[:32]!r} is not that of what the letter says")
    is_whole = not wire.payload_truncated and len(wire.payload) == wire.payload_bytes
    return StoredLetter(
        wire.id, wire.log, letter, wire.payload_bytes, is_whole, at, record.offset, written_ms=record.arrival_ms
    )


def _note(wire: _WireNote, at: TopicPartition, written_ms: int) -> ReplayNote:
    ends = {}
    for source, end in wire.ends.items():
        topic, _, partition = source.rpartition("/")
        ends[TopicPartition(topic, int(partition))] = end
    for each in wire.ids:
        int(each, 16)
    return ReplayNote(wire.note, wire.run, wire.ids, ends, at, written_ms)
