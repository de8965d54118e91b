"""Dead letters: events that were refused, kept with where they were and why, in a topic of their own.

The pipeline goes on without them. A trainer that restarts from a checkpoint reads some records again and so writes
their letters again: (topic, partition, offset, row) identifies a letter.
"""

import base64
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from smes.errors import EventLogError, EventLogUnavailable
from stream.codec.validation import Code, Problem
from stream.log.event_log import EventLog, OutRecord, Record, UnreadableRecord
from stream.topics import DEAD_LETTERS

MAX_PAYLOAD_BYTES = 65_536
"""Most payload bytes that a letter in the log carries; longer payloads are cut and flagged ``payload_truncated``."""

SHORT_PAYLOAD_BYTES = 512
"""Most payload bytes of a letter where the log refused the longer ones."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One refusal: a record, or one row of an Arrow record.

    Attributes:
        topic: Topic that the record was read from.
        partition: Its partition.
        offset: Its offset there.
        row: Row within an Arrow record, from 0; None where the whole record is refused.
        code: Short machine-readable reason, for counters.
        reason: For people: what was expected and what the event had.
        field: Dotted name of the field at fault, None where it is the event as a whole.
        payload: The record's value; for a row, that row as JSON.
        place: The server's own name of the record, such as a Redis entry id, where it is unreadable; else None.
        events: How many events it stands for: the rows of an Arrow record refused as a whole, else 1.
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
        )

    @classmethod
    def of_row(cls, record: Record, row: int, problem: Problem, payload: bytes) -> "DeadLetter":
        """The letter for one row of an Arrow record."""
        return cls(
            topic=record.topic,
            partition=record.partition,
            offset=record.offset,
            row=row,
            code=problem.code,
            reason=problem.reason,
            field=problem.field,
            payload=payload,
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

    def to_json(self, max_payload_bytes: int = MAX_PAYLOAD_BYTES) -> bytes:
        """The letter as it stands in the log: its fields, with ``payload`` in base64.

        ``payload_bytes`` is the payload's full size; ``payload_truncated`` says that only the first
        ``max_payload_bytes`` of it are here.
        """
        return msgspec.json.encode(
            {
                "topic": self.topic,
                "partition": self.partition,
                "offset": self.offset,
                "row": self.row,
                "code": self.code,
                "reason": self.reason,
                "field": self.field,
                "place": self.place,
                "events": self.events,
                "payload": base64.b64encode(self.payload[:max_payload_bytes]).decode("ascii"),
                "payload_bytes": len(self.payload),
                "payload_truncated": len(self.payload) > max_payload_bytes,
            }
        )


class DeadLetterWriter:
    """Appends letters to the dead-letter topic and counts them.

    Args:
        log: Where to append.
        topic: The dead-letter topic; created when it is not there yet.
        partitions: Its number of partitions where it is created. One that exists may have any number. A letter goes to
            the partition that its event was read from, modulo the number that there are.
    """

    def __init__(self, log: EventLog, topic: str = DEAD_LETTERS, *, partitions: int = 1) -> None:
        log.ensure_topic(topic, partitions, exact=False)
        self._log = log
        self._topic = topic
        self._counts: Counter[tuple[str, Code]] = Counter()

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
        try:
            self._append(letters, MAX_PAYLOAD_BYTES)
        except EventLogUnavailable:
            raise
        except EventLogError:
            if all(len(letter.payload) <= SHORT_PAYLOAD_BYTES for letter in letters):
                raise
            self._append(letters, SHORT_PAYLOAD_BYTES)
        for letter in letters:
            self._counts[letter.topic, letter.code] += letter.events

    def _append(self, letters: Sequence[DeadLetter], max_payload_bytes: int) -> None:
        headers, partitions = (("codec", b"json"),), self._log.partitions(self._topic)
        records = [OutRecord(le.to_json(max_payload_bytes), headers, le.partition % partitions) for le in letters]
        self._log.append(self._topic, records)
