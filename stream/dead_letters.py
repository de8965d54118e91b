"""Dead letters: events that were refused, kept with where they were and why, in a topic of their own.

The pipeline goes on without them. A trainer that restarts from a checkpoint reads some records again and so writes
their letters again. Both copies have the same *id*, which :func:`letter_id` makes of where the event was.
:mod:`stream.dead_letter_reading` reads letters, :mod:`stream.dead_letter_replay` appends their events
again.
"""

import base64
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from smes.errors import EventLogError, EventLogUnavailable
from stream.codec.validation import Code, Problem
from stream.log.event_log import EventLog, Headers, OutRecord, Record, TopicPartition, UnreadableRecord
from stream.topics import DEAD_LETTERS

MAX_PAYLOAD_BYTES = 65_536
"""Most payload bytes that a letter in the log carries; longer payloads are cut and flagged ``payload_truncated``."""

SHORT_PAYLOAD_BYTES = 512
"""Most payload bytes of a letter where the log refused the longer ones."""

MAX_HEADER_BYTES = 4096
"""A record's headers are in its letter if they are not larger together."""

LETTER_HEADERS: Headers = (("codec", b"json"), ("kind", b"letter"))
"""Headers of a letter. Notes on replays lie in the same topic (:mod:`stream.dead_letter_replay`)."""

_INCARNATION_MAX_AGE_S = 1.0


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One refusal: a record, or one event of a record of many.

    Attributes:
        topic: Topic that the record was read from.
        partition: Its partition.
        offset: Its offset there.
        row: Place within a record of many events, from 0: the row in Arrow. None where the whole record is refused.
        code: Short machine-readable reason, for counters.
        reason: For people: what was expected and what the event had.
        field: Dotted name of the field at fault, None where it is the event as a whole.
        payload: The record's value; for a row, that event as JSON.
        place: The server's own name of the record, such as a Redis entry id, where it is unreadable; else None.
        events: How many events it stands for: those of a record of many that is refused as a whole, else 1.
        headers: The record's headers; None where there is no record, or they are larger than ``MAX_HEADER_BYTES``.
        arrival_ms: When the record reached the log, Unix milliseconds; None where there is no record.
        is_excerpt: Whether something of the row is missing in ``payload``, such as the end of a long list.
    """

    topic: str
    partition: int
    offset: int
    row: int | None
    code: Code
    reason: str
    field: str | None
    payload: bytes
    events: int = 1
    place: str | None = None
    headers: Headers | None = None
    arrival_ms: int | None = None
    is_excerpt: bool = False

    @classmethod
    def of_record(cls, record: Record, problem: Problem, *, events: int = 1) -> "DeadLetter":
        """The letter for a whole record; its payload is the record's value, shared, not copied."""
        return cls(
            topic=record.topic,
            partition=record.partition,
            offset=record.offset,
            row=None,
            code=problem.code,
            reason=problem.reason,
            field=problem.field,
            payload=record.value,
            events=events,
            headers=_short(record.headers),
            arrival_ms=record.arrival_ms,
        )

    @classmethod
    def of_row(
        cls, record: Record, row: int, problem: Problem, payload: bytes, *, is_excerpt: bool = False
    ) -> "DeadLetter":
        """The letter for one event of a record of many."""
        return cls(
            topic=record.topic,
            partition=record.partition,
            offset=record.offset,
            row=row,
            code=problem.code,
            reason=problem.reason,
            field=problem.field,
            payload=payload,
            headers=_short(record.headers),
            arrival_ms=record.arrival_ms,
            is_excerpt=is_excerpt,
        )

    @classmethod
    def of_unreadable(cls, record: UnreadableRecord) -> "DeadLetter":
        """The letter for what is in the log but is no record of ours."""
        return cls(
            topic=record.topic,
            partition=record.partition,
            offset=record.offset,
            row=None,
            code="unreadable",
            reason=record.reason,
            field=None,
            payload=record.payload,
            events=record.records,
            place=record.place,
        )

    def to_json(self, log: str, max_payload_bytes: int = MAX_PAYLOAD_BYTES) -> bytes:
        """The letter as it stands in the log: its fields, with ``payload`` in base64.

        ``id`` is :func:`letter_id`. ``payload_bytes`` is the payload's full size; ``payload_truncated`` says that only
        the first ``max_payload_bytes`` of it are here, or an excerpt.

        Args:
            log: The incarnation of the partition that the event was read from.
            max_payload_bytes: At least ``SHORT_PAYLOAD_BYTES``.
        """
        return msgspec.json.encode(
            {
                "id": letter_id(self, log),
                "log": log,
                "topic": self.topic,
                "partition": self.partition,
                "offset": self.offset,
                "row": self.row,
                "code": self.code,
                "reason": self.reason,
                "field": self.field,
                "place": self.place,
                "events": self.events,
                "arrival_ms": self.arrival_ms,
                "headers": None if self.headers is None else [[name, _text(value)] for name, value in self.headers],
                "payload": base64.b64encode(self.payload[:max_payload_bytes]).decode("ascii"),
                "payload_bytes": len(self.payload),
                "payload_truncated": self.is_excerpt or len(self.payload) > max_payload_bytes,
            }
        )


