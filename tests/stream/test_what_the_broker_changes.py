"""Partitions that are added while the stream runs, and another log under the same name: on real servers and in memory.

Guarantee shown: what is written to a new partition is read from its beginning and accounted for; a position is never
applied to a log that it does not belong to.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
import redis
from kafka import KafkaAdminClient
from kafka.errors import TopicAlreadyExistsError, UnknownTopicOrPartitionError

from smes.errors import EventLogError, LogReplaced
from smes.events import FeedbackBlock, ImpressionBlock
from smes.schema import Schema, Task
from smes_io.clock import wait_until
from stream.codec.codec import encode_feedback, encode_impressions
from stream.config import JoinConfig, MiniBatchConfig, StreamConfig
from stream.dead_letters import DeadLetterWriter
from stream.example_stream import ExampleStream
from stream.log.event_log import EventLog, TopicPartition
from stream.log.kafka_log import KafkaLog
from stream.log.memory_log import InMemoryLog
from stream.log.redis_log import RedisStreamsLog, connect_log
from stream.topics import DEAD_LETTERS, FEEDBACK, IMPRESSIONS

SCHEMA = Schema("broker", tasks=(Task("click", window_s=60),))
START_MS = 1_700_000_000_000
CONFIG = StreamConfig(
    join=JoinConfig(allowed_lateness_s=0),
    batch=MiniBatchConfig(size=10, max_wait_s=None),
    idle_after_s=10,
    metadata_refresh_s=0.2,
)
HANG_S = 60.0


@dataclass(frozen=True)
class World:
    """A log and what an operator does to it.

    Attributes:
        log: The stream's log.
        producer: Another client of it.
        grow: Gives a topic so many partitions.
        make_anew: Deletes both topics and makes them again, empty, with two partitions.
    """

    log: EventLog
    producer: EventLog
    grow: Callable[[str, int], object]
    make_anew: Callable[[], None]


@pytest.fixture(params=["memory", "redis", pytest.param("kafka", marks=pytest.mark.kafka)])
def world(request: pytest.FixtureRequest, namespace: str) -> Iterator[World]:
    if request.param == "memory":
        made = _memory()
    elif request.param == "redis":
        made = _redis(request.getfixturevalue("redis_url"), namespace)
    else:
        made = _kafka(request.getfixturevalue("kafka_bootstrap"), namespace)
    for topic in (IMPRESSIONS, FEEDBACK):
        made.log.ensure_topic(topic, 2)
    yield made
    made.log.close()
    made.producer.close()


def _memory() -> World:
    log = InMemoryLog()

    def make_anew() -> None:
        for topic in (IMPRESSIONS, FEEDBACK):
            log.make_anew(topic)

    return World(log, log, log.add_partitions, make_anew)


def _redis(url: str, namespace: str) -> World:
    logs = [RedisStreamsLog(connect_log(url, timeout_s=30), namespace) for _ in range(2)]

    def make_anew() -> None:
        with redis.Redis.from_url(url) as client:
            client.delete(*client.scan_iter(f"{{{namespace}}}:*"))
        for topic in (IMPRESSIONS, FEEDBACK):
            logs[1].ensure_topic(topic, 2)

    def grow(topic: str, partitions: int) -> None:
        with redis.Redis.from_url(url) as client:
            client.hset(f"{{{namespace}}}:log:topics", topic, str(partitions))
        assert wait_until(lambda: logs[1].partitions(topic) == partitions, timeout_s=HANG_S)

    return World(logs[0], logs[1], grow, make_anew)


def _kafka(bootstrap: str, namespace: str) -> World:
    logs = [KafkaLog(bootstrap, namespace) for _ in range(2)]

    def grow(topic: str, partitions: int) -> None:
        with KafkaAdminClient(bootstrap_servers=bootstrap) as admin:
            admin.create_partitions({f"{namespace}.{topic}": partitions})
        assert wait_until(lambda: logs[1].partitions(topic) == partitions, timeout_s=HANG_S)

    def created(topic: str) -> bool:
        with suppress(TopicAlreadyExistsError, EventLogError), KafkaAdminClient(bootstrap_servers=bootstrap) as admin:
            admin.create_topics({f"{namespace}.{topic}": {"num_partitions": 2, "replication_factor": 1}})
            return True
        return False

    def make_anew() -> None:
        with KafkaAdminClient(bootstrap_servers=bootstrap) as admin, suppress(UnknownTopicOrPartitionError):
            admin.delete_topics([f"{namespace}.{topic}" for topic in (IMPRESSIONS, FEEDBACK)])
        for topic in (IMPRESSIONS, FEEDBACK):
            ask = partial(created, topic)
            assert wait_until(ask, timeout_s=HANG_S)

    return World(logs[0], logs[1], grow, make_anew)


def append(log: EventLog, ids: range) -> None:
    """An impression per id, 100 ms apart, and a click on every second one, wherever their partitions are now."""
    shown = ImpressionBlock.empty(SCHEMA, len(ids))
    shown.impression_id[:] = shown.ids[:, 0] = shown.ids[:, 1] = ids
    shown.event_time_ms[:] = START_MS + 100 * np.array(ids)
    clicks = FeedbackBlock.empty(len(ids) // 2)
    clicks.impression_id[:] = ids[::2]
    clicks.event_time_ms[:] = START_MS + 100 * np.array(ids[::2]) + 50
    clicks.value[:] = 1
    # A producer that knows the new partitions a moment late still reaches all of them in the end.
    count = {topic: log.partitions(topic) for topic in (IMPRESSIONS, FEEDBACK)}
    log.append(IMPRESSIONS, encode_impressions(shown, SCHEMA, "json", count[IMPRESSIONS]))
    log.append(FEEDBACK, encode_feedback(clicks, SCHEMA, "json", count[FEEDBACK]))


def open_stream(log: EventLog, config: StreamConfig = CONFIG) -> ExampleStream:
    return ExampleStream(SCHEMA, config, log, DeadLetterWriter(log))


def read(stream: ExampleStream, impressions: int, feedback: int) -> None:
    """Poll until so many were read, and then until nothing more comes."""
    deadline = time.monotonic() + HANG_S
    while (got := (stream.ledger().impressions, stream.ledger().feedback)) != (impressions, feedback):
        assert time.monotonic() < deadline, f"read {got} of {(impressions, feedback)}"
        stream.poll(0.1)
    assert stream.poll(0) == 0
    assert stream.has_reached(stream.end())


def accounted(stream: ExampleStream) -> bool:
    ledger = stream.ledger()
    impressions = ledger.handed_out + ledger.waiting + ledger.late + ledger.duplicate + ledger.dead_lettered
    feedback = ledger.attached + ledger.feedback_waiting + ledger.feedback_late + ledger.orphaned
    return impressions == ledger.impressions and feedback + ledger.feedback_duplicate == ledger.feedback


def raised_by_polls(stream: ExampleStream) -> EventLogError:
    """The error that ends polling."""
    deadline = time.monotonic() + HANG_S
    while time.monotonic() < deadline:
        try:
            stream.poll(0.1)
        except EventLogError as error:
            return error
    pytest.fail("no poll raised")


def test_partitions_added_while_the_stream_runs_are_read_from_their_beginning(world: World) -> None:
    append(world.producer, range(400))
    stream = open_stream(world.log)
    read(stream, 400, 200)

    world.grow(FEEDBACK, 4)
    world.grow(IMPRESSIONS, 4)
    append(world.producer, range(400, 800))
    read(stream, 800, 400)

    ledger = stream.ledger()
    assert (ledger.late, ledger.duplicate, ledger.attached, ledger.orphaned) == (0, 0, 400, 0)
    assert accounted(stream)
    assert {TopicPartition(t, p) for t in (IMPRESSIONS, FEEDBACK) for p in range(4)} == stream.positions.keys()
    assert all(position > 0 for position in stream.positions.values())


def test_the_state_of_a_stream_that_grew_goes_on(world: World) -> None:
    append(world.producer, range(400))
    stream = open_stream(world.log)
    read(stream, 400, 200)
    world.grow(FEEDBACK, 3)
    world.grow(IMPRESSIONS, 3)
    append(world.producer, range(400, 600))
    read(stream, 600, 300)

    restarted = open_stream(world.log)
    restarted.load_state(stream.state())

    assert restarted.ledger() == stream.ledger()
    append(world.producer, range(600, 800))
    read(restarted, 800, 400)
    assert (restarted.ledger().late, restarted.ledger().attached) == (0, 400)


def test_feedback_may_grow_first(world: World) -> None:
    stream = open_stream(world.log)
    world.grow(FEEDBACK, 3)
    append(world.producer, range(200))

    read(stream, 200, 100)

    restarted = open_stream(world.log)
    restarted.load_state(stream.state())
    assert restarted.ledger() == stream.ledger()
    assert restarted.ledger().attached == 100
    assert restarted.positions[TopicPartition(FEEDBACK, 2)] > 0


def test_feedback_with_fewer_partitions_stops_the_stream_when_that_is_seen(world: World) -> None:
    stream = open_stream(world.log)
    world.grow(IMPRESSIONS, 4)

    assert "'feedback': 2 partitions, expected at least 4" in str(raised_by_polls(stream))
    with pytest.raises(EventLogError, match="'feedback': 2 partitions, expected at least 4 as topic 'impressions'"):
        open_stream(world.log)

    world.grow(FEEDBACK, 4)
    append(world.producer, range(200))
    read(stream, 200, 100)


def test_topics_made_anew_while_the_stream_was_stopped_are_another_log(world: World) -> None:
    append(world.producer, range(200))
    before = open_stream(world.log)
    read(before, 200, 100)
    old = set(world.log.incarnations(IMPRESSIONS).values()) | set(world.log.incarnations(FEEDBACK).values())
    world.make_anew()
    append(world.producer, range(1000, 1500))

    after = open_stream(world.producer)
    after.load_state(before.state())
    with pytest.raises(LogReplaced) as refusal:
        after.poll(0.1)

    new = set(world.producer.incarnations(IMPRESSIONS).values()) | set(world.producer.incarnations(FEEDBACK).values())
    assert not old & new
    assert any(each in str(refusal.value) for each in old)
    assert any(each in str(refusal.value) for each in new)
    assert after.ledger() == before.ledger()  # nothing was read

    skipped = after.skip_lost()

    assert sum(each.end - each.now for each in skipped.values()) == 750
    assert sum(each.before for each in skipped.values()) == 300
    assert all(each.now == 0 and "what the old log held" in str(each) for each in skipped.values())
    read(after, 200 + 500, 100 + 250)
    assert accounted(after)


def test_topics_made_anew_while_the_stream_runs_stop_it(world: World) -> None:
    append(world.producer, range(200))
    stream = open_stream(world.log)
    read(stream, 200, 100)

    world.make_anew()

    error = raised_by_polls(stream)
    assert isinstance(error, LogReplaced), error
    assert stream.ledger().impressions == 200


def test_the_same_log_after_a_restart_is_no_other_one(world: World) -> None:
    append(world.producer, range(200))
    before = open_stream(world.log)
    read(before, 200, 100)

    after = open_stream(world.producer)
    after.load_state(before.state())

    assert after.skip_lost() == {}
    assert after.poll(0) == 0


def test_a_partition_whose_first_record_comes_later_is_known_by_it(world: World) -> None:
    stream = open_stream(world.log, replace(CONFIG, metadata_refresh_s=3600.0))
    append(world.producer, range(200))
    read(stream, 200, 100)
    state = stream.state()

    names = [name for name in state if name.endswith("/incarnation")]

    assert len(names) == 4
    assert all(len(state[name]) for name in names)


@pytest.mark.parametrize("partitions", [1, 3])
def test_dead_letters_go_wherever_there_are_partitions(world: World, partitions: int) -> None:
    world.log.ensure_topic(DEAD_LETTERS, partitions)
    append(world.producer, range(10))
    for topic in (IMPRESSIONS, FEEDBACK):
        records = [replace(r, value=b"no event") for r in encode_feedback(FeedbackBlock.empty(2), SCHEMA, "json", 1)]
        world.producer.append(topic, [replace(r, partition=p) for p, r in enumerate(records)])
    stream = open_stream(world.log)

    read(stream, 12, 7)

    ends = world.log.end(DEAD_LETTERS)
    assert sum(ends.values()) == 4
    assert [ends[TopicPartition(DEAD_LETTERS, p)] for p in range(partitions)] == [[4], [], [2, 2, 0]][partitions - 1]
