"""kafka-python's clients as the event log sets them up, and bounded retries against brokers that are away."""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer
from kafka.errors import (
    BrokerNotAvailableError,
    KafkaConnectionError,
    KafkaError,
    KafkaTimeoutError,
    RetriableError,
    StaleBrokerEpochError,
    StaleControllerEpochError,
    UnknownBrokerIdError,
)

from smes.errors import EventLogError, EventLogUnavailable
from smes_io.secrets import masked_text
from smes_io.stopping import StoppableCalls
from stream.log.kafka_access import NotLetIn, knock, lacking
from stream.log.kafka_config import KafkaAccess, KafkaLogConfig

_T = TypeVar("_T")
_log = logging.getLogger(__name__)

NOT_NOW = (
    RetriableError,  # what kafka-python itself calls so: no leader, no coordinator, not enough replicas, timed out, …
    BrokerNotAvailableError,
    UnknownBrokerIdError,  # the cluster no longer has a broker that the client knew
    StaleBrokerEpochError,
    StaleControllerEpochError,
)
"""Errors after which the same call may succeed later, perhaps at another broker."""

_CLOSE_S = 1.0
_LONGEST_BOOTSTRAP_S = 10.0
_REQUEST_TIMEOUT_S = 10.0
_MOST_RECONNECT_BACKOFF_MS = 1000  # the client's 30 s would outlast a restart by far


class KafkaConnection:
    """Where the brokers are, and how long to wait for them.

    Args:
        bootstrap: ``host:port[,host:port…]``.
        config: Limits of the log.
        connect_timeout_s: Longest wait for a first answer.
        access: How the brokers let us in.

    Raises:
        ValueError: ``bootstrap`` is not of that form.
    """

    def __init__(
        self, bootstrap: str, config: KafkaLogConfig, connect_timeout_s: float, access: KafkaAccess | None = None
    ) -> None:
        self.bootstrap = bootstrap
        self._access = access or KafkaAccess()
        self._addresses = _addresses(bootstrap)
        self.config = config
        self.connect_timeout_s = connect_timeout_s
        self.calls = StoppableCalls()
        _quiet_client_logs()

    def admin(self) -> KafkaAdminClient:
        """A client for topics and offsets; its calls may come from any thread."""
        return self._connect(KafkaAdminClient, {})

    def producer(self, compression: str) -> KafkaProducer:
        """An idempotent producer that waits for all in-sync replicas."""
        config = self.config
        options: dict[str, object] = {
            "acks": "all",
            "enable_idempotence": True,
            "compression_type": None if compression == "none" else compression,
            "max_request_size": config.max_record_bytes + 65_536,
            "batch_size": config.batch_bytes,
            "delivery_timeout_ms": _ms(config.outage_timeout_s),
            "max_block_ms": _ms(config.outage_timeout_s),
            "metrics_enabled": False,
            "allow_auto_create_topics": False,
        }
        return self._connect(KafkaProducer, options)

    def consumer(self) -> KafkaConsumer:
        """A consumer without a group: it commits nothing, and raises where a position is out of range.

        It sees committed transactions only; records without a transaction count as committed.
        """
        options: dict[str, object] = {
            "isolation_level": "read_committed",
            "group_id": None,
            "enable_auto_commit": False,
            "auto_offset_reset": "none",
            "metrics_enabled": False,  # unused, and they cost time with every record
            "fetch_max_wait_ms": self.config.fetch_wait_ms,
            "fetch_max_bytes": self.config.fetch_max_bytes,
            "max_partition_fetch_bytes": self.config.fetch_max_bytes,
            "allow_auto_create_topics": False,
        }
        return self._connect(KafkaConsumer, options)

    def retry_during_outage(self, what: str, call: Callable[[], _T], timeout_s: float | None = None) -> _T:
        """Call until the brokers answer.

        Args:
            what: Names the call in the error.
            call: What to try.
            timeout_s: How long to try; None: ``outage_timeout_s``.

        Raises:
            EventLogUnavailable: No answer in time.
            EventLogError: The brokers answered with an error that trying again does not mend, such as that of wrong
                credentials, certificates or missing rights.
            SecretError: A file or variable with a secret, or a certificate, cannot be read.
            Stopped: No answer yet when a stop was asked for.
        """
        timeout_s = self.config.outage_timeout_s if timeout_s is None else timeout_s
        where = f"Kafka at {self.bootstrap}: {what}"
        try:
            return self.calls.retry(where, call, timeout_s=timeout_s, retriable=NOT_NOW)
        except NOT_NOW as error:
            raise self.unavailable(what, timeout_s, error) from error
        except KafkaError as error:
            raise self.refused(what, error) from error

    def unavailable(self, what: str, timeout_s: float, error: Exception) -> EventLogUnavailable:
        """The error to raise when the brokers gave no answer in time."""
        return EventLogUnavailable(f"Kafka at {self.bootstrap}: {what}: no answer within {timeout_s:g} s: {error!r}")

    def refused(self, what: str, error: Exception | None) -> EventLogError:
        """The error to raise when the brokers answered with one."""
        if isinstance(error, NotLetIn):
            return EventLogError(f"Kafka at {self.bootstrap}: {what}: {error}")
        if right := lacking(error):
            return EventLogError(f"Kafka at {self.bootstrap}: {what}: {self._access.who} lacks a right (ACL): {right}")
        return EventLogError(f"Kafka at {self.bootstrap}: {what}: {error!r}")

    def _connect(self, kind: Callable[..., _T], options: dict[str, object]) -> _T:
        """A client, or one of ``NOT_NOW`` where no broker answers; addresses, files and secrets are read anew."""
        access = self._access.options()
        self._find_listener(access)
        bootstrap_s = min(self.connect_timeout_s, _LONGEST_BOOTSTRAP_S)
        try:
            return kind(
                bootstrap_servers=self.bootstrap.split(","),
                bootstrap_timeout_ms=_ms(bootstrap_s),
                request_timeout_ms=_ms(min(_REQUEST_TIMEOUT_S, self.config.outage_timeout_s)),
                reconnect_backoff_max_ms=_MOST_RECONNECT_BACKOFF_MS,
                **access,
                **options,
            )
        except KafkaTimeoutError as error:
            raise KafkaTimeoutError(f"{error.args[0]} by {self._access.protocol}; is it the listener's?") from error

    def _find_listener(self, access: dict[str, object]) -> None:
        """Raise KafkaConnectionError unless a bootstrap server lets us in, NotLetIn if one says that it never will.

        A client that finds none would fail too, but it would leave its thread and sockets behind, and not say why.
        """
        errors = []
        for address in self._addresses:
            try:
                # Only a TCP connection where there is nothing to show: then within a second, like any other.
                timeout_s = self.connect_timeout_s if len(access) > 1 else min(1.0, self.connect_timeout_s)
                knock(address, access, min(timeout_s, _LONGEST_BOOTSTRAP_S))
                return
            except KafkaConnectionError as error:
                errors.append(error)
        raise errors[-1]


