"""Event logs whose server is paused, demoted or moved: operations ride it out, and a stop ends the wait at once."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import redis

from smes.errors import EventLogError, EventLogUnavailable, Stopped
from smes_cli.demo.local_servers import ValkeyServer, start_kafka, start_valkey
from stream.log.event_log import EventLog, OutRecord, Positions, TopicPartition
from stream.log.kafka_config import KafkaLogConfig
from stream.log.kafka_log import KafkaLog
from stream.log.redis_log import RedisLogConfig, RedisStreamsLog, connect_log

AT = TopicPartition("t", 0)
DEADLINE_S = 60.0
HANG_S = 30.0  # longer than any load makes these waits, shorter than what would end them otherwise
LONG_S = 1000.0

KAFKA_LEAVES_SOCKETS = pytest.mark.filterwarnings(
    "ignore:unclosed:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture
def closing() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def out(value: str) -> OutRecord:
    return OutRecord(value.encode(), (), 0)


class Forwarder:
    """Forwards TCP connections to a port that can be changed, as a name or a virtual address that moves.

    Connections that are open stay with the server they were made to.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        for each in (self._listener, *self._sockets):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                here, _ = self._listener.accept()
                there = socket.create_connection(("127.0.0.1", self.target))
                self._sockets += [here, there]
                for one, other in ((here, there), (there, here)):
                    threading.Thread(target=self._copy, args=(one, other), daemon=True).start()

    @staticmethod
    def _copy(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65_536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)


def drain(log: EventLog, positions: Positions) -> list[str]:
    values, deadline = [], time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        fetch = log.read(positions, max_records=1000, timeout_s=0.1)
        values += [record.value.decode() for record in fetch.records]
        positions = fetch.positions
        if positions == log.end("t"):
            return values
    pytest.fail(f"not at the end after {DEADLINE_S} s: {positions}")


def await_replica(old: redis.Redis, new: redis.Redis) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        info = new.info("replication")
        if (
            info["master_link_status"] == "up"
            and info["slave_repl_offset"] == old.info("replication")["master_repl_offset"]
        ):
            return
    pytest.fail(f"no replica after {DEADLINE_S} s")


def test_appending_goes_on_when_the_address_moves_to_a_new_primary(closing: ExitStack, tmp_path: Path) -> None:
    """The old primary stays as a replica, and connections to it stay open."""
    servers = [closing.enter_context(start_valkey(tmp_path / name)) for name in ("a", "b")]
    old, new = (closing.enter_context(redis.Redis.from_url(server.url)) for server in servers)
    address = Forwarder(servers[0].port)
    closing.callback(address.close)
    log = RedisStreamsLog(connect_log(f"redis://127.0.0.1:{address.port}", timeout_s=30), "ns")
    closing.callback(log.close)
    log.ensure_topic("t", 1)
    log.append("t", [out("before")])
    new.replicaof("127.0.0.1", str(servers[0].port))
    await_replica(old, new)
    incarnation = log.incarnations("t")

    new.replicaof("NO", "ONE")
    old.replicaof("127.0.0.1", str(servers[1].port))
    mover = threading.Timer(1.0, lambda: setattr(address, "target", servers[1].port))
    mover.start()
    log.append("t", [out("after")])
    mover.join()

    assert drain(log, {AT: 0}) == ["before", "after"]
    assert log.incarnations("t") == incarnation
    assert new.xlen("{ns}:log:t:0") == 2


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ValkeyServer]:
    with start_valkey(tmp_path / "server") as server:
        yield server


def be_replica(client: redis.Redis) -> None:
    client.replicaof("127.0.0.1", "1")


def be_primary(client: redis.Redis) -> None:
    client.replicaof("NO", "ONE")


def refuse_stale(client: redis.Redis) -> None:
    client.config_set("replica-serve-stale-data", "no")
    be_replica(client)


def want_replicas(client: redis.Redis) -> None:
    client.config_set("min-replicas-to-write", 1)


def want_none(client: redis.Redis) -> None:
    client.config_set("min-replicas-to-write", 0)


