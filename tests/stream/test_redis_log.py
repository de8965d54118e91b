"""The event log on Redis beyond the contract: retention, bounded reads, outages."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import redis

from smes.errors import EventLogError, EventLogUnavailable, PositionOutOfRange
from smes_cli.demo.local_servers import ValkeyServer, start_valkey
from stream.log.event_log import OutRecord, Positions, TopicPartition
from stream.log.redis_log import RedisLogConfig, RedisStreamsLog, connect_log

AT = TopicPartition("t", 0)
DEADLINE_S = 60.0
HANG_S = 30.0  # longer than any load makes these waits, shorter than what would end them otherwise


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ValkeyServer]:
    """A server for one test, which may kill or reconfigure it."""
    with start_valkey(tmp_path / "server") as server:
        yield server


@pytest.fixture
def closing() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def open_log(
    closing: ExitStack, url: str, namespace: str = "ns", config: RedisLogConfig | None = None
) -> RedisStreamsLog:
    log = RedisStreamsLog(connect_log(url, timeout_s=30), namespace, config)
    closing.callback(log.close)
    return log


def out(value: bytes) -> OutRecord:
    return OutRecord(value, (), 0)


def test_namespaces_are_separate(redis_url: str, namespace: str, closing: ExitStack) -> None:
    one, two = open_log(closing, redis_url, namespace + "a"), open_log(closing, redis_url, namespace + "b")
    one.ensure_topic("t", 1)
    two.ensure_topic("t", 2)

    one.append("t", [out(b"mine")])

    assert two.end("t") == {TopicPartition("t", 0): 0, TopicPartition("t", 1): 0}


def test_retention_keeps_about_the_newest_entries(redis_url: str, namespace: str, closing: ExitStack) -> None:
    log = open_log(closing, redis_url, namespace, RedisLogConfig(max_entries_per_partition=1000))
    log.ensure_topic("t", 1)
    log.append("t", [out(b"%d" % i) for i in range(5000)])

    begin, end = log.begin("t")[AT], log.end("t")[AT]

    assert end == 5000
    assert 1000 <= end - begin <= 1200  # Redis trims whole nodes of up to 100 entries
    with pytest.raises(PositionOutOfRange, match=f"position 0: trimmed, the log begins at {begin}"):
        log.read({AT: 0}, max_records=10, timeout_s=0)

    first = log.read({AT: begin}, max_records=10, timeout_s=0).records[0]

    assert (first.offset, first.value) == (begin, b"%d" % begin)


def test_a_read_adapts_to_the_size_of_the_records(redis_url: str, namespace: str, closing: ExitStack) -> None:
    log = open_log(closing, redis_url, namespace, RedisLogConfig(fetch_max_bytes=1 << 20))
    log.ensure_topic("t", 1)
    log.append("t", [out(bytes(256 * 1024)) for _ in range(40)])
    positions, sizes = {AT: 0}, []
    while positions[AT] < 40:
        fetch = log.read(positions, max_records=1000, timeout_s=5)
        positions = fetch.positions
        sizes.append(len(fetch.records))

    assert sum(sizes) == 40
    assert max(sizes[1:]) <= 4  # 4 x 256 KiB; the first read had to guess


def test_an_absent_server_is_an_error_in_bounded_time_without_the_password() -> None:
    started = time.monotonic()

    with pytest.raises(EventLogUnavailable, match=r"127\.0\.0\.1:1/3 .*within 0\.5 s") as caught:
        connect_log("redis://someone:hunter2@127.0.0.1:1/3", timeout_s=0.5)
    assert 0.4 < time.monotonic() - started < HANG_S
    assert "hunter2" not in str(caught.value)


def test_a_wrong_password_is_an_error_at_once(server: ValkeyServer) -> None:
    with redis.Redis.from_url(server.url) as client:
        client.config_set("requirepass", "right")
        started = time.monotonic()
        with pytest.raises(EventLogError, match="refused the credentials while connecting") as caught:
            connect_log(server.url.replace("redis://", "redis://:wrong-one@"), timeout_s=100)
        assert not isinstance(caught.value, EventLogUnavailable)
        assert "wrong-one" not in str(caught.value)
        assert time.monotonic() - started < HANG_S


def test_refused_records_raise(server: ValkeyServer, closing: ExitStack) -> None:
    log = open_log(closing, server.url)
    log.ensure_topic("t", 1)
    with redis.Redis.from_url(server.url) as client:
        client.config_set("maxmemory", "1")

        with pytest.raises(EventLogError, match=r"t/0 in Redis at .*: 3 of 3 records refused: .*maxmemory"):
            log.append("t", [out(b"x")] * 3)

        client.config_set("maxmemory", "0")

    assert log.end("t") == {AT: 0}


def test_a_server_that_stays_away_is_an_error_in_bounded_time(server: ValkeyServer, closing: ExitStack) -> None:
    log = open_log(closing, server.url, config=RedisLogConfig(outage_timeout_s=0.5))
    log.ensure_topic("t", 1)
    server.stop()
    for operation in (
        lambda: log.append("t", [out(b"x")]),
        lambda: log.read({AT: 0}, max_records=1, timeout_s=0.1),
        lambda: log.end("t"),
    ):
        started = time.monotonic()
        with pytest.raises(EventLogUnavailable, match=r"Redis at redis://127\.0\.0\.1.*within 0\.5 s"):
            operation()
        assert time.monotonic() - started < HANG_S


def test_a_server_that_came_back_empty_is_noticed(server: ValkeyServer, closing: ExitStack, tmp_path: Path) -> None:
    log = open_log(closing, server.url)
    log.ensure_topic("t", 1)
    log.append("t", [out(b"x")] * 10)
    server.stop()

    with (
        start_valkey(tmp_path / "empty", port=server.port),
        pytest.raises(PositionOutOfRange, match=r"t/0: position 10, the log holds 0 … 0"),
    ):
        log.read({AT: 10}, max_records=1, timeout_s=0.1)


def test_what_a_stalled_server_gets_twice_is_there_once(server: ValkeyServer, closing: ExitStack) -> None:
    log = open_log_of_impatient_client(closing, server.url)
    log.ensure_topic("t", 1)
    log.append("t", [out(b"before")])
    os.kill(server.pid, signal.SIGSTOP)
    waker = threading.Timer(2.0, os.kill, (server.pid, signal.SIGCONT))  # after a second try, 1.25 s later
    waker.start()
    closing.callback(waker.join)

    offsets = log.append_reporting("t", [out(b"%d" % i) for i in range(5)])

    values = [each.value for each in log.read({AT: 0}, max_records=100, timeout_s=0).records]
    assert values == [b"before", *(b"%d" % i for i in range(5))]
    assert offsets == [1, 2, 3, 4, 5]


def open_log_of_impatient_client(closing: ExitStack, url: str) -> RedisStreamsLog:
    log = RedisStreamsLog(connect_log(url, timeout_s=0.1), "ns")
    closing.callback(log.close)
    return log


def test_a_server_killed_and_restarted_in_mid_run_loses_nothing(
    server: ValkeyServer, closing: ExitStack, tmp_path: Path
) -> None:
    writer, reader = open_log(closing, server.url), open_log(closing, server.url)
    writer.ensure_topic("t", 1)
    stop, sent, errors = threading.Event(), 0, []

    def write() -> None:
        nonlocal sent
        try:
            while not stop.is_set():
                writer.append("t", [out(b"%d" % i) for i in range(sent, sent + 10)])
                sent += 10
        except Exception as error:  # noqa: BLE001 - whatever it is, the test has to show it
            errors.append(error)

    positions: Positions = {AT: 0}
    seen: list[int] = []

    def read_until(count: int) -> None:
        nonlocal positions
        deadline = time.monotonic() + DEADLINE_S
        while len(seen) < count and not errors and time.monotonic() < deadline:
            fetch = reader.read(positions, max_records=1000, timeout_s=0.1)
            positions = fetch.positions
            seen.extend(int(r.value) for r in fetch.records)

    thread = threading.Thread(target=write)
    thread.start()
    read_until(2000)
    os.kill(server.pid, signal.SIGKILL)
    server.process.wait(DEADLINE_S)
    # The writer and the next read find no server until it is back.
    with start_valkey(tmp_path / "server", port=server.port):
        read_until(len(seen) + 2000)
        stop.set()
        thread.join(DEADLINE_S)
        while positions != reader.end("t"):
            read_until(len(seen) + 1)
        reader.close()
        writer.close()

    assert errors == []
    assert sorted(set(seen)) == list(range(sent))
    assert len(seen) == sent
