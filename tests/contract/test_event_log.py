"""The contract of the event log: one suite for the in-memory log, Redis Streams (also in a cluster) and Kafka."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import cast

import pytest
import redis
from kafka import KafkaAdminClient
from kafka import TopicPartition as KafkaPartition

from smes.errors import EventLogError, PositionOutOfRange
from smes_io.clock import wall_clock_ms
from smes_io.redis_access import RedisAccess
from stream.log.event_log import EventLog, OutRecord, Positions, Record, ReportingLog, TopicPartition
from stream.log.kafka_log import KafkaLog
from stream.log.memory_log import InMemoryLog
from stream.log.redis_log import RedisStreamsLog, connect_log
from tests.secure_servers import RedisCluster

TOPIC = "impressions"
NOW_MS = wall_clock_ms()  # Kafka's retention would remove records of another year
DEADLINE_S = 30.0
HANG_S = 30.0  # longer than any load makes these waits, shorter than what would end them otherwise


@dataclass(frozen=True)
class LogUnderTest:
    """One adapter: the log, another client of the same log, and what others may do to it, on command.

    Attributes:
        log: The log.
        another: Opens another client of it.
        trim: Removes the records before an offset, as retention does.
        grow: Gives a topic so many partitions, as an operator may.
        remove: Removes a topic with its records.
        spoil: Appends something that is no record; None where everything is one.
        delete: Deletes one record; None where nobody can.
    """

    log: EventLog
    another: Callable[[], EventLog]
    trim: Callable[[TopicPartition, int], None]
    grow: Callable[[str, int], None]
    remove: Callable[[str], None]
    spoil: Callable[[TopicPartition, bytes], None] | None = None
    delete: Callable[[TopicPartition, int], None] | None = None


@pytest.fixture(params=["memory", "redis", "redis cluster", pytest.param("kafka", marks=pytest.mark.kafka)])
def under_test(request: pytest.FixtureRequest, namespace: str) -> Iterator[LogUnderTest]:
    opened: list[EventLog] = []

    def keep(log: EventLog) -> EventLog:
        opened.append(log)
        return log

    if request.param == "memory":
        memory = InMemoryLog(now_ms=lambda: NOW_MS)
        keep(memory)
        yield LogUnderTest(
            memory,
            lambda: memory,
            memory.truncate,
            memory.add_partitions,
            memory.remove,
            memory.append_unreadable,
            memory.delete,
        )
    elif request.param == "redis":
        url: str = request.getfixturevalue("redis_url")
        yield from redis_under_test(url, url, RedisAccess(), namespace, keep)
    elif request.param == "redis cluster":
        cluster: RedisCluster = request.getfixturevalue("cluster")
        owner = cluster.owner(f"{{{namespace}}}")
        access = RedisAccess(cluster=True)
        yield from redis_under_test(cluster.url((owner + 1) % 3), cluster.url(owner), access, namespace, keep)
    else:
        yield from kafka_under_test(request.getfixturevalue("kafka_bootstrap"), namespace, keep)
    for log in opened:
        log.close()


def redis_under_test(
    url: str, owner_url: str, access: RedisAccess, namespace: str, keep: Callable[[EventLog], EventLog]
) -> Iterator[LogUnderTest]:
    def open_log() -> EventLog:
        client = connect_log(url, timeout_s=30, access=access, namespace=namespace)
        return keep(RedisStreamsLog(client, namespace, now_ms=lambda: NOW_MS))

    def key(at: TopicPartition) -> str:
        return f"{{{namespace}}}:log:{at.topic}:{at.partition}"

    def remove(topic: str) -> None:
        client.hdel(f"{{{namespace}}}:log:topics", topic)
        client.delete(*client.keys(f"{{{namespace}}}:log:{topic}:*"))

    with redis.Redis.from_url(owner_url) as client:
        yield LogUnderTest(
            open_log(),
            open_log,
            lambda at, offset: client.xtrim(key(at), minid=f"0-{offset + 1}", approximate=False),
            lambda topic, partitions: client.hset(f"{{{namespace}}}:log:topics", topic, str(partitions)),
            remove,
            lambda at, payload: client.xadd(key(at), {"foo": payload}, id="0-*"),
            lambda at, offset: client.xdel(key(at), f"0-{offset + 1}"),
        )
        for name in client.scan_iter(f"{{{namespace}}}:*"):
            client.delete(name)


def kafka_under_test(bootstrap: str, namespace: str, keep: Callable[[EventLog], EventLog]) -> Iterator[LogUnderTest]:
    def open_log() -> EventLog:
        return keep(KafkaLog(bootstrap, namespace, now_ms=lambda: NOW_MS))

    def trim(at: TopicPartition, offset: int) -> None:
        with KafkaAdminClient(bootstrap_servers=bootstrap) as admin:
            admin.delete_records({KafkaPartition(f"{namespace}.{at.topic}", at.partition): offset})

    def grow(topic: str, partitions: int) -> None:
        with KafkaAdminClient(bootstrap_servers=bootstrap) as admin:
            admin.create_partitions({f"{namespace}.{topic}": partitions})

    def remove(topic: str) -> None:
        with KafkaAdminClient(bootstrap_servers=bootstrap) as admin:
            admin.delete_topics([f"{namespace}.{topic}"])

    yield LogUnderTest(open_log(), open_log, trim, grow, remove)


@pytest.fixture
def log(under_test: LogUnderTest) -> EventLog:
    return under_test.log


def out(value: str, partition: int = 0) -> OutRecord:
    return OutRecord(value.encode(), (("codec", b"json"),), partition)


def drain(log: EventLog, positions: Positions, max_records: int = 1000) -> tuple[list[Record], Positions]:
    """Read until every partition is at its end, or fail after ``DEADLINE_S``."""
    records, deadline = [], time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        fetch = log.read(positions, max_records=max_records, timeout_s=0.5)
        records += fetch.records
        positions = fetch.positions
        if fetch.at_end == set(positions):
            return records, positions
    pytest.fail(f"not at the end after {DEADLINE_S} s: {positions}")


def values(records: list[Record], partition: int = 0) -> list[str]:
    return [r.value.decode() for r in records if r.partition == partition]


def test_an_append_says_where_its_records_are(under_test: LogUnderTest) -> None:
    log = under_test.log
    log.ensure_topic(TOPIC, 2)
    log.append(TOPIC, [OutRecord(b"before", (), 1)])

    offsets = cast(ReportingLog, log).append_reporting(TOPIC, [OutRecord(b"%d" % i, (), i % 2) for i in range(7)])

    starts = dict.fromkeys([TopicPartition(TOPIC, 0), TopicPartition(TOPIC, 1)], 0)
    read: dict[tuple[int, int], bytes] = {}
    while len(read) < 8:
        fetch = log.read(starts, max_records=100, timeout_s=1)
        starts = fetch.positions
        read |= {(record.partition, record.offset): record.value for record in fetch.records}
    assert [read[i % 2, offset or 0] for i, offset in enumerate(offsets)] == [b"%d" % i for i in range(7)]
    assert offsets[0] == 0


def test_a_new_topic_is_empty_and_begins_where_it_ends(log: EventLog) -> None:
    log.ensure_topic(TOPIC, 3)

    assert log.partitions(TOPIC) == 3
    assert log.begin(TOPIC) == log.end(TOPIC) == {TopicPartition(TOPIC, i): 0 for i in range(3)}


def test_records_come_back_in_order_with_everything_they_carried(log: EventLog) -> None:
    log.ensure_topic(TOPIC, 2)
    headers = (("codec", b"arrow"), ("schema", bytes(range(256))), ("codec", b""))
    log.append(TOPIC, [OutRecord(f"v{i}".encode(), headers, 1) for i in range(50)])

    records, _ = drain(log, log.begin(TOPIC))

    first = records[0].offset
    assert values(records, 1) == [f"v{i}" for i in range(50)]
    assert [r.offset for r in records] == list(range(first, first + 50))
    assert {(r.topic, r.partition, r.headers, r.arrival_ms) for r in records} == {(TOPIC, 1, headers, NOW_MS)}


def test_a_value_and_headers_may_be_empty(log: EventLog) -> None:
    log.ensure_topic(TOPIC, 1)
    log.append(TOPIC, [OutRecord(b"", (), 0)])

    records, _ = drain(log, log.begin(TOPIC))

    assert [(r.value, r.headers) for r in records] == [(b"", ())]


def test_begin_and_end_count_the_records_of_each_partition(log: EventLog) -> None:
    log.ensure_topic(TOPIC, 2)
    log.append(TOPIC, [out(str(i), partition=i % 2) for i in range(7)])

    begin, end = log.begin(TOPIC), log.end(TOPIC)

    assert {at.partition: end[at] - begin[at] for at in end} == {0: 4, 1: 3}


def test_appends_add_up(log: EventLog) -> None:
    log.ensure_topic(TOPIC, 1)
    for start in range(0, 30, 10):
        log.append(TOPIC, [out(str(i)) for i in range(start, start + 10)])

    records, _ = drain(log, log.begin(TOPIC))

    assert values(records) == [str(i) for i in range(30)]


def test_an_empty_append_appends_nothing(log: EventLog) -> None:
    log.ensure_topic(TOPIC, 1)

    log.append(TOPIC, [])

    assert log.end(TOPIC) == log.begin(TOPIC)


def test_reading_goes_on_exactly_after_the_last_record_read(under_test: LogUnderTest) -> None:
    log = under_test.log
    log.ensure_topic(TOPIC, 1)
    log.append(TOPIC, [out(str(i)) for i in range(100)])
    start, seen, deadline = log.begin(TOPIC), 0, time.monotonic() + DEADLINE_S
    while seen < 30 and time.monotonic() < deadline:
        fetch = log.read(start, max_records=7, timeout_s=5)
        assert values(fetch.records) == [str(i) for i in range(seen, seen + len(fetch.records))]
        seen, start = seen + len(fetch.records), fetch.positions

    records, after = drain(under_test.another(), start)

    assert values(records) == [str(i) for i in range(seen, 100)]
    assert after == log.end(TOPIC)


def test_the_same_positions_give_the_same_records_again(log: EventLog) -> None:
    log.ensure_topic(TOPIC, 2)
    log.append(TOPIC, [out(str(i), partition=i % 2) for i in range(40)])
    begin = log.begin(TOPIC)
    once, _ = drain(log, begin, max_records=9)
    again, _ = drain(log, begin)

    by_place = [sorted((r.partition, r.offset, r.value) for r in records) for records in (once, again)]

    assert by_place[0] == by_place[1]
    assert len(once) == 40


def test_several_partitions_and_topics_in_one_read(log: EventLog) -> None:
    log.ensure_topic(TOPIC, 3)
    log.ensure_topic("feedback", 2)
    log.append(TOPIC, [out(f"i{i}", partition=i % 3) for i in range(30)])
    log.append("feedback", [out(f"f{i}", partition=i % 2) for i in range(20)])

    records, after = drain(log, log.begin(TOPIC) | log.begin("feedback"))

    assert after == log.end(TOPIC) | log.end("feedback")

    for topic, letter, partitions, count in ((TOPIC, "i", 3, 30), ("feedback", "f", 2, 20)):
        mine = [r for r in records if r.topic == topic]
        for p in range(partitions):
            assert values(mine, p) == [f"{letter}{i}" for i in range(p, count, partitions)]


def test_one_fetch_never_interleaves_partitions(log: EventLog) -> None:
    log.ensure_topic(TOPIC, 3)
    log.append(TOPIC, [out(str(i), partition=i % 3) for i in range(30)])
    positions, deadline = log.begin(TOPIC), time.monotonic() + DEADLINE_S
    while positions != log.end(TOPIC) and time.monotonic() < deadline:
        fetch = log.read(positions, max_records=1000, timeout_s=1)
        positions = fetch.positions
        order = [r.partition for r in fetch.records]
        runs = [p for i, p in enumerate(order) if i == 0 or order[i - 1] != p]
        assert len(runs) == len(set(runs))

    assert positions == log.end(TOPIC)


def test_only_the_partitions_asked_for_are_read(log: EventLog) -> None:
    log.ensure_topic(TOPIC, 2)
    log.append(TOPIC, [out(str(i), partition=i % 2) for i in range(10)])
    at = TopicPartition(TOPIC, 1)

    records, after = drain(log, {at: 0})

    assert values(records, 1) == ["1", "3", "5", "7", "9"]
    assert after == {at: 5}


def test_the_next_read_may_ask_for_other_partitions(log: EventLog) -> None:
    log.ensure_topic(TOPIC, 2)
    log.append(TOPIC, [out(str(i), partition=i % 2) for i in range(10)])
    at = TopicPartition(TOPIC, 1)
    drain(log, {at: 0})

    records, _ = drain(log, {at: 3, TopicPartition(TOPIC, 0): 4})

    assert (values(records, 0), values(records, 1)) == (["8"], ["7", "9"])


def test_max_records_bounds_a_read(log: EventLog) -> None:
    log.ensure_topic(TOPIC, 2)
    log.append(TOPIC, [out(str(i), partition=i % 2) for i in range(60)])
    positions, sizes, deadline = log.begin(TOPIC), [], time.monotonic() + DEADLINE_S
    while positions != log.end(TOPIC) and time.monotonic() < deadline:
        fetch = log.read(positions, max_records=10, timeout_s=5)
        positions = fetch.positions
        sizes.append(len(fetch.records))

    assert sum(sizes) == 60
    assert max(sizes) <= 10


@pytest.mark.parametrize("timeout_s", [0.0, 0.3])
def test_without_data_a_read_returns_nothing_after_the_timeout(log: EventLog, timeout_s: float) -> None:
    log.ensure_topic(TOPIC, 2)
    begin = log.begin(TOPIC)
    log.read(begin, max_records=1, timeout_s=0)  # clients are set up on first use
    started = time.monotonic()
    fetch = log.read(begin, max_records=10, timeout_s=timeout_s)
    took_s = time.monotonic() - started

    assert (fetch.records, fetch.positions, fetch.at_end) == ([], begin, frozenset(begin))
    assert timeout_s - 0.02 <= took_s < timeout_s + HANG_S


def test_a_waiting_read_wakes_up_on_an_append(under_test: LogUnderTest) -> None:
    log, writer = under_test.log, under_test.another()
    log.ensure_topic(TOPIC, 2)
    begin = log.begin(TOPIC)
    log.read(begin, max_records=1, timeout_s=0)
    writer.append(TOPIC, [out("warm", partition=0)])  # connects the writer
    _, positions = drain(log, begin)
    appender = threading.Timer(0.3, lambda: writer.append(TOPIC, [out("late", partition=1)]))
    appender.start()
    started = time.monotonic()
    fetch = log.read(positions, max_records=10, timeout_s=100)
    took_s = time.monotonic() - started

    appender.join()

    assert values(fetch.records, 1) == ["late"]
    assert took_s < HANG_S


def test_big_records_pass(log: EventLog) -> None:
    log.ensure_topic(TOPIC, 2)
    megabyte = bytes(range(256)) * 4096
    big = [OutRecord(bytes((i,)) + megabyte * 4, (), i % 2) for i in range(4)]
    log.append(TOPIC, big)

    records, _ = drain(log, log.begin(TOPIC))

    assert sorted(r.value for r in records) == sorted(r.value for r in big)


def test_at_end_says_which_partitions_have_nothing_further(log: EventLog) -> None:
    log.ensure_topic(TOPIC, 2)
    empty, full = TopicPartition(TOPIC, 0), TopicPartition(TOPIC, 1)
    log.append(TOPIC, [out(str(i), partition=1) for i in range(8)])
    positions, deadline = {empty: 0, full: 0}, time.monotonic() + DEADLINE_S
    while positions[full] < 8 and time.monotonic() < deadline:
        fetch = log.read(positions, max_records=4, timeout_s=5)
        positions = fetch.positions
        assert fetch.at_end == ({empty, full} if positions[full] == 8 else {empty})

    log.append(TOPIC, [out("8", partition=1)])

    assert empty in log.read({empty: 0}, max_records=1, timeout_s=0).at_end

    records, _ = drain(log, positions)

    assert values(records, 1) == ["8"]


def test_at_end_counts_records_appended_after_the_fetch(log: EventLog) -> None:
    log.ensure_topic(TOPIC, 1)
    at = TopicPartition(TOPIC, 0)
    log.append(TOPIC, [out(str(i)) for i in range(10)])
    positions, deadline = {at: 0}, time.monotonic() + DEADLINE_S
    while positions[at] < 5 and time.monotonic() < deadline:
        positions = log.read(positions, max_records=5, timeout_s=5).positions
    log.append(TOPIC, [out("new")])

    fetch = log.read(positions, max_records=5, timeout_s=5)

    assert fetch.positions == {at: 10}
    assert fetch.at_end == frozenset()


def test_a_trimmed_position_is_out_of_range(under_test: LogUnderTest) -> None:
    log = under_test.log
    log.ensure_topic(TOPIC, 2)
    at = TopicPartition(TOPIC, 1)
    log.append(TOPIC, [out(str(i), partition=1) for i in range(10)])

    under_test.trim(at, 4)

    assert log.begin(TOPIC)[at] == 4
    with pytest.raises(PositionOutOfRange, match=r"impressions/1.* 3"):
        drain(log, {TopicPartition(TOPIC, 0): 0, at: 3})

    records, _ = drain(log, {TopicPartition(TOPIC, 0): 0, at: 4})

    assert values(records, 1) == [str(i) for i in range(4, 10)]


def test_a_position_trimmed_away_with_everything_is_out_of_range(under_test: LogUnderTest) -> None:
    log = under_test.log
    log.ensure_topic(TOPIC, 1)
    at = TopicPartition(TOPIC, 0)
    log.append(TOPIC, [out(str(i)) for i in range(10)])

    under_test.trim(at, 10)

    assert (log.begin(TOPIC), log.end(TOPIC)) == ({at: 10}, {at: 10})
    with pytest.raises(PositionOutOfRange, match="impressions/0"):
        drain(log, {at: 9})


def test_a_reader_that_retention_overtook_gets_an_error(under_test: LogUnderTest) -> None:
    log = under_test.log
    log.ensure_topic(TOPIC, 1)
    at = TopicPartition(TOPIC, 0)
    log.append(TOPIC, [out(str(i)) for i in range(5)])
    _, positions = drain(log, {at: 0})
    log.append(TOPIC, [out(str(i)) for i in range(5, 10)])
    under_test.trim(at, 8)
    reader = under_test.another()

    with pytest.raises(PositionOutOfRange, match="impressions/0"):
        drain(reader, positions)


@pytest.mark.parametrize("position", [-1, 11, 1_000_000])
def test_a_position_that_never_was_is_out_of_range(log: EventLog, position: int) -> None:
    log.ensure_topic(TOPIC, 1)
    at = TopicPartition(TOPIC, 0)
    log.append(TOPIC, [out(str(i)) for i in range(10)])

    with pytest.raises(PositionOutOfRange, match=rf"impressions/0.*{position}"):
        drain(log, {at: position})


@pytest.mark.parametrize(
    "ask",
    [
        lambda log: log.partitions("nowhere"),
        lambda log: log.begin("nowhere"),
        lambda log: log.end("nowhere"),
        lambda log: log.append("nowhere", [out("x")]),
        lambda log: log.read({TopicPartition("nowhere", 0): 0}, max_records=1, timeout_s=0),
    ],
    ids=["partitions", "begin", "end", "append", "read"],
)
def test_a_topic_that_does_not_exist_is_named(log: EventLog, ask: Callable[[EventLog], object]) -> None:
    log.ensure_topic(TOPIC, 1)

    with pytest.raises(EventLogError, match=r"nowhere.*does not exist"):
        ask(log)


def test_ensure_topic_again_keeps_the_records(under_test: LogUnderTest) -> None:
    log = under_test.log
    log.ensure_topic(TOPIC, 2)
    log.append(TOPIC, [out("kept")])
    log.ensure_topic(TOPIC, 2)
    under_test.another().ensure_topic(TOPIC, 2)

    records, _ = drain(log, log.begin(TOPIC))

    assert values(records) == ["kept"]


def test_ensure_topic_with_another_number_of_partitions_names_both(under_test: LogUnderTest) -> None:
    under_test.log.ensure_topic(TOPIC, 2)

    with pytest.raises(EventLogError, match=r"impressions.* 2 partitions, expected 3"):
        under_test.another().ensure_topic(TOPIC, 3)


@pytest.mark.parametrize("partition", [-1, 2])
def test_a_partition_that_does_not_exist_is_refused_and_nothing_appended(log: EventLog, partition: int) -> None:
    log.ensure_topic(TOPIC, 2)

    with pytest.raises(ValueError, match=rf"partition {partition}, expected 0 … 1"):
        log.append(TOPIC, [out("good"), out("bad", partition=partition)])
    assert log.end(TOPIC) == log.begin(TOPIC)


@pytest.mark.parametrize("partition", [-1, 2])
def test_a_partition_that_does_not_exist_is_not_read(log: EventLog, partition: int) -> None:
    log.ensure_topic(TOPIC, 2)

    with pytest.raises(ValueError, match=rf"partition {partition}, expected 0 … 1"):
        log.read({TopicPartition(TOPIC, partition): 0}, max_records=1, timeout_s=0)


def test_a_read_of_no_records_is_refused(log: EventLog) -> None:
    log.ensure_topic(TOPIC, 1)

    with pytest.raises(ValueError, match="max_records 0"):
        log.read(log.begin(TOPIC), max_records=0, timeout_s=0)


def test_a_read_of_no_partitions_is_refused(log: EventLog) -> None:
    with pytest.raises(ValueError, match="at least one partition"):
        log.read({}, max_records=1, timeout_s=0)


def test_a_topic_without_partitions_is_refused(log: EventLog) -> None:
    with pytest.raises(ValueError, match="partitions 0, expected at least 1"):
        log.ensure_topic("none", 0)


def test_two_readers_are_independent(under_test: LogUnderTest) -> None:
    one, two = under_test.log, under_test.another()
    one.ensure_topic(TOPIC, 1)
    one.append(TOPIC, [out(str(i)) for i in range(20)])
    mine, _ = drain(one, one.begin(TOPIC), max_records=6)

    yours, _ = drain(two, two.begin(TOPIC), max_records=11)

    assert values(mine) == values(yours) == [str(i) for i in range(20)]


def test_many_threads_append_and_nothing_is_lost(log: EventLog) -> None:
    log.ensure_topic(TOPIC, 2)
    errors: list[Exception] = []

    def write(name: int) -> None:
        try:
            for i in range(5):
                log.append(TOPIC, [out(f"{name}.{i}", partition=name % 2)])
        except Exception as error:  # noqa: BLE001 - whatever it is, the test has to show it
            errors.append(error)

    threads = [threading.Thread(target=write, args=(name,)) for name in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    records, _ = drain(log, log.begin(TOPIC))

    assert errors == []
    assert sorted(r.value.decode() for r in records) == sorted(f"{n}.{i}" for n in range(6) for i in range(5))

    for name in range(6):  # a thread's own appends keep their order
        mine = [v for v in values(records, name % 2) if v.startswith(f"{name}.")]
        assert mine == [f"{name}.{i}" for i in range(5)]


def test_close_may_be_called_again(log: EventLog) -> None:
    log.ensure_topic(TOPIC, 1)
    log.append(TOPIC, [out("x")])
    drain(log, log.begin(TOPIC))
    log.close()
    log.close()


def test_any_number_of_partitions_will_do_where_it_need_not_be_exact(under_test: LogUnderTest) -> None:
    under_test.log.ensure_topic(TOPIC, 3)

    under_test.another().ensure_topic(TOPIC, 1, exact=False)
    under_test.log.ensure_topic("other", 2, exact=False)

    assert (under_test.log.partitions(TOPIC), under_test.log.partitions("other")) == (3, 2)


def await_partitions(log: EventLog, count: int) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while log.partitions(TOPIC) != count:
        if time.monotonic() > deadline:
            pytest.fail(f"{log.partitions(TOPIC)} partitions after {DEADLINE_S} s, expected {count}")


def test_new_partitions_are_noticed_read_and_appended_to(under_test: LogUnderTest) -> None:
    log, writer = under_test.log, under_test.another()
    log.ensure_topic(TOPIC, 2)
    writer.append(TOPIC, [out(str(i), partition=i % 2) for i in range(10)])
    drain(log, log.begin(TOPIC))

    under_test.grow(TOPIC, 4)
    await_partitions(log, 4)
    await_partitions(writer, 4)
    writer.append(TOPIC, [out(str(i), partition=i % 4) for i in range(10, 30)])

    records, after = drain(log, log.begin(TOPIC))

    assert set(after) == set(log.incarnations(TOPIC)) == {TopicPartition(TOPIC, i) for i in range(4)}
    assert sorted(int(r.value) for r in records) == list(range(30))


def test_an_incarnation_stays_while_records_come_and_go(under_test: LogUnderTest) -> None:
    log = under_test.log
    log.ensure_topic(TOPIC, 2)
    before = log.incarnations(TOPIC)
    log.append(TOPIC, [out(str(i), partition=i % 2) for i in range(10)])
    under_test.trim(TopicPartition(TOPIC, 0), 5)

    assert log.incarnations(TOPIC) == before == under_test.another().incarnations(TOPIC)


def test_a_topic_made_anew_is_another_incarnation(under_test: LogUnderTest) -> None:
    log = under_test.log
    log.ensure_topic(TOPIC, 2)
    log.append(TOPIC, [out(str(i), partition=i % 2) for i in range(10)])
    before = log.incarnations(TOPIC)

    under_test.remove(TOPIC)
    other = under_test.another()
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:  # a broker removes topics later than it says
        other.ensure_topic(TOPIC, 2)
        with suppress(EventLogError):  # it was removed now
            if other.end(TOPIC) == {TopicPartition(TOPIC, i): 0 for i in range(2)}:
                break
    other.append(TOPIC, [out("new", partition=i % 2) for i in range(20)])
    after = log.incarnations(TOPIC)

    assert after.keys() == before.keys()
    assert not set(after.values()) & set(before.values())


def test_a_stop_ends_a_wait_for_records(log: EventLog) -> None:
    log.ensure_topic(TOPIC, 1)
    begin, stop = log.begin(TOPIC), threading.Event()
    log.set_stop(stop)
    log.read(begin, max_records=1, timeout_s=0)
    threading.Timer(0.2, stop.set).start()
    started = time.monotonic()

    fetch = log.read(begin, max_records=1, timeout_s=1000)

    assert (fetch.records, fetch.positions) == ([], begin)
    assert time.monotonic() - started < HANG_S


def test_while_a_stop_is_set_a_log_that_is_there_still_answers(log: EventLog) -> None:
    log.ensure_topic(TOPIC, 1)
    stop = threading.Event()
    stop.set()
    log.set_stop(stop)
    log.append(TOPIC, [out("last")])

    records, after = drain(log, log.begin(TOPIC))

    assert (values(records), after) == (["last"], log.end(TOPIC))


def test_what_is_no_record_is_reported_and_passed(under_test: LogUnderTest) -> None:
    if under_test.spoil is None:
        pytest.skip("every record of such a log is one; damage is tried in test_kafka_damage.py")
    log, at = under_test.log, TopicPartition(TOPIC, 1)
    log.ensure_topic(TOPIC, 2)
    log.append(TOPIC, [out("before", partition=1)])
    under_test.spoil(at, b"junk")
    log.append(TOPIC, [out("behind", partition=1)])

    fetch = log.read({at: 0}, max_records=10, timeout_s=0)

    (bad,) = fetch.unreadable
    assert (bad.topic, bad.partition, bad.offset, bad.records) == (TOPIC, 1, 1, 1)
    assert b"junk" in bad.payload
    assert values(fetch.records, 1) == ["before", "behind"]
    assert (fetch.positions, fetch.at_end) == ({at: 3}, frozenset({at}))


@pytest.mark.parametrize("offsets", [[0], [4], [9], [0, 1, 5, 8, 9]])
def test_deleted_records_are_gaps(under_test: LogUnderTest, offsets: list[int]) -> None:
    if under_test.delete is None:
        pytest.skip("single records of such a log cannot be deleted")
    log, at = under_test.log, TopicPartition(TOPIC, 0)
    log.ensure_topic(TOPIC, 1)
    log.append(TOPIC, [out(str(i)) for i in range(10)])
    for offset in offsets:
        under_test.delete(at, offset)
    positions, gaps = {at: 0}, 0
    records: list[Record] = []
    while positions != log.end(TOPIC):
        fetch = log.read(positions, max_records=3, timeout_s=0)
        positions, records, gaps = fetch.positions, records + fetch.records, gaps + sum(fetch.gaps.values())

    assert values(records) == [str(i) for i in range(10) if i not in offsets]
    assert gaps == len(offsets)