NOT_NOW: dict[str, tuple[Callable[[redis.Redis], None], Callable[[redis.Redis], None]]] = {
    "READONLY": (be_replica, be_primary),
    "MASTERDOWN": (refuse_stale, be_primary),
    "NOREPLICAS": (want_replicas, want_none),
}


@pytest.mark.parametrize("answer", NOT_NOW)
def test_an_answer_that_says_not_now_is_ridden_out(server: ValkeyServer, closing: ExitStack, answer: str) -> None:
    log = RedisStreamsLog(connect_log(server.url, timeout_s=30), "ns")
    closing.callback(log.close)
    log.ensure_topic("t", 1)
    begin, end = NOT_NOW[answer]
    client = closing.enter_context(redis.Redis.from_url(server.url))
    begin(client)
    ending = threading.Timer(1.0, lambda: end(client))
    ending.start()

    log.append("t", [out("x"), out("y")])
    ending.join()

    assert drain(log, {AT: 0}) == ["x", "y"]


@pytest.mark.parametrize("answer", NOT_NOW)
def test_an_answer_that_says_not_now_for_ever_is_an_error_in_bounded_time(
    server: ValkeyServer, closing: ExitStack, answer: str
) -> None:
    log = RedisStreamsLog(connect_log(server.url, timeout_s=30), "ns", RedisLogConfig(outage_timeout_s=0.5))
    closing.callback(log.close)
    log.ensure_topic("t", 1)
    NOT_NOW[answer][0](closing.enter_context(redis.Redis.from_url(server.url)))
    started = time.monotonic()

    with pytest.raises(EventLogUnavailable, match=rf"could not serve within 0\.5 s while .*: {answer}"):
        log.end("t") if answer == "MASTERDOWN" else log.append("t", [out("x")])
    assert time.monotonic() - started < HANG_S


def test_a_server_that_is_busy_with_a_script_is_waited_for(server: ValkeyServer, closing: ExitStack) -> None:
    log = RedisStreamsLog(connect_log(server.url, timeout_s=30), "ns")
    closing.callback(log.close)
    log.ensure_topic("t", 1)
    # Without a time limit: after one the client would start another script.
    client, killer = (closing.enter_context(redis.Redis.from_url(server.url, socket_timeout=None)) for _ in range(2))
    client.config_set("busy-reply-threshold", 1)

    def spin() -> None:
        with suppress(redis.ResponseError):  # killed
            client.eval("while true do end", 0)

    thread = threading.Thread(target=spin)
    thread.start()
    deadline, busy = time.monotonic() + DEADLINE_S, False
    while not busy and time.monotonic() < deadline:
        try:
            killer.ping()
        except redis.ResponseError as error:
            busy = "BUSY" in str(error)
    ending = threading.Timer(0.5, killer.script_kill)
    ending.start()
    log.append("t", [out("x")])
    ending.join()
    thread.join(DEADLINE_S)

    assert busy
    assert drain(log, {AT: 0}) == ["x"]


def operations(log: EventLog) -> list[Callable[[], object]]:
    return [
        lambda: log.append("t", [out("x")]),
        lambda: log.end("t"),
        lambda: log.incarnations("t"),
        lambda: log.read({AT: 0}, max_records=1, timeout_s=LONG_S),
    ]


def stopped_in_time(log: EventLog, operation: Callable[[], object]) -> BaseException | None:
    """The error of an operation during whose wait a stop is asked for; a failure if that does not end it."""
    stop, outcome = threading.Event(), list[BaseException | None]()
    log.set_stop(stop)

    def run() -> None:
        try:
            operation()
            outcome.append(None)
        except EventLogError as error:
            outcome.append(error)
        except Stopped as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(0.5)
    assert thread.is_alive()
    stop.set()
    thread.join(HANG_S)
    assert not thread.is_alive()
    return outcome[0]


def check_that_a_stop_is_heard(log: EventLog) -> None:
    for operation in operations(log):
        error = stopped_in_time(log, operation)
        assert isinstance(error, Stopped)
    started = time.monotonic()
    log.close()
    assert time.monotonic() - started < HANG_S


