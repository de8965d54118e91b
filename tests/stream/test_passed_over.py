"""What the stream passes over: deleted records, and what is in the log but is no record of ours. And the log's end.

Guarantee shown: both are counted by partition, in the ledger and in the state; what cannot be read is a dead letter
that names its place; neither ends the stream.
"""

import base64
import json
from dataclasses import replace

import pytest
import redis

from smes.errors import EventLogError
from stream.dead_letters import MAX_PAYLOAD_BYTES, SHORT_PAYLOAD_BYTES, DeadLetterWriter
from stream.example_stream import ExampleStream
from stream.log.event_log import EventLog, OutRecord, TopicPartition
from stream.log.memory_log import InMemoryLog
from stream.log.redis_log import RedisStreamsLog, connect_log
from stream.topics import DEAD_LETTERS, FEEDBACK, IMPRESSIONS
from tests.stream.test_what_the_broker_changes import CONFIG, SCHEMA, accounted, append, open_stream, read

SHOWN = TopicPartition(IMPRESSIONS, 1)
CLICKED = TopicPartition(FEEDBACK, 0)


@pytest.fixture
def log() -> InMemoryLog:
    log = InMemoryLog()
    for topic in (IMPRESSIONS, FEEDBACK):
        log.ensure_topic(topic, 2)
    append(log, range(400))
    return log


def letters(log: EventLog) -> list[dict[str, object]]:
    fetch = log.read({TopicPartition(DEAD_LETTERS, 0): 0}, max_records=100, timeout_s=0)
    return [json.loads(record.value) for record in fetch.records]


def taken(stream: ExampleStream) -> list[int]:
    ids: list[int] = []
    while (batch := stream.next_batch()) is not None:
        ids += batch.impression_id.tolist()
    return ids


def test_a_deleted_record_is_one_gap_and_the_others_are_read(log: InMemoryLog) -> None:
    log.delete(SHOWN, 7)
    log.delete(CLICKED, 3)
    log.delete(CLICKED, 4)
    stream = open_stream(log)

    read(stream, 399, 198)

    ledger = stream.ledger()
    assert (ledger.gaps, ledger.feedback_gaps) == (1, 2)
    assert (ledger.dead_lettered, ledger.feedback_dead_lettered) == (0, 0)
    assert accounted(stream)
    assert sum(p for s, p in stream.positions.items() if s.topic == IMPRESSIONS) == ledger.impressions + ledger.gaps


def test_what_is_no_record_of_ours_is_a_letter_that_names_its_place(log: InMemoryLog) -> None:
    log.append_unreadable(SHOWN, b"\x00foreign", "expected the fields v and h, got x")
    append(log, range(400, 410))
    stream = open_stream(log)

    read(stream, 411, 205)

    ledger = stream.ledger()
    assert (ledger.unreadable, ledger.feedback_unreadable) == (1, 0)
    assert (ledger.dead_lettered, ledger.feedback_dead_lettered) == (1, 0)
    assert accounted(stream)
    [letter] = letters(log)
    offset = log.end(IMPRESSIONS)[SHOWN] - 1
    assert letter["code"] == "unreadable"
    assert letter["reason"] == "expected the fields v and h, got x"
    assert (letter["topic"], letter["partition"], letter["row"], letter["events"]) == (IMPRESSIONS, 1, None, 1)
    assert isinstance(letter["offset"], int)
    assert letter["offset"] < offset
    assert letter["place"] == f"entry {letter['offset']}"
    assert base64.b64decode(str(letter["payload"])) == b"\x00foreign"


def test_redis_streams_that_others_touched_are_read_on(redis_url: str, namespace: str) -> None:
    log = RedisStreamsLog(connect_log(redis_url, timeout_s=30), namespace)
    for topic in (IMPRESSIONS, FEEDBACK):
        log.ensure_topic(topic, 1)
    append(log, range(400))
    stream = open_stream(log)
    with redis.Redis.from_url(redis_url) as client:
        assert client.xdel(f"{{{namespace}}}:log:{IMPRESSIONS}:0", "0-101") == 1
        foreign = client.xadd(f"{{{namespace}}}:log:{IMPRESSIONS}:0", {"who": "someone"}, id="0-*")

    read(stream, 400, 200)  # 399 of ours and the foreign one

    ledger = stream.ledger()
    assert (ledger.gaps, ledger.unreadable, ledger.dead_lettered) == (1, 1, 1)
    assert accounted(stream)
    [letter] = letters(log)
    assert (letter["code"], letter["place"]) == ("unreadable", f"entry {foreign.decode()}")
    append(log, range(400, 410))
    read(stream, 410, 205)
    log.close()


def test_gaps_and_unreadable_records_are_counted_by_partition_and_kept_in_the_state(log: InMemoryLog) -> None:
    log.delete(SHOWN, 7)
    log.append_unreadable(CLICKED, b"?")
    stream = open_stream(log)
    read(stream, 399, 201)

    state = stream.state()
    restarted = open_stream(log)
    restarted.load_state(state)

    assert state["impressions/1/refused"].tolist() == [0, 0, 1, 0, 0]
    assert state["feedback/0/refused"].tolist() == [1, 0, 0, 1, 0]
    assert restarted.ledger() == stream.ledger()


