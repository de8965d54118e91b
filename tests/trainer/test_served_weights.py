"""What a real learner's trainer publishes, folded from any base over all deltas, is what the learner has, bit for bit.

Ids are admitted, expire, and are given back for a budget; the trainer is killed and goes on from its checkpoints, as a
fork where it had published more.
"""

import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
import torch
from numpy.typing import NDArray

from feature_store.config import SnapshotStoreConfig
from feature_store.folding import read_weights
from feature_store.snapshots import SnapshotStore
from smes.model.config import OptimizerConfig
from smes.model.learner import Learner
from smes.model.rows_config import RowsConfig
from smes_io.clock import wall_clock_ms
from tests.running import until
from tests.trainer.small_world import MODEL, SCHEMA, fill, make_trainer, open_log
from trainer.loop import Trainer
from trainer.publisher import Publisher

ROWS = {
    "every id": RowsConfig(),
    "some ids": RowsConfig(admit_after=3, shared_rows=4, expire_after_s=8.0, budget=60),
}


def by_key(tensors: dict[str, torch.Tensor]) -> dict[str, NDArray[Any]]:
    order = np.argsort(tensors["table.keys"].numpy())
    return {n: t.numpy()[order] if n.startswith("table.") else t.numpy() for n, t in tensors.items()}


def assert_served(store: SnapshotStore, trainer: Trainer) -> None:
    """Every way to the current version gives the learner's weights."""
    manifest = store.current()
    assert manifest is not None
    assert (manifest.lineage, manifest.version) == (trainer.lineage, trainer.learner.step_number)
    got, expected = by_key(read_weights(store, manifest)[0]), by_key(trainer.learner.serving_state())
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        assert got[name].dtype == array.dtype
        assert got[name].tobytes() == array.tobytes(), name


def live(trainer: Trainer, store: SnapshotStore, chance: random.Random) -> bool:
    """Train, cut and write checkpoints until the log's end, or until the trainer dies; whether it died."""
    publisher = trainer.publisher
    assert publisher is not None
    while trainer.step() or trainer.stream.poll(0):
        if trainer.learner.step_number and chance.random() < 0.5:
            trainer.cut()
            name = f"{trainer.lineage}:{trainer.learner.step_number}"
            until(lambda: store.pointer() == name, "the cut published")  # noqa: B023 - asked at once
            assert_served(store, trainer)
        if chance.random() < 0.1:
            trainer.checkpoint()
        if trainer.learner.step_number and chance.random() < 0.06:
            return True  # what was trained on since the last checkpoint is lost
    return False


@pytest.mark.parametrize("rows", ROWS)
def test_what_serves_is_what_was_learned(rows: str, client: redis.Redis, namespace: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    log, chance = open_log(), random.Random(1)
    fill(log, 6000)
    store = SnapshotStore(client, namespace, SnapshotStoreConfig(max_chain_length=4, retain_bytes=3_000_000))
    lineages: set[str] = set()
    kinds: Counter[str] = Counter()
    bases, died = 0, True
    while died:
        learner = Learner(SCHEMA, MODEL, OptimizerConfig(), ROWS[rows], device=torch.device("cpu"), seed=1)
        trainer = make_trainer(log, tmp_path, learner=learner)
        trainer.restore()
        trainer.publish_to(
            lambda name: Publisher(store, SCHEMA, MODEL.to_dict(), name, now_ms=wall_clock_ms),
            store.current(),
            listed=store.list(),
        )
        lineages.add(trainer.lineage)
        died = live(trainer, store, chance)
        assert trainer.publisher is not None
        assert trainer.publisher.close()
        bases += trainer.publisher.bases
        kinds.update(manifest.kind for manifest in store.list() if manifest.lineage == trainer.lineage)

    assert len(lineages) > 2
    assert bases > 2
    assert kinds["delta"] > kinds["full"] > 2
    if rows == "some ids":
        assert trainer.learner.num_rows <= 60 + 30  # the budget; default and shared rows
