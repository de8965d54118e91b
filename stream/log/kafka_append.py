"""Appending to Kafka: one idempotent producer per compression, made anew when it or its brokers fail."""

import threading
import time
from collections.abc import Sequence
from functools import partial

from kafka import KafkaProducer
from kafka.errors import (
    IllegalStateError,
    InvalidProducerEpochError,
    InvalidProducerIdMappingError,
    KafkaError,
    KafkaTimeoutError,
    OutOfOrderSequenceNumberError,
    ProducerFencedError,
    UnknownProducerIdError,
    UnknownTopicOrPartitionError,
)
from kafka.producer.future import FutureRecordMetadata

from stream.log.event_log import OutRecord
from stream.log.kafka_brokers import Brokers
from stream.log.kafka_connection import NOT_NOW, KafkaConnection, close_all
from stream.topics import DEAD_LETTERS

_LOOK_S = 2.0  # between two looks at where the brokers are, while acknowledgements do not come

# The producer's identity is spoiled, not the record: a new producer can send it.
_NEW_PRODUCER = (
    *NOT_NOW,
    IllegalStateError,  # closed by another thread that met an error
    InvalidProducerEpochError,
    InvalidProducerIdMappingError,
    OutOfOrderSequenceNumberError,
    ProducerFencedError,
    UnknownProducerIdError,
)


class Appender:
    """Sends records and waits until all in-sync replicas hold them; thread-safe."""

    def __init__(self, connection: KafkaConnection, brokers: Brokers) -> None:
        self._connection, self._brokers = connection, brokers
        self._lock = threading.Lock()
        self._producers: dict[str, KafkaProducer] = {}
        self._addresses: dict[KafkaProducer, frozenset[tuple[str, int]]] = {}  # when it was made

    def append(self, topic: str, name: str, records: Sequence[OutRecord], arrival_ms: int) -> list[int | None]:
        """Send all records, again where a broker was away.

        Args:
            topic: Ours; it decides the compression.
            name: Kafka's name of it.
            records: What to send.
            arrival_ms: Their timestamp.

        Returns:
            The offset of each record; None where a broker acknowledged it only as one that it had already.

        Raises:
            EventLogError, EventLogUnavailable, Stopped: As :meth:`stream.log.event_log.EventLog.append`.
        """
        connection = self._connection
        timeout_s = connection.config.outage_timeout_s
        sending = _Sending(self, self.compression(topic), name, records, arrival_ms)
        where = f"Kafka at {connection.bootstrap}: append to {name}"
        try:
            connection.calls.retry(where, sending.attempt, timeout_s=timeout_s, retriable=NOT_NOW)
        except NOT_NOW as error:
            raise connection.unavailable(f"append to {name}: {sending.left}", timeout_s, error) from error
        except KafkaError as error:
            raise connection.refused(f"append to {name}: {sending.left}", error) from error
        return sending.offsets

    def prepare(self, topic: str) -> None:
        """Make the producer that appends to a topic, so that a later append starts no thread.

        Raises:
            EventLogError, EventLogUnavailable, Stopped: As :meth:`append`.
        """
        self._connection.retry_during_outage("connect", partial(self.producer, self.compression(topic)))

    def compression(self, topic: str) -> str:
        """Of a topic's batches. Dead letters are for people: gzip, because every client reads that."""
        configured = self._connection.config.compression
        return "gzip" if topic == DEAD_LETTERS and configured != "none" else configured

    def producer(self, compression: str) -> KafkaProducer:
        """The producer of a compression; made when it is first needed."""
        with self._lock:
            if compression not in self._producers:
                producer = self._producers[compression] = self._connection.producer(compression)
                self._addresses[producer] = self._brokers.addresses()
            return self._producers[compression]

    def moved(self, producer: KafkaProducer) -> bool:
        """Whether every broker has another address than when the producer was made; it would not find them."""
        return self._brokers.addresses().isdisjoint(self._addresses.get(producer, frozenset()))

    def give_up(self, producer: KafkaProducer, *, flush: bool) -> None:
        """Make a new one the next time."""
        with self._lock:
            self._producers = {name: each for name, each in self._producers.items() if each is not producer}
            self._addresses.pop(producer, None)
        close = partial(_close, producer, 1.0 if flush else 0.0)
        threading.Thread(target=close_all, args=({"producer": close},), daemon=True).start()

    @property
    def flush_s(self) -> float:
        """How long to wait for acknowledgements."""
        return self._connection.config.outage_timeout_s

    def close(self) -> None:
        """Close the producers; nothing is on its way, since every append waits, unless a stop ended its wait."""
        with self._lock:
            producers, self._producers = self._producers, {}
        close_all({f"{name} producer": partial(_close, each, 0.3) for name, each in producers.items()})


