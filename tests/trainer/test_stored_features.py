"""Events that leave features out are trained on as if they carried them, over kills and outages."""

import os
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pytest
import redis

from feature_store.config import FeatureStoreConfig
from feature_store.entities import ALWAYS, EntityStore
from feature_store.entity_layout import ENTITIES
from smes.errors import FeatureStoreUnavailable, Stopped
from smes.events import DAY_S, ExampleBlock, FeedbackBlock, ImpressionBlock
from smes.schema import MISSING, Feature, Schema, Task
from smes_cli.config import Config
from smes_cli.stored_features import open_stored_features
from smes_io.schema_file import SchemaFile
from stream.codec.codec import encode_feedback, encode_impressions
from stream.config import MiniBatchConfig, StreamConfig
from stream.dead_letters import DeadLetterWriter
from stream.example_stream import ExampleStream
from stream.join.ledgers import StreamLedger
from stream.left_out_features import FeatureCounts, LookUps
from stream.log.memory_log import InMemoryLog
from stream.log.open_log import EventLogConfig
from stream.log.redis_log import RedisLogConfig
from stream.topics import FEEDBACK, IMPRESSIONS
from tests.running import valkey_server
from trainer.stored_features import StoredFeatures
from trainer.waits import Waits

SCHEMA = Schema(
    "left-out",
    (Task("click", window_s=2),),
    (
        Feature("band", "id", source="user"),
        Feature("tab", "id"),
        Feature("tags", "bag", source="item", max_length=3),
        Feature("price", "numeric", source="item"),
        Feature("born", "numeric", source="item", elapsed=True),
        Feature("joined", "numeric", source="user", elapsed=True),
        Feature("battery", "numeric"),
    ),
)
SCHEMA_FILE = SchemaFile(SCHEMA.name, SCHEMA.tasks, SCHEMA.features)
# ids: user_id, item_id, band, tab, tags ×3; numerics: price, born, joined, battery
STREAM = StreamConfig(batch=MiniBatchConfig(size=50, max_wait_s=None), events_per_read=120, idle_after_s=3600)
START_MS = 1_700_000_000_000
USERS, ITEMS, SECONDS = 30, 40, 12
OWN = {"user": ([2], [2]), "item": ([4, 5, 6], [0, 1])}  # columns of ids and numerics


@pytest.fixture
def stored(client: redis.Redis, namespace: str) -> EntityStore:
    return EntityStore(client, SCHEMA, namespace, keep=4)


