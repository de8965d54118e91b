"""Kafka topics that others write to: transactions, records without a time, odd compressions."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from kafka import KafkaAdminClient, KafkaProducer

from stream.log.event_log import Fetch, OutRecord, TopicPartition
from stream.log.kafka_log import KafkaLog
from stream.topics import DEAD_LETTERS

AT = TopicPartition("t", 0)
DEADLINE_S = 60.0

pytestmark = pytest.mark.kafka


@pytest.fixture
def closing() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def log(kafka_bootstrap: str, namespace: str, closing: ExitStack) -> KafkaLog:
    with KafkaAdminClient(bootstrap_servers=kafka_bootstrap) as admin:  # without retention, which goes by timestamps
        admin.create_topics({f"{namespace}.t": {"num_partitions": 1, "configs": {"retention.ms": "-1"}}})
    log = KafkaLog(kafka_bootstrap, namespace, now_ms=lambda: 777)
    closing.callback(log.close)
    log.ensure_topic("t", 1)
    return log


def transactional(closing: ExitStack, bootstrap: str, name: str) -> KafkaProducer:
    producer = KafkaProducer(bootstrap_servers=bootstrap, transactional_id=name)
    closing.callback(producer.close, timeout=5)
    producer.init_transactions()
    return producer


def read_to(log: KafkaLog, position: int, end: int, max_records: int = 1000) -> list[Fetch]:
    """Read from a position until the log says that this is the end; a broker writes markers later than it says."""
    fetches, positions, deadline = list[Fetch](), {AT: position}, time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        fetch = log.read(positions, max_records=max_records, timeout_s=0.2)
        fetches.append(fetch)
        positions = fetch.positions
        if fetch.at_end == {AT} and positions == {AT: end}:
            return fetches
    pytest.fail(f"not at {end} after {DEADLINE_S} s: {positions}, {log.end('t')}")


def values(fetches: list[Fetch]) -> list[bytes]:
    return [record.value for fetch in fetches for record in fetch.records]


@pytest.mark.parametrize("max_records", [7, 1000])
def test_aborted_transactions_are_not_read(
    log: KafkaLog, kafka_bootstrap: str, namespace: str, closing: ExitStack, max_records: int
) -> None:
    producer = transactional(closing, kafka_bootstrap, namespace)
    for value, end in (("0", producer.abort_transaction), ("1", producer.commit_transaction)):
        producer.begin_transaction()
        for i in range(200):
            producer.send(f"{namespace}.t", f"{i}:{value}".encode(), partition=0)
        producer.flush()
        end()

    fetches = read_to(log, 0, 402, max_records)  # 400 records, two markers

    assert values(fetches) == [f"{i}:1".encode() for i in range(200)]
    assert log.end("t") == {AT: 402}
    assert all(not fetch.gaps and not fetch.unreadable for fetch in fetches)


def test_an_aborted_transaction_at_the_end_is_passed(
    log: KafkaLog, kafka_bootstrap: str, namespace: str, closing: ExitStack
) -> None:
    log.append("t", [OutRecord(b"before", (), 0)])
    producer = transactional(closing, kafka_bootstrap, namespace)
    producer.begin_transaction()
    producer.send(f"{namespace}.t", b"never", partition=0).get(30)
    producer.abort_transaction()

    assert values(read_to(log, 0, 3)) == [b"before"]


def test_the_end_is_before_a_transaction_that_is_still_open(
    log: KafkaLog, kafka_bootstrap: str, namespace: str, closing: ExitStack
) -> None:
    log.append("t", [OutRecord(b"before", (), 0)])
    producer = transactional(closing, kafka_bootstrap, namespace)
    producer.begin_transaction()
    producer.send(f"{namespace}.t", b"open", partition=0).get(30)
    log.append("t", [OutRecord(b"behind", (), 0)])

    assert values(read_to(log, 0, 1)) == [b"before"]
    assert log.end("t") == {AT: 1}

    producer.commit_transaction()

    assert values(read_to(log, 1, 4)) == [b"open", b"behind"]


@pytest.mark.parametrize("timestamp_ms", [-1, 0])
def test_a_record_without_a_time_arrives_when_it_is_read(
    log: KafkaLog, kafka_bootstrap: str, namespace: str, closing: ExitStack, timestamp_ms: int
) -> None:
    producer = KafkaProducer(bootstrap_servers=kafka_bootstrap)
    closing.callback(producer.close)
    producer.send(f"{namespace}.t", b"x", partition=0, timestamp_ms=timestamp_ms).get(30)

    fetches = read_to(log, 0, 1)

    assert [r.arrival_ms for fetch in fetches for r in fetch.records] == [777]


def test_dead_letters_are_read_by_a_client_without_lz4(log: KafkaLog, kafka_bootstrap: str, namespace: str) -> None:
    log.ensure_topic(DEAD_LETTERS, 1)
    log.append(DEAD_LETTERS, [OutRecord(b"a letter " * 200, (), 0)])
    program = f"""
import sys
sys.modules["lz4"] = sys.modules["lz4.frame"] = None
from kafka import KafkaConsumer, TopicPartition
consumer = KafkaConsumer(bootstrap_servers="{kafka_bootstrap}", auto_offset_reset="earliest", consumer_timeout_ms=30000)
consumer.assign([TopicPartition("{namespace}.{DEAD_LETTERS}", 0)])
print(next(consumer).value.decode())
consumer.close()
"""

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)

    assert (done.returncode, done.stdout.strip()) == (0, ("a letter " * 200).strip()), done.stderr[-2000:]


def test_several_processes_may_create_a_topic_at_the_same_moment(
    kafka_bootstrap: str, namespace: str, closing: ExitStack
) -> None:
    logs = [KafkaLog(kafka_bootstrap, namespace) for _ in range(3)]
    for each in logs:
        closing.callback(each.close)
    problems: list[Exception] = []

    def use(log: KafkaLog, barrier: threading.Barrier, topic: str) -> None:
        try:
            barrier.wait(DEADLINE_S)
            log.ensure_topic(topic, 2)
            assert log.partitions(topic) == 2
            log.append(topic, [OutRecord(b"x", (), 1)])
        except Exception as error:  # noqa: BLE001 - whatever it is, the test has to show it
            problems.append(error)

    for i in range(5):
        barrier = threading.Barrier(len(logs))
        threads = [threading.Thread(target=use, args=(log, barrier, f"fresh{i}")) for log in logs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE_S)

        assert problems == []
        assert logs[0].end(f"fresh{i}")[TopicPartition(f"fresh{i}", 1)] == 3
