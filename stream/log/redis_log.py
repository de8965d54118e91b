"""The event log on Redis Streams (Redis 7 or newer, Valkey): the embedded default.

Keys, all under ``{namespace}:log:``

======================= ====== ==================================================================
``topics``              hash   topic → its number of partitions
``{topic}:{partition}`` stream the records; fields ``v`` (value), ``h`` (headers), ``t`` (arrival)
======================= ====== ==================================================================

Entry ids are ``0-1, 0-2, …`` without gaps (``XADD 0-*``). So an offset is the sequence number - 1, and a trimmed
position is recognised exactly.

Appending is *at least once*: an append whose acknowledgement was lost with the connection is sent again. Consumers
drop duplicates by event id (:mod:`stream.join.joiner`).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar, cast

import msgspec
import redis
from redis.typing import EncodableT, FieldT, KeyT, StreamIdT

from smes.errors import EventLogError, PositionOutOfRange
from smes.ranges import NonNegativeFloat, PositiveInt, check_ranges
from smes_io.clock import wall_clock_ms
from smes_io.redis_client import EVENT_LOG, address, connect, retry_during_outage
from stream.log.event_log import (
    Fetch,
    Headers,
    OutRecord,
    Positions,
    Record,
    TopicPartition,
    check_partition,
    check_partition_count,
    check_read,
)

_T = TypeVar("_T")
_Entry = tuple[bytes, dict[bytes, bytes]]

_MAX_VALUE_BYTES = 512 * 1024 * 1024  # Redis' proto-max-bulk-len
_RECORD_OVERHEAD_BYTES = 64  # fields and headers around a record's value
_FIRST_READ_BYTES_PER_RECORD = 65_536  # a guess, until the first read shows the size of records
_LONGEST_BLOCK_S = 1.0  # a blocking read asks again this often, well within the client's timeout
_HEADERS = msgspec.msgpack.Decoder(tuple[tuple[str, bytes], ...])

# KEYS[1]: a stream. Returns its length and its newest entry id.
# XINFO also returns the first and the last entry, megabytes with Arrow records; the script leaves them in the server.
_BOUNDS_LUA = """
if redis.call('EXISTS', KEYS[1]) == 0 then return {0, '0-0'} end
local info, length, last = redis.call('XINFO', 'STREAM', KEYS[1]), 0, '0-0'
for i = 1, #info, 2 do
  if info[i] == 'length' then length = info[i + 1] end
  if info[i] == 'last-generated-id' then last = info[i + 1] end
end
return {length, last}
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
    outage_timeout_s: NonNegativeFloat = 30.0

    def __post_init__(self) -> None:
        check_ranges(self)


def connect_log(url: str, *, timeout_s: float) -> redis.Redis:
    """A client for :class:`RedisStreamsLog` whose server has answered.

    Raises:
        ValueError: The URL is malformed.
        EventLogUnavailable: No answer within ``timeout_s``.
        EventLogError: Wrong credentials.
    """
    return connect(url, timeout_s, EVENT_LOG, answer_timeout_s=max(timeout_s, 5 * _LONGEST_BLOCK_S))


