"""Derived features against plain Python; quantile buckets; and what a learner and its copies make of both."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smes.arrays import F32
from smes.derive import Derivations, count_boundaries
from smes.events import ExampleBlock
from smes.model.config import ModelConfig, OptimizerConfig
from smes.model.frozen_model import FrozenModel, KeptModel
from smes.model.learner import Learner
from smes.model.serving import ServingModel
from smes.quantiles import StreamQuantiles
from smes.schema import MISSING, Derived, Feature, Schema, Task
from tests.smes.derivations import naive_inputs, random_rows, random_schema, values_of

_TASKS = (Task("click"),)
_PRICE = Feature("price", "numeric")
_MODEL = ModelConfig(ranker="shared_bottom", embedding_dim=4, head_dim=4)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_every_value_is_that_of_plain_python_however_the_rows_are_cut(seed: int) -> None:
    rng = np.random.default_rng(seed)
    schema = random_schema(rng)
    ids, numerics, time_ms = random_rows(schema, 17, rng)
    boundaries = np.sort(rng.normal(size=count_boundaries(schema)).round(1)).astype(np.float32)
    derive = Derivations(schema)

    read = derive(ids, numerics, time_ms, boundaries)

    by_name = {name: boundaries[columns].tolist() for name, columns in derive.boundaries.items()}
    for n in range(len(ids)):
        expected = naive_inputs(schema, values_of(schema, ids[n], numerics[n]), int(time_ms[n]), by_name)
        assert values_of(schema.inputs, read.ids[n], read.numerics[n]) == expected
        alone = derive(ids[n : n + 1], numerics[n : n + 1], int(time_ms[n]), boundaries)
        np.testing.assert_array_equal(alone.ids[0], read.ids[n])
        np.testing.assert_array_equal(alone.numerics[0], read.numerics[n])


def _price_bucket(**more: object) -> Schema:
    band = Derived("band", "bucket", ("price",), **more)  # type: ignore[arg-type]
    return Schema("q", _TASKS, (_PRICE,), derived=(band,))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 40), st.integers(1, 30_000))
def test_quantile_buckets_hold_equally_many_values_and_settle(seed: int, quantiles: int, settle: int) -> None:
    rng = np.random.default_rng(seed)
    schema = _price_bucket(quantiles=quantiles, settle=settle)
    learned, in_parts = (StreamQuantiles(Derivations(schema)) for _ in range(2))
    x: F32 = np.exp(rng.normal(size=(settle, 1))).astype(np.float32)

    learned.observe(x)
    for part in np.array_split(x, int(rng.integers(1, 30))):
        gaps = np.full((2 * len(part), 1), np.nan, np.float32)  # what is missing does not count
        gaps[::2] = part
        in_parts.observe(gaps)
        in_parts.load(in_parts.boundaries, in_parts.state())

    np.testing.assert_array_equal(in_parts.boundaries, learned.boundaries)
    shares = np.searchsorted(np.sort(x[:, 0]), learned.boundaries) / settle
    error = 1 / settle + (0.03 if settle > 8192 else 0)  # five standard errors of a sample of 8,192
    np.testing.assert_allclose(shares, np.arange(1, quantiles) / quantiles, atol=error)
    assert not learned.observe(x + 1), "the boundaries have settled"
    np.testing.assert_array_equal(in_parts.boundaries, learned.boundaries)


def test_boundaries_are_compared_as_events_hold_numbers() -> None:
    derive = Derivations(_price_bucket(boundaries=(0.7, 1.1)))
    prices = np.array([[0.7], [1.1], [0.69], [np.inf], [np.nan]], np.float32)

    read = derive(np.zeros((5, 2), np.int64), prices, None, np.zeros(0, np.float32))

    assert read.ids[:, 2].tolist() == [1, 2, 0, 2, MISSING]


def test_without_derived_features_nothing_is_computed_or_kept() -> None:
    schema = Schema("plain", _TASKS, (_PRICE,))
    ids, numerics = np.zeros((3, 2), np.int64), np.zeros((3, 1), np.float32)

    read = Derivations(schema)(ids, numerics, None, np.zeros(0, np.float32))

    assert read.ids is ids
    assert read.numerics is numerics
    assert schema.inputs is schema
    assert "derived" not in schema.to_dict()
    state = Learner(schema, _MODEL, OptimizerConfig(), device=torch.device("cpu")).state()
    assert not [name for name in state if "boundaries" in name or "quantiles" in name]


def _blocks(schema: Schema, count: int, rng: np.random.Generator) -> list[ExampleBlock]:
    blocks = []
    for _ in range(count):
        ids, numerics, time_ms = random_rows(schema, 64, rng)
        labels = (rng.random((64, schema.num_tasks)) < 0.4).astype(np.float32)
        block = replace(ExampleBlock.empty(schema, 64), ids=ids, numerics=numerics, event_time_ms=time_ms)
        blocks.append(replace(block, labels=labels))
    return blocks


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**32))
def test_a_restart_at_any_step_and_going_back_change_nothing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    schema = random_schema(rng)
    blocks, stop = _blocks(schema, 12, rng), int(rng.integers(1, 11))
    whole, again = (Learner(schema, _MODEL, OptimizerConfig(), device=torch.device("cpu")) for _ in range(2))
    scores = [whole.step(whole.prepare(block)).scores.numpy() for block in blocks]

    first = Learner(schema, _MODEL, OptimizerConfig(), device=torch.device("cpu"))
    for block in blocks[:stop]:
        first.step(first.prepare(block))
    again.load_state(first.state())
    kept = KeptModel.keep(first)
    for block in blocks[:3]:
        first.step(first.prepare(block))
    kept.go_back()

    for continued in (first, again):
        for block, expected in zip(blocks[stop:], scores[stop:], strict=True):
            np.testing.assert_array_equal(continued.step(continued.prepare(block)).scores.numpy(), expected)


def test_a_frozen_copy_keeps_its_boundaries_while_the_learner_moves_on() -> None:
    schema = random_schema(np.random.default_rng(3))
    schema = replace(schema, derived=(Derived("band", "bucket", ("price",), quantiles=4, settle=10_000),))
    learner = Learner(schema, _MODEL, OptimizerConfig(), device=torch.device("cpu"))
    blocks = _blocks(schema, 6, np.random.default_rng(4))
    for block in blocks[:2]:
        learner.step(learner.prepare(block))
    served = ServingModel.from_state(schema, _MODEL, learner.serving_state())
    frozen = FrozenModel.freeze(learner)
    before = [model.score(blocks[5].ids, blocks[5].numerics) for model in (served, frozen)]

    shifted = [replace(block, numerics=block.numerics + 100) for block in blocks[2:5]]
    for block in shifted:
        learner.step(learner.prepare(block))

    after = [model.score(blocks[5].ids, blocks[5].numerics) for model in (served, frozen)]
    own = learner.step(learner.prepare(blocks[5])).scores.numpy()
    for scores in (*before, *after):
        np.testing.assert_array_equal(scores, before[0])
    assert np.abs(own - before[0]).max() > 1e-3
    restarted = Learner(schema, _MODEL, OptimizerConfig(), device=torch.device("cpu"))
    restarted.load_serving_state(learner.serving_state(), step_number=6)
    boundaries = restarted.serving_state()["dense.boundaries_Q"]
    restarted.step(restarted.prepare(shifted[0]))
    assert torch.equal(restarted.serving_state()["dense.boundaries_Q"], boundaries), "ids keep their meaning"


def test_what_needs_the_time_is_not_computed_without_it() -> None:
    schema = Schema("t", _TASKS, derived=(Derived("hour", "hour_of_day"),))
    model = Learner(schema, _MODEL, OptimizerConfig(), device=torch.device("cpu"))
    with pytest.raises(ValueError, match="now_ms: None, expected the time of the event: derived feature 'hour'"):
        FrozenModel.freeze(model).score(np.zeros((1, 2), np.int64), np.zeros((1, 0), np.float32))


@pytest.mark.parametrize(
    ("derived", "message"),
    [
        ((Derived("a", "hash", ("b",), into=2), Derived("b", "cross", ("item_id", "a"))), "of itself (a → b → a)"),
        ((Derived("a", "hash", ("colour",), into=2),), "of 'colour', expected a feature, one of user_id"),
        ((Derived("a", "ratio", ("price", "user_id")),), "of kind id, expected kind numeric for ratio"),
        ((Derived("a", "cross", ("t", "u")),), "of 't', 'u', expected at most one bag"),
        ((Derived("a", "hash", ("item_id",), into=2, replaces=True),), "replaces 'item_id', which the model needs"),
        ((Derived("price", "hash", ("item_id",), into=2),), "duplicate feature 'price'"),
        ((Derived("a", "age", ("days",)),), "of 'days', which is elapsed: an age already"),
    ],
)
def test_a_derivation_that_does_not_fit_is_refused_by_name(derived: tuple[Derived, ...], message: str) -> None:
    days = Feature("days", "numeric", source="item", elapsed=True)
    with pytest.raises(ValueError) as raised:
        Schema("s", _TASKS, (_PRICE, days, Feature("t", "bag"), Feature("u", "bag")), derived=derived)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"kind": "hash", "of": ("p",)}, "into None, expected how many"),
        ({"kind": "ratio", "of": ("p", "p")}, "of ['p', 'p'], expected two features"),
        ({"kind": "ratio", "of": ("p", "q"), "into": 3}, "into 3, expected none for ratio"),
        ({"kind": "bucket", "of": ("p",)}, "expected either boundaries or quantiles"),
        ({"kind": "bucket", "of": ("p",), "boundaries": (2, 1)}, "boundaries [2.0, 1.0], expected ascending"),
        ({"kind": "bucket", "of": ("p",), "boundaries": (1, 1 + 1e-12)}, "expected ascending float32 numbers"),
        ({"kind": "hour_of_day", "time_zone": "Europe/Nowhere"}, "'Europe/Nowhere', expected a name such as"),
    ],
)
def test_a_wrong_entry_is_refused_by_name(entries: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        Derived("x", **entries)  # type: ignore[arg-type]
    assert message in str(raised.value)
    assert "derived feature 'x'" in str(raised.value)
