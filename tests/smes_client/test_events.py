"""What the client takes is what the reader takes, each event is delivered once, and nothing is lost silently."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smes.errors import EventLogError, EventLogUnavailable
from smes.hashing import encode_id
from smes.schema import MISSING, Feature, Schema, Task
from smes_cli.demo.local_servers import KafkaServer, ValkeyServer, start_kafka, start_valkey
from smes_client import BufferFull, DeliveryFailed, Events, Sent
from smes_client.addresses import open_log
from smes_client.batches import Encoded, records_of
from smes_client.checked import EventForms
from stream.codec.codec import Decoded, decode
from stream.codec.record_headers import Codec, headers
from stream.log.event_log import EventLog, OutRecord, Record, TopicPartition
from stream.log.kafka_log import KafkaLog
from stream.log.memory_log import InMemoryLog
from stream.log.redis_log import RedisStreamsLog, connect_log
from stream.topics import FEEDBACK, IMPRESSIONS

NOW_MS = 1_750_000_000_000
SCHEMA = Schema(
    "client-test",
    tasks=(Task("click"), Task("stars", "regression", max_value=5)),
    features=(
        Feature("age", "numeric", source="user"),
        Feature("topic", source="item"),
        Feature("price", "numeric"),
        Feature("tags", "bag", max_length=3),
        Feature("seen", "sequence", max_length=2, vocabulary="item_id", query="item_id"),
        Feature("outcomes", "sequence", max_length=2, accompanies="seen"),
    ),
)
_ids = st.integers(-(2**63) - 1, 2**63) | st.sampled_from([MISSING, MISSING + 1])
_numbers = st.floats(width=32) | st.integers(-5, 5) | st.just(1e39)
_odd: Any = st.sampled_from([None, True, [], {}, [None], 1.5])
_served = st.fixed_dictionaries(
    {},
    optional={
        "arm": st.sampled_from(["main", "arm-2", "No Arm", ""]) | _odd,
        "version": _ids | _odd,
        "scores": st.dictionaries(st.sampled_from(["click", "stars"]), _numbers, max_size=2) | _odd,
    },
)
_features = st.fixed_dictionaries(
    {},
    optional={
        "age": _numbers | _odd,
        "topic": _ids | _odd,
        "price": _numbers | _odd,
        "tags": st.lists(_ids, max_size=4) | _odd,
        "seen": st.lists(st.integers(0, 9), max_size=3),
        "outcomes": st.lists(st.integers(0, 9), max_size=3),
    },
)


def decoded(records: Sequence[Record], schema: Schema = SCHEMA) -> Decoded:
    return decode(records, schema, now_ms=NOW_MS)


def as_read(topic: str, records: Sequence[OutRecord]) -> list[Record]:
    return [Record(topic, each.partition, n, each.value, each.headers, NOW_MS) for n, each in enumerate(records)]


@settings(max_examples=150)
@given(
    st.fixed_dictionaries(
        {"impression_id": st.integers(-9, 9), "user_id": _ids, "item_id": _ids},
        optional={"request_id": _ids | st.none(), "features": _features, "served": _served},
    )
)
def test_an_impression_is_taken_if_and_only_if_the_reader_takes_it(event: dict[str, Any]) -> None:
    event |= {"event_time_ms": NOW_MS}
    try:
        raw = json.dumps(event, allow_nan=False).encode()
    except ValueError:  # JSON has no NaN and no infinity
        raw = b"{}"
    expected = decoded([Record(IMPRESSIONS, 0, 0, raw, headers("json", SCHEMA), NOW_MS)])
    forms = EventForms(SCHEMA, lambda: NOW_MS)
    features, served = event.get("features"), event.get("served")
    try:
        request = event.get("request_id")
        value = forms.impression(
            event["impression_id"], event["user_id"], event["item_id"], features, request, served, None
        )
    except ValueError as error:
        refused = str(error)
    else:
        refused = ""
    if refused:
        assert expected.dead
        return
    for codec in ("json", "arrow"):
        records, _ = records_of([Encoded(IMPRESSIONS, event["impression_id"], value)], SCHEMA, codec, 1)
        ours = decoded(as_read(IMPRESSIONS, records))
        assert (ours.dead, ours.unknown_fields) == ([], 0)
        if expected.dead:
            assert 1.5 in (features or {}).values()  # 1.5 is an id to the client, that of the text "1.5"
            continue
        for name, column in ours.impressions.arrays().items():
            np.testing.assert_array_equal(column, getattr(expected.impressions, name), err_msg=name)


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"user": True}, "user"),
        ({"item": None}, "item"),
        ({"user": ""}, "user"),
        ({"features": {"price": "12"}}, "features.price"),
        ({"features": {"price": float("nan")}}, "features.price"),
        ({"features": {"colour": 1}}, "features.colour"),
        ({"features": {"tags": "one"}}, "features.tags: expected an array of integers, got 'one"),
        ({"features": {"seen": [1], "outcomes": []}}, "features.outcomes"),
        ({"served": {"scores": {"click": "much"}}}, "served.scores.click"),
        ({"served": {"arm": "An Arm"}}, "served.arm"),
        ({"time_ms": NOW_MS // 1000}, "event_time_ms"),
        ({"features": {"tags": list(range(200_000))}}, "event"),
    ],
)
def test_what_is_wrong_is_named_before_it_leaves(wrong: dict[str, Any], field: str) -> None:
    log = InMemoryLog()
    with Events(SCHEMA, log, now_ms=lambda: NOW_MS) as events, pytest.raises(ValueError, match=rf"^{field}\b"):
        events.impression(**{"user": 1, "item": 2, **wrong})
    assert sum(log.end(IMPRESSIONS).values()) == 0


def test_an_answer_of_a_later_schema_and_empty_texts_are_no_faults() -> None:
    forms = EventForms(SCHEMA, lambda: NOW_MS)
    scores = {"click": 0.5, "new_task": 0.1}
    sent = forms.impression(1, 2, "3", {"topic": "", "tags": ["", 5]}, None, {"version": 9, "scores": scores}, None)
    event = json.loads(sent)
    assert (event["features"], event["served"]) == ({"tags": [5]}, {"version": 9, "scores": {"click": 0.5}})


@pytest.mark.parametrize("by_request", [False, True])
@pytest.mark.parametrize("codec", ["json", "arrow"])
def test_reports_say_where_each_event_is(codec: Codec, by_request: bool) -> None:
    log = InMemoryLog(lambda: NOW_MS)
    told: list[Sent] = []
    sent: list[Sent] = []
    with Events(
        SCHEMA,
        log,
        codec=codec,
        by_request=by_request,
        partitions=3,
        batch_events=17,
        on_delivery=told.append,
        now_ms=lambda: NOW_MS,
    ) as events:
        for n in range(50):
            features = {"topic": "t", "price": np.float32(n), "tags": np.arange(2)}
            shown = events.impression(user=f"u{n // 9}", item=n, request=n // 9, features=features)
            sent += [shown, events.feedback(shown.impression_id, "stars", 2.5)]
        assert events.flush() == 100

    assert [each.delivery for each in told] != []
    assert Counter(each.delivery for each in told) == Counter(each.delivery for each in sent)
    for topic in (IMPRESSIONS, FEEDBACK):
        positions = {TopicPartition(topic, i): 0 for i in range(3)}
        read = decoded(log.read(positions, max_records=1000, timeout_s=0).records)
        block = read.impressions if topic == IMPRESSIONS else read.feedback
        there = set(zip(block.impression_id.tolist(), block.partition.tolist(), block.offset.tolist(), strict=True))
        reports = {(each.impression_id, each.delivery.result()) for each in sent}
        assert there == {(i, report.partition, report.offset) for i, report in reports if report.topic == topic}
    users = decode(log.read({TopicPartition(IMPRESSIONS, 0): 0}, max_records=9, timeout_s=0).records, SCHEMA)
    assert set(users.impressions.user_id.tolist()) <= {encode_id(f"u{n}") for n in range(6)}
    assert users.impressions.request_id.tolist() == sorted(users.impressions.request_id.tolist())
    records = sum(log.end(IMPRESSIONS).values())
    assert (records < 50) == (by_request or codec == "arrow")


class Gated(InMemoryLog):
    """An event log that takes nothing until it is opened, and may fail."""

    def __init__(self) -> None:
        super().__init__()
        self.opened = threading.Event()
        self.error: Exception | None = None

    def append_reporting(self, topic: str, records: Sequence[OutRecord]) -> list[int | None]:
        if records:
            self.opened.wait(30)
            if self.error is not None:
                raise self.error
        return super().append_reporting(topic, records)


def test_a_full_buffer_makes_the_caller_wait_and_then_says_so() -> None:
    log = Gated()
    events = Events(SCHEMA, log, buffer_events=4, batch_events=2, linger_s=0, block_s=0.05)
    taken = [events.impression(user=1, item=n) for n in range(4)]

    with pytest.raises(BufferFull, match=r"4 events wait for the event log, no room within 0\.05 s"):
        events.impression(user=1, item=9)
    with pytest.raises(DeliveryFailed, match=r"4 events not acknowledged within 0\.01 s"):
        events.flush(0.01)
    threading.Timer(0.02, log.opened.set).start()
    events.flush()
    events.impression(user=1, item=10)
    events.close()

    assert events.counts.delivered == len(taken) + 1
    with pytest.raises(ValueError, match="closed"):
        events.impression(user=1, item=11)


def test_what_could_not_be_delivered_is_reported_and_raised() -> None:
    log = Gated()
    log.error = EventLogError("the log is full")
    log.opened.set()
    events = Events(SCHEMA, log, linger_s=0)
    shown = events.impression(user=1, item=1)

    with pytest.raises(EventLogError, match="the log is full"):
        shown.delivery.result(30)
    with pytest.raises(DeliveryFailed, match="1 events not delivered; the first because: the log is full"):
        events.flush()
    assert events.flush() == 0  # told once
    log.error = None
    events.impression(user=1, item=2)
    events.close()
    assert (events.counts.delivered, events.counts.failed) == (1, 1)


def read_all(log: EventLog) -> Counter[int]:
    """How often each impression id is there."""
    positions, seen = log.begin(IMPRESSIONS), Counter[int]()
    while positions != log.end(IMPRESSIONS):
        fetch = log.read(positions, max_records=1000, timeout_s=1)
        seen.update(json.loads(each.value)["impression_id"] for each in fetch.records)
        positions = fetch.positions
    return seen


@pytest.fixture(params=["redis", pytest.param("kafka", marks=[pytest.mark.kafka, pytest.mark.soak])])
def restartable(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Any, Any]]:
    """A broker of the test's own: its address, the running server, and how to start it again."""
    if request.param == "redis":
        valkey = start_valkey(tmp_path)
        again: Any = lambda: start_valkey(tmp_path, port=valkey.port)  # noqa: E731
        yield valkey.url, valkey, again
        return
    home: Path = request.getfixturevalue("kafka_home")
    kafka = start_kafka(home, tmp_path)
    yield f"kafka://{kafka.bootstrap}", kafka, lambda: start_kafka(home, tmp_path, port=kafka.port)


