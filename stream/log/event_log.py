"""The event log as the rest of the project sees it: append records, read from positions, ask for begin and end.

A *position* is the offset of the next record to read in one partition. Offsets are integers that grow with every
record, not always by one: Kafka leaves offsets out, and so does Redis after an entry of another program. Positions are
kept with the weights, in the checkpoint. They belong to one *incarnation* of a partition: a topic that is deleted and
made again has other records under the same name and the same offsets. Every adapter passes
``tests/contract/test_event_log.py``.
"""

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from smes.errors import PositionOutOfRange

_MAX_AGE_S = 1.0  # of a number of partitions

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
        headers: (name, bytes) pairs that name the codec and the schema (see :mod:`stream.codec.codec`).
        partition: ``0 … partitions(topic) - 1``.
    """

    value: bytes
    headers: Headers
    partition: int


@dataclass(frozen=True, slots=True)
class Record:
    """A record as read.

    Attributes:
        topic, partition, offset: Its place in the log.
        value, headers: As appended.
        arrival_ms: When it reached the log, Unix milliseconds of the producer's clock. The time of reading where the
            record says nothing.
    """

    topic: str
    partition: int
    offset: int
    value: bytes
    headers: Headers
    arrival_ms: int


@dataclass(frozen=True, slots=True)
class UnreadableRecord:
    """Something in the log that is no record of ours, or that the client cannot decode. The read has passed it.

    Attributes:
        topic, partition, offset: Where it is; of several records that are unreadable together, the first.
        place: The server's own name of it, such as a Redis entry id or a range of Kafka offsets.
        reason: What was expected and what was found.
        payload: Its bytes, as far as they are known.
        records: How many records it stands for: those of a damaged Kafka batch, else 1.
    """

    topic: str
    partition: int
    offset: int
    place: str
    reason: str
    payload: bytes
    records: int = 1


@dataclass(frozen=True, slots=True)
class Fetch:
    """The result of one read.

    Attributes:
        records: One partition after the other, each in the order of its offsets.
        positions: Next record to read, for every partition asked for.
        at_end: Partitions that had no more records when the read returned.
        gaps: Partition → records passed over because somebody deleted them. Only partitions with any.
        unreadable: What the read has passed because it is no record of ours.
    """

    records: list[Record]
    positions: Positions
    at_end: frozenset[TopicPartition]
    gaps: Mapping[TopicPartition, int] = field(default_factory=dict)
    unreadable: Sequence[UnreadableRecord] = ()


class EventLog(Protocol):
    """An append-only, partitioned log of records.

    Every call that needs a server tries again while the server is away, for a bounded time. It raises ``Stopped`` if
    :meth:`set_stop`'s event is set while it waits.
    """

    def ensure_topic(self, topic: str, partitions: int, *, exact: bool = True) -> None:
        """Create the topic if it does not exist, and return when it can be used.

        Args:
            topic: Its name.
            partitions: Its number of partitions where it is created.
            exact: Whether an existing topic must have this number. With False, any number will do.

        Raises:
            ValueError: ``partitions`` is less than 1.
            EventLogError: It exists with another number of partitions; the message names both numbers.
        """

    def partitions(self, topic: str) -> int:
        """Number of partitions now, as the server says; the answer is at most a second old.

        Raises:
            EventLogError: The topic does not exist; the message names it.
        """

    def incarnations(self, topic: str) -> dict[TopicPartition, str]:
        """A text for each partition that stays the same as long as its records do.

        It is another one after the topic was deleted and made again, or when the server came back empty.

        Raises:
            EventLogError: The topic does not exist; the message names it.
        """

    def append(self, topic: str, records: Sequence[OutRecord]) -> None:
        """Append all records, and return once they are as durable as the adapter promises.

        Raises:
            ValueError: The topic has no such partition; nothing was appended.
            EventLogError: A record was refused.
            EventLogUnavailable: No acknowledgement within the bounded wait.
        """

    def read(self, positions: Mapping[TopicPartition, int], *, max_records: int, timeout_s: float) -> Fetch:
        """Read up to about ``max_records`` records from ``positions`` on.

        Args:
            positions: Next record to read, per partition; at least one.
            max_records: At least 1.
            timeout_s: Longest wait for the first record. A stop ends this wait early, without an error.

        Raises:
            ValueError: No position, no record, or a partition that the topic does not have.
            PositionOutOfRange: A position was trimmed away, or it lies past the end.
            EventLogUnavailable: The log cannot be reached.
            Stopped: The log cannot be reached, and a stop was asked for.
        """

    def begin(self, topic: str) -> Positions:
        """Position of the oldest record kept, per partition."""

    def end(self, topic: str) -> Positions:
        """Position after the newest record that can be read, per partition.

        Records of a transaction that is still open cannot be read yet.
        """

    def at_time(self, topic: str, time_ms: int) -> Positions:
        """Position of the first record that arrived at a time or later, per partition; the end where there is none.

        Records whose arrival times do not ascend, as those of producers whose clocks differ, are found by Kafka
        exactly; the others search as if they did.

        Args:
            topic: Its name.
            time_ms: Unix milliseconds, as :attr:`Record.arrival_ms`.
        """

    def set_stop(self, event: threading.Event | None) -> None:
        """End waits early from now on when ``event`` is set; None: no longer.

        While it is set, a call still gets its answer from a server that answers within a second.
        """

    def close(self) -> None:
        """Release connections, within about a second; idempotent. Errors on the way are logged, not raised."""


class ReportingLog(Protocol):
    """An event log that says where it has put what it was given; every adapter is one.

    A record whose acknowledgement was lost, as when a server dies, is not appended a second time.
    """

    def append_reporting(self, topic: str, records: Sequence[OutRecord]) -> list[int | None]:
        """As :meth:`EventLog.append`; the offset of each record, None where the server no longer says it.

        Without records it connects, so that a later call starts no thread: Python 3.12 has none at a program's end.
        """

    def ensure_topic(self, topic: str, partitions: int, *, exact: bool = True) -> None:
        """As :meth:`EventLog.ensure_topic`."""

    def partitions(self, topic: str) -> int:
        """As :meth:`EventLog.partitions`."""

    def close(self) -> None:
        """As :meth:`EventLog.close`."""


def check_partition_count(topic: str, partitions: int) -> None:
    """Raise ValueError unless a topic can have this many partitions."""
    if partitions < 1:
        raise ValueError(f"topic {topic!r}: partitions {partitions}, expected at least 1")


def check_partition(topic: str, partition: int, partitions: int) -> None:
    """Raise ValueError unless a topic of so many partitions has this one."""
    if not 0 <= partition < partitions:
        raise ValueError(f"topic {topic!r}: partition {partition}, expected 0 … {partitions - 1}")


def check_read(positions: Mapping[TopicPartition, int], max_records: int, check: Callable[[str, int], None]) -> None:
    """Check the arguments of a read, as far as that is possible without knowing the records.

    Args:
        positions, max_records: As :meth:`EventLog.read`.
        check: Raises ValueError unless a topic has this partition.

    Raises:
        ValueError: As :meth:`EventLog.read`.
        PositionOutOfRange: A position is negative.
    """
    if max_records < 1:
        raise ValueError(f"max_records {max_records}, expected at least 1")
    if not positions:
        raise ValueError("positions: expected at least one partition")
    for at, position in positions.items():
        check(at.topic, at.partition)
        if position < 0:
            raise PositionOutOfRange(f"{at.topic}/{at.partition}: position {position}, expected at least 0")


class PartitionCounts:
    """Numbers of partitions as a server says, asked again when they are older than a second.

    Args:
        ask: Asks the server; raises EventLogError if there is no such topic.
    """

    def __init__(self, ask: Callable[[str], int]) -> None:
        self._ask = ask
        self._known: dict[str, tuple[int, float]] = {}

    def now(self, topic: str) -> int:
        """As :meth:`EventLog.partitions`."""
        count, asked_s = self._known.get(topic, (0, -math.inf))
        if time.monotonic() - asked_s > _MAX_AGE_S:
            self._known.pop(topic, None)
            asked_s = time.monotonic()
            count = self._ask(topic)
            self._known[topic] = count, asked_s
        return count

    def check(self, topic: str, partition: int) -> None:
        """Raise ValueError unless the topic has this partition. Asks only for one that it did not have before."""
        count, _ = self._known.get(topic, (0, 0.0))
        if not 0 <= partition < count:
            check_partition(topic, partition, self.now(topic))

    def forget(self, topic: str) -> None:
        """Ask the next time."""
        self._known.pop(topic, None)
