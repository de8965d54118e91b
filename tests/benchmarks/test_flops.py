"""Operations and parameters against formulas written out by hand, one for each ranker."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.flops import Cost, FlopTally, cost_of
from benchmarks.worlds import WORLDS, World
from smes.model.config import ModelConfig, OptimizerConfig
from smes.model.learner import Learner
from smes.model.serving import ServingModel
from smes.rankers.config import HomeConfig, MmoeConfig, PleConfig, SharedBottomConfig
from smes.rankers.sparse.config import SmesConfig
from tests.smes.plain_smes import changed, plain

T, N = 8, 112 + 0  # tasks, numeric columns of the world "segments"
I = N + 2  # noqa: E741  # the project's letter for the input width; two ids of one column each
B = 256


def measured(config: ModelConfig) -> tuple[Cost, float]:
    """Cost of a ranker after one step on a world, and its mean number of executed experts (0 without)."""
    world = World(WORLDS["segments"], 0)
    examples, _ = next(world.stream(B, B))
    learner = Learner(world.schema, config, OptimizerConfig(), device=torch.device("cpu"))
    learner.step(learner.prepare(examples))
    tally = FlopTally()
    model = ServingModel.from_state(world.schema, config, learner.serving_state())
    with tally.counting(B):
        model.score(examples.ids, examples.numerics, requests=np.arange(B))
    active = learner.step(learner.prepare(examples)).active_experts  # scored by the same weights
    mean_active = None if active is None else float(active.float().mean())
    return cost_of(world.schema, config, tally, mean_active), mean_active or 0.0


def test_linear() -> None:
    cost, _ = measured(ModelConfig(ranker="linear"))
    assert (cost.features, cost.ranker, cost.heads) == (2 * N * T, 0, 0)
    assert cost.parameters == cost.active_parameters == N * T


def test_shared_bottom() -> None:
    cost, _ = measured(ModelConfig(ranker="shared_bottom", shared_bottom=SharedBottomConfig(dims=(48, 24))))
    assert cost.ranker == 2 * (I * 48 + 48 * 24)
    assert cost.heads == 2 * T * 24


def test_hidden_head_layers_count() -> None:
    config = ModelConfig(ranker="shared_bottom", head_dim=8, shared_bottom=SharedBottomConfig(dims=(48, 24)))
    assert measured(config)[0].heads == 2 * T * (24 * 8 + 8)


def test_mmoe() -> None:
    cost, _ = measured(ModelConfig(ranker="mmoe", mmoe=MmoeConfig(5, (48,), (32, 24))))
    experts = 5 * (48 * 32 + 32 * 24)
    gates, mixing = T * 48 * 5, T * 5 * 24
    assert cost.ranker == 2 * (I * 48 + experts + gates + mixing)
    # Encoder with gain and bias, experts, gates, heads with bias, and the linear part.
    assert cost.parameters == I * 48 + 2 * 48 + experts + gates + T * 24 + T + N * T


def test_ple() -> None:
    config = PleConfig(num_levels=2, num_shared=3, num_specific=1, encoder_dims=(48,), expert_dims=(24,))
    cost, _ = measured(ModelConfig(ranker="ple", ple=config))
    experts = T * 1 + 3
    # Each task's gate and the shared gate of all but the last level; a gate scores every expert, allowed or not.
    first = experts * 48 * 24 + (T + 1) * (48 * experts + experts * 24)
    last = experts * 24 * 24 + T * (24 * experts + experts * 24)
    assert cost.ranker == pytest.approx(2 * (I * 48 + first + last))


def test_home() -> None:
    groups = {"a": tuple(f"task{t}" for t in range(4)), "b": tuple(f"task{t}" for t in range(4, 8))}
    config = HomeConfig(groups=groups, feature_gates=0, self_gates=False, encoder_dims=(48,), expert_dims=(24,))
    cost, _ = measured(ModelConfig(ranker="home", home=config))
    meta = 3 * (48 * 24 + 48 * 3 + 3 * 24)  # two groups and the shared one, an expert each
    experts = T + 2 + 1
    task = experts * 24 * 24 + T * (48 * experts + experts * 24)
    assert cost.ranker == 2 * (I * 48 + meta + task)


_SMES = plain(
    {
        "experts.num": 16,
        "num_shared": 1,
        "num_adaptive": 1,
        "encoder_dims": (48,),
        "experts.dims": (24,),
        "router.rank": 8,
    }
)


@pytest.mark.parametrize("form", ["full", "residual", "low_rank"])
def test_smes_is_charged_for_the_experts_it_runs(form: str) -> None:
    config = changed(_SMES, {"experts.form": form, "experts.narrow_dim": 16, "experts.rank": 8})
    cost, active = measured(ModelConfig(smes=config))
    assert 2 < active < 9
    router = 48 * 8 + 8 * T * 16
    each = {"full": 48 * 24, "residual": 16 * 24, "low_rank": 48 * 8 + 8 * 24}[form]
    once = {"full": 0, "residual": 48 * (24 + 16), "low_rank": 48 * 24}[form]
    least = I * 48 + router + once + active * each
    # Above that: stage I's mean over the tasks (T·E), and combining over the slots of the busiest instance.
    most = least + T * 16 + T * 9 * 24
    assert 2 * (least + T * active * 24) <= cost.ranker <= 2 * most
    inactive = (16 - active) * each
    assert cost.active_parameters == pytest.approx(cost.parameters - inactive)


@pytest.mark.parametrize("trunk_input", ["raw", "encoder"])
def test_a_trunk_of_smes_is_charged_to_every_instance(trunk_input: str) -> None:
    """Of the default's form: the number of executed experts is fixed, so the rest is the same to the last operation."""
    shape: dict[str, Any] = {"encoder_dims": (16,), "trunk_dims": (), "trunk_input": trunk_input, "router.rank": 8}
    shape |= {"experts.num": 16, "experts.dims": (24,), "experts.narrow_dim": 8}
    config = changed(SmesConfig(), shape)
    without, _ = measured(ModelConfig(smes=config))
    cost, active = measured(ModelConfig(smes=replace(config, trunk_dims=(40, 24))))
    trunk = (I if trunk_input == "raw" else 16) * 40 + 40 * 24
    assert cost.ranker - without.ranker == pytest.approx(2 * trunk)
    assert cost.parameters - without.parameters == trunk + 2 * 40 + 2 * 24  # with gains and biases
    # Base and projection run for every instance, although their first dimension is the number of experts, too.
    assert cost.active_parameters == pytest.approx(cost.parameters - (16 - active) * 8 * 24)


def test_passes_add_up() -> None:
    config = ModelConfig(ranker="shared_bottom")
    world = World(WORLDS["segments"], 0)
    examples, _ = next(world.stream(B, B))
    learner = Learner(world.schema, config, OptimizerConfig(), device=torch.device("cpu"))
    model = ServingModel.from_state(world.schema, config, learner.serving_state())
    once, twice = FlopTally(), FlopTally()
    for tally, passes in ((once, 1), (twice, 2)):
        for _ in range(passes):
            with tally.counting(B):
                model.score(examples.ids, examples.numerics, requests=np.arange(B))
    assert (twice.instances, twice.ranker) == (2 * once.instances, 2 * once.ranker)
    assert cost_of(world.schema, config, once, None) == cost_of(world.schema, config, twice, None)
