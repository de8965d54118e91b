"""The event-log seam: append records, read from explicit positions, ask where a topic begins and ends.

A *position* is the offset of the next record to read in one partition. Offsets are integers that grow by record
(dense in Redis Streams and in memory; Kafka may leave gaps). Positions live with the weights, in the checkpoint.
Every adapter passes ``tests/contract/test_event_log.py``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

Headers = tuple[tuple[str, bytes], ...]


@dataclass(frozen=True, slots=True, order=True)
class TopicPartition:
    topic: str
    partition: int


Positions = dict[TopicPartition, int]


@dataclass(frozen=True, slots=True)
class OutRecord:
    """A record to append.

    Attributes:
        value: The payload.
        headers: Name → bytes; which codec and which schema (see :mod:`stream.codec.codec`).
        partition: Where it goes: ``0 … partitions(topic) - 1``.
    """

    value: bytes
    headers: Headers
    partition: int


@dataclass(frozen=True, slots=True)
class Record:
    """A record as read.

    Attributes:
        arrival_ms: When it reached the log (the producer's clock), Unix milliseconds.
    """

    topic: str
    partition: int
    offset: int
    value: bytes
    headers: Headers
    arrival_ms: int


@dataclass(frozen=True, slots=True)
class Fetch:
    """One read: records in offset order within each partition, and where each partition continues.

    Attributes:
        records: What was read; partitions one after the other, never interleaved.
        positions: Next record to read, for every partition asked for.
        at_end: Partitions that had nothing further when the read returned.
    """

    records: list[Record]
    positions: Positions
    at_end: frozenset[TopicPartition]


class EventLog(Protocol):
    """An append-only, partitioned log of records."""

    def ensure_topic(self, topic: str, partitions: int) -> None:
        """Create the topic if it is not there.

        Raises:
            EventLogError: It exists with another number of partitions; both numbers are named.
        """

    def partitions(self, topic: str) -> int:
        """Number of partitions; ``EventLogError`` naming the topic when it does not exist."""

    def append(self, topic: str, records: Sequence[OutRecord]) -> None:
        """Append all records and return once they are durable as far as the adapter promises.

        Raises:
            EventLogError: Any record was refused.
            EventLogUnavailable: No acknowledgement within the bounded wait.
        """

    def read(self, positions: Mapping[TopicPartition, int], *, max_records: int, timeout_s: float) -> Fetch:
        """Up to about ``max_records`` records from ``positions`` on, waiting at most ``timeout_s`` for the first.

        Raises:
            PositionOutOfRange: The log no longer holds a position (trimmed), or it lies past the end.
            EventLogUnavailable: The log cannot be reached.
        """

    def begin(self, topic: str) -> Positions:
        """Position of the oldest record kept, per partition."""

    def end(self, topic: str) -> Positions:
        """Position after the newest record, per partition."""

    def close(self) -> None:
        """Release connections; idempotent."""
