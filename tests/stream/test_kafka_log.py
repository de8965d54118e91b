"""The event log on Kafka beyond the contract: records of other producers, refusals, outages."""

import gc
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from kafka import KafkaProducer

from smes.errors import EventLogError, EventLogUnavailable
from smes_cli.demo.local_servers import start_kafka
from smes_io.clock import wall_clock_ms
from stream.log.event_log import OutRecord, Positions, TopicPartition
from stream.log.kafka_config import KafkaLogConfig
from stream.log.kafka_log import KafkaLog

AT = TopicPartition("t", 0)
DEADLINE_S = 60.0
HANG_S = 30.0  # longer than any load makes these waits, shorter than what would end them otherwise


@pytest.fixture
def closing() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def open_log(closing: ExitStack, bootstrap: str, namespace: str, config: KafkaLogConfig | None = None) -> KafkaLog:
    log = KafkaLog(bootstrap, namespace, config)
    closing.callback(log.close)
    return log


def out(value: bytes) -> OutRecord:
    return OutRecord(value, (), 0)


def test_absent_brokers_are_an_error_in_bounded_time() -> None:
    started = time.monotonic()

    with pytest.raises(EventLogUnavailable, match=r"127\.0\.0\.1:1,127\.0\.0\.1:2: .*within 1 s"):
        KafkaLog("127.0.0.1:1,127.0.0.1:2", connect_timeout_s=1)
    assert 0.9 < time.monotonic() - started < HANG_S


@pytest.mark.parametrize("bootstrap", ["localhost", ":9092", "a:1,b", "a:port", "a:0", ""])
def test_a_malformed_server_is_named_with_what_was_expected(bootstrap: str) -> None:
    with pytest.raises(ValueError, match=r"bootstrap server .*expected host:port"):
        KafkaLog(bootstrap)


@pytest.mark.parametrize(
    "bootstrap",
    [
        "user:s3cr3t@host:9092",
        "user:s3@cr3t@host:9092",
        "user:s3,cr3t@host:9092",
        "host:9092,user:s3cr3t@host2:9092",
        "kafka://user:s3cr3t@host:9092",
        "user:s3cr3t@host",
        "s3cr3t@host:9092",
    ],
)
def test_credentials_are_refused_and_not_shown(bootstrap: str) -> None:
    with pytest.raises(ValueError, match=r"\*\*\*@host.*expected host:port without credentials") as caught:
        KafkaLog(bootstrap)
    assert not any(part in str(caught.value) for part in ("s3", "cr3t"))


def test_the_client_keeps_quiet_also_where_warnings_are_wanted_of_others() -> None:
    log = logging.getLogger("kafka")
    before = log.level
    try:
        for level, expected in ((logging.NOTSET, logging.CRITICAL), (logging.WARNING, logging.CRITICAL), (10, 10)):
            log.setLevel(level)
            with pytest.raises(EventLogUnavailable):
                KafkaLog("127.0.0.1:1", connect_timeout_s=0.1)
            assert log.level == expected
    finally:
        log.setLevel(before)


@pytest.mark.kafka
@pytest.mark.parametrize("compression", ["lz4", "zstd", "gzip", "none"])
def test_every_compression_is_read_back(
    kafka_bootstrap: str, namespace: str, closing: ExitStack, compression: str
) -> None:
    config = KafkaLogConfig(compression=compression)  # type: ignore[arg-type]  # parametrised literal
    log = open_log(closing, kafka_bootstrap, namespace, config)
    log.ensure_topic("t", 1)
    log.append("t", [out(b"%d" % i * 50) for i in range(100)])
    seen: list[bytes] = []
    positions, deadline = {AT: 0}, time.monotonic() + DEADLINE_S
    while len(seen) < 100 and time.monotonic() < deadline:
        fetch = log.read(positions, max_records=1000, timeout_s=1)
        positions = fetch.positions
        seen += [r.value for r in fetch.records]

    assert seen == [b"%d" % i * 50 for i in range(100)]


