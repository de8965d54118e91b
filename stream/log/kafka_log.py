"""The event log on Apache Kafka, through kafka-python.

The caller keeps the positions: the log assigns partitions and seeks, and commits nothing. A position that the broker
no longer holds is an error; the log never jumps to another one. A record's time is the producer's (``CreateTime``).

There are three clients: a producer for ``append`` (any thread), a consumer for ``read`` (one thread at a time), and an
admin client for topics and offsets. Producer and consumer are made when they are first needed. The admin client has a
connection of its own because a broker answers the requests of one connection in order: behind a fetch that waits for
data, every other request would wait too.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache

from kafka import KafkaConsumer, KafkaProducer
from kafka import TopicPartition as KafkaPartition
from kafka.consumer.fetcher import ConsumerRecord
from kafka.errors import (
    KafkaError,
    KafkaTimeoutError,
    LogTruncationError,
    OffsetOutOfRangeError,
    TopicAlreadyExistsError,
    UnknownTopicOrPartitionError,
    for_code,
)
from kafka.producer.future import FutureRecordMetadata
from kafka.protocol.consumer import OffsetSpec

from smes.errors import EventLogError, PositionOutOfRange
from smes_io.clock import wall_clock_ms
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
from stream.log.kafka_connection import KafkaConnection, KafkaLogConfig

_NO_ERROR, _UNKNOWN_TOPIC = 0, int(UnknownTopicOrPartitionError.errno)
_RECORD_OVERHEAD_BYTES = 65_536  # headers and batch framing around a record's value


class KafkaLog:
    """An :class:`stream.log.event_log.EventLog` on Kafka.

    Args:
        bootstrap: ``host:port[,host:port…]``.
        namespace: Topics are named ``{namespace}.{topic}``; empty: ``{topic}``.
        config: Limits.
        connect_timeout_s: Longest wait for a first answer of the brokers.
        now_ms: The producer's clock, Unix milliseconds; it stamps ``arrival_ms``.

    Raises:
        ValueError: ``bootstrap`` is not of that form.
        EventLogUnavailable: No answer within ``connect_timeout_s``; the message names the bootstrap servers.
    """

    def __init__(
        self,
        bootstrap: str,
        namespace: str = "",
        config: KafkaLogConfig | None = None,
        *,
        connect_timeout_s: float = 10.0,
        now_ms: Callable[[], int] = wall_clock_ms,
    ) -> None:
        self._connection = KafkaConnection(bootstrap, config or KafkaLogConfig(), connect_timeout_s)
        self._namespace = namespace
        self._now_ms = now_ms
        self._partitions: dict[str, int] = {}
        self._producer: KafkaProducer | None = None
        self._producer_lock = threading.Lock()
        self._consumer: KafkaConsumer | None = None
        self._consumer_lock = threading.Lock()
        self._sought: Positions = {}
        self._admin = self._connection.admin()
        self._connection.retry_during_outage("list topics", self._admin.list_topics, connect_timeout_s)

    def ensure_topic(self, topic: str, partitions: int) -> None:
        """See :meth:`stream.log.event_log.EventLog.ensure_topic`."""
        check_partition_count(topic, partitions)
        wanted = {
            "num_partitions": partitions,
            "replication_factor": self._connection.config.replication_factor,
            "configs": {"max.message.bytes": str(self._connection.config.max_record_bytes + _RECORD_OVERHEAD_BYTES)},
        }

        def create() -> None:
            with suppress(TopicAlreadyExistsError):  # another process was faster
                self._admin.create_topics({self._name(topic): wanted}, wait_for_metadata=True)

        if self._describe(topic) is None:
            self._connection.retry_during_outage(f"create topic {self._name(topic)}", create)
        existing = self.partitions(topic)
        if existing != partitions:
            raise EventLogError(f"topic {self._name(topic)!r} has {existing} partitions, expected {partitions}")

    def partitions(self, topic: str) -> int:
        """See :meth:`stream.log.event_log.EventLog.partitions`."""
        known = self._partitions.get(topic)
        if known is None:
            known = self._describe(topic)
            if known is None:
                raise EventLogError(
                    f"topic {self._name(topic)!r} does not exist on Kafka at {self._connection.bootstrap}"
                )
            self._partitions[topic] = known
        return known

    def append(self, topic: str, records: Sequence[OutRecord]) -> None:
        """See :meth:`stream.log.event_log.EventLog.append`: returns once all in-sync replicas hold every record."""
        count = self.partitions(topic)
        for record in records:
            check_partition(topic, record.partition, count)
            if len(record.value) > self._connection.config.max_record_bytes:
                limit = self._connection.config.max_record_bytes
                raise EventLogError(f"topic {topic!r}: a record of {len(record.value)} bytes, expected at most {limit}")
        name, arrival_ms = self._name(topic), self._now_ms()
        producer = self._connected_producer()
        sent = []
        try:
            for record in records:
                headers = list(record.headers)
                sent.append(producer.send(name, record.value, None, headers, record.partition, arrival_ms))
            producer.flush(self._connection.config.outage_timeout_s)
        except KafkaTimeoutError as error:
            acknowledged = sum(future.succeeded() for future in sent)
            what = f"append to {name}: {acknowledged} of {len(records)} records acknowledged"
            raise self._connection.unavailable(what, self._connection.config.outage_timeout_s, error) from error
        except KafkaError as error:
            raise self._connection.refused(f"append to {name}", error) from error
        self._raise_refused(name, sent)

    def read(self, positions: Mapping[TopicPartition, int], *, max_records: int, timeout_s: float) -> Fetch:
        """See :meth:`stream.log.event_log.EventLog.read`."""
        check_read(positions, max_records, self.partitions)
        with self._consumer_lock:
            consumer = self._connected_consumer()
            self._seek(consumer, positions)
            try:
                batches = consumer.poll(max(0, round(timeout_s * 1000)), max_records)
            except (OffsetOutOfRangeError, LogTruncationError) as error:
                self._sought = {}
                raise self._out_of_range(positions) from error
            except KafkaError as error:
                self._sought = {}
                raise self._connection.refused("read", error) from error
            return self._fetch(consumer, positions, batches)

    def begin(self, topic: str) -> Positions:
        """See :meth:`stream.log.event_log.EventLog.begin`."""
        return self._offsets(self._all(topic), OffsetSpec.EARLIEST)

    def end(self, topic: str) -> Positions:
        """See :meth:`stream.log.event_log.EventLog.end`."""
        return self._offsets(self._all(topic), OffsetSpec.LATEST)

    def close(self) -> None:
        """See :meth:`stream.log.event_log.EventLog.close`."""
        if self._producer is not None:
            self._producer.close(timeout=self._connection.connect_timeout_s)
        if self._consumer is not None:
            self._consumer.close(autocommit=False)
        self._admin.close()

    def _describe(self, topic: str) -> int | None:
        """Number of partitions; ``None`` if there is no such topic."""
        name = self._name(topic)
        answers = self._connection.retry_during_outage(
            f"look up topic {name}", lambda: self._admin.describe_topics([name])
        )
        code = int(answers[0]["error_code"])
        if code == _UNKNOWN_TOPIC:
            return None
        if code != _NO_ERROR:
            raise EventLogError(f"Kafka at {self._connection.bootstrap}: topic {name!r}: {for_code(code).__name__}")
        return len(answers[0]["partitions"])

    def _connected_producer(self) -> KafkaProducer:
        with self._producer_lock:
            if self._producer is None:
                self._producer = self._connection.producer()
            return self._producer

    def _connected_consumer(self) -> KafkaConsumer:
        if self._consumer is None:
            self._consumer = self._connection.consumer()
        return self._consumer

    def _raise_refused(self, name: str, sent: Sequence[FutureRecordMetadata]) -> None:
        failed = [future for future in sent if not future.succeeded()]
        if not failed:
            return
        error = failed[0].exception
        what = f"append to {name}: {len(failed)} of {len(sent)} records not acknowledged"
        if isinstance(error, KafkaTimeoutError):
            raise self._connection.unavailable(what, self._connection.config.outage_timeout_s, error)
        raise self._connection.refused(what, error)

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

    def _fetch(
        self,
        consumer: KafkaConsumer,
        positions: Mapping[TopicPartition, int],
        batches: Mapping[KafkaPartition, list[ConsumerRecord]],
    ) -> Fetch:
        records: list[Record] = []
        after: Positions = {}
        maybe_at_end = []
        for at in positions:
            partition = self._kafka(at)
            records += [_record(at, record) for record in batches.get(partition, ())]
            after[at] = consumer.position(partition)  # past gaps, such as transaction markers
            high_water = consumer.highwater(partition)
            if high_water is None or after[at] >= high_water:
                maybe_at_end.append(at)
        self._sought = dict(after)
        # The fetch's high water mark may be old by now. Asking also notices absent brokers: a poll returns nothing
        # then, just as it does when there is no data.
        ends = self._offsets(maybe_at_end, OffsetSpec.LATEST)
        return Fetch(records, after, frozenset(at for at, end in ends.items() if after[at] >= end))

    def _offsets(self, ats: Sequence[TopicPartition], which: OffsetSpec) -> Positions:
        if not ats:
            return {}
        asked = {self._kafka(at): which for at in ats}
        found = self._connection.retry_during_outage(
            "ask for offsets", lambda: self._admin.list_partition_offsets(asked)
        )
        return {at: found[self._kafka(at)].offset for at in ats}

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


def _record(at: TopicPartition, record: ConsumerRecord) -> Record:
    headers = _headers(tuple(record.headers))
    return Record(at.topic, at.partition, record.offset, record.value or b"", headers, record.timestamp)


# Cached, because every record has headers and few of them differ.
@lru_cache(maxsize=256)
def _headers(headers: tuple[tuple[str, bytes | None], ...]) -> Headers:
    """Headers as read; one without a value, which other producers may write, gets an empty value."""
    return tuple((name, value or b"") for name, value in headers)