def close_all(clients: Mapping[str, Callable[[], object]]) -> None:
    """Close clients side by side, within about a second; errors and clients that take longer are logged.

    Args:
        clients: What it is → how to close it.
    """

    def close(what: str, one: Callable[[], object]) -> None:
        try:
            one()
        except Exception as error:  # noqa: BLE001 - whatever it is, the other clients have to be closed
            _log.warning("closing Kafka's %s: %r", what, error)

    deadline_s = time.monotonic() + _CLOSE_S
    threads = [
        threading.Thread(target=close, args=each, daemon=True, name=f"close-{each[0]}") for each in clients.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline_s - time.monotonic()))
    late = [what for what, thread in zip(clients, threads, strict=True) if thread.is_alive()]
    if late:
        _log.warning("closing Kafka's %s: not done after %g s, left behind", ", ".join(late), _CLOSE_S)


def _addresses(bootstrap: str) -> list[tuple[str, int]]:
    """Host and port of each server; the message of an error shows no credentials."""
    if "@" in bootstrap:
        shown = masked_text(bootstrap)
        shown = shown if "***" in shown else f"***@{bootstrap.rpartition('@')[2]}"
        raise ValueError(f"Kafka bootstrap server {shown!r}, expected host:port without credentials")
    return [_address(server) for server in bootstrap.split(",")]


def _address(server: str) -> tuple[str, int]:
    host, colon, port = server.strip().rpartition(":")
    if not (host and colon and port.isdecimal() and 0 < int(port) < 65_536):
        raise ValueError(f"Kafka bootstrap server {server!r}, expected host:port")
    return host.strip("[]"), int(port)


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def _quiet_client_logs() -> None:
    """Silence the client's own reports, unless somebody asked for its debug or info messages.

    The client logs every attempt to reach an absent broker as an error, and every step of its event loop that took
    longer than 0.1 s as a warning. The event log itself says when it tries again, and raises when it gives up.
    """
    log = logging.getLogger("kafka")
    if log.level == logging.NOTSET or log.level > logging.INFO:
        log.setLevel(logging.CRITICAL)