def test_a_stop_ends_waits_for_a_redis_that_is_paused(server: ValkeyServer, closing: ExitStack) -> None:
    config = RedisLogConfig(outage_timeout_s=LONG_S)
    log = RedisStreamsLog(connect_log(server.url, timeout_s=LONG_S), "ns", config)
    log.ensure_topic("t", 1)
    os.kill(server.pid, signal.SIGSTOP)
    closing.callback(os.kill, server.pid, signal.SIGCONT)

    check_that_a_stop_is_heard(log)


def test_a_stop_ends_waits_for_a_redis_that_is_gone(server: ValkeyServer) -> None:
    config = RedisLogConfig(outage_timeout_s=LONG_S)
    log = RedisStreamsLog(connect_log(server.url, timeout_s=LONG_S), "ns", config)
    log.ensure_topic("t", 1)
    server.stop()

    check_that_a_stop_is_heard(log)


_STOPPED_PROGRAM = """
import sys, threading, time
from stream.log.event_log import OutRecord, TopicPartition
from stream.log.kafka_config import KafkaLogConfig
from stream.log.kafka_log import KafkaLog
from smes.errors import Stopped

at = TopicPartition("t", 0)
log = KafkaLog(sys.argv[1], "ns", KafkaLogConfig(outage_timeout_s=1000), connect_timeout_s=1000)
log.ensure_topic("t", 1)
log.append("t", [OutRecord(b"x", (), 0)])
log.read({at: 0}, max_records=10, timeout_s=5)
print("ready", flush=True)
sys.stdin.readline()
for operation in (
    lambda: log.append("t", [OutRecord(b"x", (), 0)]),
    lambda: log.end("t"),
    lambda: log.incarnations("t"),
    lambda: log.read({at: 1}, max_records=1, timeout_s=1000),
):
    stop = threading.Event()
    log.set_stop(stop)
    threading.Timer(0.5, stop.set).start()
    try:
        operation()
        print("not stopped", flush=True)
    except Stopped:
        print("stopped", flush=True)
log.close()
print("closed", flush=True)
"""


@pytest.mark.kafka
@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
def test_a_stop_ends_waits_for_a_kafka_that_is_away_and_the_process_ends(
    kafka_home: Path, tmp_path: Path, closing: ExitStack, how: signal.Signals
) -> None:
    server = closing.enter_context(start_kafka(kafka_home, tmp_path / "kafka"))
    argv = [sys.executable, "-P", "-c", _STOPPED_PROGRAM, server.bootstrap]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    started = subprocess.Popen(argv, text=True, **pipes)  # type: ignore[call-overload]  # no pattern fits a dict
    process = closing.enter_context(started)
    closing.callback(process.kill)
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    os.kill(server.pid, how)
    if how == signal.SIGSTOP:
        closing.callback(os.kill, server.pid, signal.SIGCONT)

    said, complaints = process.communicate("go\n", timeout=DEADLINE_S)  # four waits and the end of the process

    assert said.split() == ["stopped"] * 4 + ["closed"]
    assert process.returncode == 0
    assert "Traceback" not in complaints


@pytest.mark.kafka
@KAFKA_LEAVES_SOCKETS
def test_a_kafka_that_comes_back_elsewhere_is_found(kafka_home: Path, tmp_path: Path, closing: ExitStack) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        second = free.getsockname()[1]
    with start_kafka(kafka_home, tmp_path / "kafka") as server:
        bootstrap = f"{server.bootstrap},127.0.0.1:{second}"
        log = KafkaLog(bootstrap, "ns", KafkaLogConfig(outage_timeout_s=DEADLINE_S))
        closing.callback(log.close)
        log.ensure_topic("t", 1)
        log.append("t", [out("before")])
        fetch = log.read({AT: 0}, max_records=10, timeout_s=5)
    closing.enter_context(start_kafka(kafka_home, tmp_path / "kafka", port=second))

    log.append("t", [out("after")])

    assert [record.value for record in fetch.records] == [b"before"]
    assert drain(log, fetch.positions) == ["after"]