@pytest.mark.kafka
def test_a_record_over_the_limit_is_refused_before_anything_is_sent(
    kafka_bootstrap: str, namespace: str, closing: ExitStack
) -> None:
    log = open_log(closing, kafka_bootstrap, namespace, KafkaLogConfig(max_record_bytes=100_000))
    log.ensure_topic("t", 1)
    log.append("t", [out(bytes(100_000))])

    with pytest.raises(EventLogError, match="a record of 100001 bytes, expected at most 100000"):
        log.append("t", [out(b"small"), out(bytes(100_001))])
    assert log.end("t") == {AT: 1}


@pytest.mark.kafka
def test_what_the_broker_refuses_raises(kafka_bootstrap: str, namespace: str, closing: ExitStack) -> None:
    open_log(closing, kafka_bootstrap, namespace, KafkaLogConfig(max_record_bytes=1000)).ensure_topic("t", 1)
    generous = open_log(closing, kafka_bootstrap, namespace, KafkaLogConfig(compression="none"))

    with pytest.raises(EventLogError, match=r"1 of 1 records not acknowledged: .*TooLarge"):
        generous.append("t", [out(bytes(500_000))])
    assert generous.end("t") == {AT: 0}


@pytest.mark.kafka
def test_records_of_other_producers_are_read(kafka_bootstrap: str, namespace: str, closing: ExitStack) -> None:
    log = open_log(closing, kafka_bootstrap, namespace)
    log.ensure_topic("t", 1)
    now_ms = wall_clock_ms()
    producer = KafkaProducer(bootstrap_servers=kafka_bootstrap)
    producer.send(f"{namespace}.t", None, b"a key, no value", partition=0, timestamp_ms=now_ms)
    producer.send(f"{namespace}.t", b"a value", partition=0, timestamp_ms=now_ms + 1)
    producer.close()
    seen: list[tuple[bytes, int]] = []
    positions, deadline = {AT: 0}, time.monotonic() + DEADLINE_S
    while len(seen) < 2 and time.monotonic() < deadline:
        fetch = log.read(positions, max_records=10, timeout_s=1)
        positions = fetch.positions
        seen += [(r.value, r.arrival_ms) for r in fetch.records]

    assert seen == [(b"", now_ms), (b"a value", now_ms + 1)]


@pytest.mark.kafka
def test_gaps_of_transaction_markers_are_passed(kafka_bootstrap: str, namespace: str, closing: ExitStack) -> None:
    log = open_log(closing, kafka_bootstrap, namespace)
    log.ensure_topic("t", 1)
    producer = KafkaProducer(bootstrap_servers=kafka_bootstrap, transactional_id=namespace)
    producer.init_transactions()
    for i in range(3):
        producer.begin_transaction()
        producer.send(f"{namespace}.t", b"%d" % i, partition=0)
        producer.commit_transaction()
    producer.close()
    positions, offsets, deadline = {AT: 0}, [], time.monotonic() + DEADLINE_S
    while positions != {AT: 6} and time.monotonic() < deadline:  # a broker writes markers later than it says
        fetch = log.read(positions, max_records=10, timeout_s=1)
        positions = fetch.positions
        offsets += [r.offset for r in fetch.records]

    assert offsets == [0, 2, 4]  # a commit marker follows each
    assert positions == {AT: 6} == log.end("t")
    assert fetch.at_end == {AT}


@pytest.mark.kafka
# kafka-python leaves a socket whose connection was refused to the garbage collector
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_broker_killed_and_restarted_in_mid_run_loses_nothing(
    kafka_home: Path, tmp_path: Path, closing: ExitStack
) -> None:
    server = closing.enter_context(start_kafka(kafka_home, tmp_path / "kafka"))
    config = KafkaLogConfig(outage_timeout_s=DEADLINE_S)
    writer, reader = (open_log(closing, server.bootstrap, "ns", config) for _ in range(2))
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
    read_until(500)
    os.kill(server.pid, signal.SIGKILL)
    server.process.wait(DEADLINE_S)
    closing.enter_context(start_kafka(kafka_home, tmp_path / "kafka", port=server.port))
    read_until(len(seen) + 500)
    stop.set()
    thread.join(DEADLINE_S)
    read_until(sent)
    reader.close()
    writer.close()
    gc.collect()  # the sockets, here where they are expected

    assert errors == []
    assert seen == list(range(sent))  # idempotent producer: nothing lost, doubled or out of order
