"""Dead letters: events that were refused, kept with where they were and why, in a topic of their own.

The pipeline goes on without them. A trainer that restarts from a checkpoint reads some records again and so writes
their letters again: (topic, partition, offset, row) identifies a letter.
"""

import base64
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from stream.codec.validation import Code, Problem
from stream.log.event_log import EventLog, OutRecord, Record
from stream.topics import DEAD_LETTERS

MAX_PAYLOAD_BYTES = 65_536
"""Most payload bytes that a letter in the log carries; longer payloads are cut and flagged ``payload_truncated``."""


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

    def to_json(self) -> bytes:
        """The letter as it stands in the log: its fields, with ``payload`` in base64.

        ``payload_bytes`` is the payload's full size; ``payload_truncated`` says that only the first
        ``MAX_PAYLOAD_BYTES`` of it are here.
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
                "events": self.events,
                "payload": base64.b64encode(self.payload[:MAX_PAYLOAD_BYTES]).decode("ascii"),
                "payload_bytes": len(self.payload),
                "payload_truncated": len(self.payload) > MAX_PAYLOAD_BYTES,
            }
        )


class DeadLetterWriter:
    """Appends letters to the dead-letter topic and counts them.

    Args:
        log: Where to append.
        topic: The dead-letter topic; created when it is not there yet.
        partitions: Its number of partitions; a letter goes to the partition that its event was read from, modulo this.

    Raises:
        EventLogError: The topic exists with another number of partitions.
    """

    def __init__(self, log: EventLog, topic: str = DEAD_LETTERS, *, partitions: int = 1) -> None:
        log.ensure_topic(topic, partitions)
        self._partitions = partitions
        self._log = log
        self._topic = topic
        self._counts: Counter[tuple[str, Code]] = Counter()

    @property
    def counts(self) -> Mapping[tuple[str, Code], int]:
        """Events written so far by (topic they were read from, reason code), since this writer was made."""
        return self._counts

    def write(self, letters: Sequence[DeadLetter]) -> None:
        """Append the letters, then count them; returns when the log has them.

        Raises:
            EventLogError: The log refused them; nothing is counted.
            EventLogUnavailable: No acknowledgement within the log's bounded wait; nothing is counted.
        """
        if not letters:
            return
        headers = (("codec", b"json"),)
        records = [OutRecord(letter.to_json(), headers, letter.partition % self._partitions) for letter in letters]
        self._log.append(self._topic, records)
        for letter in letters:
            self._counts[letter.topic, letter.code] += letter.events
