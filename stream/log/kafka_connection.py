"""kafka-python's clients as the event log sets them up, and bounded retries against brokers that are away."""

import logging
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer
from kafka.errors import KafkaError, RetriableError

from smes.errors import EventLogError, EventLogUnavailable

_T = TypeVar("_T")
_PAUSE_S = 0.1
_REQUEST_TIMEOUT_S = 10.0
_MOST_RECONNECT_BACKOFF_MS = 1000  # the client's 30 s would outlast a restart by far


@dataclass(frozen=True)
class KafkaLogConfig:
    """Limits of the event log on Kafka.

    Attributes:
        compression: Codec of the producer's batches.
        max_record_bytes: Largest record; topics that this log creates are told so.
        fetch_max_bytes: Most bytes of one fetch, and of one partition in it; a larger single record still comes.
        batch_bytes: Size of a producer batch.
        fetch_wait_ms: How long the broker may hold a fetch without data; a change of partitions waits this long.
        replication_factor: Of created topics; ``-1`` is the broker's default.
        outage_timeout_s: How long an operation rides out brokers that are away, such as one being restarted.
    """

    compression: Literal["lz4", "zstd", "gzip", "none"] = "lz4"
    max_record_bytes: int = 16 * 1024 * 1024
    fetch_max_bytes: int = 8 * 1024 * 1024
    batch_bytes: int = 256 * 1024
    fetch_wait_ms: int = 100
    replication_factor: int = -1
    outage_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        for name in ("max_record_bytes", "fetch_max_bytes", "batch_bytes", "fetch_wait_ms"):
            if getattr(self, name) < 1:
                raise ValueError(f"kafka log: {name} {getattr(self, name)}, expected at least 1")
        if self.outage_timeout_s < 1:
            raise ValueError(f"kafka log: outage_timeout_s {self.outage_timeout_s}, expected at least 1 second")


class KafkaConnection:
    """Where the brokers are, and how long to wait for them.

    Args:
        bootstrap: ``host:port[,host:port…]``.
        config: Limits of the log.
        connect_timeout_s: Longest wait for a first answer.

    Raises:
        ValueError: ``bootstrap`` is not of that form.
    """

    def __init__(self, bootstrap: str, config: KafkaLogConfig, connect_timeout_s: float) -> None:
        self.bootstrap = bootstrap
        self._addresses = [_address(server) for server in bootstrap.split(",")]
        self.config = config
        self.connect_timeout_s = connect_timeout_s
        _quiet_client_logs()

    def admin(self) -> KafkaAdminClient:
        """A client for topics and offsets; its calls may come from any thread."""
        return self._connect(KafkaAdminClient, {})

    def producer(self) -> KafkaProducer:
        """An idempotent producer that waits for all in-sync replicas."""
        config = self.config
        options: dict[str, object] = {
            "acks": "all",
            "enable_idempotence": True,
            "compression_type": None if config.compression == "none" else config.compression,
            "max_request_size": config.max_record_bytes + 65_536,
            "batch_size": config.batch_bytes,
            "delivery_timeout_ms": _ms(config.outage_timeout_s),
            "max_block_ms": _ms(config.outage_timeout_s),
            "metrics_enabled": False,
            "allow_auto_create_topics": False,
        }
        return self._connect(KafkaProducer, options)

    def consumer(self) -> KafkaConsumer:
        """A consumer without a group: it commits nothing, and raises where a position is out of range."""
        options: dict[str, object] = {
            "group_id": None,
            "enable_auto_commit": False,
            "auto_offset_reset": "none",
            "metrics_enabled": False,  # nobody reads them, and they cost time with every record
            "fetch_max_wait_ms": self.config.fetch_wait_ms,
            "fetch_max_bytes": self.config.fetch_max_bytes,
            "max_partition_fetch_bytes": self.config.fetch_max_bytes,
            "allow_auto_create_topics": False,
        }
        return self._connect(KafkaConsumer, options)

    def ride_out(self, what: str, call: Callable[[], _T]) -> _T:
        """Call until it succeeds; what a broker's absence causes is retried for ``outage_timeout_s``."""
        return self.retry(what, self.config.outage_timeout_s, call)

    def retry(self, what: str, timeout_s: float, call: Callable[[], _T]) -> _T:
        """Call until it succeeds; retriable errors are retried for ``timeout_s``, others are not."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                return call()
            except RetriableError as error:
                if time.monotonic() >= deadline:
                    raise self.unavailable(what, timeout_s, error) from error
            except KafkaError as error:
                raise EventLogError(f"Kafka at {self.bootstrap}: {what}: {error!r}") from error
            time.sleep(_PAUSE_S)

    def unavailable(self, what: str, timeout_s: float, error: Exception) -> EventLogUnavailable:
        """The error to raise when the brokers gave no answer in time."""
        return EventLogUnavailable(f"Kafka at {self.bootstrap}: {what}: no answer within {timeout_s:g} s: {error!r}")

    def _connect(self, kind: Callable[..., _T], options: dict[str, object]) -> _T:
        deadline = time.monotonic() + self.connect_timeout_s
        self._await_listener(deadline)
        try:
            return kind(
                bootstrap_servers=self.bootstrap.split(","),
                bootstrap_timeout_ms=_ms(deadline - time.monotonic()),
                request_timeout_ms=_ms(min(_REQUEST_TIMEOUT_S, self.config.outage_timeout_s)),
                reconnect_backoff_max_ms=_MOST_RECONNECT_BACKOFF_MS,
                **options,
            )
        except RetriableError as error:
            raise self.unavailable("connect", self.connect_timeout_s, error) from error
        except KafkaError as error:
            raise EventLogError(f"Kafka at {self.bootstrap}: connect: {error!r}") from error

    def _await_listener(self, deadline: float) -> None:
        """Wait until a bootstrap server accepts connections.

        A client that finds none fails too, but leaves its thread and sockets behind.
        """
        while True:
            for address in self._addresses:
                try:
                    patience_s = min(1.0, max(0.1, deadline - time.monotonic()))
                    socket.create_connection(address, timeout=patience_s).close()
                except OSError as error:
                    last = error
                else:
                    return
            if time.monotonic() >= deadline:
                raise self.unavailable("connect", self.connect_timeout_s, last) from last
            time.sleep(_PAUSE_S)


def _address(server: str) -> tuple[str, int]:
    host, colon, port = server.strip().rpartition(":")
    if not (host and colon and port.isdecimal() and 0 < int(port) < 65_536):
        raise ValueError(f"Kafka bootstrap server {server!r}, expected host:port")
    return host.strip("[]"), int(port)


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def _quiet_client_logs() -> None:
    """Keep the client's reports of lost connections out of the log, unless its level was set on purpose.

    It logs every attempt to reach an absent broker as an error; the event log waits, and raises when it gives up.
    """
    log = logging.getLogger("kafka")
    if log.level == logging.NOTSET:
        log.setLevel(logging.CRITICAL)
