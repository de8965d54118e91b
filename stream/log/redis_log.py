"""The event log on Redis Streams (Redis 7 or newer, Valkey): the embedded default.

One stream per partition, key ``{namespace}:log:{topic}:{partition}``. Entry ids are ``0-1, 0-2, …`` (``XADD 0-*``):
dense, so offset = sequence number - 1, and a trimmed position is recognised exactly. The hash
``{namespace}:log:topics`` maps a topic to its number of partitions.

Appending is *at least once*: an append whose acknowledgement was lost with the connection is sent again. Consumers
drop duplicates by event id (:mod:`stream.join.joiner`).
"""

import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar, cast

import redis
from redis.typing import EncodableT, FieldT, KeyT, StreamIdT

from smes.errors import EventLogError, PositionOutOfRange
from smes_io.clock import wall_clock_ms
from smes_io.redis_client import LONGEST_BLOCK_S, retry, server_name
from stream.log.event_log import Fetch, Headers, OutRecord, Positions, Record, TopicPartition

_T = TypeVar("_T")
_Entry = tuple[bytes, dict[bytes, bytes]]

_MAX_VALUE_BYTES = 512 * 1024 * 1024  # Redis' proto-max-bulk-len
_FIRST_READ_BYTES_PER_RECORD = 65_536  # a guess until the first read tells

# XINFO answers with the first and last entry, megabytes with Arrow records: the script keeps them in the server.
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
        max_entries_per_partition: Retention: about this many of the newest entries are kept (``MAXLEN ~``). A reader
            that falls further behind gets ``PositionOutOfRange``.
        fetch_max_bytes: A read aims at no more than this many bytes (it knows the size of earlier records only).
        append_chunk_bytes: Values sent in one round trip of an append.
        outage_timeout_s: How long an operation rides out a server that is away, such as one being restarted.
    """

    max_entries_per_partition: int = 1_000_000
    fetch_max_bytes: int = 32 * 1024 * 1024
    append_chunk_bytes: int = 4 * 1024 * 1024
    outage_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        for name in ("max_entries_per_partition", "fetch_max_bytes", "append_chunk_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"redis log: {name} {getattr(self, name)}, expected at least 1")
        if self.outage_timeout_s < 0:
            raise ValueError(f"redis log: outage_timeout_s {self.outage_timeout_s}, expected at least 0 seconds")


class RedisStreamsLog:
    """A thread-safe :class:`stream.log.event_log.EventLog` on Redis Streams. Owns ``client``: closing the log closes it.

    Args:
        client: From :func:`connect`; it must return bytes (no ``decode_responses``).
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
        if partitions < 1:
            raise ValueError(f"topic {topic!r}: partitions {partitions}, expected at least 1")
        key = self._topics_key()
        self._ride_out("create the topic", lambda: self._client.hsetnx(key, topic, str(partitions)))
        there = self.partitions(topic)
        if there != partitions:
            raise EventLogError(f"topic {topic!r} has {there} partitions, expected {partitions}")

    def partitions(self, topic: str) -> int:
        """See :meth:`stream.log.event_log.EventLog.partitions`."""
        known = self._partitions.get(topic)
        if known is not None:
            return known
        key = self._topics_key()
        count = self._ride_out("look up the topic", lambda: self._client.hget(key, topic))
        if count is None:
            raise EventLogError(
                f"topic {topic!r} does not exist in {server_name(self._client)}, namespace {self._namespace}"
            )
        self._partitions[topic] = int(cast(bytes, count))
        return self._partitions[topic]

    def append(self, topic: str, records: Sequence[OutRecord]) -> None:
        """See :meth:`stream.log.event_log.EventLog.append`: returns once the server has accepted every record.

        Durable as the server is: with ``appendonly yes`` a killed server loses nothing of it.
        """
        count = self.partitions(topic)
        for record in records:
            if not 0 <= record.partition < count:
                raise ValueError(f"topic {topic!r}: partition {record.partition}, expected 0 … {count - 1}")
            if len(record.value) > _MAX_VALUE_BYTES:
                raise EventLogError(f"topic {topic!r}: a record of {len(record.value)} bytes, Redis takes 512 MiB")
        start, size = 0, 0
        for i, record in enumerate(records):
            size += len(record.value) + 64
            if size >= self._config.append_chunk_bytes or i == len(records) - 1:
                self._append_chunk(topic, records[start : i + 1])
                start, size = i + 1, 0

    def read(self, positions: Mapping[TopicPartition, int], *, max_records: int, timeout_s: float) -> Fetch:
        """See :meth:`stream.log.event_log.EventLog.read`. Each partition gets its share of ``max_records``, at least 1."""
        if max_records < 1:
            raise ValueError(f"max_records {max_records}, expected at least 1")
        if not positions:
            raise ValueError("positions: expected at least one partition")
        self._check(positions)
        count = self._count(max_records, len(positions))
        streams: dict[KeyT, StreamIdT] = {self._key(at): f"0-{position}" for at, position in positions.items()}
        deadline = time.monotonic() + timeout_s
        while True:
            block_s = min(deadline - time.monotonic(), LONGEST_BLOCK_S)
            entries = self._xread(streams, count, block_s)
            if entries or deadline <= time.monotonic():
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
        todo = list(records)

        def send() -> None:
            nonlocal todo
            pipe = self._client.pipeline(transaction=False)
            for record in todo:
                key, headers = self._key(TopicPartition(topic, record.partition)), pack_headers(record.headers)
                fields: dict[FieldT, EncodableT] = {"v": record.value, "h": headers, "t": arrival_ms}
                pipe.xadd(key, fields, id="0-*", maxlen=keep, approximate=True)
            answers = pipe.execute(raise_on_error=False)
            refused = [(r, a) for r, a in zip(todo, answers, strict=True) if isinstance(a, Exception)]
            todo = [r for r, a in refused if isinstance(a, redis.ConnectionError)]  # the server is loading its file
            for record, answer in refused:
                if not isinstance(answer, redis.ConnectionError):
                    where = f"{topic}/{record.partition} in {server_name(self._client)}"
                    raise EventLogError(f"{where}: {len(refused)} of {len(answers)} records refused: {answer}")
            if todo:
                raise refused[0][1]

        self._ride_out(f"append to {topic}", send)

    def _check(self, positions: Mapping[TopicPartition, int]) -> None:
        for at, position in positions.items():
            count = self.partitions(at.topic)
            if not 0 <= at.partition < count:
                raise ValueError(f"topic {at.topic!r}: partition {at.partition}, expected 0 … {count - 1}")
            if position < 0:
                raise PositionOutOfRange(f"{at.topic}/{at.partition}: position {position}, expected at least 0")

    def _count(self, max_records: int, partitions: int) -> int:
        """Entries to ask for per partition: within the records wanted and the bytes allowed."""
        affordable = self._config.fetch_max_bytes / self._bytes_per_record
        return max(1, int(min(max_records, affordable) / partitions))

    def _xread(self, streams: dict[KeyT, StreamIdT], count: int, block_s: float) -> dict[bytes, list[_Entry]]:
        block_ms = max(1, round(block_s * 1000)) if block_s > 0 else None
        answer: object = self._ride_out("read", lambda: self._client.xread(streams, count, block_ms))
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
        uncertain = []
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
                uncertain.append(at)
        self._learn_size(records)
        at_end = set(positions) - set(uncertain)  # fewer than asked for: there was no more
        for at, (begin, end) in self._bounds(uncertain).items():
            if not begin <= after[at] <= end:
                raise PositionOutOfRange(
                    f"{at.topic}/{at.partition}: position {after[at]}, the log holds {begin} … {end}"
                )
            if after[at] == end:
                at_end.add(at)
        return Fetch(records, after, frozenset(at_end))

    def _learn_size(self, records: Sequence[Record]) -> None:
        """Grow the estimate at once, shrink it slowly: a surprise by big records costs memory, the reverse little."""
        if records:
            mean = sum(len(r.value) for r in records) / len(records) + 64
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

        answers = self._ride_out("ask for begin and end", ask)
        ends = [_sequence(last) for _, last in answers]
        return {at: (end - length, end) for at, end, (length, _) in zip(ats, ends, answers, strict=True)}

    def _ride_out(self, what: str, call: Callable[[], _T]) -> _T:
        return retry(self._client, what, self._config.outage_timeout_s, call)

    def _all(self, topic: str) -> list[TopicPartition]:
        return [TopicPartition(topic, i) for i in range(self.partitions(topic))]

    def _key(self, at: TopicPartition) -> str:
        return f"{self._namespace}:log:{at.topic}:{at.partition}"

    def _topics_key(self) -> str:
        return f"{self._namespace}:log:topics"


