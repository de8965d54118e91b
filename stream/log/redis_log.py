"""The event log on Redis Streams (Redis 7 or newer, Valkey): the embedded default.

Keys, all under ``{namespace}:log:``. The braces are part of the key: a hash tag, so that one server of a Redis Cluster
has all of them.

======================= ====== ==================================================================
``topics``              hash   topic → its number of partitions
``{topic}:{partition}`` stream the records (:mod:`stream.log.redis_entries`)
``sent:{batch}``        string the id of a batch's first entry, for a minute or two after it was added
======================= ====== ==================================================================

Entry ids are ``0-1, 0-2, …`` (``XADD 0-*``), and an offset is the sequence number - 1, as long as nobody else writes
there; :mod:`stream.log.redis_ids` says what happens after a foreign entry. A trimmed position is an error, a deleted
entry is a gap that is counted, and an entry that is no record of ours is reported and passed.

A stream's incarnation is the name of a consumer group that nobody uses: it lives and dies with the stream itself.

An append whose acknowledgement was lost with the connection is sent again; the server knows it and adds nothing
twice. A caller that gives up after ``outage_timeout_s`` and appends the same again does: consumers drop duplicates by
event id (:mod:`stream.join.joiner`).
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar, cast

import redis
from redis.typing import KeyT, StreamIdT

from smes.errors import EventLogError, PositionOutOfRange
from smes.ranges import PositiveInt, SecondsOrZero, check_ranges
from smes_io.clock import wall_clock_ms
from smes_io.redis_access import RedisAccess, key_prefix
from smes_io.redis_client import EVENT_LOG, address, connect, retry_during_outage
from smes_io.stopping import StoppableCalls
from stream.log.event_log import (
    Fetch,
    OutRecord,
    PartitionCounts,
    Positions,
    Record,
    TopicPartition,
    UnreadableRecord,
    check_partition_count,
    check_read,
)
from stream.log.redis_append import Appender
from stream.log.redis_entries import Entry, record_of
from stream.log.redis_ids import Bounds, Id, id_before, offset_of, parse_id, shown
from stream.log.redis_times import ARRIVAL_LUA, position_at

_T = TypeVar("_T")

_MAX_VALUE_BYTES = 512 * 1024 * 1024  # Redis' proto-max-bulk-len
_RECORD_OVERHEAD_BYTES = 64  # fields and headers around a record's value
_FIRST_READ_BYTES_PER_RECORD = 65_536  # a guess, until the first read shows the size of records
_REMEMBER_S = 60.0  # what was appended, beyond twice the time in which it may be sent again
_LONGEST_BLOCK_S = 0.25  # a blocking read asks again this often, well within the client's timeout and a stop's

# KEYS[1]: a stream; ARGV[1]: an id. Returns its length, four counters of XINFO, and whether an entry lies after the id.
# XINFO also returns the first and the last entry, megabytes with Arrow records; the script leaves them in the server.
_BOUNDS_LUA = """
if redis.call('EXISTS', KEYS[1]) == 0 then return {0, '0-0', '0-0', '0-0', 0, 0} end
local info, s = redis.call('XINFO', 'STREAM', KEYS[1]), {}
for i = 1, #info, 2 do s[info[i]] = info[i + 1] end
local after = 0
if s['length'] > 0 and ARGV[1] ~= '' then after = #redis.call('XRANGE', KEYS[1], '(' .. ARGV[1], '+', 'COUNT', 1) end
return {s['length'], s['recorded-first-entry-id'], s['last-generated-id'], s['max-deleted-entry-id'],
        s['entries-added'], after}
