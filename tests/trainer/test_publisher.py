"""Publishing to a real Redis that is slow, goes away and comes back.

Guarantee shown: the trainer never waits, and the newest cut is the one that is published. Feedback counted for a cut
that was replaced or failed is counted by the cut that replaces it. A clean close leaves nothing behind.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import redis
import torch

from feature_store.payload import read_payload
from feature_store.snapshots import SnapshotStore
from smes.errors import SmesError, SnapshotNotFound
from smes.schema import Schema, Task
from smes_cli.demo.local_servers import ValkeyServer, start_valkey
from smes_io.redis_client import connect
from tests.trainer.small_table import NOW_MS, SmallTable
from tests.trainer.small_world import fill, make_trainer, open_log, train_to_the_end
from trainer.publisher import Publisher

SCHEMA = Schema("published", tasks=(Task("click"),))
DEADLINE_S = 60.0


def until(condition: Callable[[], bool]) -> None:
    pause, deadline = threading.Event(), time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"the condition did not come true within {DEADLINE_S:g} s"
        pause.wait(0.005)


def offer(publishing: Publisher, step: int, arrivals: dict[int, int] | None = None) -> None:
    """Offer the cut of a table that was changed ``step`` times."""
    table = SmallTable()
    for _ in range(step):
        table.change()
    publishing.offer(table.cut(full=publishing.wants_full, arrivals=arrivals))


def publisher(store: SnapshotStore, lineage: str = "line") -> Publisher:
    return Publisher(store, SCHEMA, {"ranker": "none"}, lineage, now_ms=lambda: NOW_MS)


def test_what_is_offered_is_what_serving_loads(client: redis.Redis, namespace: str) -> None:
    store = SnapshotStore(client, namespace)
    publishing = publisher(store)
    offer(publishing, 3, {NOW_MS - 5: 2})
    assert publishing.close(DEADLINE_S)
    manifest = store.current()
    assert manifest is not None
    assert (manifest.lineage, manifest.version, manifest.step) == ("line", 3, 3)
    assert (manifest.schema_hash, manifest.created_ms, manifest.event_time_ms) == (SCHEMA.hash, NOW_MS, NOW_MS + 3)
    assert manifest.positions == {"impressions": {"0": 30}}
    assert manifest.feedback_arrivals == ((NOW_MS - 5, 2, 0, 0, 0),)
    payload = store.load(manifest)
    assert (publishing.published, publishing.bytes_last) == (1, len(payload))
    content = read_payload([payload], len(payload))
    assert torch.equal(content.dense["dense.step"], torch.tensor([3.0]))
    assert content.metadata["schema_hash"] == SCHEMA.hash


@contextmanager
def paused_writes(client: redis.Redis) -> Iterator[None]:
    """The server answers no command that writes, until the end of the context."""
    client.client_pause(round(1000 * DEADLINE_S), all=False)
    try:
        yield
    finally:
        client.client_unpause()


def test_cuts_offered_during_an_upload_coalesce_into_the_newest(client: redis.Redis, namespace: str) -> None:
    store = SnapshotStore(client, namespace)
    publishing = publisher(store)

    with paused_writes(client):
        offer(publishing, 1, {100: 1})
        until(lambda: not publishing.has_waiting)  # the thread uploads the first
        for step in (2, 3, 4):
            offer(publishing, step, {100: 10, 100 + step: step})
        assert publishing.published == 0  # offering did not wait for the server
    assert publishing.close(DEADLINE_S)

    assert [m.version for m in store.list()] == [1, 4]
    assert publishing.published == 2
    newest = store.current()
    assert newest is not None
    assert [row[:2] for row in newest.feedback_arrivals] == [(100, 30), (102, 2), (103, 3), (104, 4)]


def test_a_redis_that_goes_away_and_comes_back_gets_the_newest(tmp_path: Path, stack: ExitStack) -> None:
    server = stack.enter_context(start_valkey(tmp_path))
    client = stack.enter_context(connect(server.url, 2.0))
    store = SnapshotStore(client)
    publishing = publisher(store)
    offer(publishing, 1, {1: 1})
    until(lambda: publishing.published == 1)
    kill(server)
    offer(publishing, 2, {2: 2})
    until(lambda: publishing.failures > 0)
    offer(publishing, 3, {3: 3})
    stack.enter_context(start_valkey(tmp_path, port=server.port))
    until(lambda: publishing.published == 2)
    newest = store.current()
    assert newest is not None
    assert (newest.version, newest.parent) == (3, 1)
    assert newest.feedback_arrivals == ((2, 2, 0, 0, 0), (3, 3, 0, 0, 0))
    assert publishing.close(DEADLINE_S)
    assert publishing.published == 2


def test_closing_waits_for_a_store_that_answers_but_is_slow(client: redis.Redis, namespace: str) -> None:
    publishing = publisher(SnapshotStore(client, namespace))
    closed: list[bool] = []

    with paused_writes(client):
        offer(publishing, 1)
        until(lambda: not publishing.has_waiting)  # the thread uploads it
        closing = threading.Thread(target=lambda: closed.append(publishing.close(DEADLINE_S)))
        closing.start()
        closing.join(3.0)  # longer than a store that does not answer is waited for
        assert closing.is_alive()
    closing.join(DEADLINE_S)

    assert closed == [True]
    assert publishing.published == 1


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hanging"])
def test_closing_without_a_redis_ends_soon_and_says_so(fault: signal.Signals, tmp_path: Path, stack: ExitStack) -> None:
    server = stack.enter_context(start_valkey(tmp_path))
    client = stack.enter_context(connect(server.url, 600.0))  # a timeout that would be waited for
    publishing = publisher(SnapshotStore(client))
    os.kill(server.pid, fault)
    offer(publishing, 1)
    closed: list[bool] = []

    closing = threading.Thread(target=lambda: closed.append(publishing.close(600.0)))
    closing.start()
    closing.join(DEADLINE_S)
    os.kill(server.pid, signal.SIGKILL)

    assert closed == [False]


def test_a_version_that_is_served_already_is_no_failure(client: redis.Redis, namespace: str) -> None:
    store = SnapshotStore(client, namespace)
    first = publisher(store)
    offer(first, 5)
    assert first.close(DEADLINE_S)
    again = publisher(store)  # restarted from a checkpoint of the very step that is served
    offer(again, 5)
    assert again.close(DEADLINE_S)
    assert (again.published, again.failures) == (0, 0)
    assert [m.version for m in store.list()] == [5]


def test_nothing_offered_nothing_published(client: redis.Redis, namespace: str) -> None:
    publishing = publisher(SnapshotStore(client, namespace))
    assert publishing.close(DEADLINE_S)
    assert (publishing.published, publishing.bytes_last) == (0, None)
    with pytest.raises(SnapshotNotFound):
        SnapshotStore(client, namespace).get("line", 0)


def kill(server: ValkeyServer) -> None:
    os.kill(server.pid, signal.SIGKILL)
    server.process.wait(DEADLINE_S)


def test_the_manifest_says_what_the_trainer_measured(client: redis.Redis, namespace: str) -> None:
    log = open_log()
    fill(log, 1500)
    trainer = make_trainer(log, None)
    store = SnapshotStore(client, namespace)
    model = trainer.learner.config.to_dict()
    trainer.publish_to(
        lambda lineage: Publisher(store, trainer.learner.schema, model, lineage, now_ms=lambda: NOW_MS), store.current()
    )
    train_to_the_end(trainer)
    trainer.finish()
    manifest = store.current()
    assert manifest is not None
    assert manifest.version == trainer.learner.step_number
    measured = trainer.evaluation.progressive()
    for name, metrics in manifest.metrics["tasks"].items():
        assert metrics["examples"] == measured[name].examples > 0
        assert metrics["auc"] == measured[name].auc
    assert manifest.metrics["experts"]["active_mean"] == trainer.experts.mean
    assert sum(manifest.metrics["experts"]["load_share"]) == pytest.approx(1, abs=1e-4)


def test_a_second_lineage_in_the_same_place_is_warned_of(
    client: redis.Redis, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = SnapshotStore(client, namespace)
    log = open_log()
    fill(log, 1500)
    for name in ("first", "second"):
        trainer = make_trainer(log, None)
        model = trainer.learner.config.to_dict()
        trainer.publish_to(
            lambda lineage, trainer=trainer, model=model: Publisher(  # type: ignore[misc] # defaults bind the loop's
                store, trainer.learner.schema, model, lineage, now_ms=lambda: NOW_MS
            ),
            store.current(),
        )
        warned = f"lineage {trainer.lineage} takes its place" in caplog.text
        assert warned == (name == "second")
        while not trainer.step():
            trainer.stream.poll(0)
        trainer.finish()


def test_a_cut_is_not_offered_to_a_thread_that_has_ended(client: redis.Redis, namespace: str) -> None:
    publishing = publisher(SnapshotStore(client, namespace))
    assert publishing.close(DEADLINE_S)
    with pytest.raises(SmesError, match="publishing thread has ended"):
        offer(publishing, 1)
