"""The event log on Apache Kafka, through kafka-python.

The caller keeps the positions: the log assigns partitions and seeks, and commits nothing. A position that the broker
no longer holds is an error; the log never jumps to another one. A record's time is the producer's (``CreateTime``).
Aborted transactions are not read, and the end of a partition is its last stable offset. A batch that cannot be decoded
is reported and passed, and so is a stretch of which the broker has returned nothing for ``outage_timeout_s``.

There are three kinds of clients: producers for ``append`` (any thread), a consumer for ``read`` (one thread at a time),
and an admin client for topics and offsets. Producers and consumer are made when they are first needed, and every client
is made anew after an outage. The admin client has a connection of its own because a broker answers the requests of one
connection in order: behind a fetch that waits for data, every other request would wait too.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

from kafka import KafkaConsumer
from kafka import TopicPartition as KafkaPartition
from kafka.consumer.fetcher import ConsumerRecord
from kafka.errors import (
    BrokerResponseError,
    CorruptRecordError,
    InvalidRecordError,
    LogTruncationError,
    OffsetOutOfRangeError,
    UnknownError,
)
from kafka.protocol.consumer import OffsetSpec
from kafka.protocol.consumer.offsets import OffsetTimestamp

from smes.errors import EventLogError, PositionOutOfRange
from smes_io.clock import wall_clock_ms
from stream.log.event_log import (
    Fetch,
    Headers,
    OutRecord,
    PartitionCounts,
    Positions,
    Record,
    TopicPartition,
    UnreadableRecord,
    check_partition_count,
    check_read,
)
from stream.log.kafka_append import Appender
from stream.log.kafka_brokers import Brokers
from stream.log.kafka_config import KafkaAccess, KafkaLogConfig
from stream.log.kafka_connection import NOT_NOW, KafkaConnection, close_all
from stream.log.kafka_damage import damaged_at

_RECORD_OVERHEAD_BYTES = 65_536  # headers and batch framing around a record's value
_LONGEST_POLL_S = 0.25  # between two looks at the stop event
_PAUSE_S = 0.2  # after an error of the consumer that has no cause in the log

_DAMAGE = (CorruptRecordError, InvalidRecordError, UnknownError)  # a broker's answers where it trips over a batch

_Batches = Mapping[KafkaPartition, list[ConsumerRecord]]


class KafkaLog:
    """An :class:`stream.log.event_log.EventLog` on Kafka.

    Args:
        bootstrap: ``host:port[,host:port…]``.
        namespace: Topics are named ``{namespace}.{topic}``; empty: ``{topic}``.
        config: Limits.
        access: How the brokers let us in.
        connect_timeout_s: Longest wait for a first answer of the brokers.
        now_ms: The producer's clock, Unix milliseconds; it stamps ``arrival_ms``.
        monotonic: Seconds; says for how long the log has been in trouble or has returned nothing.

    Raises:
        ValueError: ``bootstrap`` is not of that form.
        EventLogUnavailable: No answer within ``connect_timeout_s``; the message names the bootstrap servers.
        EventLogError: The brokers do not let us in.
        SecretError: A file or variable with a secret, or a certificate, cannot be read.
    """

    def __init__(
        self,
        bootstrap: str,
        namespace: str = "",
        config: KafkaLogConfig | None = None,
        *,
        access: KafkaAccess | None = None,
        connect_timeout_s: float = 10.0,
        now_ms: Callable[[], int] = wall_clock_ms,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._connection = KafkaConnection(bootstrap, config or KafkaLogConfig(), connect_timeout_s, access)
        self._namespace = namespace
        self._now_ms, self._monotonic = now_ms, monotonic
        self._brokers = Brokers(self._connection)
        self._appender = Appender(self._connection, self._brokers)
        self._counts = PartitionCounts(lambda topic: len(self._describe(topic)["partitions"]))
        self._consumer: KafkaConsumer | None = None
        self._consumer_generation = 0
        self._consumer_lock = threading.Lock()
        self._sought: Positions = {}
        self._trouble_since_s: float | None = None
        self._standing: dict[TopicPartition, tuple[int, float]] = {}  # position, since when
        self._brokers.ask("connect", lambda admin: admin.list_topics(), connect_timeout_s)

    def ensure_topic(self, topic: str, partitions: int, *, exact: bool = True) -> None:
        """See :meth:`stream.log.event_log.EventLog.ensure_topic`."""
        check_partition_count(topic, partitions)
        limit = self._connection.config.max_record_bytes + _RECORD_OVERHEAD_BYTES
        existing = self._brokers.ensure_topic(self._name(topic), partitions, {"max.message.bytes": str(limit)})
        if exact and existing != partitions:
            raise EventLogError(f"topic {self._name(topic)!r} has {existing} partitions, expected {partitions}")

    def partitions(self, topic: str) -> int:
        """See :meth:`stream.log.event_log.EventLog.partitions`."""
        return self._counts.now(topic)

    def incarnations(self, topic: str) -> dict[TopicPartition, str]:
        """See :meth:`stream.log.event_log.EventLog.incarnations`: the topic's id."""
        found = self._describe(topic)
        return {TopicPartition(topic, i): str(found["topic_id"]) for i in range(len(found["partitions"]))}

    def append(self, topic: str, records: Sequence[OutRecord]) -> None:
        """See :meth:`stream.log.event_log.EventLog.append`: returns once all in-sync replicas hold every record."""
        self.append_reporting(topic, records)

    def append_reporting(self, topic: str, records: Sequence[OutRecord]) -> list[int | None]:
        """See :meth:`stream.log.event_log.ReportingLog.append_reporting`."""
        limit = self._connection.config.max_record_bytes
        for record in records:
            self._counts.check(topic, record.partition)
            if len(record.value) > limit:
                raise EventLogError(f"topic {topic!r}: a record of {len(record.value)} bytes, expected at most {limit}")
        if not records:
            self._counts.check(topic, 0)
            self._appender.prepare(topic)
            return []
        return self._appender.append(topic, self._name(topic), records, self._now_ms())

    def read(self, positions: Mapping[TopicPartition, int], *, max_records: int, timeout_s: float) -> Fetch:
        """See :meth:`stream.log.event_log.EventLog.read`."""
        check_read(positions, max_records, self._counts.check)
        with self._consumer_lock:
            consumer = self._connected_consumer()
            self._seek(consumer, positions)
            try:
                batches = self._poll(consumer, max_records, timeout_s)
                # Past gaps, such as transaction markers. Without a time limit this could wait for absent brokers.
                after = {at: consumer.position(self._kafka(at), timeout_ms=0) for at in positions}
            except (OffsetOutOfRangeError, LogTruncationError) as error:
                self._drop_consumer()
                raise self._out_of_range(positions) from error
            except NOT_NOW:
                self._drop_consumer()
                return self._fetch_nothing(positions)  # asks for the ends, and so waits for the brokers
            except Exception as error:  # noqa: BLE001 - damaged bytes may raise anything inside a decoder
                self._drop_consumer()
                return self._pass_damage(positions, error)
            self._trouble_since_s = None
            fetch = self._fetch(consumer, after, batches)
            return self._pass_standstill(fetch)

    def begin(self, topic: str) -> Positions:
        """See :meth:`stream.log.event_log.EventLog.begin`."""
        return self._offsets(self._all(topic), OffsetSpec.EARLIEST)

    def end(self, topic: str) -> Positions:
        """See :meth:`stream.log.event_log.EventLog.end`."""
        return self._offsets(self._all(topic), OffsetSpec.LATEST)

    def at_time(self, topic: str, time_ms: int) -> Positions:
        """See :meth:`stream.log.event_log.EventLog.at_time`: Kafka's offsets for times."""
        ats = self._all(topic)
        ends = self._offsets(ats, OffsetSpec.LATEST)
        found = self._offsets(ats, OffsetTimestamp(max(0, time_ms)))
        return {at: found[at] if found[at] >= 0 else ends[at] for at in ats}

    def set_stop(self, event: threading.Event | None) -> None:
        """See :meth:`stream.log.event_log.EventLog.set_stop`."""
        self._connection.calls.set_stop(event)

    def close(self) -> None:
        """See :meth:`stream.log.event_log.EventLog.close`."""
        close_all({"producers": self._appender.close, "consumer": self._drop_consumer, "admin": self._brokers.close})
        self._connection.calls.close()

    def _describe(self, topic: str) -> dict[str, Any]:
        name = self._name(topic)
        found = self._brokers.describe(name)
        if found is None:
            raise EventLogError(f"topic {name!r} does not exist on Kafka at {self._connection.bootstrap}")
        return found

    def _connected_consumer(self) -> KafkaConsumer:
        if self._consumer_generation != self._brokers.generation:  # brokers were away, and may be elsewhere now
            self._drop_consumer()
        if self._consumer is None:
            self._consumer_generation = self._brokers.generation
            self._consumer = self._connection.retry_during_outage("connect", self._connection.consumer)
        return self._consumer

    def _drop_consumer(self) -> None:
        """Close the consumer. After an error it must not be used again: it may return nothing for ever."""
        consumer, self._consumer, self._sought = self._consumer, None, {}
        if consumer is not None:
            close_all({"consumer": lambda: consumer.close(autocommit=False, timeout_ms=500)})

    def _poll(self, consumer: KafkaConsumer, max_records: int, timeout_s: float) -> _Batches:
        """Poll until there are records, the time is over or a stop is asked for."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            remaining_s = max(0.0, deadline_s - time.monotonic())
            batches: _Batches = consumer.poll(round(1000 * min(remaining_s, _LONGEST_POLL_S)), max_records)
            if batches or time.monotonic() >= deadline_s or self._connection.calls.stopping:
                return batches

    def _fetch_nothing(self, positions: Mapping[TopicPartition, int]) -> Fetch:
        ends = self._offsets(list(positions), OffsetSpec.LATEST)
        return Fetch([], dict(positions), frozenset(at for at, end in ends.items() if positions[at] == end))

    def _pass_damage(self, positions: Mapping[TopicPartition, int], error: Exception) -> Fetch:
        """Pass the batches that the consumer cannot decode; other errors are raised, some after a while.

        Raises:
            EventLogError: The brokers refused, or no damage is found for ``outage_timeout_s``.
        """
        if isinstance(error, BrokerResponseError) and not isinstance(error, _DAMAGE):
            raise self._connection.refused("read", error) from error
        unreadable, after, at_end = self._damage(positions)
        now_s = self._monotonic()
        self._trouble_since_s = None if unreadable else self._trouble_since_s or now_s
        if self._trouble_since_s is not None:
            if now_s - self._trouble_since_s >= self._connection.config.outage_timeout_s:
                raise self._connection.refused("read", error) from error
            self._connection.calls.wait(_PAUSE_S)
        return Fetch([], after, at_end, unreadable=unreadable)

    def _pass_standstill(self, fetch: Fetch) -> Fetch:
        """Pass what the broker returns nothing of, and no error, though it is before the end.

        A pause of ``outage_timeout_s`` between two reads looks the same at first. Then the broker returns records when
        it is asked here, and nothing is passed.
        """
        now_s = self._monotonic()
        stuck = {}
        for at, position in fetch.positions.items():
            before, since_s = self._standing.get(at, (-1, now_s))
            if position != before or at in fetch.at_end:
                self._standing[at] = position, now_s
            elif now_s - since_s >= self._connection.config.outage_timeout_s:
                self._standing[at] = position, now_s
                stuck[at] = position
        if not stuck:
            return fetch
        unreadable, after, at_end = self._damage(stuck, stuck=True)
        return Fetch(fetch.records, fetch.positions | after, fetch.at_end | at_end, unreadable=unreadable)

    def _damage(
        self, positions: Mapping[TopicPartition, int], *, stuck: bool = False
    ) -> tuple[list[UnreadableRecord], Positions, frozenset[TopicPartition]]:
        """What cannot be decoded at these positions, the positions behind it, and which of them are the end.

        Args:
            positions: Where to look.
            stuck: As :func:`stream.log.kafka_damage.damaged_at`.
        """
        unreadable: list[UnreadableRecord] = []
        after = dict(positions)
        ends = self._offsets(list(positions), OffsetSpec.LATEST)
        max_bytes = self._connection.config.fetch_max_bytes
        for at, position in positions.items():
            fetch = partial(self._brokers.fetch_raw, self._kafka(at), max_bytes)
            found = damaged_at(at, position, ends[at], fetch, stuck=stuck)
            unreadable += found
            after[at] = max([position, *(each.offset + each.records for each in found)])
        return unreadable, after, frozenset(at for at, end in ends.items() if after[at] >= end)

    def _seek(self, consumer: KafkaConsumer, positions: Mapping[TopicPartition, int]) -> None:
        """Point the consumer at ``positions``. A partition that is there already keeps the records fetched ahead."""
        wanted = {self._kafka(at) for at in positions}
        if consumer.assignment() != wanted:
            consumer.assign(sorted(wanted))
            self._sought = {}
        for at, position in positions.items():
            if self._sought.get(at) != position:
                consumer.seek(self._kafka(at), int(position))
                self._sought[at] = position

    def _fetch(self, consumer: KafkaConsumer, after: Positions, batches: _Batches) -> Fetch:
        records: list[Record] = []
        maybe_at_end = []
        now_ms = self._now_ms()
        for at, position in after.items():
            partition = self._kafka(at)
            records += [_record(at, record, now_ms) for record in batches.get(partition, ())]
            high_water = consumer.highwater(partition)
            # Without any records, too: behind an open transaction the high water mark is never reached.
            if not batches or high_water is None or position >= high_water:
                maybe_at_end.append(at)
        self._sought = dict(after)
        # The fetch's high water mark may be old by now. Asking also notices absent brokers: a poll returns nothing
        # then, just as it does when there is no data.
        ends = self._offsets(maybe_at_end, OffsetSpec.LATEST)
        return Fetch(records, after, frozenset(at for at, end in ends.items() if after[at] >= end))

    def _offsets(self, ats: Sequence[TopicPartition], which: OffsetSpec | OffsetTimestamp) -> Positions:
        found = self._brokers.offsets([self._kafka(at) for at in ats], which)
        return {at: found[self._kafka(at)] for at in ats}

    def _out_of_range(self, positions: Mapping[TopicPartition, int]) -> PositionOutOfRange:
        ats = list(positions)
        begin, end = self._offsets(ats, OffsetSpec.EARLIEST), self._offsets(ats, OffsetSpec.LATEST)
        outside = [at for at in ats if not begin[at] <= positions[at] <= end[at]] or ats
        return PositionOutOfRange(
            "; ".join(
                f"{at.topic}/{at.partition}: position {positions[at]}, the log holds {begin[at]} … {end[at]}"
                for at in outside
            )
        )

    def _all(self, topic: str) -> list[TopicPartition]:
        return [TopicPartition(topic, i) for i in range(self.partitions(topic))]

    def _kafka(self, at: TopicPartition) -> KafkaPartition:
        return KafkaPartition(self._name(at.topic), at.partition)

    def _name(self, topic: str) -> str:
        return f"{self._namespace}.{topic}" if self._namespace else topic


def _record(at: TopicPartition, record: ConsumerRecord, now_ms: int) -> Record:
    headers = _headers(tuple(record.headers))
    arrival_ms = record.timestamp if record.timestamp > 0 else now_ms  # producers may write 0, or -1 for "none"
    return Record(at.topic, at.partition, record.offset, record.value or b"", headers, arrival_ms)


# Cached, because every record has headers and few of them differ.
@lru_cache(maxsize=256)
def _headers(headers: tuple[tuple[str, bytes | None], ...]) -> Headers:
    """Headers as read; one without a value, which other producers may write, gets an empty value."""
    return tuple((name, value or b"") for name, value in headers)
