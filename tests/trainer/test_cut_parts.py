"""Ranks publish one snapshot together: each uploads the rows that it owns, rank 0 commits.

The reference is the dictionary of :mod:`tests.trainer.small_table`: all ranks change the same one, and each owns the
rows whose keys hash to it. Ranks are threads; gloo carries what they say.
"""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import redis
import torch

from feature_store.config import SnapshotStoreConfig
from feature_store.manifest import Manifest
from feature_store.objects import Objects
from feature_store.snapshots import SnapshotStore
from smes.errors import SnapshotDamaged
from smes.model.deltas import RowDelta
from smes.model.shards import owner_of
from smes.schema import Schema, Task
from smes.world import World
from smes_io.redis_client import connect
from tests.feature_store.test_snapshots import InterruptedClient
from tests.running import until
from tests.trainer.small_table import NOW_MS, CopiedView, Rows, SmallTable, assert_rows, served
from tests.worlds import on_ranks
from trainer.cut_offers import CutOffers
from trainer.lease import LeaseKeeper
from trainer.other_ranks import OtherRanks
from trainer.part_uploader import PartUploader
from trainer.publisher import Publisher

SCHEMA = Schema("published", tasks=(Task("click"),))
MODEL = {"ranker": "none"}
_CLIENTS: list[redis.Redis] = []


class Shard:
    """The rows of one rank, with the face of a learner that a cut is taken of."""

    def __init__(self, world: World) -> None:
        self.table, self._world = SmallTable(), world
        self.views: list[CopiedView] = []

    @property
    def step_number(self) -> int:
        return self.table.step

    def take_delta(self) -> RowDelta:
        (delta,) = self.table.cut().deltas
        own, gone = self._owned(delta.keys), self._owned(delta.removed)
        return RowDelta(delta.keys[own], {name: c[own] for name, c in delta.columns.items()}, delta.removed[gone])

    def skip_delta(self) -> None:
        self.table.cut()

    def full_view(self) -> CopiedView:
        keys = np.array([*self.table.rows], np.int64)
        rows = {key: self.table.rows[key] for key in keys[self._owned(keys)].tolist()}
        self.views.append(CopiedView(rows, self.dense_serving_state()))
        return self.views[-1]

    def dense_serving_state(self) -> Any:
        return {"dense.step": torch.tensor([float(self.table.step)])}

    def _owned(self, keys: Any) -> Any:
        return owner_of(keys, self._world.size) == self._world.rank


class Rank:
    """One rank that publishes."""

    def __init__(self, world: World, store: SnapshotStore, lease: LeaseKeeper | None = None) -> None:
        self.world, self.store, self.shard = world, store, Shard(world)
        nothing = SimpleNamespace(summary=dict, progressive=dict, start=lambda: None, taken_times=lambda: None)
        nothing.positions_by_topic = lambda: {"impressions": {str(world.rank): 10 * self.shard.step_number}}
        parts: Any = SimpleNamespace(learner=self.shard, stream=nothing, evaluation=nothing, experts=nothing)
        self.offers = CutOffers(
            parts,
            nothing,  # type: ignore[arg-type]  # as above
            None,
            event_time_ms=lambda: NOW_MS + self.shard.step_number - world.rank,
            deliver=lambda: None,
            forget_sent=lambda: None,
            world=world,
        )
        self.publisher: Publisher | None = None
        if world.rank == 0:
            others = OtherRanks(world.size - 1, timeout_s=30.0)
            self.publisher = Publisher(store, SCHEMA, MODEL, "line", now_ms=lambda: NOW_MS, lease=lease, others=others)
            self.offers.open(self.publisher, 0)
        else:
            self.offers.open_part(PartUploader(store, SCHEMA, MODEL, world.rank, world.size))

    def change_and_offer(self) -> Rows:
        self.shard.table.change()
        self.offers.offer()
        return dict(self.shard.table.rows)

    def until(self, condition: Callable[[Publisher], bool]) -> None:
        """Turns, until rank 0 finds the condition true."""
        deadline_s = time.monotonic() + 30.0
        while not self.world.broadcast(b"1" if self.publisher is not None and condition(self.publisher) else b""):
            assert time.monotonic() < deadline_s
            self.offers.exchange()
            time.sleep(0.002)


def store_of(url: str, namespace: str, folder: Path | None, **config: Any) -> SnapshotStore:
    objects = None if folder is None else Objects(f"file://{folder}", namespace)
    _CLIENTS.append(connect(url, 20.0))
    return SnapshotStore(_CLIENTS[-1], namespace, SnapshotStoreConfig(chunk_bytes=1000, **config), objects=objects)