def _sequence(entry_id: bytes) -> int:
    milliseconds, _, sequence = entry_id.partition(b"-")
    if milliseconds != b"0":
        raise EventLogError(f"stream entry {entry_id.decode()}: expected ids 0-1, 0-2, …; who else writes here?")
    return int(sequence)


def _record(at: TopicPartition, entry: _Entry) -> Record:
    entry_id, fields = entry
    try:
        value, headers, arrival_ms = fields[b"v"], unpack_headers(fields[b"h"]), int(fields[b"t"])
    except (KeyError, ValueError) as error:
        raise EventLogError(
            f"{at.topic}/{at.partition}: entry {entry_id.decode()} is no record of ours: {error!r}"
        ) from error
    return Record(at.topic, at.partition, _sequence(entry_id) - 1, value, headers, arrival_ms)


# TODO(merge) was stream.headers: Record headers as compact bytes, for logs that have no heade

_LENGTH = struct.Struct("<I")


# Headers name codec and schema: a run has a handful of different ones, and packs one of them for every record.
@lru_cache(maxsize=256)
def pack_headers(headers: Headers) -> bytes:
    """Headers to bytes.

    Raises:
        ValueError: A name is longer than 255 bytes.
    """
    parts = []
    for name, value in headers:
        encoded = name.encode()
        if len(encoded) > 255:
            raise ValueError(f"header {name[:40]!r}…: name of {len(encoded)} bytes, expected at most 255")
        parts += [bytes((len(encoded),)), encoded, _LENGTH.pack(len(value)), value]
    return b"".join(parts)


@lru_cache(maxsize=256)
def unpack_headers(data: bytes) -> Headers:
    """The inverse of :func:`pack_headers`.

    Raises:
        ValueError: The bytes are no headers.
    """
    headers, at = [], 0
    while at < len(data):
        name_end = at + 1 + data[at]
        value_start = name_end + _LENGTH.size
        if value_start > len(data):
            raise ValueError(f"headers of {len(data)} bytes end inside a name, at byte {at}")
        value_end = value_start + _LENGTH.unpack_from(data, name_end)[0]
        if value_end > len(data):
            raise ValueError(f"headers of {len(data)} bytes end inside a value, at byte {value_start}")
        headers.append((data[at + 1 : name_end].decode(), data[value_start:value_end]))
        at = value_end
    return tuple(headers)
