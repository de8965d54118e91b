"""What the publisher puts into a real Redis adds up: from any base and over any deltas, every version is right.

"Right" is bit for bit. The reference is a dictionary of rows that is changed at random: rows are born, change, go and
come back.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis

from feature_store.config import SnapshotStoreConfig
from feature_store.manifest import Manifest
from feature_store.payload import Precision, read_payload
from feature_store.snapshots import SnapshotStore
from smes.errors import LeaseLost, SnapshotNotFound
from smes.schema import Schema, Task
from smes_cli.demo.local_servers import start_valkey
from smes_io.redis_client import connect
from tests.feature_store.test_snapshots import InterruptedClient
from tests.running import until
from tests.trainer.small_table import NOW_MS, Rows, SmallTable, arrays, assert_rows, served
from trainer.lease import LeaseKeeper
from trainer.publisher import Publisher

SCHEMA = Schema("published", tasks=(Task("click"),))


def make_store(client: redis.Redis, namespace: str, **config: Any) -> SnapshotStore:
    return SnapshotStore(client, namespace, SnapshotStoreConfig(**{"chunk_bytes": 1000, **config}))


def make_publisher(store: SnapshotStore, lineage: str = "line", lease: LeaseKeeper | None = None) -> Publisher:
    return Publisher(store, SCHEMA, {"ranker": "none"}, lineage, now_ms=lambda: NOW_MS, lease=lease)


def publish(table: SmallTable, publisher: Publisher) -> Rows:
    """Change the table, and publish it; the rows at this version."""
    before = publisher.published
    rows = table.offer_to(publisher)
    until(lambda: publisher.published > before, f"version {table.step} published")
    return rows


def wants_base(publisher: Publisher) -> bool:
    return publisher.wants_base


def base_is_done(table: SmallTable) -> bool:
    """Whether every view that was opened is closed."""
    return all(view.is_closed for view in table.views)


def current(store: SnapshotStore) -> Manifest:
    manifest = store.current()
    assert manifest is not None
    return manifest


class Reader:
    """Follows the store as a scorer does: it has the rows of one version, and loads what leads to the current one."""

    def __init__(self, store: SnapshotStore) -> None:
        self._store = store
        self.version: int | None = None
        self.rows: Rows = {}
        self.full = 0

    def follow(self) -> None:
        for part in self._store.chain(current(self._store), self.version):
            content = read_payload(self._store.pieces(part), part.total_bytes)
            if content.kind == "full":
                self.rows = {}
                self.full += 1
            for key in content.removed.tolist():
                self.rows.pop(key, None)
            for keys, columns in content.rows():
                for n, key in enumerate(keys.tolist()):
                    self.rows[key] = np.concatenate([column[n] for column in columns.values()])
            self.version = content.version


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_version_is_right_for_a_follower_and_for_what_starts_late(
    client: redis.Redis, namespace: str, seed: int, precision: Precision
) -> None:
    store = make_store(client, namespace, precision=precision, max_chain_length=6, retain_bytes=150_000)
    publisher, table = make_publisher(store), SmallTable(seed)
    follower, now_and_then = Reader(store), Reader(store)
    was: dict[int, Rows] = {}

    for step in range(1, 61):
        was[step] = publish(table, publisher)
        follower.follow()
        assert_rows(follower.rows, was[step], precision)
        if step % 11 == 0:
            until(lambda: base_is_done(table), "the base done")
            now_and_then.follow()
            assert_rows(now_and_then.rows, was[step], precision)
            for manifest in store.list():
                assert_rows(served(store, manifest), was[manifest.version], precision)

    assert follower.full == 1
    assert publisher.bases >= 3
    assert publisher.close()
    assert base_is_done(table)
    assert [m.kind for m in store.manifests_between("line", 1, 60)] == ["delta"] * 59


def test_cuts_that_wait_become_one_delta(client: redis.Redis, namespace: str) -> None:
    store = make_store(client, namespace)
    publisher, table = make_publisher(store), SmallTable()
    publish(table, publisher)

    client.client_pause(60_000, all=False)
    for _ in range(10):
        rows = table.offer_to(publisher)
    client.client_unpause()
    assert publisher.close()

    assert current(store).version == 11
    assert len(store.list()) <= 3
    assert_rows(served(store, current(store)), rows)


def test_a_chain_that_is_longer_than_the_bounds_asks_for_a_base(client: redis.Redis, namespace: str) -> None:
    all_bounds: tuple[dict[str, float], ...] = (
        {"max_chain_length": 3, "max_chain_bytes_ratio": 1e9},
        {"max_chain_bytes_ratio": 2.0},
    )
    for bounds in all_bounds:
        store = make_store(client, f"{namespace}-{len(bounds)}", **bounds)
        publisher, table = make_publisher(store), SmallTable()
        publish(table, publisher)
        first = current(store)
        deltas: list[Manifest] = []
        while not wants_base(publisher):
            publish(table, publisher)
            deltas.append(current(store))
        if "max_chain_length" in bounds:
            assert len(deltas) == 4
        else:
            total_bytes = sum(delta.total_bytes for delta in deltas)
            assert total_bytes > 2 * first.total_bytes >= total_bytes - deltas[-1].total_bytes

        publish(table, publisher)
        until(lambda publisher=publisher: publisher.bases == 1, "a base")  # type: ignore[misc] # binds the loop's
        assert store.bases(store.list()).keys() == {("line", table.step)}
        assert not wants_base(publisher)
        assert publisher.close()


def test_a_store_that_is_away_gets_one_delta_over_all_that_it_missed(tmp_path: Path, stack: ExitStack) -> None:
    server = stack.enter_context(start_valkey(tmp_path))
    client = stack.enter_context(connect(server.url, 2.0))
    store = make_store(client, "outage", max_chain_length=1)
    publisher, table, follower = make_publisher(store), SmallTable(), Reader(store)
    for _ in range(3):
        publish(table, publisher)
    until(lambda: base_is_done(table), "bases done")
    follower.follow()
    assert follower.version == 3

    os.kill(server.pid, signal.SIGKILL)
    server.process.wait(60)
    for step in range(30):
        rows = table.offer_to(publisher)
        if step == 10:
            until(lambda: publisher.failures > 0, "a failure")
    until(lambda: base_is_done(table), "no view kept open while the store is away")
    stack.enter_context(start_valkey(tmp_path, port=server.port))
    until(lambda: publisher.published == 4, "the newest published")

    newest = current(store)
    assert (newest.version, newest.parent, newest.kind) == (33, 3, "delta")
    follower.follow()
    assert_rows(follower.rows, rows)
    assert follower.full == 1
    assert_rows(served(store, newest), rows)
    assert publisher.close()


@pytest.mark.parametrize("lost", ["everything", "the newest versions", "a chunk"])
def test_after_a_loss_in_the_store_a_full_snapshot_follows(client: redis.Redis, namespace: str, lost: str) -> None:
    store = make_store(client, namespace, max_chain_bytes_ratio=1e9)
    publisher, table, follower = make_publisher(store), SmallTable(), Reader(store)
    for _ in range(4):
        publish(table, publisher)
    follower.follow()
    keys = [key for key in client.scan_iter(f"{{{namespace}}}:snapshots:*") if isinstance(key, bytes)]
    if lost == "everything":
        client.delete(*keys)
    elif lost == "the newest versions":  # a replica that had not seen them took over
        client.set(f"{{{namespace}}}:snapshots:current", "line:2")
        client.zrem(f"{{{namespace}}}:snapshots:index", "line:3", "line:4")
    else:
        client.delete(next(key for key in keys if b":line:2:" in key and key.endswith(b":0")))

    table.offer_to(publisher, {NOW_MS: 5})
    until(lambda: publisher.wants_full, "a full one wanted")
    table.offer_to(publisher, {NOW_MS + 1: 7})
    until(lambda: publisher.published == 5, "published")

    newest = current(store)
    assert (newest.version, newest.kind) == (6, "full")
    assert [row[:2] for row in newest.feedback_arrivals] == [(NOW_MS, 5), (NOW_MS + 1, 7)]  # nothing is counted lost
    follower.follow()
    assert_rows(follower.rows, table.rows)
    publish(table, publisher)
    assert current(store).kind == "delta"
    assert publisher.close()
    assert base_is_done(table)


def test_the_last_cut_is_published_in_full_where_its_delta_does_not_apply(client: redis.Redis, namespace: str) -> None:
    store = make_store(client, namespace)
    publisher, table = make_publisher(store), SmallTable()
    publish(table, publisher)
    client.delete(*[key for key in client.scan_iter(f"{{{namespace}}}:snapshots:*") if isinstance(key, bytes)])
    rows = table.offer_to(publisher)
    until(lambda: publisher.has_owed, "the delta refused")

    assert publisher.close(take_full=lambda: table.cut(full=True))

    assert (current(store).version, current(store).kind) == (2, "full")
    assert_rows(served(store, current(store)), rows)


def test_without_a_full_cut_a_close_says_that_the_last_one_is_not_published(
    client: redis.Redis, namespace: str
) -> None:
    store = make_store(client, namespace)
    publisher, table = make_publisher(store), SmallTable()
    publish(table, publisher)
    client.delete(*[key for key in client.scan_iter(f"{{{namespace}}}:snapshots:*") if isinstance(key, bytes)])
    table.offer_to(publisher)
    until(lambda: publisher.has_owed, "the delta refused")

    assert not publisher.close(2.0)


def test_a_full_snapshot_that_the_store_refuses_is_tried_again_from_a_new_view(
    tmp_path: Path, stack: ExitStack
) -> None:
    server = stack.enter_context(start_valkey(tmp_path))
    client = stack.enter_context(connect(server.url, 2.0))
    store, table = make_store(client, "refused"), SmallTable()
    client.config_set("maxmemory", 1)
    publisher = make_publisher(store)
    table.offer_to(publisher, {NOW_MS: 1})
    until(lambda: publisher.failures == 1, "refused")
    for _ in range(5):
        table.offer_to(publisher, {NOW_MS: 1})
    client.config_set("maxmemory", 0)
    until(lambda: publisher.wants_full, "a full one wanted")
    assert base_is_done(table)

    rows = table.offer_to(publisher, {NOW_MS: 1})
    until(lambda: publisher.published == 1, "published")

    assert_rows(served(store, current(store)), rows)
    assert current(store).feedback_arrivals[0][:2] == (NOW_MS, 7)
    assert publisher.close()
    assert base_is_done(table)


def test_what_waits_never_grows_beyond_a_full_snapshot(
    tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.waiting_cuts._ALWAYS_WAITING_BYTES", 1000)
    server = stack.enter_context(start_valkey(tmp_path))
    client = stack.enter_context(connect(server.url, 2.0))
    store, table = make_store(client, "full"), SmallTable()
    publisher = make_publisher(store)
    publish(table, publisher)
    os.kill(server.pid, signal.SIGKILL)
    server.process.wait(60)
    waiting_bytes = []
    for _ in range(60):
        table.offer_to(publisher)
        waiting_bytes.append(publisher._waiting.nbytes)
    assert max(waiting_bytes) <= max(1000, current_bytes(publisher))
    assert publisher.has_owed
    assert not publisher.wants_full  # nothing is copied for a store that is away
    stack.enter_context(start_valkey(tmp_path, port=server.port))

    until(lambda: publisher.wants_full, "a full one wanted")
    rows = table.offer_to(publisher)
    until(lambda: store.pointer() == "line:62", "published")

    assert current(store).kind == "full"
    assert_rows(served(store, current(store)), rows)
    assert publisher.close()
    assert base_is_done(table)


def current_bytes(publisher: Publisher) -> int:
    return publisher._waiting.chain.base_bytes


def test_a_restart_begins_with_a_full_snapshot_and_a_fork_too(client: redis.Redis, namespace: str) -> None:
    store = make_store(client, namespace)
    first, table = make_publisher(store), SmallTable()
    for _ in range(3):
        publish(table, first)
    assert first.close()

    again = make_publisher(store)
    publish(table, again)
    assert (current(store).kind, current(store).version, current(store).parent) == ("full", 4, 3)
    publish(table, again)
    assert again.close()

    fork = make_publisher(store, "line.f")
    publish(table, fork)
    rows = publish(table, fork)
    assert fork.close()
    assert [(m.lineage, m.version, m.kind) for m in store.list()[-2:]] == [
        ("line.f", 6, "full"),
        ("line.f", 7, "delta"),
    ]
    assert_rows(served(store, current(store)), rows)


def cut_again(table: SmallTable, publisher: Publisher) -> None:
    """Offer the version that is published already, as a trainer does that was stopped cleanly and starts again."""
    publisher.offer(table.cut(full=publisher.wants_full))


@pytest.mark.parametrize(("before", "after"), [("fp32", "int8"), ("int8", "fp32"), ("fp32", "fp32")])
def test_one_version_is_one_set_of_rows_when_the_precision_changed_at_a_restart(
    client: redis.Redis, namespace: str, before: Precision, after: Precision
) -> None:
    store, table = make_store(client, namespace, precision=before), SmallTable()
    columns = np.random.default_rng(1).normal(size=(400, 5)).astype(np.float32)
    table.rows = dict(enumerate(columns, 100))  # many more than change, so that deltas are small
    running = Reader(store)
    first = make_publisher(store)
    for _ in range(5):
        publish(table, first)
        running.follow()
    assert first.close()

    store = make_store(client, namespace, precision=after, max_chain_length=1)
    again = make_publisher(store)
    cut_again(table, again)

    def are_published() -> bool:
        table.change(1)  # most rows stay as they were
        again.offer(table.cut(full=again.wants_full, base=again.wants_base))
        running.follow()
        return again.published >= 3 and again.bases >= 1

    until(are_published, "some versions and a base published")
    assert again.close()
    running.follow()
    late = Reader(make_store(client, namespace))
    late.follow()

    assert late.version == running.version == table.step
    assert_rows(running.rows, table.rows, after)
    assert_rows(late.rows, table.rows, after)


def test_frequent_clean_restarts_do_not_let_a_chain_grow(client: redis.Redis, namespace: str) -> None:
    store, table = make_store(client, namespace, max_chain_length=4), SmallTable()
    publisher = make_publisher(store)
    publish(table, publisher)
    for _ in range(6):
        assert publisher.close()
        publisher = make_publisher(store)
        cut_again(table, publisher)
        until(lambda publisher=publisher: current_bytes(publisher) > 0, "the version found")  # type: ignore[misc]
        publish(table, publisher)
        publish(table, publisher)
        until(lambda: base_is_done(table), "the base done")
    assert publisher.close()

    kinds = [manifest.kind for manifest in store.chain(current(store))]
    assert len(kinds) <= 5 + 1  # the one that makes it too long gets the base with the next
    assert_rows(served(store, current(store)), dict(table.rows))


def test_a_zombie_publishes_neither_deltas_nor_bases(client: redis.Redis, namespace: str, stack: ExitStack) -> None:
    store = make_store(client, namespace, max_chain_length=1)
    zombie_lease = stack.enter_context(LeaseKeeper(store, 60.0, holder="zombie"))
    zombie, table = make_publisher(store, lease=zombie_lease), SmallTable()
    publish(table, zombie)
    client.delete(f"{{{namespace}}}:snapshots:lease")  # it expired, and another trainer took over
    heir_lease = stack.enter_context(LeaseKeeper(store, 60.0, holder="heir"))
    heir, heirs = make_publisher(store, "line.h", heir_lease), SmallTable(1)
    rows = publish(heirs, heir)

    def lost() -> bool:
        try:
            table.offer_to(zombie)
        except LeaseLost:
            return True
        return False

    until(lost, "the zombie told")

    assert not zombie.close()
    assert base_is_done(table)
    assert current(store).lineage == "line.h"
    assert_rows(served(store, current(store)), rows)
    assert heir.close()


_DYING = """
import sys
from tests.trainer import test_deltas as deltas
deltas.publish_and_die(sys.argv[1], sys.argv[2])
"""


def publish_and_die(redis_url: str, namespace: str) -> None:
    """Publish two versions and upload a third; then this process is killed, before the commit."""
    uploads: list[str] = []

    def die(key: str) -> None:
        uploads.append(key)
        if len(uploads) == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    store = make_store(InterruptedClient(connect(redis_url, 30.0), 0, die), namespace)
    publisher, table = make_publisher(store), SmallTable()
    while True:
        publish(table, publisher)


def test_what_a_killed_publisher_uploaded_is_not_served_and_the_next_one_publishes_all(
    client: redis.Redis, namespace: str, redis_url: str
) -> None:
    argv = [sys.executable, "-P", "-c", _DYING, redis_url, namespace]
    died = subprocess.run(argv, cwd=Path(__file__).parents[2], check=False)
    store, table = make_store(client, namespace), SmallTable()

    assert died.returncode == -signal.SIGKILL
    assert client.hlen(f"{{{namespace}}}:snapshots:uploads") == 1
    assert (current(store).version, current(store).kind) == (2, "delta")
    for _ in range(2):
        table.change()
    assert_rows(served(store, current(store)), table.rows)

    again = make_publisher(store)
    rows = publish(table, again)

    assert (current(store).version, current(store).kind) == (3, "full")
    assert_rows(served(store, current(store)), rows)
    assert client.hlen(f"{{{namespace}}}:snapshots:uploads") == 0
    assert again.close()


def test_a_reader_in_the_middle_of_a_chain_that_retention_removes_starts_over(
    client: redis.Redis, namespace: str
) -> None:
    store = make_store(client, namespace, retain_bytes=1, min_retained=1, max_chain_length=2)
    publisher, table, reader = make_publisher(store), SmallTable(), Reader(store)
    for _ in range(3):
        publish(table, publisher)
    old = store.chain(current(store))
    for _ in range(12):
        rows = publish(table, publisher)
        until(lambda: base_is_done(table), "bases done")

    for part in old:
        with pytest.raises(SnapshotNotFound):
            store.load(part)
    reader.follow()
    assert_rows(reader.rows, rows)
    assert publisher.close()


def timed(call: Callable[[], object]) -> float:
    started_s = time.monotonic()
    call()
    return time.monotonic() - started_s


def test_a_stop_does_not_wait_for_a_base(client: redis.Redis, namespace: str) -> None:
    store = make_store(client, namespace, max_chain_length=1)
    publisher, table = make_publisher(store), SmallTable()
    while not wants_base(publisher):
        publish(table, publisher)
    table.change()
    cut = table.cut(base=True)
    stuck, go_on = threading.Event(), threading.Event()
    view = table.views[-1]

    def blocks() -> Iterator[Any]:
        stuck.set()
        assert go_on.wait(60)
        yield arrays(table.rows)

    view.blocks = blocks  # type: ignore[method-assign]
    publisher.offer(cut)
    assert stuck.wait(60)

    assert not wants_base(publisher)
    assert timed(lambda: publisher.close()) < 10
    go_on.set()
    until(lambda: view.is_closed, "the view closed")

    assert publisher.bases == 0
    assert client.hlen(f"{{{namespace}}}:snapshots:uploads") == 0
    assert_rows(served(store, current(store)), table.rows)


def offer_base(publisher: Publisher, table: SmallTable) -> None:
    """Offer a cut with a base, as soon as one is wanted."""
    while not wants_base(publisher):
        publish(table, publisher)
    table.change()
    publisher.offer(table.cut(base=True))


def test_a_base_that_failed_is_tried_again_after_a_pause_whatever_the_reason(
    client: redis.Redis, namespace: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError("no room for a block")

    store = make_store(client, namespace, max_chain_length=1)
    monkeypatch.setattr(store, "publish_base", fail)
    publisher, table = make_publisher(store), SmallTable()

    offer_base(publisher, table)
    until(lambda: base_is_done(table) and not publisher._waiting.has_base_view, "the view closed")

    assert not wants_base(publisher)
    assert "trying again later: no room for a block" in caplog.text
    assert publisher.close()
    assert_rows(served(store, current(store)), table.rows)


def test_a_stop_may_come_just_when_a_base_begins(
    client: redis.Redis, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    beginning, go_on, start = threading.Event(), threading.Event(), threading.Thread.start

    def slow_start(thread: threading.Thread) -> None:
        if thread.name == "publisher-base":
            beginning.set()
            assert go_on.wait(60)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", slow_start)
    publisher, table = make_publisher(make_store(client, namespace, max_chain_length=1)), SmallTable()
    offer_base(publisher, table)
    assert beginning.wait(60)

    assert not publisher.close(timeout_s=0.2)

    go_on.set()
    until(lambda: base_is_done(table) and not publisher.is_running, "everything closed")