"""


@dataclass(frozen=True)
class RedisLogConfig:
    """Limits of the event log on Redis.

    Attributes:
        max_entries_per_partition: About how many of the newest entries are kept (``MAXLEN ~``). A reader that falls
            further behind gets ``PositionOutOfRange``.
        fetch_max_bytes: About the most bytes of a read, estimated from the size of earlier records.
        append_chunk_bytes: About how many bytes an append sends in one round trip.
        outage_timeout_s: How long an operation is tried while the server is away, as during a restart.
    """

    max_entries_per_partition: PositiveInt = 1_000_000
    fetch_max_bytes: PositiveInt = 32 * 1024 * 1024
    append_chunk_bytes: PositiveInt = 4 * 1024 * 1024
    outage_timeout_s: SecondsOrZero = 120.0

    def __post_init__(self) -> None:
        check_ranges(self)


def connect_log(url: str, *, timeout_s: float, access: RedisAccess | None = None, namespace: str = "") -> redis.Redis:
    """A client for :class:`RedisStreamsLog` whose server has answered.

    Args:
        url: Of the server.
        timeout_s: Longest wait for a connection.
        access: How the server lets us in, beside what the URL says.
        namespace: Of the log; a cluster needs to know.

    Raises:
        ValueError: The URL is malformed or does not fit ``access``.
        EventLogUnavailable: No answer within ``timeout_s``.
        EventLogError: Wrong credentials or certificates.
    """
    answer_s = max(timeout_s, 5 * _LONGEST_BLOCK_S)
    return connect(url, timeout_s, EVENT_LOG, answer_timeout_s=answer_s, access=access, namespace=namespace)


class RedisStreamsLog:
    """A thread-safe :class:`stream.log.event_log.EventLog` on Redis Streams.

    Args:
        client: From :func:`connect_log`; it must return bytes (no ``decode_responses``). Closing the log closes it.
        namespace: First part of every key, in braces: a hash tag, for clusters.
        config: Limits.
        now_ms: The producer's clock, Unix milliseconds; it stamps ``arrival_ms``.
    """

    def __init__(
        self,
        client: redis.Redis,
        namespace: str,
        config: RedisLogConfig | None = None,
        now_ms: Callable[[], int] = wall_clock_ms,
    ) -> None:
        self._client = client
        self._namespace, self._prefix = namespace, key_prefix(namespace)
        self._config = config or RedisLogConfig()
        self._now_ms = now_ms
        self._calls = StoppableCalls()
        self._counts = PartitionCounts(self._ask_partitions)
        keep, remember_s = self._config.max_entries_per_partition, 2 * self._config.outage_timeout_s + _REMEMBER_S
        self._appender = Appender(client, self._prefix, now_ms, keep, remember_s)
        self._bytes_per_record = float(_FIRST_READ_BYTES_PER_RECORD)

    def ensure_topic(self, topic: str, partitions: int, *, exact: bool = True) -> None:
        """See :meth:`stream.log.event_log.EventLog.ensure_topic`."""
        check_partition_count(topic, partitions)
        key = self._topics_key()
        self._retry_during_outage(f"creating topic {topic}", lambda: self._client.hsetnx(key, topic, str(partitions)))
        existing = self.partitions(topic)
        if exact and existing != partitions:
            raise EventLogError(f"topic {topic!r} has {existing} partitions, expected {partitions}")

    def partitions(self, topic: str) -> int:
        """See :meth:`stream.log.event_log.EventLog.partitions`."""
        return self._counts.now(topic)

    def incarnations(self, topic: str) -> dict[TopicPartition, str]:
        """See :meth:`stream.log.event_log.EventLog.incarnations`; a stream that has none gets one now."""
        ats = self._all(topic)
        names = self._retry_during_outage(
            f"asking for incarnations of {topic}",
            lambda: self._appender.incarnations([self._key(at) for at in ats]),
            ats,
        )
        return dict(zip(ats, names, strict=True))

    def append(self, topic: str, records: Sequence[OutRecord]) -> None:
        """See :meth:`stream.log.event_log.EventLog.append`; returns once the server has accepted every record.

        Records are as durable as the server makes them. With ``appendonly yes`` and ``appendfsync always``, a killed
        server loses none.
        """
        self.append_reporting(topic, records)

    def append_reporting(self, topic: str, records: Sequence[OutRecord]) -> list[int | None]:
        """See :meth:`stream.log.event_log.ReportingLog.append_reporting`."""
        offsets: list[int | None] = []
        for record in records:
            self._counts.check(topic, record.partition)
            if len(record.value) > _MAX_VALUE_BYTES:
                limit = _MAX_VALUE_BYTES
                raise EventLogError(f"topic {topic!r}: a record of {len(record.value)} bytes, expected at most {limit}")
        start, size = 0, 0
        for i, record in enumerate(records):
            size += len(record.value) + _RECORD_OVERHEAD_BYTES
            if size >= self._config.append_chunk_bytes or i == len(records) - 1:
                offsets += self._append_chunk(topic, records[start : i + 1])
                start, size = i + 1, 0
        return offsets

    def read(self, positions: Mapping[TopicPartition, int], *, max_records: int, timeout_s: float) -> Fetch:
        """See :meth:`stream.log.event_log.EventLog.read`. Each partition gets an equal share of ``max_records``."""
        check_read(positions, max_records, self._counts.check)
        count = self._count(max_records, len(positions))
        streams: dict[KeyT, StreamIdT] = {self._key(at): shown(id_before(p)) for at, p in positions.items()}
        deadline_s = time.monotonic() + timeout_s
        while True:
            block_s = min(deadline_s - time.monotonic(), _LONGEST_BLOCK_S)
            entries = self._xread(list(positions), streams, count, block_s)
            if entries or deadline_s <= time.monotonic() or self._calls.stopping:
                return self._fetch(positions, entries, count)

    def begin(self, topic: str) -> Positions:
        """See :meth:`stream.log.event_log.EventLog.begin`."""
        return {at: bounds.begin for at, (bounds, _) in self._bounds(dict.fromkeys(self._all(topic))).items()}

    def end(self, topic: str) -> Positions:
        """See :meth:`stream.log.event_log.EventLog.end`."""
        return {at: bounds.end for at, (bounds, _) in self._bounds(dict.fromkeys(self._all(topic))).items()}

    def at_time(self, topic: str, time_ms: int) -> Positions:
        """See :meth:`stream.log.event_log.EventLog.at_time`: a binary search by the entries' arrival times."""
        bounds = self._bounds(dict.fromkeys(self._all(topic)))
        return {
            at: position_at(time_ms, found.begin, found.end, partial(self._arrival, at))
            for at, (found, _) in bounds.items()
        }

    def set_stop(self, event: threading.Event | None) -> None:
        """See :meth:`stream.log.event_log.EventLog.set_stop`."""
        self._calls.set_stop(event)

    def close(self) -> None:
        """See :meth:`stream.log.event_log.EventLog.close`."""
        self._calls.close()
        self._client.close()

    def _append_chunk(self, topic: str, records: Sequence[OutRecord]) -> list[int | None]:
        ats = [TopicPartition(topic, record.partition) for record in records]
        placed = [(self._key(at), at, record) for at, record in zip(ats, records, strict=True)]
        send = self._appender.sending(placed, self._server())
        return self._retry_during_outage(f"appending to {topic}", send, ats)

    def _count(self, max_records: int, partitions: int) -> int:
        """Entries to ask for per partition, at least 1: within the records wanted and the bytes allowed."""
        affordable = self._config.fetch_max_bytes / self._bytes_per_record
        return max(1, int(min(max_records, affordable) / partitions))

    def _xread(
        self, ats: Sequence[TopicPartition], streams: dict[KeyT, StreamIdT], count: int, block_s: float
    ) -> dict[bytes, list[Entry]]:
        block_ms = max(1, round(block_s * 1000)) if block_s > 0 else None
        answer: object = self._retry_during_outage("reading", lambda: self._client.xread(streams, count, block_ms), ats)
        if not answer:
            return {}
        if isinstance(answer, dict):  # RESP3
            return {key: lists[0] for key, lists in answer.items()}
        return dict(cast(list[tuple[bytes, list[Entry]]], answer))

    def _fetch(
        self, positions: Mapping[TopicPartition, int], entries: Mapping[bytes, list[Entry]], count: int
    ) -> Fetch:
        found = _Found(self._now_ms())
        after: Positions = {}
        maybe_at_end: dict[TopicPartition, Id | None] = {}
        for at, position in positions.items():
            new = entries.get(self._key(at).encode(), [])
            after[at] = self._take(at, position, new, found) if new else position
            if not new or len(new) >= count:
                maybe_at_end[at] = id_before(after[at])
        self._learn_size(found.records)
        at_end = set(positions) - set(maybe_at_end)  # these gave fewer records than asked for: there were no more
        for at, (bounds, more) in self._bounds(maybe_at_end).items():
            if after[at] > bounds.end:
                what = f"position {after[at]}, the log holds {bounds.begin} … {bounds.end}"
                raise PositionOutOfRange(f"{at.topic}/{at.partition}: {what}")
            if not more and after[at] < bounds.end:  # the newest entries were deleted, or all were trimmed
                found.add_gap(at, bounds.passed(after[at], None))
                after[at] = bounds.end
            if after[at] == bounds.end:
                at_end.add(at)
        return Fetch(found.records, after, frozenset(at_end), found.gaps, found.unreadable)

    def _take(self, at: TopicPartition, position: int, entries: Sequence[Entry], found: "_Found") -> int:
        """Sort the entries into ``found``; the position after them."""
        expected: Id = (id_before(position)[0], id_before(position)[1] + 1)
        bounds: Bounds | None = None
        for name, fields in entries:
            entry = parse_id(name)
            if entry != expected:
                bounds = bounds or self._bounds({at: None})[at][0]
                found.add_gap(at, bounds.passed(position, entry))
            position = offset_of(at, entry) + 1
            expected = entry[0], entry[1] + 1
            one = record_of(at, position - 1, name, fields, found.now_ms)
            found.add(one)
        return position

    def _learn_size(self, records: Sequence[Record]) -> None:
        """Raise the estimate at once and lower it slowly: too low an estimate costs memory, too high a one little."""
        if records:
            mean = sum(len(r.value) for r in records) / len(records) + _RECORD_OVERHEAD_BYTES
            self._bytes_per_record = max(mean, 0.5 * self._bytes_per_record)

    def _arrival(self, at: TopicPartition, position: int) -> tuple[int, int] | None:
        """Offset and arrival time of the first entry from ``position`` on that has one; None: there is none."""
        before = shown(id_before(position))
        answer = self._retry_during_outage(
            "asking for times", lambda: self._client.eval(ARRIVAL_LUA, 1, self._key(at), before), [at]
        )
        if not answer:
            return None
        name, arrival_ms = cast(list[bytes], answer)
        return offset_of(at, parse_id(name)), int(arrival_ms)

    def _bounds(self, ats: Mapping[TopicPartition, Id | None]) -> dict[TopicPartition, tuple[Bounds, bool]]:
        """Each partition's bounds, and whether it has an entry after the given id."""
        if not ats:
            return {}

        def ask() -> list[tuple[int, bytes, bytes, bytes, int, int]]:
            pipe = self._client.pipeline(transaction=False)
            for at, before in ats.items():
                pipe.eval(_BOUNDS_LUA, 1, self._key(at), shown(before) if before else "")
            return cast(list[tuple[int, bytes, bytes, bytes, int, int]], pipe.execute())

        answers = self._retry_during_outage("asking for begin and end", ask, list(ats))
        return {
            at: (Bounds(at, length, parse_id(first), parse_id(last), parse_id(deleted), added), bool(more))
            for at, (length, first, last, deleted, added, more) in zip(ats, answers, strict=True)
        }

    def _retry_during_outage(self, doing: str, call: Callable[[], _T], ats: Sequence[TopicPartition] = ()) -> _T:
        def attempt() -> _T:
            try:
                return call()
            except redis.ResponseError as error:
                if "WRONGTYPE" in str(error):
                    self._name_wrong_key(ats, error)
                raise

        client, timeout_s = self._client, self._config.outage_timeout_s
        return retry_during_outage(client, doing, attempt, EVENT_LOG, timeout_s, self._calls)

    def _name_wrong_key(self, ats: Sequence[TopicPartition], error: redis.ResponseError) -> None:
        """Raise an error that names the key of another type."""
        for key, wanted in [*((self._key(at), "stream") for at in ats), (self._topics_key(), "hash")]:
            kind = cast(bytes, self._client.type(key)).decode()
            if kind not in (wanted, "none"):
                what = f"key {key} in {self._server()}: holds a {kind}, expected a {wanted}"
                raise EventLogError(f"{what}; another program may have written it, DEL removes it") from error

    def _ask_partitions(self, topic: str) -> int:
        key = self._topics_key()
        answer = self._retry_during_outage(f"looking up topic {topic}", lambda: self._client.hget(key, topic))
        if answer is None:
            raise EventLogError(f"topic {topic!r} does not exist in {self._server()}, namespace {self._namespace}")
        count = cast(bytes, answer)
        if not (count.isdigit() and int(count) >= 1):
            raise EventLogError(f"topic {topic!r} in {self._server()}, key {key}: {count!r}, expected a number above 0")
        return int(count)

    def _server(self) -> str:
        return f"Redis at {address(self._client)}"

    def _all(self, topic: str) -> list[TopicPartition]:
        return [TopicPartition(topic, i) for i in range(self.partitions(topic))]

    def _key(self, at: TopicPartition) -> str:
        return f"{self._prefix}:log:{at.topic}:{at.partition}"

    def _topics_key(self) -> str:
        return f"{self._prefix}:log:topics"


@dataclass(slots=True)
class _Found:
    """What a read has found so far."""

    now_ms: int
    records: list[Record] = field(default_factory=list)
    unreadable: list[UnreadableRecord] = field(default_factory=list)
    gaps: dict[TopicPartition, int] = field(default_factory=dict)

    def add(self, one: Record | UnreadableRecord) -> None:
        if isinstance(one, Record):
            self.records.append(one)
        else:
            self.unreadable.append(one)

    def add_gap(self, at: TopicPartition, count: int) -> None:
        if count:
            self.gaps[at] = self.gaps.get(at, 0) + count
