"""An event log in memory, for tests and for runs in one process.

Tests can make it end, fail and pause, delete records, put in what is no record, and make a topic anew.
"""

import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from smes.errors import EventLogError, PositionOutOfRange
from smes_io.clock import wall_clock_ms
from stream.log.event_log import (
    Fetch,
    OutRecord,
    Positions,
    Record,
    TopicPartition,
    UnreadableRecord,
    check_partition,
    check_partition_count,
    check_read,
)

_LONGEST_WAIT_S = 0.05  # between two looks at the stop event


@dataclass(slots=True)
class _Partition:
    """Offsets ``first … first + len(records) - 1``, None where one was deleted, and the failures a test asked for."""

    first: int = 0
    records: list[Record | UnreadableRecord | None] = field(default_factory=list)
    incarnation: str = field(default_factory=lambda: uuid.uuid4().hex)
    end_at: int | None = None
    aborts: dict[int, BaseException] = field(default_factory=dict)

    @property
    def end(self) -> int:
        """Position after the newest record, whether or not ``set_end`` hides it."""
        return self.first + len(self.records)

    @property
    def begin(self) -> int:
        """Position of the oldest record that is there."""
        return next((self.first + i for i, each in enumerate(self.records) if each is not None), self.end)

    @property
    def visible_end(self) -> int:
        return self.end if self.end_at is None else min(self.end, max(self.end_at, self.first))


