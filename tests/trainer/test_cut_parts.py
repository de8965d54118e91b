"""Ranks publish one snapshot together: each uploads the rows that it owns, rank 0 commits.

The reference is the dictionary of :mod:`tests.trainer.small_table`: all ranks change the same one, and each owns the
rows whose keys hash to it. Ranks are threads; gloo carries what they say.
"""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import redis
import torch

from feature_store.config import SnapshotStoreConfig
from feature_store.objects import Objects
from feature_store.snapshots import SnapshotStore
from smes.model.deltas import RowDelta
from smes.model.shards import owner_of
from smes.schema import Schema, Task
from smes.world import World
from smes_io.redis_client import connect
from tests.feature_store.test_snapshots import InterruptedClient
from tests.running import until
from tests.trainer.small_table import NOW_MS, CopiedView, Rows, SmallTable, arrays, assert_rows, served
from tests.worlds import on_ranks
from trainer.cut_offers import CutOffers
from trainer.lease import LeaseKeeper
from trainer.other_ranks import OtherRanks
from trainer.part_uploader import PartUploader
from trainer.publisher import Publisher

SCHEMA = Schema("published", tasks=(Task("click"),))
MODEL = {"ranker": "none"}


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
            self.publisher = Publisher(
                store, SCHEMA, MODEL, "line", now_ms=lambda: NOW_MS, lease=lease, others=others
            )
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


def store_of(url: str, namespace: str, folder: Path | None, **config: Any) -> SnapshotStore:
    objects = None if folder is None else Objects(f"file://{folder}", namespace)
    return SnapshotStore(
        connect(url, 20.0), namespace, SnapshotStoreConfig(chunk_bytes=1000, **config), objects=objects
    )


@pytest.mark.parametrize("chunks_in", ["redis", "objects"])
def test_every_version_of_several_ranks_is_right_from_any_base_and_over_any_deltas(
    client: redis.Redis, redis_url: str, namespace: str, tmp_path: Path, chunks_in: str
) -> None:
    folder = tmp_path if chunks_in == "objects" else None
    was: dict[int, Rows] = {}
    steps = 40

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