@pytest.fixture(autouse=True)
def _closed_clients() -> Iterator[None]:
    yield
    while _CLIENTS:
        _CLIENTS.pop().close()


@pytest.mark.parametrize("chunks_in", ["redis", "objects"])
def test_every_version_of_several_ranks_is_right_from_any_base_and_over_any_deltas(
    client: redis.Redis, redis_url: str, namespace: str, tmp_path: Path, chunks_in: str
) -> None:
    folder = tmp_path if chunks_in == "objects" else None
    was: dict[int, Rows] = {}
    steps = 27

    def work(world: World) -> list[CopiedView]:
        store = store_of(redis_url, namespace, folder, max_chain_length=5, retain_bytes=60_000)
        rank, turns = Rank(world, store), random.Random(5)
        for step in range(1, steps + 1):
            rows = rank.change_and_offer()
            if world.rank == 0:
                was[step] = rows
            if step % 9 == 0:
                rank.until(lambda publisher: publisher.published > 0 and not publisher.num_deltas)
            for _ in range(turns.randrange(4)):
                rank.offers.exchange()
        rank.until(lambda publisher: publisher.bases > 0)
        assert rank.offers.close()
        return rank.shard.views

    views = on_ranks(3, work)

    store = store_of(redis_url, namespace, folder)
    manifests = store.list()
    assert manifests[-1].version == steps
    assert manifests[-1].positions == {"impressions": {str(rank): 10 * steps for rank in range(3)}}
    assert manifests[-1].event_time_ms == NOW_MS + steps
    assert {m.kind for m in manifests} == {"full", "delta"} or store.bases(manifests)
    for manifest in (*manifests, *store.bases(manifests).values()):
        assert (len(manifest.parts), manifest.chunks_in) == (3, chunks_in)
        assert_rows(served(store, manifest), was[manifest.version])
    assert all(view.is_closed for of_rank in views for view in of_rank)
    assert len({len(of_rank) for of_rank in views}) == 1  # all ranks took the same cuts
    assert not client.hlen(f"{{{namespace}}}:snapshots:uploads")
    keys = list(client.scan_iter(f"{{{namespace}}}:snapshots:chunk:*"))
    assert bool(keys) == (folder is None)
    assert {client.ttl(key) for key in keys} <= {-1}
    last = store._keys.chunks(manifests[-1])
    if folder is None:
        client.delete(last.keys[-1])
    else:
        Objects(f"file://{folder}", namespace).remove(last.objects[-1:])
    with pytest.raises(SnapshotDamaged, match="missing, though the snapshot is listed"):
        served(store, manifests[-1])


def test_a_part_that_cannot_be_uploaded_is_in_the_next_version(redis_url: str, namespace: str) -> None:
    was: dict[int, Rows] = {}

    def work(world: World) -> int:
        with connect(redis_url, 20.0) as client:
            failing = threading.Event()

            def fail(key: str) -> None:
                if failing.is_set():
                    raise redis.ConnectionError("no route to the store")

            tried = InterruptedClient(client, 0, fail) if world.rank == 1 else client
            config = SnapshotStoreConfig(chunk_bytes=1000)
            rank = Rank(world, SnapshotStore(tried, namespace, config, outage_timeout_s=0.05))
            for step in range(1, 7):
                if step == 3:
                    failing.set()
                was[step] = rank.change_and_offer()
                if step <= 2:
                    rank.until(lambda publisher, step=step: publisher.published == step)  # type: ignore[misc]
                if step == 3:
                    rank.until(lambda publisher: publisher.failures > 0)
            failing.clear()
            rank.until(lambda publisher: not publisher.num_deltas)
            assert rank.offers.close()
            return rank.publisher.failures if rank.publisher else 0

    failures, _ = on_ranks(2, work)

    with connect(redis_url, 20.0) as client:
        store = SnapshotStore(client, namespace)
        assert failures >= 1
        manifests = store.list()
        assert [(m.version, m.kind, m.parent) for m in manifests[:2]] == [(1, "full", None), (2, "delta", 1)]
        assert {m.kind for m in manifests[2:]} == {"delta"}
        assert manifests[-1].version == 6
        for manifest in manifests:
            assert_rows(served(store, manifest), was[manifest.version])
        payloads = [*manifests, *store.bases(manifests).values()]
        expected = {key.encode() for manifest in payloads for key in store._keys.chunks(manifest).keys}
        assert set(client.scan_iter(f"{{{namespace}}}:snapshots:chunk:*")) == expected