class InMemoryLog:
    """A thread-safe :class:`stream.log.event_log.EventLog` that keeps everything in memory.

    Args:
        now_ms: The producer's clock, Unix milliseconds; it stamps ``arrival_ms``.
    """

    def __init__(self, now_ms: Callable[[], int] = wall_clock_ms) -> None:
        self._now_ms = now_ms
        self._topics: dict[str, list[_Partition]] = {}
        self._changed = threading.Condition()
        self._paused = False
        self._stop: threading.Event | None = None

    def ensure_topic(self, topic: str, partitions: int, *, exact: bool = True) -> None:
        """See :meth:`stream.log.event_log.EventLog.ensure_topic`."""
        check_partition_count(topic, partitions)
        with self._changed:
            existing = len(self._topics.setdefault(topic, [_Partition() for _ in range(partitions)]))
        if exact and existing != partitions:
            raise EventLogError(f"topic {topic!r} has {existing} partitions, expected {partitions}")

    def add_partitions(self, topic: str, partitions: int) -> None:
        """Grow a topic to ``partitions`` partitions, as an operator may; the new ones are empty."""
        with self._changed:
            parts = self._parts(topic)
            if partitions < len(parts):
                raise ValueError(f"topic {topic!r}: partitions {partitions}, expected at least {len(parts)}")
            parts.extend(_Partition() for _ in range(partitions - len(parts)))

    def partitions(self, topic: str) -> int:
        """See :meth:`stream.log.event_log.EventLog.partitions`."""
        with self._changed:
            return len(self._parts(topic))

    def incarnations(self, topic: str) -> dict[TopicPartition, str]:
        """See :meth:`stream.log.event_log.EventLog.incarnations`."""
        with self._changed:
            return {TopicPartition(topic, i): part.incarnation for i, part in enumerate(self._parts(topic))}

    def append(self, topic: str, records: Sequence[OutRecord]) -> None:
        """See :meth:`stream.log.event_log.EventLog.append`. After an error, no record was appended."""
        self.append_reporting(topic, records)

    def append_reporting(self, topic: str, records: Sequence[OutRecord]) -> list[int | None]:
        """See :meth:`stream.log.event_log.ReportingLog.append_reporting`."""
        offsets: list[int | None] = []
        with self._changed:
            parts = self._parts(topic)
            for record in records:
                check_partition(topic, record.partition, len(parts))
            arrival_ms = self._now_ms()
            for record in records:
                part = parts[record.partition]
                offsets.append(part.end)
                part.records.append(Record(topic, record.partition, part.end, record.value, record.headers, arrival_ms))
            self._changed.notify_all()
        return offsets

    def read(self, positions: Mapping[TopicPartition, int], *, max_records: int, timeout_s: float) -> Fetch:
        """See :meth:`stream.log.event_log.EventLog.read`."""
        check_read(positions, max_records, lambda topic, i: check_partition(topic, i, self.partitions(topic)))
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            for at, position in positions.items():
                self._check(at, position)
            while True:
                fetch = self._take(positions, max_records)
                remaining_s = deadline_s - time.monotonic()
                stopped = self._stop is not None and self._stop.is_set()
                if fetch.records or fetch.unreadable or fetch.gaps or remaining_s <= 0 or stopped:
                    return fetch
                self._changed.wait(remaining_s if self._stop is None else min(remaining_s, _LONGEST_WAIT_S))

    def begin(self, topic: str) -> Positions:
        """See :meth:`stream.log.event_log.EventLog.begin`."""
        with self._changed:
            return {TopicPartition(topic, i): part.begin for i, part in enumerate(self._parts(topic))}

    def end(self, topic: str) -> Positions:
        """See :meth:`stream.log.event_log.EventLog.end`; records hidden by ``set_end`` do not count."""
        with self._changed:
            return {TopicPartition(topic, i): part.visible_end for i, part in enumerate(self._parts(topic))}

    def at_time(self, topic: str, time_ms: int) -> Positions:
        """See :meth:`stream.log.event_log.EventLog.at_time`."""
        found = {}
        with self._changed:
            for i, part in enumerate(self._parts(topic)):
                kept = [(part.first + n, each) for n, each in enumerate(part.records) if isinstance(each, Record)]
                later = (offset for offset, each in kept if each.arrival_ms >= time_ms)
                found[TopicPartition(topic, i)] = next(later, part.visible_end)
        return found

    def set_stop(self, event: threading.Event | None) -> None:
        """See :meth:`stream.log.event_log.EventLog.set_stop`."""
        with self._changed:
            self._stop = event
            self._changed.notify_all()

    def close(self) -> None:
        """Nothing to release."""

    def pause(self) -> None:
        """Make reads return nothing, and no partition at its end, until :meth:`resume`."""
        with self._changed:
            self._paused = True

    def resume(self) -> None:
        """Undo :meth:`pause` and wake up waiting reads."""
        with self._changed:
            self._paused = False
            self._changed.notify_all()

    def set_end(self, at: TopicPartition, offset: int | None) -> None:
        """Hide the records from ``offset`` on, as if they were not appended yet; None shows them again."""
        with self._changed:
            self._part(at).end_at = offset
            self._changed.notify_all()

    def abort_at(self, at: TopicPartition, offset: int, error: BaseException) -> None:
        """Raise ``error`` once, from the first read that starts at ``offset``.

        A read that starts before ``offset`` returns the records before it.
        """
        with self._changed:
            self._part(at).aborts[offset] = error
            self._changed.notify_all()

    def truncate(self, at: TopicPartition, offset: int) -> None:
        """Drop the records before ``offset``, as retention would."""
        with self._changed:
            part = self._part(at)
            if not part.first <= offset <= part.end:
                raise ValueError(f"{at}: offset {offset}, expected {part.first} … {part.end}")
            del part.records[: offset - part.first]
            part.first = offset

    def delete(self, at: TopicPartition, offset: int) -> None:
        """Delete one record, as ``XDEL`` would; reads pass it as a gap."""
        with self._changed:
            part = self._part(at)
            if not part.first <= offset < part.end:
                raise ValueError(f"{at}: offset {offset}, expected {part.first} … {part.end - 1}")
            part.records[offset - part.first] = None

    def append_unreadable(self, at: TopicPartition, payload: bytes, reason: str = "no record of ours") -> None:
        """Append something that is no record, as a foreign producer may; reads pass and report it."""
        with self._changed:
            part = self._part(at)
            place = f"entry {part.end}"
            part.records.append(UnreadableRecord(at.topic, at.partition, part.end, place, reason, payload))
            self._changed.notify_all()

    def remove(self, topic: str) -> None:
        """Delete a topic with its records; :meth:`ensure_topic` makes another one, of another incarnation."""
        with self._changed:
            self._parts(topic)
            del self._topics[topic]
            self._changed.notify_all()

    def make_anew(self, topic: str, partitions: int | None = None) -> None:
        """Delete a topic and create it again, by default as wide as before."""
        count = self.partitions(topic) if partitions is None else partitions
        self.remove(topic)
        self.ensure_topic(topic, count)

    def _parts(self, topic: str) -> list[_Partition]:
        try:
            return self._topics[topic]
        except KeyError:
            raise EventLogError(f"topic {topic!r} does not exist; topics: {sorted(self._topics)}") from None

    def _part(self, at: TopicPartition) -> _Partition:
        parts = self._parts(at.topic)
        check_partition(at.topic, at.partition, len(parts))
        return parts[at.partition]

    def _check(self, at: TopicPartition, position: int) -> None:
        part = self._part(at)
        if not part.first <= position <= part.end:
            raise PositionOutOfRange(
                f"{at.topic}/{at.partition}: position {position}, the log holds {part.first} … {part.end}"
            )

    def _take(self, positions: Mapping[TopicPartition, int], max_records: int) -> Fetch:
        records: list[Record] = []
        unreadable: list[UnreadableRecord] = []
        gaps: dict[TopicPartition, int] = {}
        after = dict(positions)
        if self._paused:
            return Fetch(records, after, frozenset())
        for at, start in positions.items():
            part = self._part(at)
            if start in part.aborts:
                raise part.aborts.pop(start)
            stop = min(part.visible_end, start + max_records - len(records), *(o for o in part.aborts if o > start))
            after[at] = max(stop, start)
            found = part.records[start - part.first : after[at] - part.first]
            records += [each for each in found if isinstance(each, Record)]
            unreadable += [each for each in found if isinstance(each, UnreadableRecord)]
            if deleted := found.count(None):
                gaps[at] = deleted
        at_end = frozenset(at for at, position in after.items() if position >= self._part(at).visible_end)
        return Fetch(records, after, at_end, gaps, unreadable)