def events(n: int, store: EntityStore) -> tuple[ImpressionBlock, FeedbackBlock]:
    """Impressions with what each entity's features were at their time. They are in the store, too.

    Every entity's features change every four seconds. The first user and the first item have none before the first
    change; user 1 and item 1 never have any.
    """
    rng = np.random.default_rng(3)
    block = ImpressionBlock.empty(SCHEMA, n)
    block.impression_id[:] = np.arange(n)
    block.event_time_ms[:] = START_MS + np.linspace(0, SECONDS * 1000 - 1, n).astype(np.int64)
    block.ids[:, 0], block.ids[:, 1] = rng.integers(0, USERS, n), rng.integers(0, ITEMS, n)
    block.ids[:, 3], block.numerics[:, 3] = rng.integers(0, 3, n), rng.normal(size=n)
    period = (block.event_time_ms - START_MS) // 4000
    # Rows are written newest first: what is stored does not depend on the order.
    for change in (2, 1, 0):
        for column, (entity, count) in enumerate(zip(ENTITIES, (USERS, ITEMS), strict=True)):
            ids = np.array([i for i in range(count) if i != 1 and (i or change)])
            bags = np.full((len(ids), 3), MISSING)
            bags[:, 0], bags[::2, 1] = ids + change, change
            born_s = (START_MS // 1000 - rng.integers(0, 10**7, len(ids))).astype(np.float32)
            price = rng.normal(size=len(ids)).astype(np.float32)
            columns = {"band": ids % 5 + change, "joined": born_s}
            if entity == "item":
                columns = {"tags": bags, "price": price, "born": born_s}
            store.put_many(entity, ids, columns, START_MS + 4000 * change if change else ALWAYS)
            place = np.searchsorted(ids, block.ids[:, column]).clip(0, len(ids) - 1)
            rows = np.flatnonzero((period == change) & (ids[place] == block.ids[:, column]))
            place = place[rows]
            days = (block.event_time_ms[rows] / 1000 - born_s[place].astype(np.float64)) / DAY_S
            if entity == "user":
                block.ids[rows, 2], block.numerics[rows, 2] = columns["band"][place], days
            else:
                block.ids[rows, 4:7], block.numerics[rows, 0], block.numerics[rows, 1] = bags[place], price[place], days
    clicked = np.flatnonzero(rng.random(n) < 0.3)
    feedback = FeedbackBlock.empty(len(clicked))
    feedback.impression_id[:], feedback.value[:] = clicked, 1
    feedback.event_time_ms[:] = block.event_time_ms[clicked] + 500
    return block, feedback


def leave_out(block: ImpressionBlock, seed: int = 0) -> ImpressionBlock:
    """The features of a user are left out of two thirds of the impressions, and those of an item likewise."""
    rng, block = np.random.default_rng(seed), ImpressionBlock(**{k: v.copy() for k, v in block.arrays().items()})
    for ids, numerics in OWN.values():
        rows = np.flatnonzero(rng.random(len(block)) < 2 / 3)
        block.ids[rows[:, None], ids] = MISSING
        block.numerics[rows[:, None], numerics] = np.nan
    return block


def log_of(block: ImpressionBlock, feedback: FeedbackBlock) -> InMemoryLog:
    log = InMemoryLog()
    for topic in (IMPRESSIONS, FEEDBACK):
        log.ensure_topic(topic, 2)
    log.append(IMPRESSIONS, encode_impressions(block, SCHEMA, "json", 2))
    log.append(FEEDBACK, encode_feedback(feedback, SCHEMA, "json", 2))
    return log


def read(
    log: InMemoryLog, features: StoredFeatures | None, seed: int | None
) -> tuple[list[ExampleBlock], StreamLedger]:
    """All batches, and where the events are; with a seed, the reader is killed now and then."""
    chance = random.Random(seed)

    def new() -> ExampleStream:
        return ExampleStream(SCHEMA, STREAM, log, DeadLetterWriter(log), features=features)

    stream, batches, saved = new(), list[ExampleBlock](), None
    while stream.poll(0) or stream.upcoming() is not None:
        if seed is not None and chance.random() < 0.4:
            saved = stream.state(), len(batches)
        while (batch := stream.next_batch()) is not None:
            batches.append(batch)
        if saved is not None and chance.random() < 0.2:
            stream = new()
            stream.load_state(saved[0])
            del batches[saved[1] :]
            saved = None
    return batches, stream.ledger()


def assert_same(got: list[ExampleBlock], expected: list[ExampleBlock]) -> None:
    assert len(got) == len(expected) > 10
    for one, other in zip(got, expected, strict=True):
        for name, column in other.arrays().items():
            if name != "feedback_arrival_ms":  # by the clock of the log
                np.testing.assert_array_equal(one.arrays()[name], column, err_msg=name)


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_features_left_out_are_those_of_the_time(stored: EntityStore, seed: int | None) -> None:
    """Batches are, bit for bit, those of events that carry their features; also if the reader was killed."""
    block, feedback = events(1500, stored)
    carried, _ = read(log_of(block, feedback), None, None)
    partial = leave_out(block)

    batches, ledger = read(log_of(partial, feedback), StoredFeatures(SCHEMA, stored), seed)

    assert_same(batches, carried)
    expected: list[LookUps] = []
    for column, (ids, numerics) in enumerate(OWN.values()):
        left_out = (partial.ids[:, ids] == MISSING).all(axis=1) & np.isnan(partial.numerics[:, numerics]).all(axis=1)
        has = (block.ids[:, ids] != MISSING).any(axis=1) & left_out
        entity = block.ids[:, column]
        gone, later = left_out & (entity == 1), left_out & (entity == 0) & ~has
        assert (has | gone | later)[left_out].all()
        expected.append(LookUps(int(has.sum()), int((gone | later).sum()), int(later.sum())))
    assert ledger.features == FeatureCounts(*expected)
    assert min(expected[0].from_store, expected[1].from_store) > 500
    assert min(expected[0].written_later, expected[1].written_later) > 0


def test_history_ends_with_the_versions_that_are_kept(client: redis.Redis, namespace: str) -> None:
    """With two versions kept of three, impressions of the first period are trained on without, and counted so."""
    store = EntityStore(client, SCHEMA, namespace, keep=2)
    block, feedback = events(600, store)

    _, ledger = read(log_of(leave_out(block), feedback), StoredFeatures(SCHEMA, store), None)

    assert ledger.features.user.written_later > 100
    assert ledger.features.user.from_store > 200


@pytest.fixture
def paused_store(stack: ExitStack) -> Iterator[tuple[Config, int, ImpressionBlock]]:
    """A configuration of a server of its own, its process, and impressions with the features that are in it."""
    server = stack.enter_context(valkey_server())
    place = FeatureStoreConfig(redis_url=server.connection_url, timeout_s=0.3)
    log = EventLogConfig(redis=RedisLogConfig(outage_timeout_s=1.0))
    with redis.Redis.from_url(server.connection_url) as client:
        block, _ = events(200, EntityStore(client, SCHEMA, place.namespace))
        process = int(client.info("server")["process_id"])
    yield Config(feature_store=place, event_log=log), process, block
    os.kill(process, signal.SIGCONT)


def test_an_outage_is_waited_for_and_then_is_an_error(
    paused_store: tuple[Config, int, ImpressionBlock], stack: ExitStack
) -> None:
    config, server, carried = paused_store
    stop, duties = threading.Event(), threading.Event()
    waits = Waits(stop.is_set)
    features = open_stored_features(config, SCHEMA_FILE, waits, stop, stack)
    assert features is not None
    block = leave_out(carried)

    def goes_on() -> None:
        duties.set()
        os.kill(server, signal.SIGCONT)

    os.kill(server, signal.SIGSTOP)
    waits.meanwhile = goes_on
    filled = features.fill(block)
    assert duties.is_set()  # the trainer's schedules went on, one of which ended the outage
    np.testing.assert_array_equal(filled.impressions.ids, carried.ids)
    np.testing.assert_array_equal(filled.impressions.numerics, carried.numerics)

    os.kill(server, signal.SIGSTOP)
    waits.meanwhile = lambda: None
    with pytest.raises(FeatureStoreUnavailable, match="gave no answer while features were read"):
        features.fill(block)
    waits.meanwhile = stop.set
    with pytest.raises(Stopped):
        features.fill(block)

    off = Config(stream=StreamConfig(features_from_store=False))
    assert open_stored_features(off, SCHEMA_FILE, waits, None, stack) is None