def test_neither_ranks_that_were_away_nor_dead_ones_publish(
    client: redis.Redis, redis_url: str, namespace: str, tmp_path: Path
) -> None:
    """All of version 2 is uploaded and not committed when the ranks are stopped; in another namespace, killed."""
    stopped, killed = f"{namespace}-stopped", f"{namespace}-killed"
    with ranks_that_stop_and_die(redis_url, stopped, killed, tmp_path) as ranks:
        until(lambda: os.waitid(os.P_PID, ranks.pid, os.WSTOPPED | os.WNOHANG) is not None, "the ranks stopped")
        store = store_of(redis_url, stopped, None)
        assert client.hlen(f"{{{stopped}}}:snapshots:uploads") == 2
        with LeaseKeeper(store, 5.0) as lease:  # once that of the ranks, which nobody renews, has expired
            other = publish(store, lease.number)
            os.kill(ranks.pid, signal.SIGCONT)
            said, _ = ranks.communicate(timeout=60)
        assert ranks.returncode == -signal.SIGKILL

    assert "LeaseLost: " in said
    assert "expected the lease with number" in said
    assert store.current() == other
    assert [(m.lineage, m.version) for m in store.list()] == [("line", 1), ("other", 7)]
    assert store.fenced()[1].startswith("line:2, published with the lease with number")
    assert not client.hlen(f"{{{stopped}}}:snapshots:uploads")  # rank 1 has removed its part, too
    keys = {key.encode() for manifest in store.list() for key in store._keys.chunks(manifest).keys}
    assert set(client.scan_iter(f"{{{stopped}}}:snapshots:chunk:*")) == keys

    store = store_of(redis_url, killed, tmp_path)
    before = store.current()
    assert before is not None
    assert (before.version, len(before.parts)) == (1, 2)
    assert_rows(served(store, before), rows_of_version(1))
    assert client.hlen(f"{{{killed}}}:snapshots:uploads") == 2
    client.delete(f"{{{killed}}}:snapshots:lease")  # of the dead process; it would expire by itself

    def go_on(world: World) -> None:
        rank = Rank(world, store_of(redis_url, killed, tmp_path))
        rank.shard.table.change()
        rank.change_and_offer()
        rank.until(lambda publisher: publisher.published == 1)
        assert rank.offers.close()

    on_ranks(2, go_on)

    newest = store.current()
    assert newest is not None
    assert newest.version == 2
    assert_rows(served(store, newest), rows_of_version(2))
    assert not client.hlen(f"{{{killed}}}:snapshots:uploads")
    names = [name for manifest in (before, newest) for name in store._keys.chunks(manifest).objects]
    assert objects_in(tmp_path) == sorted(names)


def publish(store: SnapshotStore, number: int) -> Manifest:
    """What another trainer publishes."""
    return store.publish(
        b"weights",
        lineage="other",
        version=7,
        schema_hash=SCHEMA.hash,
        step=7,
        created_ms=NOW_MS,
        fencing=number,
    )


def rows_of_version(version: int) -> Rows:
    table = SmallTable()
    for _ in range(version):
        table.change()
    return table.rows


def objects_in(folder: Path) -> list[str]:
    """The names of all objects below the one namespace of a folder."""
    return sorted(f"{path.parent.name}/{path.name}" for path in folder.rglob("*") if path.is_file())


_RANKS = """
import os, signal, sys, time
from pathlib import Path
from smes.errors import LeaseLost
from tests.trainer.test_cut_parts import Rank, on_ranks, store_of
from feature_store.publication import Publication
from trainer.lease import LeaseKeeper

url, stopped, killed, folder = sys.argv[1:]
commit = Publication.commit

def interrupted(publication, manifest, fencing=None):
    if manifest.version == 2:
        os.kill(os.getpid(), signal.SIGSTOP if manifest.chunks_in == "redis" else signal.SIGKILL)
        time.sleep(0.1)  # another thread may get the signal first
    return commit(publication, manifest, fencing)

Publication.commit = interrupted

def work(world, store):
    lease = LeaseKeeper(store, 0.6) if world.rank == 0 else None
    with lease or open(os.devnull):
        rank = Rank(world, store, lease)
        rank.change_and_offer()
        rank.until(lambda publisher: publisher.published == 1)
        rank.change_and_offer()
        try:
            rank.until(lambda publisher: publisher.published == 2 or publisher.check())
        except LeaseLost as error:
            print(f"LeaseLost: {error}", flush=True)
            world.broadcast(b"1")
        rank.offers.close()

on_ranks(2, lambda world: work(world, store_of(url, stopped, None)))
on_ranks(2, lambda world: work(world, store_of(url, killed, Path(folder))))
"""


@contextmanager
def ranks_that_stop_and_die(url: str, stopped: str, killed: str, folder: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process of two ranks, which publishes versions 1 and 2 in each namespace."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", _RANKS, url, stopped, killed, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
    )
    with process:
        try:
            yield process
        finally:
            process.kill()
