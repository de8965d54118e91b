"""Questions to the brokers, through an admin client that is made anew after an outage."""

import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, TypeVar

from kafka import KafkaAdminClient
from kafka import TopicPartition as KafkaPartition
from kafka.errors import (
    LeaderNotAvailableError,
    RetriableError,
    TopicAlreadyExistsError,
    UnknownTopicOrPartitionError,
    for_code,
)
from kafka.protocol.consumer import FetchRequest, OffsetSpec
from kafka.protocol.consumer.offsets import IsolationLevel, OffsetTimestamp

from smes.errors import EventLogError
from stream.log.kafka_connection import NOT_NOW, KafkaConnection, close_all

_T = TypeVar("_T")

_METADATA_WAIT_S = 2.0  # a topic that another process has just made may be unknown to a broker for a moment
_FETCH_VERSION = 12  # the last one that names topics, not their ids


class Brokers:
    """Asks the brokers about topics and offsets; thread-safe.

    Args:
        connection: Where they are.

    Attributes:
        generation: Grows whenever the admin client is given up, that is, whenever brokers did not answer. Clients made
            before know addresses that may be out of date.
    """

    def __init__(self, connection: KafkaConnection) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._admin: KafkaAdminClient | None = None
        self.generation = 0

    def ask(self, what: str, call: Callable[[KafkaAdminClient], _T], timeout_s: float | None = None) -> _T:
        """The answer to a call; errors as :meth:`KafkaConnection.retry_during_outage`."""

        def attempt() -> _T:
            admin = self._connected()
            try:
                return call(admin)
            except UnknownTopicOrPartitionError:
                raise  # an answer, from a broker that is there
            except NOT_NOW:
                self._give_up(admin)
                raise

        return self._connection.retry_during_outage(what, attempt, timeout_s)

    def describe(self, name: str) -> dict[str, Any] | None:
        """A topic as the brokers describe it; None if there is none, after waiting for a moment."""
        wait_s = min(_METADATA_WAIT_S, self._connection.config.outage_timeout_s)
        try:
            found = self.ask(f"look up topic {name}", lambda admin: _described(admin, name), wait_s)
        except EventLogError as error:
            if isinstance(error.__cause__, UnknownTopicOrPartitionError):
                return None
            if isinstance(error.__cause__, RetriableError):  # an outage: it gets the time of an outage
                return self.ask(f"look up topic {name}", lambda admin: _described(admin, name))
            raise
        return found

    def ensure_topic(self, name: str, partitions: int, config: dict[str, str]) -> int:
        """Create the topic unless it exists; its number of partitions when all of them can be used."""
        replication = self._connection.config.replication_factor
        wanted = {"num_partitions": partitions, "replication_factor": replication, "configs": config}

        def ready(admin: KafkaAdminClient) -> int:
            try:
                found = _described(admin, name)
            except UnknownTopicOrPartitionError:
                with suppress(TopicAlreadyExistsError):  # another process was faster
                    admin.create_topics({name: wanted})
                raise
            if any(part["error_code"] or part["leader_id"] < 0 for part in found["partitions"]):
                raise LeaderNotAvailableError(f"topic {name}: not every partition has a leader yet")
            return len(found["partitions"])

        return self.ask(f"create topic {name}", ready)

    def offsets(
        self, partitions: Iterable[KafkaPartition], which: OffsetSpec | OffsetTimestamp
    ) -> dict[KafkaPartition, int]:
        """First offset, or the last stable one: the end without transactions that are still open; or that of a time.

        The offset of a time is that of the first record whose timestamp is not before it, -1 if there is none.
        """
        asked = dict.fromkeys(partitions, which)
        if not asked:
            return {}
        found = self.ask(
            "ask for offsets", lambda admin: admin.list_partition_offsets(asked, IsolationLevel.READ_COMMITTED)
        )
        return {partition: found[partition].offset for partition in asked}

    def addresses(self) -> frozenset[tuple[str, int]]:
        """Host and port of every broker, as the cluster says now."""
        cluster = self.ask("ask for brokers", lambda admin: admin.describe_cluster())
        return frozenset((broker["host"], broker["port"]) for broker in cluster["brokers"])

    def fetch_raw(self, partition: KafkaPartition, max_bytes: int, offset: int) -> tuple[int, bytes]:
        """The broker's error code and the record batches from ``offset`` on, as they lie in the log."""
        wanted = FetchRequest.FetchTopic.FetchPartition(
            partition=partition.partition,
            current_leader_epoch=-1,
            fetch_offset=offset,
            last_fetched_epoch=-1,
            log_start_offset=-1,
            partition_max_bytes=max_bytes,
        )

        def fetch(admin: KafkaAdminClient) -> tuple[int, bytes]:
            request = FetchRequest(
                max_wait_ms=self._connection.config.fetch_wait_ms,
                min_bytes=1,
                max_bytes=max_bytes,
                isolation_level=0,
                session_id=0,
                session_epoch=-1,
                topics=[FetchRequest.FetchTopic(topic=partition.topic, partitions=[wanted])],
                forgotten_topics_data=[],
                rack_id="",
                min_version=4,
                max_version=_FETCH_VERSION,
            )
            leader = _described(admin, partition.topic)["partitions"]
            node = next(each["leader_id"] for each in leader if each["partition_index"] == partition.partition)
            # The client has no public call for this: its consumer decodes what it fetches.
            answer = admin._manager.run(admin._manager.send, request, node)
            (part,) = answer.responses[0].partitions
            error = for_code(part.error_code)
            if part.error_code and issubclass(error, NOT_NOW):
                raise error(f"fetch of {partition.topic}/{partition.partition}")
            return int(part.error_code), bytes(part.records or b"")

        return self.ask(f"fetch {partition.topic}/{partition.partition} at {offset}", fetch)

    def close(self) -> None:
        """Close the client."""
        with self._lock:
            admin, self._admin = self._admin, None
        if admin is not None:
            admin.close()

    def _connected(self) -> KafkaAdminClient:
        with self._lock:
            if self._admin is None:
                self._admin = self._connection.admin()
            return self._admin

    def _give_up(self, admin: KafkaAdminClient) -> None:
        with self._lock:
            faster = self._admin is not admin  # another thread was
            if not faster:
                self._admin = None
                self.generation += 1
        if not faster:
            close_all({"admin client": admin.close})


def _described(admin: KafkaAdminClient, name: str) -> dict[str, Any]:
    (found,) = admin.describe_topics([name])
    if found["error_code"]:
        raise for_code(found["error_code"])(f"topic {name}")
    topic: dict[str, Any] = found
    return topic