class _Sending:
    """Records on their way, without those that were acknowledged."""

    def __init__(
        self, appender: Appender, compression: str, name: str, records: Sequence[OutRecord], arrival_ms: int
    ) -> None:
        self._appender, self._compression, self._name = appender, compression, name
        self._unsent, self._arrival_ms = list(enumerate(records)), arrival_ms
        self.offsets: list[int | None] = [None] * len(records)

    @property
    def left(self) -> str:
        """What is left, in words."""
        return f"{len(self._unsent)} of {len(self.offsets)} records not acknowledged"

    def attempt(self) -> None:
        """Send what is left and wait.

        Raises:
            KafkaError: Something is left. One of ``NOT_NOW`` if sending it again may help.
        """
        producer = self._appender.producer(self._compression)
        self._check_partitions(producer)
        sent: list[FutureRecordMetadata] = []
        try:
            for _, record in self._unsent:
                headers = list(record.headers)
                sent.append(producer.send(self._name, record.value, None, headers, record.partition, self._arrival_ms))
            stuck = self._flush(producer)
        except KafkaTimeoutError as error:
            stuck = error
        failed = [future for future in sent if not future.succeeded()]
        errors = [future.exception for future in failed]
        unsent = []
        for one, future in zip(self._unsent, sent, strict=False):
            if future.succeeded():
                offset = future.value.offset
                self.offsets[one[0]] = offset if offset >= 0 else None
            else:
                unsent.append(one)
        self._unsent = unsent + self._unsent[len(sent) :]
        if stuck or errors:
            self._raise(producer, stuck, errors)

    def _flush(self, producer: KafkaProducer) -> KafkaTimeoutError | None:
        """Wait for acknowledgements; an error if they do not come, or cannot, because all brokers have moved."""
        deadline_s = time.monotonic() + self._appender.flush_s
        while True:
            try:
                producer.flush(min(_LOOK_S, max(0.0, deadline_s - time.monotonic())))
            except KafkaTimeoutError as error:
                if time.monotonic() >= deadline_s or self._appender.moved(producer):
                    return error
            else:
                return None

    def _check_partitions(self, producer: KafkaProducer) -> None:
        """Give up a producer that does not know a partition yet; a new one asks the brokers."""
        known = producer.partitions_for(self._name) or set()
        if missing := {record.partition for _, record in self._unsent} - known:
            self._appender.give_up(producer, flush=True)
            raise UnknownTopicOrPartitionError(f"{self._name}: partitions {sorted(missing)}")

    def _raise(self, producer: KafkaProducer, stuck: KafkaError | None, errors: list[KafkaError | None]) -> None:
        self._appender.give_up(producer, flush=False)
        error = stuck or next((each for each in errors if each), None) or KafkaTimeoutError("no acknowledgement")
        refused = next((each for each in errors if each and not isinstance(each, _NEW_PRODUCER)), None)
        if refused:
            raise refused
        if isinstance(error, NOT_NOW):
            raise error
        raise KafkaTimeoutError(repr(error)) from error  # one that a new producer mends


def _close(producer: KafkaProducer, flush_s: float) -> None:
    """Close a producer, also one with records that cannot be sent: its own ``close`` gives up before it has begun."""
    try:
        producer.close(timeout=flush_s)
    except KafkaTimeoutError:
        producer._sender.force_close()  # the client has no public call that drops records
        producer._sender.join(0.5)
        producer.close(timeout=0)
