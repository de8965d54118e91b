"""Base + deltas = full, bit for bit, while rows are born, admitted, given back and used again, over restarts and forks.

The reference is a dictionary: key → the bytes of its row.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from smes.arrays import F32, I64
from smes.model.config import ModelConfig, OptimizerConfig
from smes.model.deltas import FullView, RowDelta, merged
from smes.model.id_table import IdTable
from smes.model.rows_config import RowRules, RowsConfig
from smes.model.serving import TensorRows
from smes.model.table import RowGradients
from smes.schema import MISSING, Feature, Schema, Task

_SCHEMA = Schema(
    "deltas",
    tasks=(Task("click"), Task("like")),
    features=(Feature("tags", kind="bag", vocabulary="tag", max_length=2), Feature("favourite", vocabulary="tag")),
)
_MODEL = ModelConfig(embedding_dim=3)
_KEEPS_ALL = RowsConfig()
_STRICT = RowsConfig(
    admit_after=2, shared_rows=2, budget=60, vocabularies={"tag": RowRules(expire_after_s=40, shared_rows=1)}
)
_CONFIGS = {
    "keeps all": _KEEPS_ALL,
    "budget": RowsConfig(budget=50),
    "expiry": RowsConfig(expire_after_s=30),
    "admission": RowsConfig(admit_after=3, shared_rows=3),
    "everything": _STRICT,
}

Rows = dict[int, bytes]


class Training:
    """A table under random steps, that follow from its number of steps alone."""

    def __init__(self, config: RowsConfig, seed: int, optimizer: OptimizerConfig | None = None) -> None:
        self.seed, self.step_number = seed, 0
        self.table = IdTable(_SCHEMA, _MODEL, optimizer or OptimizerConfig(), config, torch.device("cpu"), seed=7)

    def step(self) -> None:
        """Train on a batch: some ids are common, most are new, some time passes."""
        rng = np.random.default_rng([self.seed, self.step_number])
        self.step_number += 1
        ids = random_ids(rng, self.step_number, int(rng.integers(1, 12)))
        batch = self.table.assign(ids, 1000 * (1_000_000 + 2 * self.step_number + int(rng.integers(0, 3))))
        if rng.random() < 0.1:
            return  # a step that was not taken: its new ids have rows all the same
        sums = rng.normal(size=(len(batch.rows_U), 5)).astype(np.float32)
        keep, rate = (None if a is None else torch.from_numpy(a) for a in (batch.keep_U, batch.rate_U))
        gradients = RowGradients(torch.from_numpy(sums), torch.tensor(1.0))
        self.table.records.update(torch.from_numpy(batch.rows_U), gradients, keep_U=keep, rate_U=rate)

    def restarted(self, other: RowsConfig, optimizer: OptimizerConfig | None = None) -> "Training":
        """The same training in a new process, from what a checkpoint holds of it."""
        arrays, views = self.table.state_view()
        pieces = {name: array.pieces() for name, array in arrays.items()}
        first = {name: next(piece) for name, piece in pieces.items()}  # reading has begun ...
        for _ in range(5):
            self.step()  # ... and training goes on, until the kill
        state = {
            name: torch.from_numpy(np.concatenate([first[name], *rest]) if first[name].ndim else first[name])
            for name, rest in pieces.items()
        }
        for view in views:
            view.close()
        result = Training(other, self.seed, optimizer)
        result.table.load_state(state)
        result.step_number = self.step_number - 5
        return result


def random_ids(rng: np.random.Generator, step: int, size: int) -> I64:
    """Users and items that come for a while, few tags that stay; some are missing."""
    user, item = rng.integers(step, step + 30, size), rng.integers(5 * step, 5 * step + 40, size)
    tags = rng.zipf(1.5, (size, 3)).clip(1, 300) + 2 * step * (rng.random((size, 3)) < 0.3)
    tags[rng.random((size, 3)) < 0.3] = MISSING
    return np.column_stack([user, item, tags]).astype(np.int64)


def rows_of(view: FullView) -> Rows:
    rows: Rows = {}
    for keys, columns in view.blocks():
        put(rows, keys, columns)
    assert len(rows) == view.num_rows
    return rows


def put(rows: Rows, keys: I64, columns: Mapping[str, F32]) -> None:
    whole = np.concatenate([columns["embedding"], columns["wide"]], axis=1)
    rows.update({int(key): row.tobytes() for key, row in zip(keys, whole, strict=True)})


def apply(rows: Rows, delta: RowDelta) -> None:
    assert len(np.unique(delta.keys)) == len(delta.keys)
    assert len(np.unique(delta.removed)) == len(delta.removed)
    assert not np.isin(delta.removed, delta.keys).any()
    for key in delta.removed.tolist():
        rows.pop(key, None)
    put(rows, delta.keys, delta.columns)


def now(training: Training) -> Rows:
    view = training.table.full_view({})
    rows = rows_of(view)
    view.close()
    return rows


@pytest.mark.parametrize("name", _CONFIGS)
@pytest.mark.parametrize("seed", range(2))
def test_a_base_and_the_deltas_after_it_are_the_whole_table(name: str, seed: int) -> None:
    """3,000 steps with a cut every few of them; deltas of some cuts are merged, as after an outage of the store."""
    rng = np.random.default_rng(seed)
    training = Training(_CONFIGS[name], seed)
    replica: Rows = {}
    apply(replica, training.table.take_delta())  # the first delta holds everything
    waiting: RowDelta | None = None
    gone = 0
    for _ in range(600):
        for _ in range(int(rng.integers(1, 10))):
            training.step()
        delta = training.table.take_delta()
        gone += len(delta.removed)
        waiting = delta if waiting is None else merged(waiting, delta)
        if rng.random() < 0.3:
            continue
        apply(replica, waiting)
        waiting = None
        if rng.random() < 0.3:
            assert replica == now(training)
    apply(replica, merged(waiting, training.table.take_delta()) if waiting else training.table.take_delta())
    assert replica == now(training)
    assert training.step_number > 2500
    assert (gone > 1000) == (name in ("budget", "expiry", "everything")), "rows went in those runs that give them back"


@pytest.mark.parametrize("name", _CONFIGS)
def test_a_view_shows_one_moment_while_training_goes_on(name: str) -> None:
    """The base of a version is read for a while; deltas after that version apply to it."""
    rng = np.random.default_rng(5)
    training = Training(_CONFIGS[name], 5)
    for _ in range(25):
        for _ in range(int(rng.integers(1, 40))):
            training.step()
        expected = now(training)
        training.table.skip_delta()
        view = training.table.full_view({})
        for _ in range(int(rng.integers(1, 60))):
            training.step()
        base = rows_of(view)
        view.close()
        assert base == expected
        apply(base, training.table.take_delta())
        assert base == now(training)


@pytest.mark.parametrize("name", _CONFIGS)
def test_a_killed_table_goes_on_bit_for_bit(name: str) -> None:
    """After each restart, row for row and bit for bit what the table does that was never killed."""
    optimizer = OptimizerConfig(accumulator_half_life_s=30, frequency_power=0.25)
    whole, killed = (Training(_CONFIGS[name], 3, optimizer) for _ in range(2))
    for round_ in range(12):
        for _ in range(40 + round_):
            whole.step()
            killed.step()
        killed = killed.restarted(_CONFIGS[name], optimizer)
        assert now(killed) == now(whole)
    arrays, others = whole.table.state_view()[0], killed.table.state_view()[0]
    assert arrays.keys() == others.keys()
    for key, array in arrays.items():
        assert np.array_equal(array.read(), others[key].read()), key


def test_a_fork_begins_with_the_rows_that_serve_and_may_have_other_rules() -> None:
    """Other numbers of shared rows too: rows that are shared no more are left out, new ones are born."""
    training = Training(_STRICT, 9)
    for _ in range(300):
        training.step()
    served, values = now(training), {n: t.clone() for n, t in training.table.values().items()}
    fork = Training(replace(_STRICT, shared_rows=5, vocabularies={}), 9)
    fork.table.load_values(values, training.table.rows.ids.shared_rows)
    fork.step_number = training.step_number
    rows = now(fork)
    required, before = (set(t.table.rows.ids.required.tolist()) for t in (fork, training))
    assert {k: v for k, v in rows.items() if k not in required - before} == {
        k: v for k, v in served.items() if k not in before - required
    }
    assert rows.keys() >= required
    fork.table.skip_delta()
    for _ in range(300):
        fork.step()
        apply(rows, fork.table.take_delta())
    assert rows == now(fork)


@pytest.mark.parametrize("name", _CONFIGS)
def test_frozen_rows_stay_what_they_were_also_over_a_restart(name: str) -> None:
    """They read what a copy of the table of that moment reads."""
    rng = np.random.default_rng(1)
    training = Training(_CONFIGS[name], 1)
    for _ in range(30):
        for _ in range(int(rng.integers(1, 30))):
            training.step()
        shared = {"dense.shared_rows_V": torch.from_numpy(training.table.rows.ids.shared_rows)}
        state = shared | {f"table.{name}": tensor for name, tensor in training.table.values().items()}
        copy, frozen = TensorRows(_SCHEMA, _MODEL, state), training.table.freeze()
        for _ in range(int(rng.integers(1, 30))):
            training.step()
        if rng.random() < 0.5:
            arrays, views = training.table.state_view()
            kept = {key: array.copy() for key, array in frozen.state().items()}
            other = Training(_CONFIGS[name], 1)
            other.table.load_state({key: torch.from_numpy(array.read()) for key, array in arrays.items()})
            for view in views:
                view.close()
            other.step_number = training.step_number
            training, frozen = other, other.table.thaw(kept)
            for _ in range(int(rng.integers(0, 10))):
                training.step()
        ids = np.concatenate([random_ids(rng, max(1, training.step_number - n), 50) for n in (0, 20, 60, 10_000)])
        for group, expected in copy.read(ids).items():
            assert torch.equal(frozen.read(ids)[group], expected), group
        frozen.close()


def test_another_thread_reads_a_view_while_rows_come_and_go() -> None:
    """The table is larger than the blocks in which the reader reads, so that both get in between each other."""
    training = Training(RowsConfig(budget=60_000), 4)
    table, rng = training.table, np.random.default_rng(4)

    def train() -> None:
        training.step_number += 1
        ids = rng.integers(0, 10**6, (1000, _SCHEMA.id_width))
        batch = table.assign(ids, 10**9 + 1000 * training.step_number)
        sums = torch.from_numpy(rng.normal(size=(len(batch.rows_U), 5)).astype(np.float32))
        table.records.update(torch.from_numpy(batch.rows_U), RowGradients(sums, torch.tensor(1.0)))

    for _ in range(20):
        train()
    assert len(table.rows) > 50_000
    with ThreadPoolExecutor(1) as pool:
        for _ in range(5):
            expected, view = now(training), table.full_view({})
            reading = pool.submit(rows_of, view)
            steps = 0
            while not reading.done():
                train()
                steps += 1
            assert steps
            assert reading.result() == expected
            view.close()


def test_views_that_are_closed_keep_nothing() -> None:
    training = Training(_CONFIGS["budget"], 2)
    for _ in range(20):
        training.step()
    view = training.table.full_view({})
    view.close()
    view.close()
    with pytest.raises(AssertionError, match="not closed"):
        list(view.blocks())


def test_a_state_with_other_shared_rows_is_refused() -> None:
    training = Training(_STRICT, 2)
    training.step()
    with pytest.raises(ValueError, match="shared_rows"):
        training.restarted(replace(_STRICT, shared_rows=9))