def letter_id(letter: DeadLetter, log: str) -> str:
    """16 hex digits that all copies of a letter have, and with near certainty no other letter.

    They are made of where the event was. An example of a training step was nowhere (its offset is -1): its payload's
    beginning tells which impression it is.

    Args:
        letter: A letter as it was written, or with its payload cut to ``SHORT_PAYLOAD_BYTES`` or more.
        log: The incarnation of the partition that the event was read from: after a topic was made anew, the same offset
            is another place.
    """
    digest = hashlib.sha256(msgspec.json.encode([log, letter.topic, letter.partition, letter.offset, letter.row]))
    if letter.offset < 0:
        digest.update(letter.payload[:SHORT_PAYLOAD_BYTES])
    return digest.hexdigest()[:16]


class DeadLetterWriter:
    """Appends letters to the dead-letter topic and counts them.

    Args:
        log: Where to append.
        topic: The dead-letter topic; created when it is not there yet.
        partitions: Its number of partitions where it is created. One that exists may have any number. A letter goes to
            the partition that its event was read from, modulo the number that there are.
        monotonic: Seconds of a clock that never goes back; says when the log is asked for its incarnations again.
    """

    def __init__(
        self,
        log: EventLog,
        topic: str = DEAD_LETTERS,
        *,
        partitions: int = 1,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        log.ensure_topic(topic, partitions, exact=False)
        self._log = log
        self._topic = topic
        self._monotonic = monotonic
        self._counts: Counter[tuple[str, Code]] = Counter()
        self._incarnations: dict[str, tuple[float, dict[TopicPartition, str]]] = {}  # by topic, and since when

    @property
    def counts(self) -> Mapping[tuple[str, Code], int]:
        """Events written so far by (topic they were read from, reason code), since this writer was made."""
        return self._counts

    def write(self, letters: Sequence[DeadLetter]) -> None:
        """Append the letters, then count them; returns when the log has them.

        Where the log refuses them, their payloads are cut to ``SHORT_PAYLOAD_BYTES`` and they are appended again: a
        topic that takes only small records must not stop the pipeline. Those that it took the first time are there
        twice then.

        Raises:
            EventLogError: The log refused them again; nothing is counted.
            EventLogUnavailable: No acknowledgement within the log's bounded wait; nothing is counted.
        """
        if not letters:
            return
        logs: dict[TopicPartition, str] = {}
        for topic in {letter.topic for letter in letters}:
            logs |= self._incarnations_of(topic)
        try:
            self._append(letters, logs, MAX_PAYLOAD_BYTES)
        except EventLogUnavailable:
            raise
        except EventLogError:
            if all(len(letter.payload) <= SHORT_PAYLOAD_BYTES for letter in letters):
                raise
            self._append(letters, logs, SHORT_PAYLOAD_BYTES)
        for letter in letters:
            self._counts[letter.topic, letter.code] += letter.events

    def _append(
        self, letters: Sequence[DeadLetter], logs: Mapping[TopicPartition, str], max_payload_bytes: int
    ) -> None:
        partitions = self._log.partitions(self._topic)
        records = []
        for letter in letters:
            log = logs.get(TopicPartition(letter.topic, letter.partition), "")
            value = letter.to_json(log, max_payload_bytes)
            records.append(OutRecord(value, LETTER_HEADERS, letter.partition % partitions))
        self._log.append(self._topic, records)

    def _incarnations_of(self, topic: str) -> dict[TopicPartition, str]:
        """As the log says, at most a second ago."""
        now_s = self._monotonic()
        asked_s, known = self._incarnations.get(topic, (-_INCARNATION_MAX_AGE_S, {}))
        if not known or now_s - asked_s >= _INCARNATION_MAX_AGE_S:
            known = self._log.incarnations(topic)
            self._incarnations[topic] = now_s, known
        return known


def row_payload_bytes(record: Record, letters: int) -> int:
    """Most payload bytes of each of so many letters for rows of a record.

    What events share would else stand in all of them: together they take at most a few times the record's size.
    """
    return max(SHORT_PAYLOAD_BYTES, 4 * len(record.value) // letters)


def _short(headers: Headers) -> Headers | None:
    size = sum(len(name) + len(value) for name, value in headers)
    return headers if size <= MAX_HEADER_BYTES else None


def _text(value: bytes) -> str:
    """A header's bytes as text, one character each: readable where it is ASCII, and nothing is lost elsewhere."""
    return value.decode("latin-1")
