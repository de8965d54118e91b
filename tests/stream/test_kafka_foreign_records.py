"""Kafka topics that others write to: transactions, records without a time, damaged batches, odd compressions."""

import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from kafka import KafkaAdminClient, KafkaProducer
from kafka.record.util import calc_crc32c

from smes_cli.demo.local_servers import start_kafka
from stream.log.event_log import Fetch, OutRecord, Positions, TopicPartition
from stream.log.kafka_connection import KafkaLogConfig
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


def read_to_end(log: KafkaLog, positions: Positions, max_records: int = 1000) -> tuple[list[Fetch], Positions]:
    fetches, deadline = [], time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        fetch = log.read(positions, max_records=max_records, timeout_s=0.2)
        fetches.append(fetch)
        positions = fetch.positions
        if fetch.at_end == set(positions) and positions == log.end("t"):
            return fetches, positions
    pytest.fail(f"not at the end after {DEADLINE_S} s: {positions}, {log.end('t')}")


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

    fetches, positions = read_to_end(log, {AT: 0}, max_records)

    assert values(fetches) == [f"{i}:1".encode() for i in range(200)]
    assert positions == {AT: 402}  # 400 records, two markers
    assert all(not fetch.gaps and not fetch.unreadable for fetch in fetches)


def test_an_aborted_transaction_at_the_end_is_passed(
    log: KafkaLog, kafka_bootstrap: str, namespace: str, closing: ExitStack
) -> None:
    log.append("t", [OutRecord(b"before", (), 0)])
    producer = transactional(closing, kafka_bootstrap, namespace)
    producer.begin_transaction()
    producer.send(f"{namespace}.t", b"never", partition=0).get(30)
    producer.abort_transaction()

    fetches, positions = read_to_end(log, {AT: 0})

    assert (values(fetches), positions) == ([b"before"], {AT: 3})


def test_the_end_is_before_a_transaction_that_is_still_open(
    log: KafkaLog, kafka_bootstrap: str, namespace: str, closing: ExitStack
) -> None:
    log.append("t", [OutRecord(b"before", (), 0)])
    producer = transactional(closing, kafka_bootstrap, namespace)
    producer.begin_transaction()
    producer.send(f"{namespace}.t", b"open", partition=0).get(30)
    log.append("t", [OutRecord(b"behind", (), 0)])

    fetches, positions = read_to_end(log, {AT: 0})

    assert (values(fetches), positions, log.end("t")) == ([b"before"], {AT: 1}, {AT: 1})

    producer.commit_transaction()
    fetches, positions = read_to_end(log, positions)

    assert (values(fetches), positions) == ([b"open", b"behind"], {AT: 4})


@pytest.mark.parametrize("timestamp_ms", [-1, 0])
def test_a_record_without_a_time_arrives_when_it_is_read(
    log: KafkaLog, kafka_bootstrap: str, namespace: str, closing: ExitStack, timestamp_ms: int
) -> None:
    producer = KafkaProducer(bootstrap_servers=kafka_bootstrap)
    closing.callback(producer.close)
    producer.send(f"{namespace}.t", b"x", partition=0, timestamp_ms=timestamp_ms).get(30)

    fetches, _ = read_to_end(log, {AT: 0})

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


_LENGTH_AT, _MAGIC_AT, _CRC_AT, _ATTRIBUTES_AT, _DELTA_AT, _RECORDS_AT = 8, 16, 17, 21, 23, 61


def flip(at: int) -> Callable[[bytearray], None]:
    def damage(batch: bytearray) -> None:
        batch[at] ^= 0xFF

    return damage


def with_checksum(change: Callable[[bytearray], None]) -> Callable[[bytearray], None]:
    def damage(batch: bytearray) -> None:
        change(batch)
        struct.pack_into(">I", batch, _CRC_AT, calc_crc32c(bytes(batch[_ATTRIBUTES_AT:])))

    return damage


