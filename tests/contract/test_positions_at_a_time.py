"""Positions at a time, of every event log: nothing that arrived then or later lies before them, by a naive count."""

import random
from collections.abc import Callable, Iterator

import pytest
import redis

from smes_io.clock import wall_clock_ms
from stream.log.event_log import EventLog, OutRecord, TopicPartition
from stream.log.kafka_log import KafkaLog
from stream.log.memory_log import InMemoryLog
from stream.log.redis_log import RedisStreamsLog, connect_log

TOPIC, PARTITIONS = "impressions", 2
START_MS = wall_clock_ms() - 100_000  # Kafka's retention would remove records of another year


@pytest.fixture(params=["memory", "redis", pytest.param("kafka", marks=pytest.mark.kafka)])
def log_at(request: pytest.FixtureRequest, namespace: str) -> Iterator[tuple[EventLog, Callable[[int], None]]]:
    """A log, and what sets its producer's clock."""
    times = [START_MS]
    log: EventLog
    if request.param == "memory":
        log = InMemoryLog(now_ms=lambda: times[0])
    elif request.param == "redis":
        client = connect_log(request.getfixturevalue("redis_url"), timeout_s=30)
        log = RedisStreamsLog(client, namespace, now_ms=lambda: times[0])
    else:
        log = KafkaLog(request.getfixturevalue("kafka_bootstrap"), namespace, now_ms=lambda: times[0])
    yield log, lambda ms: times.__setitem__(0, ms)
    log.close()


def test_a_position_is_that_of_the_first_record_of_the_time_or_later(
    log_at: tuple[EventLog, Callable[[int], None]],
) -> None:
    log, set_clock = log_at
    log.ensure_topic(TOPIC, PARTITIONS)
    assert set(log.at_time(TOPIC, START_MS).values()) == {0}  # nothing is there yet
    rng, now_ms = random.Random(1), START_MS
    arrivals: dict[int, list[int]] = {p: [] for p in range(PARTITIONS)}
    for _ in range(6):
        now_ms += rng.choice([0, 1, 500])
        set_clock(now_ms)
        records = [OutRecord(b"v", (), rng.randrange(PARTITIONS)) for _ in range(rng.randrange(1, 4))]
        for record in records:
            arrivals[record.partition].append(now_ms)
        log.append(TOPIC, records)
    assert now_ms > START_MS

    every = sorted({*arrivals[0], *arrivals[1]})
    for time_ms in [0, *every, *(ms + 1 for ms in every)]:
        found = log.at_time(TOPIC, time_ms)
        for partition, of_partition in arrivals.items():
            at = TopicPartition(TOPIC, partition)
            assert found[at] == sum(ms < time_ms for ms in of_partition), time_ms


def test_entries_of_other_programs_have_the_time_of_their_ids(redis_url: str, namespace: str) -> None:
    log = RedisStreamsLog(connect_log(redis_url, timeout_s=30), namespace, now_ms=lambda: START_MS)
    log.ensure_topic(TOPIC, 1)
    log.append(TOPIC, [OutRecord(b"v", (), 0)] * 3)
    at = TopicPartition(TOPIC, 0)
    with redis.Redis.from_url(redis_url) as client:
        for ms in (START_MS + 10, START_MS + 20):
            client.xadd(f"{{{namespace}}}:log:{TOPIC}:0", {"foreign": "x"}, id=f"{ms}-0")
    later = log.at_time(TOPIC, START_MS + 11)[at]
    assert 3 < later < log.end(TOPIC)[at]
    unread = log.read({at: later}, max_records=10, timeout_s=0)
    assert [each.place for each in unread.unreadable] == [f"entry {START_MS + 20}-0"]
    assert log.at_time(TOPIC, START_MS + 21)[at] == log.end(TOPIC)[at]
    log.close()
