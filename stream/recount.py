"""Counting what is in the log, for an audit: events by partition, and dead letters by where their events were.

What is counted as an event is what the trainer counts: a record of JSON is one, whatever it holds, unless it holds the
impressions of a request; a record of many events is these, or what its letter stands for where it is refused as a
whole.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from smes.errors import PositionOutOfRange
from smes.schema import Schema
from stream.codec.codec import decode
from stream.codec.json_requests import may_be_request
from stream.dead_letter_reading import Foreign, StoredLetter, read_entries, topic_bounds
from stream.dead_letter_replay import origin_of
from stream.log.event_log import EventLog, Record, TopicPartition

_RECORDS_PER_READ = 5000
_MOST_TRIES = 5  # each lost to retention, which takes what is being read
_BY_THE_CLOCK = ("future_time", "bad_time")  # refusals that another time of reading may not repeat

Progress = Callable[[int], None]
"""Told how many records were read so far."""


@dataclass(frozen=True, slots=True)
class Span:
    """What a trainer has read of one incarnation of a partition: offsets ``began … position - 1``."""

    log: str
    began: int
    position: int


@dataclass(slots=True)
class Recount:
    """What is in a partition now.

    Attributes:
        begin: Offset of its oldest record.
        read: Events in the span that the trainer has read.
        unread: Events behind it.
        gaps: Records before the position that somebody deleted.
        origins: The letters that re-injected records were made of, by number.
    """

    begin: int = 0
    read: int = 0
    unread: int = 0
    gaps: int = 0
    origins: set[int] = field(default_factory=set)


@dataclass(slots=True)
class LetterCount:
    """Events of the letters in one span, copies not counted.

    Attributes:
        sure: Refused at whatever time they are read.
        by_the_clock: Refused for their time: read again later, they may be accepted.
    """

    sure: int = 0
    by_the_clock: int = 0
    unreadable: list[tuple[int, int]] = field(default_factory=list)

    @property
    def all(self) -> int:
        """Both."""
        return self.sure + self.by_the_clock

    def settle(self) -> None:
        """Count unreadable stretches, each offset once: another read may have found other bounds of the same damage."""
        covered = -1
        for start, stop in sorted(self.unreadable):
            self.sure += max(0, stop - max(start, covered))
            covered = max(covered, stop)
        self.unreadable = []


@dataclass(slots=True)
class LetterRecount:
    """What is in the dead-letter topic now; copies of a letter are one.

    Attributes:
        spans: By span.
        by_code: Events, whatever log they were on.
        here: Letters on the present logs, by number.
        replayed: Letters that a note says were re-injected, by number.
        refused_schema: Offsets of records that were refused for the schema that they name. Whether one was depends on
            the configuration of the trainer that read it.
        foreign: Entries that are neither letters nor notes.
        trimmed: Partition of the topic → the oldest offset kept, where letters were trimmed.
    """

    spans: defaultdict[TopicPartition, LetterCount] = field(default_factory=lambda: defaultdict(LetterCount))
    by_code: Counter[str] = field(default_factory=Counter)
    here: set[int] = field(default_factory=set)
    replayed: set[int] = field(default_factory=set)
    refused_schema: defaultdict[TopicPartition, set[int]] = field(default_factory=lambda: defaultdict(set))
    foreign: int = 0
    trimmed: dict[int, int] = field(default_factory=dict)


def recount_letters(log: EventLog, spans: Mapping[TopicPartition, Span]) -> LetterRecount:
    """Count the dead letters.

    Args:
        log: The event log.
        spans: What the trainer has read of the logs that are there now.
    """
    found = LetterRecount()
    seen: set[int] = set()
    for entry in read_entries(log):
        if isinstance(entry, Foreign):
            found.foreign += 1
        elif not isinstance(entry, StoredLetter):
            found.replayed |= {int(each, 16) for each in entry.ids} if entry.note == "done" else set()
        elif entry.number not in seen:
            seen.add(entry.number)
            found.by_code[entry.letter.code] += entry.letter.events
            _count_letter(entry, spans, found)
    for count in found.spans.values():
        count.settle()
    begin = topic_bounds(log)[0]
    found.trimmed = {at.partition: offset for at, offset in sorted(begin.items()) if offset > 0}
    return found


def _count_letter(entry: StoredLetter, spans: Mapping[TopicPartition, Span], found: LetterRecount) -> None:
    letter = entry.letter
    source = TopicPartition(letter.topic, letter.partition)
    span = spans.get(source)
    if span is None or span.log != entry.log:
        return
    found.here.add(entry.number)
    if not span.began <= letter.offset < span.position:
        return
    if letter.code == "schema_mismatch" and letter.row is None:
        found.refused_schema[source].add(letter.offset)
    count = found.spans[source]
    if letter.code == "unreadable":
        count.unreadable.append((letter.offset, letter.offset + letter.events))
    elif letter.code in _BY_THE_CLOCK:
        count.by_the_clock += letter.events
    else:
        count.sure += letter.events


class Recounter:
    """Reads partitions from their beginning to their end.

    Args:
        log: The event log.
        schemas: That the events were to fit, the present one first. A record says by its header which one it is of.
        refused_schema: :attr:`LetterRecount.refused_schema`.
        on_progress: Told what was read.
    """

    def __init__(
        self,
        log: EventLog,
        schemas: Sequence[Schema],
        refused_schema: Mapping[TopicPartition, set[int]],
        on_progress: Progress,
    ) -> None:
        self._log, self._on_progress = log, on_progress
        self._schema, self._schemas = schemas[0], {schema.hash.encode(): schema for schema in schemas}
        self._refused_schema = refused_schema
        self._records = 0

    def recount(self, source: TopicPartition, span: Span, end: int) -> Recount:
        """What is in a partition before ``end``; read again if retention takes what is being read.

        Raises:
            PositionOutOfRange: Retention is faster, again and again.
        """
        for _ in range(_MOST_TRIES):
            begin = self._log.begin(source.topic)[source]
            try:
                return self._read_through(source, Recount(begin), span, end)
            except PositionOutOfRange:
                if self._log.begin(source.topic)[source] <= begin:
                    raise
        raise PositionOutOfRange(
            f"{source.topic}/{source.partition}: the records that the audit was reading were trimmed {_MOST_TRIES} "
            "times: retention is faster than the audit"
        )

    def _read_through(self, source: TopicPartition, recount: Recount, span: Span, end: int) -> Recount:
        at = recount.begin
        while at < end:
            start = at
            fetch = self._log.read({source: at}, max_records=_RECORDS_PER_READ, timeout_s=1.0)
            at = fetch.positions[source]
            records = [record for record in fetch.records if record.offset < end]
            recount.read += self._events([r for r in records if span.began <= r.offset < span.position])
            recount.unread += self._events([r for r in records if r.offset >= span.position])
            for each in fetch.unreadable:
                recount.read += each.records if span.began <= each.offset < span.position else 0
                recount.unread += each.records if span.position <= each.offset < end else 0
            recount.gaps += fetch.gaps.get(source, 0) if start < span.position else 0
            recount.origins |= _origins(records)
            self._records += len(records)
            self._on_progress(self._records)
        return recount

    def _events(self, records: list[Record]) -> int:
        """How many events the trainer counts in these: good ones and refused ones."""
        by_schema: defaultdict[bytes, list[Record]] = defaultdict(list)
        for record in records:
            head = dict(record.headers)
            source = TopicPartition(record.topic, record.partition)
            may_hold_many = head.get("codec") == b"arrow" or may_be_request(record)
            if may_hold_many and record.offset not in self._refused_schema.get(source, ()):
                by_schema[head.get("schema", b"")].append(record)
        count = len(records) - sum(map(len, by_schema.values()))
        for name, many in by_schema.items():
            decoded = decode(many, self._schemas.get(name, self._schema))
            count += len(decoded.impressions) + len(decoded.feedback) + decoded.dead_by_source.total()
        return count


def _origins(records: Iterable[Record]) -> set[int]:
    """The numbers of the letters that records were made of."""
    found = set()
    for record in records:
        origin = origin_of(record.headers)
        if origin is not None and not set(origin) - set("0123456789abcdef") and origin:
            found.add(int(origin, 16))
    return found