def test_a_broker_that_is_killed_and_restarted_loses_and_repeats_nothing(
    restartable: tuple[str, ValkeyServer | KafkaServer, Any],
) -> None:
    address, server, again = restartable
    sent: list[Sent] = []
    stop = threading.Event()
    with Events(SCHEMA, address, batch_events=20, linger_s=0.001, buffer_events=100_000) as events:

        def produce() -> None:
            while not stop.wait(0.001):
                sent.append(events.impression(user=1, item=1))

        producer = threading.Thread(target=produce)
        producer.start()
        try:
            deadline_s = time.monotonic() + 30
            while events.counts.delivered < 200:
                assert time.monotonic() < deadline_s
                time.sleep(0.001)
            os.kill(server.pid, signal.SIGKILL)
            server.process.wait(30)
            back = again()
        finally:
            stop.set()
            producer.join()
        with back:
            assert events.flush() == len(sent)
            log = open_log(address, "smes", None, delivery_timeout_s=30)
            assert isinstance(log, KafkaLog | RedisStreamsLog)
            assert read_all(log) == Counter(each.impression_id for each in sent)
            log.close()
            events.close()


def test_an_absent_broker_is_said_in_time_and_a_wrong_address_at_once() -> None:
    with pytest.raises(EventLogUnavailable, match=r"127\.0\.0\.1:1"):
        Events(SCHEMA, "redis://127.0.0.1:1/0", delivery_timeout_s=0.1)
    with pytest.raises(ValueError, match="expected redis://"):
        Events(SCHEMA, "127.0.0.1:9092")
    with pytest.raises(ValueError, match="batch_events: 0, expected at least 1"):
        Events(SCHEMA, InMemoryLog(), batch_events=0)


def test_a_program_that_ends_without_closing_has_sent_everything_and_loaded_little(
    redis_url: str, namespace: str, tmp_path: Path
) -> None:
    schema = tmp_path / "shop.yaml"
    schema.write_text("{name: shop, tasks: [{name: open}], features: [{name: price, kind: numeric}]}")
    program = f"""
import sys
from smes_client import Events, Features, Scorer
Scorer("http://127.0.0.1:1", {str(schema)!r})
Features({str(schema)!r}, {redis_url!r}, namespace={namespace!r})
events = Events({str(schema)!r}, {redis_url!r}, namespace={namespace!r}, linger_s=60)
for n in range(700):
    events.impression(user=n, item=1, impression=n, features={{"price": 2.5}})
heavy = {{"torch", "numba", "duckdb", "pydantic", "fastapi", "apscheduler", "pyarrow", "kafka"}}
print(*(heavy & {{name.partition(".")[0] for name in sys.modules}}))
raise SystemExit(3)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)

    assert (ended.returncode, ended.stdout.split()) == (3, []), ended.stderr
    log = RedisStreamsLog(connect_log(redis_url, timeout_s=30), namespace)
    assert read_all(log) == Counter(range(700))
    log.close()