def test_a_state_from_before_gaps_were_counted_is_read(log: InMemoryLog) -> None:
    stream = open_stream(log)
    read(stream, 400, 200)
    state = {name: array for name, array in stream.state().items() if not name.endswith("/incarnation")}
    older = {name: array[:2] if name.endswith("/refused") else array for name, array in state.items()}

    restarted = open_stream(log)
    restarted.load_state(older)

    assert restarted.poll(0) == 0
    assert restarted.ledger() == stream.ledger()


def test_a_dead_letter_topic_that_takes_small_records_only_gets_short_letters() -> None:
    class Small(InMemoryLog):
        def append(self, topic: str, records: object) -> None:
            assert isinstance(records, list)
            if topic == DEAD_LETTERS and any(len(record.value) > 2000 for record in records):
                raise EventLogError(f"{topic}: a record of more than 2000 bytes")
            super().append(topic, records)

    log = Small()
    for topic in (IMPRESSIONS, FEEDBACK):
        log.ensure_topic(topic, 2)
    log.append(IMPRESSIONS, [OutRecord(b"x" * 5000, (), 0)])
    stream = open_stream(log)

    read(stream, 1, 0)

    [letter] = letters(log)
    assert (letter["payload_bytes"], letter["payload_truncated"]) == (5000, True)
    assert len(base64.b64decode(str(letter["payload"]))) == SHORT_PAYLOAD_BYTES < MAX_PAYLOAD_BYTES


def test_a_dead_letter_topic_that_gets_more_partitions_is_used_as_it_is_then(log: InMemoryLog) -> None:
    log.ensure_topic(DEAD_LETTERS, 1)
    stream = open_stream(log)
    log.append(IMPRESSIONS, [OutRecord(b"no event", (), 1)])
    read(stream, 401, 200)
    log.add_partitions(DEAD_LETTERS, 2)
    log.append(IMPRESSIONS, [OutRecord(b"no event", (), 1)])
    read(stream, 402, 200)

    assert list(log.end(DEAD_LETTERS).values()) == [1, 1]


# The end of a finite log.


def test_a_flush_hands_out_everything_that_waits(log: InMemoryLog) -> None:
    stream = open_stream(log)
    read(stream, 400, 200)
    ids = taken(stream)
    assert stream.ledger().waiting == 400 - len(ids) > 0

    stream.flush()
    ids += taken(stream)

    ledger = stream.ledger()
    assert ids == list(range(400))
    assert (ledger.waiting, ledger.feedback_waiting, ledger.handed_out, ledger.attached) == (0, 0, 400, 200)


def test_feedback_without_its_impression_is_orphaned_by_a_flush(log: InMemoryLog) -> None:
    log.delete(SHOWN, 0)
    stream = open_stream(log)
    read(stream, 399, 200)

    stream.flush()
    taken(stream)

    ledger = stream.ledger()
    assert ledger.feedback_waiting == 0
    assert ledger.attached + ledger.orphaned == 200
    assert accounted(stream)


def test_a_stream_goes_on_after_a_flush_and_nothing_is_late(log: InMemoryLog) -> None:
    stream = open_stream(log)
    read(stream, 400, 200)
    stream.flush()
    ids = taken(stream)
    restarted = open_stream(log)
    restarted.load_state(stream.state())

    append(log, range(400, 600))
    read(restarted, 600, 300)
    restarted.flush()

    ledger = restarted.ledger()
    assert ids + taken(restarted) == list(range(600))
    assert (ledger.late, ledger.feedback_late, ledger.orphaned, ledger.attached) == (0, 0, 0, 300)


# Clocks.


@pytest.mark.parametrize("arrival_ms", [-1, 0, 1_700_000_000_000 - 600_000])
def test_events_are_good_whatever_their_records_say_of_their_arrival(arrival_ms: int) -> None:
    log = InMemoryLog(now_ms=lambda: arrival_ms)
    for topic in (IMPRESSIONS, FEEDBACK):
        log.ensure_topic(topic, 2)
    append(log, range(100))

    stream = ExampleStream(SCHEMA, CONFIG, log, DeadLetterWriter(log), now_ms=lambda: 1_700_000_010_000)
    read(stream, 100, 50)

    assert (stream.ledger().dead_lettered, stream.ledger().feedback_dead_lettered) == (0, 0)


def test_a_reader_whose_clock_is_behind_refuses_nothing_that_has_arrived() -> None:
    log = InMemoryLog(now_ms=lambda: 1_700_000_000_000)
    for topic in (IMPRESSIONS, FEEDBACK):
        log.ensure_topic(topic, 2)
    append(log, range(100))

    behind = replace(CONFIG, max_future_s=60.0)
    stream = ExampleStream(SCHEMA, behind, log, DeadLetterWriter(log), now_ms=lambda: 1_700_000_000_000 - 7_200_000)
    read(stream, 100, 50)

    assert stream.ledger().dead_lettered == 0