class RedisStreamsLog:
    """A thread-safe :class:`stream.log.event_log.EventLog` on Redis Streams.

    Args:
        client: From :func:`connect_log`; it must return bytes (no ``decode_responses``). Closing the log closes it.
        namespace: First part of every key.
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
        self._namespace = namespace
        self._config = config or RedisLogConfig()
        self._now_ms = now_ms
        self._partitions: dict[str, int] = {}
        self._bytes_per_record = float(_FIRST_READ_BYTES_PER_RECORD)

    def ensure_topic(self, topic: str, partitions: int) -> None:
        """See :meth:`stream.log.event_log.EventLog.ensure_topic`."""
        check_partition_count(topic, partitions)
        key = self._topics_key()
        self._retry_during_outage(f"creating topic {topic}", lambda: self._client.hsetnx(key, topic, str(partitions)))
        existing = self.partitions(topic)
        if existing != partitions:
            raise EventLogError(f"topic {topic!r} has {existing} partitions, expected {partitions}")

    def partitions(self, topic: str) -> int:
        """See :meth:`stream.log.event_log.EventLog.partitions`."""
        known = self._partitions.get(topic)
        if known is not None:
            return known
        key = self._topics_key()
        count = self._retry_during_outage(f"looking up topic {topic}", lambda: self._client.hget(key, topic))
        if count is None:
            raise EventLogError(f"topic {topic!r} does not exist in {self._server()}, namespace {self._namespace}")
        self._partitions[topic] = int(cast(bytes, count))
        return self._partitions[topic]

    def append(self, topic: str, records: Sequence[OutRecord]) -> None:
        """See :meth:`stream.log.event_log.EventLog.append`; returns once the server has accepted every record.

        Records are as durable as the server makes them. With ``appendonly yes`` and ``appendfsync always``, a killed
        server loses none.
        """
        count = self.partitions(topic)
        for record in records:
            check_partition(topic, record.partition, count)
            if len(record.value) > _MAX_VALUE_BYTES:
                limit = _MAX_VALUE_BYTES
                raise EventLogError(f"topic {topic!r}: a record of {len(record.value)} bytes, expected at most {limit}")
        start, size = 0, 0
        for i, record in enumerate(records):
            size += len(record.value) + _RECORD_OVERHEAD_BYTES
            if size >= self._config.append_chunk_bytes or i == len(records) - 1:
                self._append_chunk(topic, records[start : i + 1])
                start, size = i + 1, 0

    def read(self, positions: Mapping[TopicPartition, int], *, max_records: int, timeout_s: float) -> Fetch:
        """See :meth:`stream.log.event_log.EventLog.read`. Each partition gets an equal share of ``max_records``."""
        check_read(positions, max_records, self.partitions)
        count = self._count(max_records, len(positions))
        streams: dict[KeyT, StreamIdT] = {self._key(at): f"0-{position}" for at, position in positions.items()}
        deadline_s = time.monotonic() + timeout_s
        while True:
            block_s = min(deadline_s - time.monotonic(), _LONGEST_BLOCK_S)
            entries = self._xread(streams, count, block_s)
            if entries or deadline_s <= time.monotonic():
                return self._fetch(positions, entries, count)

    def begin(self, topic: str) -> Positions:
        """See :meth:`stream.log.event_log.EventLog.begin`."""
        return {at: bounds[0] for at, bounds in self._bounds(self._all(topic)).items()}

    def end(self, topic: str) -> Positions:
        """See :meth:`stream.log.event_log.EventLog.end`."""
        return {at: bounds[1] for at, bounds in self._bounds(self._all(topic)).items()}

    def close(self) -> None:
        """See :meth:`stream.log.event_log.EventLog.close`."""
        self._client.close()

    def _append_chunk(self, topic: str, records: Sequence[OutRecord]) -> None:
        arrival_ms = self._now_ms()
        keep = self._config.max_entries_per_partition
        unsent = list(records)

        def send() -> None:
            nonlocal unsent
            pipe = self._client.pipeline(transaction=False)
            for record in unsent:
                key, headers = self._key(TopicPartition(topic, record.partition)), pack_headers(record.headers)
                fields: dict[FieldT, EncodableT] = {"v": record.value, "h": headers, "t": arrival_ms}
                pipe.xadd(key, fields, id="0-*", maxlen=keep, approximate=True)
            answers = pipe.execute(raise_on_error=False)
            refused = [(r, a) for r, a in zip(unsent, answers, strict=True) if isinstance(a, Exception)]
            unsent = [r for r, a in refused if isinstance(a, redis.ConnectionError)]  # the server is loading its file
            for record, answer in refused:
                if not isinstance(answer, redis.ConnectionError):
                    where = f"{topic}/{record.partition} in {self._server()}"
                    raise EventLogError(f"{where}: {len(refused)} of {len(answers)} records refused: {answer}")
            if unsent:
                raise refused[0][1]

        self._retry_during_outage(f"appending to {topic}", send)

    def _count(self, max_records: int, partitions: int) -> int:
        """Entries to ask for per partition, at least 1: within the records wanted and the bytes allowed."""
        affordable = self._config.fetch_max_bytes / self._bytes_per_record
        return max(1, int(min(max_records, affordable) / partitions))

    def _xread(self, streams: dict[KeyT, StreamIdT], count: int, block_s: float) -> dict[bytes, list[_Entry]]:
        block_ms = max(1, round(block_s * 1000)) if block_s > 0 else None
        answer: object = self._retry_during_outage("reading", lambda: self._client.xread(streams, count, block_ms))
        if not answer:
            return {}
        if isinstance(answer, dict):  # RESP3
            return {key: lists[0] for key, lists in answer.items()}
        return dict(cast(list[tuple[bytes, list[_Entry]]], answer))

    def _fetch(
        self, positions: Mapping[TopicPartition, int], entries: Mapping[bytes, list[_Entry]], count: int
    ) -> Fetch:
        records: list[Record] = []
        after: Positions = {}
        maybe_at_end = []
        for at, position in positions.items():
            found = entries.get(self._key(at).encode(), [])
            new = [_record(at, entry) for entry in found]
            if new and (new[0].offset != position or new[-1].offset != position + len(new) - 1):
                begin = self._bounds([at])[at][0]
                raise PositionOutOfRange(
                    f"{at.topic}/{at.partition}: no record at position {position}: trimmed, the log begins at {begin}"
                )
            records += new
            after[at] = position + len(new)
            if not new or len(new) >= count:
                maybe_at_end.append(at)
        self._learn_size(records)
        at_end = set(positions) - set(maybe_at_end)  # these gave fewer records than asked for: there were no more
        for at, (begin, end) in self._bounds(maybe_at_end).items():
            if not begin <= after[at] <= end:
                raise PositionOutOfRange(
                    f"{at.topic}/{at.partition}: position {after[at]}, the log holds {begin} … {end}"
                )
            if after[at] == end:
                at_end.add(at)
        return Fetch(records, after, frozenset(at_end))

    def _learn_size(self, records: Sequence[Record]) -> None:
        """Raise the estimate at once and lower it slowly: too low an estimate costs memory, too high a one little."""
        if records:
            mean = sum(len(r.value) for r in records) / len(records) + _RECORD_OVERHEAD_BYTES
            self._bytes_per_record = max(mean, 0.5 * self._bytes_per_record)

    def _bounds(self, ats: Sequence[TopicPartition]) -> dict[TopicPartition, tuple[int, int]]:
        """Begin and end position of each partition."""
        if not ats:
            return {}

        def ask() -> list[tuple[int, bytes]]:
            pipe = self._client.pipeline(transaction=False)
            for at in ats:
                pipe.eval(_BOUNDS_LUA, 1, self._key(at))
            return cast(list[tuple[int, bytes]], pipe.execute())

        answers = self._retry_during_outage("asking for begin and end", ask)
        ends = [_sequence(last) for _, last in answers]
        return {at: (end - length, end) for at, end, (length, _) in zip(ats, ends, answers, strict=True)}

    def _retry_during_outage(self, doing: str, call: Callable[[], _T]) -> _T:
        return retry_during_outage(self._client, doing, call, EVENT_LOG, self._config.outage_timeout_s)

    def _server(self) -> str:
        return f"Redis at {address(self._client)}"

    def _all(self, topic: str) -> list[TopicPartition]:
        return [TopicPartition(topic, i) for i in range(self.partitions(topic))]

    def _key(self, at: TopicPartition) -> str:
        return f"{self._namespace}:log:{at.topic}:{at.partition}"

    def _topics_key(self) -> str:
        return f"{self._namespace}:log:topics"


def _sequence(entry_id: bytes) -> int:
    milliseconds, _, sequence = entry_id.partition(b"-")
    if milliseconds != b"0":
        raise EventLogError(
            f"stream entry {entry_id.decode()}: expected ids 0-1, 0-2, … (another program may write here)"
        )
    return int(sequence)


def _record(at: TopicPartition, entry: _Entry) -> Record:
    entry_id, fields = entry
    try:
        value, headers, arrival_ms = fields[b"v"], unpack_headers(fields[b"h"]), int(fields[b"t"])
    except (KeyError, ValueError) as error:
        raise EventLogError(
            f"{at.topic}/{at.partition}: entry {entry_id.decode()}, expected a record of the event log: {error!r}"
        ) from error
    return Record(at.topic, at.partition, _sequence(entry_id) - 1, value, headers, arrival_ms)


# Cached, because every record has headers and few of them differ.
@lru_cache(maxsize=256)
def pack_headers(headers: Headers) -> bytes:
    """Headers as the field ``h`` holds them: MessagePack, an array of [name, bytes] pairs."""
    return msgspec.msgpack.encode(headers)


@lru_cache(maxsize=256)
def unpack_headers(data: bytes) -> Headers:
    """The inverse of :func:`pack_headers`.

    Raises:
        ValueError: The bytes are not packed headers.
    """
    try:
        return _HEADERS.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"headers of {len(data)} bytes: expected MessagePack [[name, bytes], …]: {error}") from error
