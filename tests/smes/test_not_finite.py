"""A step whose loss or gradients are not finite is not taken: everything stays as it was before it.

Both forms are tested: the CPU's, where the host knows at once, and a GPU's, where the device leaves its own state alone
and the host takes back what it counted later.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from smes.events import ExampleBlock
from smes.model.config import ModelConfig, OptimizerConfig
from smes.model.devices import HostDevice
from smes.model.learner import Learner
from smes.rankers.config import HomeConfig
from smes.rankers.sparse.config import SmesConfig
from smes.schema import MISSING
from tests.smes.plain_smes import changed
from tests.smes.streams import RICH_SCHEMA, stream

_MODELS = {
    "default": ModelConfig(embedding_dim=8),
    "searching": ModelConfig(
        embedding_dim=8,
        smes=changed(
            SmesConfig(),
            {"groups.found": 2, "groups.found_until": 6 * 64, "early.num_group": 8, "early.until": 7 * 64},
        ),
    ),
    "home-batch-norm": ModelConfig(
        ranker="home", embedding_dim=8, home=HomeConfig({"a": ("like",)}, 2, encoder_dims=(16,), norm="batch")
    ),
    "linear": ModelConfig(ranker="linear"),
}


@pytest.fixture(params=["at once", "later"])
def _host_knows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HostDevice, "tells_at_once", request.param == "at once")


def _learner(model: str, **optimizer: float) -> Learner:
    rates = OptimizerConfig(**optimizer)  # type: ignore[arg-type]
    return Learner(RICH_SCHEMA, _MODELS[model], rates, device=torch.device("cpu"))


def _with(block: ExampleBlock, column: str, value: float) -> ExampleBlock:
    array = getattr(block, column).copy()
    array[3] = value
    return replace(block, **{column: array})


_BROKEN: dict[str, Callable[[ExampleBlock], ExampleBlock]] = {
    "weight NaN": lambda b: _with(b, "weight", np.nan),
    "weight infinite": lambda b: _with(b, "weight", np.inf),
    "label NaN": lambda b: _with(b, "labels", np.nan),
    "label infinite": lambda b: _with(b, "labels", np.inf),
}


@pytest.mark.usefixtures("_host_knows")
@pytest.mark.parametrize("broken", _BROKEN)
@pytest.mark.parametrize("model", _MODELS)
def test_a_broken_batch_changes_nothing(model: str, broken: str) -> None:
    blocks = stream(RICH_SCHEMA, batches=9, size=64)
    whole, learner = _learner(model), _learner(model)
    for block in blocks[:3]:
        whole.step(whole.prepare(block))
        assert learner.step(learner.prepare(block)).taken
    bad = _BROKEN[broken](blocks[3])
    bad.label_mask[3] = True
    batch = learner.prepare(bad)
    whole.prepare(bad)  # its ids have rows
    before, all_of_it = learner.state(), HostDevice.tells_at_once

    result = learner.step(batch)

    assert result.taken is False
    assert learner.step_number == 3
    after = learner.state()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        if all_of_it or not ("numerics." in name or "features.moments" in name):
            assert torch.equal(after[name], tensor), name
    for block in blocks[4:]:
        expected, got = whole.step(whole.prepare(block)), learner.step(learner.prepare(block))
        assert got.taken
        if all_of_it:
            assert torch.equal(got.scores, expected.scores)
    assert learner.step_number == whole.step_number == 8


@pytest.mark.usefixtures("_host_knows")
@pytest.mark.parametrize("model", _MODELS)
def test_a_search_and_a_young_stream_count_only_what_was_taken(model: str) -> None:
    """Broken batches in between move no boundary that goes by the number of instances."""
    blocks = stream(RICH_SCHEMA, batches=12, size=64)
    whole, learner = _learner(model), _learner(model)
    for block in blocks:
        whole.step(whole.prepare(block))
        learner.step(learner.prepare(block))
        learner.step(learner.prepare(_with(block, "weight", np.nan)))
        assert learner.step_number == whole.step_number
    if HostDevice.tells_at_once:
        a, b = whole.state(), learner.state()
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.usefixtures("_host_knows")
@pytest.mark.parametrize("model", ["default", "searching", "home-batch-norm"])  # a linear loss stays finite
def test_weights_that_exploded_are_trained_no_further(model: str) -> None:
    learner = _learner(model, learning_rate=1e30, wide_learning_rate=1e30, embedding_learning_rate=1e30)
    blocks = stream(RICH_SCHEMA, batches=12, size=64)

    taken = [learner.step(learner.prepare(block)).taken for block in blocks]

    assert taken[0]
    assert not any(taken[-3:])
    assert learner.step_number == sum(taken)
    state = learner.state()
    for name, tensor in state.items():
        if tensor.is_floating_point() and "numerics." not in name:
            assert torch.isfinite(tensor).all(), name


def test_both_forms_of_a_step_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    states = []
    for at_once in (True, False):
        monkeypatch.setattr(HostDevice, "tells_at_once", at_once)
        learner = _learner("searching")
        for block in stream(RICH_SCHEMA, batches=10, size=64):
            learner.step(learner.prepare(block))
        states.append(learner.state())
    assert all(torch.equal(states[1][name], tensor) for name, tensor in states[0].items())


@pytest.mark.parametrize("value", [np.inf, -np.inf, 3e38, -3e38, np.nan])
@pytest.mark.parametrize("model", _MODELS)
def test_no_value_of_a_feature_breaks_a_step(model: str, value: float) -> None:
    learner = _learner(model)
    for block in stream(RICH_SCHEMA, batches=5, size=64):
        assert learner.step(learner.prepare(_with(block, "numerics", value))).taken
    scores = learner.step(learner.prepare(block)).scores
    assert torch.isfinite(scores).all()


@pytest.mark.parametrize("model", _MODELS)
def test_one_sample_weight_counts_no_more_than_its_batch(model: str) -> None:
    """A weight of 1e30 is bounded: neither base rates nor any row's Adagrad sum are spoilt by it."""
    learner = _learner(model)
    blocks = stream(RICH_SCHEMA, batches=4, size=64)
    for block in (_with(blocks[0], "weight", 1e30), *blocks[1:]):
        assert learner.step(learner.prepare(block)).taken
    state = learner.state()
    assert float(state["dense.tasks.labels.count_C"].max()) <= 4 * 64 + 1e-3
    for name, tensor in state.items():
        if name.startswith("accumulators."):
            assert float(tensor.max()) < 1e4


@pytest.mark.parametrize("model", _MODELS)
def test_regression_labels_at_their_maximum_are_learned_from(model: str) -> None:
    learner = _learner(model)
    for block in stream(RICH_SCHEMA, batches=20, size=64):
        block.labels[:, 1] = np.where(block.label_mask[:, 1], 600.0, 0.0)
        result = learner.step(learner.prepare(block))
        assert result.taken
    assert float(result.scores[:, 1].max()) <= 600.001


@pytest.mark.parametrize("model", _MODELS)
def test_a_batch_of_one_user_one_item_and_one_tag_is_bounded(model: str) -> None:
    """All impressions of a user, an item in every row, bags of one repeated id: steps stay finite and bounded."""
    learner = _learner(model)
    blocks = stream(RICH_SCHEMA, batches=30, size=64)
    for block in blocks:
        block.ids[:] = np.where(block.ids == MISSING, MISSING, 7)
        block.labels[:] = block.label_mask
        assert learner.step(learner.prepare(block)).taken
    before = learner.serving_state()
    learner.step(learner.prepare(blocks[0]))
    after = learner.serving_state()
    for table in ("table.embedding", "table.wide"):
        if table in after:
            assert float((after[table] - before[table]).abs().max()) < 0.06
