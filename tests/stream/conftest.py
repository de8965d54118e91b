"""A small schema with every kind of feature and task, records as a log would return them, and logs of events."""

from collections.abc import Callable, Iterator

import pytest

from smes.schema import Feature, Schema, Task
from stream.log.event_log import Headers, Record
from stream.log.memory_log import InMemoryLog
from stream.topics import FEEDBACK, IMPRESSIONS
from tests.stream.refused_events import KINDS, World, open_world

ARRIVAL_MS = 1_700_000_000_000


@pytest.fixture(scope="session")
def wire_schema() -> Schema:
    """Two id features (one whose name is no identifier), a bag of 3, two numbers; two binary tasks and a rating."""
    return Schema(
        "wire",
        tasks=(Task("click"), Task("like"), Task("rating", "regression", max_value=5.0)),
        features=(
            Feature("tab"),
            Feature("tags", "bag", max_length=3),
            Feature("30day_retention"),
            Feature("price", "numeric"),
            Feature("age", "numeric", transform="log1p"),
        ),
    )


@pytest.fixture(scope="session")
def as_record() -> Callable[..., Record]:
    """Makes a record: ``as_record(topic, value, offset=0, headers=(), partition=2, arrival_ms=ARRIVAL_MS)``."""

    def make(
        topic: str,
        value: bytes,
        offset: int = 0,
        headers: Headers = (),
        partition: int = 2,
        arrival_ms: int = ARRIVAL_MS,
    ) -> Record:
        return Record(topic, partition, offset, value, headers, arrival_ms)

    return make


@pytest.fixture(scope="session")
def arrow_headers(wire_schema: Schema) -> Headers:
    """The headers of a good Arrow record in ``wire_schema``."""
    return (("codec", b"arrow"), ("schema", wire_schema.hash.encode()))


@pytest.fixture(params=KINDS)
def world(request: pytest.FixtureRequest, namespace: str) -> Iterator[World]:
    """A log in memory, on a real Valkey or on a real Kafka, and what happens to it."""
    with open_world(request, namespace) as made:
        yield made


@pytest.fixture
def log() -> InMemoryLog:
    """Both topics of events, with two partitions each."""
    log = InMemoryLog()
    for topic in (IMPRESSIONS, FEEDBACK):
        log.ensure_topic(topic, 2)
    return log
