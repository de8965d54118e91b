"""Rows shared out among ranks are those of one rank that has all their batches."""

from dataclasses import asdict, dataclass, replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from smes.arrays import I64
from smes.derive import ModelInputs
from smes.events import ExampleBlock
from smes.model.config import ModelConfig, OptimizerConfig
from smes.model.devices import open_device, send_batch
from smes.model.id_table import IdTable
from smes.model.rows import LocalRows, Rows, ShardedRows
from smes.model.rows_config import RowRules, RowsConfig
from smes.model.shards import owner_of
from smes.schema import MISSING, Feature, Schema, Task
from smes.world import ALONE, World
from tests.worlds import on_ranks

_CPU = torch.device("cpu")
_SCHEMA = Schema(
    "shared out",
    tasks=(Task("click"), Task("like")),
    features=(Feature("tags", kind="bag", vocabulary="tag", max_length=2), Feature("tag", vocabulary="tag")),
)
_MODEL = ModelConfig(embedding_dim=6)
_STEPS = 12


class _Ranked:
    """A rank that trains a table on its part of every batch, by a loss of which nothing but the cells is known."""

    def __init__(self, world: World, config: RowsConfig, optimizer: OptimizerConfig) -> None:
        self.table = IdTable(_SCHEMA, _MODEL, optimizer, config, _CPU, 7, world)
        self._rows: Rows = LocalRows(self.table) if world.size == 1 else ShardedRows(self.table, world)
        self.table.take_delta()

    def step(self, ids_BW: I64, time_s: int) -> float:
        """Take a step; the sum of the gradients' squares of this rank's rows."""
        block = replace(ExampleBlock.empty(_SCHEMA, len(ids_BW)), ids=ids_BW)
        nothing = np.zeros((len(ids_BW), 0), np.float32)
        rows = self._rows.assign(ids_BW, 1000 * time_s if len(ids_BW) else 0)
        batch = send_batch(block, ModelInputs(ids_BW, nothing, nothing), rows, _SCHEMA, open_device(_CPU))
        cells, of_requests = self._rows.cells(batch)
        assert of_requests is None
        rate_BW = torch.from_numpy(np.sin(ids_BW.astype(np.float64)).astype(np.float32)).unsqueeze(2)
        loss = sum((values.square() * 0.5 + values * rate_BW).sum() for values in cells.values.values())
        assert isinstance(loss, torch.Tensor)
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = self._rows.gradients(batch, cells, torch.tensor(0.25))
        keep, rate = batch.keep_U, batch.rate_U
        self.table.records.update(batch.rows_U, gradients, torch.tensor(True), keep_U=keep, rate_U=rate)
        return float(gradients.square)

    def records(self) -> dict[int, NDArray[np.float32]]:
        """Whole records by key."""
        state = {name: tensor.numpy() for name, tensor in _read(self.table).items()}
        rows = np.flatnonzero(self.table.rows.used)
        return dict(zip(state["table.keys"][rows].tolist(), state["table.records"][rows], strict=True))


@dataclass(frozen=True)
class _Found:
    """What a rank has after a step, and what changed in it."""

    square: float
    records: dict[int, NDArray[np.float32]]
    changed: set[int]
    removed: set[int]
    counts: dict[str, int]

    @classmethod
    def of(cls, ranked: _Ranked, square: float) -> "_Found":
        delta = ranked.table.take_delta()
        counts = asdict(ranked.table.rows.counts)
        return cls(square, ranked.records(), set(delta.keys.tolist()), set(delta.removed.tolist()), counts)


def _read(table: IdTable) -> dict[str, torch.Tensor]:
    arrays, views = table.state_view()
    tensors = {name: torch.from_numpy(array.read()) for name, array in arrays.items()}
    for view in views:
        view.close()
    return tensors