def unknown_codec(batch: bytearray) -> None:
    batch[_ATTRIBUTES_AT + 1] |= 7


def broken_gzip(batch: bytearray) -> None:
    batch[_ATTRIBUTES_AT + 1] |= 1


THE_BROKER_TRIPS = "the magic byte"  # its index leads it to no batch behind the damaged one, so that is out of reach
DAMAGES = {
    "a byte of a record": flip(_RECORDS_AT + 8),
    "the checksum": flip(_CRC_AT),
    "the last offset": flip(_DELTA_AT + 1),
    "the length of a record": with_checksum(flip(_RECORDS_AT)),
    "an unknown codec": with_checksum(unknown_codec),
    "no gzip": with_checksum(broken_gzip),
    THE_BROKER_TRIPS: flip(_MAGIC_AT),
}


def damage_middle_batch(path: Path, damage: Callable[[bytearray], None]) -> tuple[int, int]:
    """Damage one batch of a segment file, neither the first nor the last; its first offset and number of records."""
    segment, starts = bytearray(path.read_bytes()), [0]
    while starts[-1] + 12 <= len(segment):
        starts.append(starts[-1] + 12 + struct.unpack_from(">i", segment, starts[-1] + _LENGTH_AT)[0])
    assert len(starts) > 3
    middle = len(starts) // 2 - 1
    batch = segment[starts[middle] : starts[middle + 1]]
    (base,), (last,) = struct.unpack_from(">q", batch), struct.unpack_from(">i", batch, _DELTA_AT)
    damage(batch)
    segment[starts[middle] : starts[middle + 1]] = batch
    path.write_bytes(segment)
    return base, last + 1


# kafka-python leaves a socket whose connection was refused to the garbage collector
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_damaged_batches_are_passed_and_reported(kafka_home: Path, tmp_path: Path, closing: ExitStack) -> None:
    """Every kind of damage at once, each in a topic of its own."""
    config = KafkaLogConfig(compression="none")
    folder = tmp_path / "kafka"
    topics = {f"t{i}": (name, damage) for i, (name, damage) in enumerate(DAMAGES.items())}
    with start_kafka(kafka_home, folder) as server:
        log = KafkaLog(server.bootstrap, "ns", config)
        for topic in topics:
            log.ensure_topic(topic, 1)
            for start in (0, 10, 20):
                log.append(topic, [OutRecord(b"%d" % i, (), 0) for i in range(start, start + 10)])
        log.close()
    segments = {topic: folder / "data" / f"ns.{topic}-0" / "00000000000000000000.log" for topic in topics}
    damaged = {name: damage_middle_batch(segments[topic], damage) for topic, (name, damage) in topics.items()}
    damaged[THE_BROKER_TRIPS] = damaged[THE_BROKER_TRIPS][0], 30 - damaged[THE_BROKER_TRIPS][0]
    server = closing.enter_context(start_kafka(kafka_home, folder))
    log = KafkaLog(server.bootstrap, "ns", config)
    closing.callback(log.close)
    positions: Positions = {TopicPartition(topic, 0): 0 for topic in topics}
    seen: dict[str, list[int]] = {name: [] for name in DAMAGES}
    bad: dict[str, list[tuple[int, int]]] = {name: [] for name in DAMAGES}

    deadline = time.monotonic() + DEADLINE_S
    at_end: frozenset[TopicPartition] = frozenset()
    while at_end != set(positions) and time.monotonic() < deadline:
        fetch = log.read(positions, max_records=1000, timeout_s=0.2)
        positions, at_end = fetch.positions, fetch.at_end
        for record in fetch.records:
            seen[topics[record.topic][0]].append(int(record.value))
        for each in fetch.unreadable:
            bad[topics[each.topic][0]].append((each.offset, each.records))

    assert bad == {name: [where] for name, where in damaged.items()}
    for name, (first, count) in damaged.items():
        assert seen[name] == [i for i in range(30) if not first <= i < first + count]
