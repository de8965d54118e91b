"""For tests of dead letters: an event log of each kind, events good and bad, and a stream that reads them."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import redis
from kafka import KafkaAdminClient
from kafka import TopicPartition as KafkaPartition

from smes.arrays import Arrays
from smes.events import FeedbackBlock, ImpressionBlock
from smes.schema import Schema, Task
from stream.audit import audit
from stream.audit_result import AuditResult
from stream.codec.codec import Codec, encode_feedback, encode_impressions, headers
from stream.config import JoinConfig, MiniBatchConfig, StreamConfig
from stream.dead_letter_reading import StoredLetter, read_entries
from stream.dead_letters import DeadLetterWriter
from stream.example_stream import ExampleStream
from stream.log.event_log import EventLog, OutRecord, TopicPartition
from stream.log.kafka_log import KafkaLog
from stream.log.memory_log import InMemoryLog
from stream.log.redis_log import RedisStreamsLog, connect_log
from stream.topics import FEEDBACK, IMPRESSIONS, partition_of

SCHEMA = Schema("refused", tasks=(Task("click", window_s=60), Task("like", window_s=60)))
ONE_TASK = Schema("refused", tasks=(Task("click", window_s=60),))
START_MS = 1_700_000_000_000
CONFIG = StreamConfig(
    join=JoinConfig(allowed_lateness_s=0),
    batch=MiniBatchConfig(size=10, max_wait_s=None),
    idle_after_s=3600,
    metadata_refresh_s=0.2,
)
_JSON = (("codec", b"json"),)
KINDS = ["memory", "redis", pytest.param("kafka", marks=pytest.mark.kafka)]


@dataclass(frozen=True)
class World:
    """A log, and what retention and an operator do to it.

    Attributes:
        log: The log; both topics of events have two partitions.
        another: Opens another client of it.
        trim: Removes the records before an offset.
    """

    log: EventLog
    another: Callable[[], EventLog]
    trim: Callable[[TopicPartition, int], object]


@contextmanager
def open_world(request: pytest.FixtureRequest, namespace: str) -> Iterator[World]:
    """The world of ``request.param``, one of :data:`KINDS`."""
    opened: list[EventLog] = []

    def keep(log: EventLog) -> EventLog:
        opened.append(log)
        return log

    if request.param == "memory":
        memory = InMemoryLog()
        world = World(memory, lambda: memory, memory.truncate)
    elif request.param == "redis":
        world = _redis(request.getfixturevalue("redis_url"), namespace, keep)
    else:
        world = _kafka(request.getfixturevalue("kafka_bootstrap"), namespace, keep)
    for topic in (IMPRESSIONS, FEEDBACK):
        world.log.ensure_topic(topic, 2)
    yield world
    for log in opened:
        log.close()


def _redis(url: str, namespace: str, keep: Callable[[EventLog], EventLog]) -> World:
    def another() -> EventLog:
        return keep(RedisStreamsLog(connect_log(url, timeout_s=30), namespace))

    def trim(at: TopicPartition, offset: int) -> None:
        with redis.Redis.from_url(url) as client:
            [key] = client.scan_iter(f"*{namespace}*:log:{at.topic}:{at.partition}")
            client.xtrim(key, minid=f"0-{offset + 1}", approximate=False)

    return World(another(), another, trim)


def _kafka(bootstrap: str, namespace: str, keep: Callable[[EventLog], EventLog]) -> World:
    def another() -> EventLog:
        return keep(KafkaLog(bootstrap, namespace))

    def trim(at: TopicPartition, offset: int) -> None:
        with KafkaAdminClient(bootstrap_servers=bootstrap) as admin:
            admin.delete_records({KafkaPartition(f"{namespace}.{at.topic}", at.partition): offset})

    return World(another(), another, trim)


def append_good(log: EventLog, ids: range, codec: Codec = "json") -> None:
    """An impression per id, 100 ms apart, and a click on every second one, 50 ms after it.

    In JSON without a schema, in Arrow with ``SCHEMA``.
    """
    shown = ImpressionBlock.empty(SCHEMA, len(ids))
    shown.impression_id[:] = shown.ids[:, 0] = shown.ids[:, 1] = ids
    shown.event_time_ms[:] = START_MS + 100 * np.array(ids)
    clicks = FeedbackBlock.empty(len(ids[::2]))
    clicks.impression_id[:] = ids[::2]
    clicks.event_time_ms[:] = START_MS + 100 * np.array(ids[::2]) + 50
    clicks.value[:] = 1
    impressions, feedback = encode_impressions(shown, SCHEMA, codec, 2), encode_feedback(clicks, SCHEMA, codec, 2)
    for topic, records in ((IMPRESSIONS, impressions), (FEEDBACK, feedback)):
        log.append(topic, [replace(r, headers=_JSON) if codec == "json" else r for r in records])


def impression(impression_id: int, **changes: Any) -> OutRecord:
    """One good impression, in JSON without a schema, with some fields changed."""
    event = {
        "impression_id": impression_id,
        "user_id": impression_id,
        "item_id": impression_id,
        "event_time_ms": START_MS + 100 * impression_id,
    }
    return _record(event | changes)


def feedback(impression_id: int, task: str = "click", **changes: Any) -> OutRecord:
    """One good feedback event, 70 ms after its impression."""
    event = {
        "impression_id": impression_id,
        "event_time_ms": START_MS + 100 * impression_id + 70,
        "task": task,
        "value": 1,
    }
    return _record(event | changes)


def _record(event: dict[str, Any]) -> OutRecord:
    partition = int(partition_of(np.array([event["impression_id"]]), 2)[0])
    return OutRecord(json.dumps(event).encode(), _JSON, partition)


def with_headers(record: OutRecord, schema: Schema, codec: Codec = "json") -> OutRecord:
    """The record as a producer with this schema would send it."""
    return OutRecord(record.value, headers(codec, schema), record.partition)


class Reader:
    """A stream, and what was taken from it; as a trainer would."""

    def __init__(self, log: EventLog, schema: Schema = SCHEMA, config: StreamConfig = CONFIG) -> None:
        self.log, self.schema = log, schema
        self.stream = ExampleStream(schema, config, log, DeadLetterWriter(log), now_ms=lambda: START_MS + 10_000_000)
        self.labels: dict[int, list[float]] = {}
        self.trained = 0

    def read_all(self, *, flush: bool = False) -> None:
        """Read to the end, and take every batch that is complete; with ``flush``, also what waits."""
        end = self.stream.end()
        while not self.stream.has_reached(end):
            self.stream.poll(1.0)
        if flush:
            self.stream.flush()
        while (batch := self.stream.next_batch()) is not None:
            self.trained += batch.num_impressions
            for impression_id, labels in zip(batch.impression_id.tolist(), batch.labels.tolist(), strict=True):
                assert impression_id not in self.labels, "an impression was handed out twice"
                self.labels[impression_id] = labels

    def state(self) -> Arrays:
        """As a checkpoint has it."""
        return {name: array.copy() for name, array in self.stream.state().items()}

    def audit(self, state: Arrays | None = None) -> AuditResult:
        """Of the present state, or of another one that has as much trained."""
        return audit(self.log, self.schema, state or self.state(), trained=self.trained, not_finite=0)


def letters_in(log: EventLog) -> list[StoredLetter]:
    """Every letter, copies too."""
    return [entry for entry in read_entries(log) if isinstance(entry, StoredLetter)]