def _batches(size: int, groups: bool, seed: int) -> list[list[I64]]:
    """For each step the batch of each rank; some ranks have none, and most ids stand in several ranks' batches.

    In groups, the ids of a batch come together or not at all, so that of one second all rows go or none.
    """
    rng = np.random.default_rng(seed)
    steps = []
    for step in range(_STEPS):
        parts = []
        group = int(rng.integers(0, 6))
        for rank in range(size):
            count = 0 if rank == step % (size + 2) else int(rng.integers(1, 12))
            ids = rng.zipf(1.3, (count, 5)) % (40 + 20 * step)
            ids[rng.random(ids.shape) < 0.2] = MISSING
            ids[:, 1] = rng.integers(1000 * step, 1000 * step + 20, count)  # new items in every batch
            if groups:
                ids = 100 * group + np.arange(10).reshape(2, 5)[: 2 if count else 0]
            parts.append(ids)
        steps.append(parts)
    return steps


_CONFIGS = {
    "every id": (RowsConfig(), OptimizerConfig(), False),
    "n sightings": (RowsConfig(admit_after=3, shared_rows=4), OptimizerConfig(), False),
    "n sightings of some, default rows": (
        RowsConfig(vocabularies={"tag": RowRules(admit_after=4)}),
        OptimizerConfig(accumulator_half_life_s=50.0, frequency_power=0.5),
        False,
    ),
    "expiry": (RowsConfig(expire_after_s=30, vocabularies={"user_id": RowRules()}), OptimizerConfig(), False),
    "budget": (
        RowsConfig(budget=20, vocabularies={"tag": RowRules(budget=12, shared_rows=2)}),
        OptimizerConfig(accumulator_half_life_s=50.0, frequency_power=0.5),
        True,
    ),
}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", _CONFIGS)
def test_ranks_have_the_rows_of_one_that_has_all_batches(name: str, size: int) -> None:
    config, optimizer, groups = _CONFIGS[name]
    steps = _batches(size, groups, seed=size)
    one = _Ranked(ALONE, config, optimizer)
    expected = []
    for step, parts in enumerate(steps):
        square = one.step(np.concatenate(parts), 1_000_000 + 9 * step)
        expected.append(_Found.of(one, square))

    def work(world: World) -> list[_Found]:
        ranked, found = _Ranked(world, config, optimizer), []
        for step, parts in enumerate(steps):
            square = ranked.step(parts[world.rank], 1_000_000 + 9 * step)
            found.append(_Found.of(ranked, square))
            assert (owner_of(np.array(list(found[-1].records), np.int64), size) == world.rank).all()
        return found

    for wanted, ranks in zip(expected, zip(*on_ranks(size, work), strict=True), strict=True):
        records = {key: record for rank in ranks for key, record in rank.records.items()}
        assert records.keys() == wanted.records.keys()
        for key, record in wanted.records.items():
            np.testing.assert_allclose(records[key], record, rtol=1e-6, atol=1e-5)
        assert set().union(*(rank.changed for rank in ranks)) == wanted.changed
        assert set().union(*(rank.removed for rank in ranks)) == wanted.removed
        assert {name: sum(rank.counts[name] for rank in ranks) for name in wanted.counts} == wanted.counts
        assert sum(rank.square for rank in ranks) == pytest.approx(wanted.square, rel=1e-4)
    counts = expected[-1].counts
    assert (counts["replaced"] > 0) == (name == "budget")
    assert (counts["expired"] > 0) == (name == "expiry")


def test_ids_for_which_no_rank_has_room_are_turned_away() -> None:
    """All ids are new in every batch, and there are more of them than the budget of all ranks allows."""

    def work(world: World) -> list[dict[str, int]]:
        ranked, found = _Ranked(world, RowsConfig(budget=7), OptimizerConfig()), []
        for step in range(5):
            ids = 1000 * (step + 1) + np.arange(30).reshape(6, 5)
            ranked.step(ids[world.rank :: world.size], 1_000_000 + step)
            found.append(asdict(ranked.table.rows.counts))
        return found

    (one,) = on_ranks(1, work)
    for wanted, ranks in zip(one, zip(*on_ranks(4, work), strict=True), strict=True):
        assert {name: sum(rank[name] for rank in ranks) for name in wanted} == wanted
    assert one[-1] == {"in_use": 7, "born": 21, "expired": 0, "replaced": 14, "turned_away": 5 * 30 - 21}
