"""What rare tasks have of their own in learning: shrunk linear parts and larger gradients into what all tasks share."""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from smes.model.config import ModelConfig, OptimizerConfig, RankerName, RareTasksConfig
from smes.model.features import FeatureInputs
from smes.model.learner import Learner
from smes.model.rank_model import RankModel, build_model
from smes.model.serving import ServingModel
from smes.model.task_outputs import TaskOutputs
from smes.rankers.config import SharedBottomConfig
from smes.rankers.sparse.config import SmesConfig
from smes.schema import Feature, Schema, Task
from tests.smes.plain_smes import changed
from tests.smes.streams import RICH_SCHEMA, stream

_TASKS = (Task("click"), Task("watch", kind="regression"), Task("follow"))
_SCHEMA = Schema("tasks", _TASKS, (Feature("price", kind="numeric"),))
_SMES = changed(SmesConfig(), {"encoder_dims": (8,), "trunk_dims": (8,), "experts.dims": (8,)})
_B = 400


def _observe(tasks: TaskOutputs) -> None:
    """400 labels each: 300 clicks, 4 follows."""
    labels_BT = torch.zeros(_B, 3)
    labels_BT[:300, 0], labels_BT[:, 1], labels_BT[:4, 2] = 1.0, 9.0, 1.0
    tasks.observe(labels_BT, torch.ones(_B, 3, dtype=torch.bool), torch.ones(_B))


def _model(gradient_power: float = 0.0, linear_prior: float = 0.0, ranker: RankerName = "shared_bottom") -> RankModel:
    rare = RareTasksConfig(gradient_power=gradient_power, linear_prior=linear_prior, borrow_ratio=0.0)
    config = ModelConfig(ranker, embedding_dim=4, rare=rare, shared_bottom=SharedBottomConfig((8,)), smes=_SMES)
    model = build_model(_SCHEMA, config, seed=0)
    for name, weight in model.named_parameters():
        if name == "ranker.experts.differences":  # they start alike, and routers that choose among equals learn nothing
            torch.nn.init.uniform_(weight, -0.5, 0.5, generator=torch.Generator().manual_seed(1))
    _observe(model.tasks)
    return model


def _inputs(wide: float = 1.0) -> FeatureInputs:
    W = _SCHEMA.id_width
    numerics_BF = torch.linspace(-1.0, 1.0, 5).unsqueeze(1)
    return FeatureInputs(torch.ones(5, W, 4), torch.full((5, W, 3), wide), None, numerics_BF)


def _gradients(model: RankModel, *, bfloat16: bool = False) -> dict[str, Tensor]:
    """Gradients of a loss with a derivative of 1, 2 and 3 for the logits of the three tasks, one task at a time.

    ``bfloat16``: in the autocast that a GPU trains in.
    """
    found = {}
    for t in range(3):
        model.zero_grad()
        output = model(_inputs(), torch.autocast("cpu", torch.bfloat16) if bfloat16 else nullcontext())
        assert output.ranker.tasks_BTH.dtype == (torch.bfloat16 if bfloat16 else torch.float32)
        ((t + 1) * output.logits_BT[:, t].sum()).backward()
        for name, weight in model.named_parameters():
            if weight.grad is not None:
                found[f"{name} of {t}"] = weight.grad.clone()
    return found


def test_trust_and_gradient_factors_equal_their_formulas() -> None:
    tasks = TaskOutputs(_SCHEMA, RareTasksConfig(linear_prior=20.0))
    limited = TaskOutputs(_SCHEMA, RareTasksConfig(gradient_limit=2.0))
    for each in (tasks, limited):
        _observe(each)
    np.testing.assert_allclose(tasks.trust().numpy(), [101 / 121, 1.0, 5 / 25], rtol=1e-6)
    click, follow = 301 / 404, 5 / 404
    expected = [(0.25 / (p * (1 - p))) ** 0.5 for p in (click, follow)]
    np.testing.assert_allclose(tasks.gradient_factors().numpy(), [expected[0], 1.0, expected[1]], rtol=1e-6)
    assert limited.gradient_factors().tolist() == pytest.approx([expected[0], 1.0, 2.0])


def test_the_linear_part_of_a_task_is_shrunk_while_its_positives_are_few() -> None:
    plain, shrunk = _model(), _model(linear_prior=20.0)
    wide_BT = [model(_inputs()).logits_BT - model(_inputs(wide=0.0)).logits_BT for model in (plain, shrunk)]
    np.testing.assert_allclose(
        (wide_BT[1] / wide_BT[0]).detach().numpy(), np.tile([101 / 121, 1.0, 5 / 25], (5, 1)), rtol=1e-4
    )


def test_the_ranker_gets_more_gradient_of_rare_tasks_and_the_heads_do_not() -> None:
    plain, scaled = _model(), _model(gradient_power=0.5)
    factor_T = scaled.tasks.gradient_factors().tolist()
    assert factor_T[2] > 4 > factor_T[0] > 1
    before, after = _gradients(plain), _gradients(scaled)
    assert before.keys() == after.keys()
    for name, gradient in before.items():
        factor = factor_T[int(name[-1])] if name.startswith("ranker.") else 1.0
        torch.testing.assert_close(after[name], gradient * factor)
    assert any(name.startswith("ranker.") and gradient.abs().sum() > 0 for name, gradient in before.items())


@pytest.mark.parametrize("ranker", ["shared_bottom", "smes"])
def test_the_factors_hold_in_bfloat16(ranker: RankerName) -> None:
    plain, scaled = _model(ranker=ranker), _model(gradient_power=0.5, ranker=ranker)
    factor_T = scaled.tasks.gradient_factors().tolist()
    before, after = _gradients(plain, bfloat16=True), _gradients(scaled, bfloat16=True)
    assert before.keys() == after.keys()
    compared = 0
    for name, gradient in before.items():
        assert after[name].dtype == torch.float32
        factor = factor_T[int(name[-1])] if name.startswith("ranker.") else 1.0
        norm = float(gradient.norm())
        compared += norm > 0 and factor > 4
        # bfloat16 keeps 8 bits, and both sides round along the way: small gradients are differences of rounded numbers.
        assert float((after[name] - gradient * factor).norm()) <= factor * (0.02 * norm + 1e-3), name
    assert compared >= 2, "some weights of the ranker learn from the rare task"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gradient_power": -0.5}, r"RareTasksConfig\.gradient_power: -0\.5, expected at least 0"),
        ({"gradient_limit": 0.9}, r"RareTasksConfig\.gradient_limit: 0\.9, expected at least 1"),
        ({"linear_prior": -1.0}, r"RareTasksConfig\.linear_prior: -1\.0, expected at least 0"),
        ({"linear_prior": float("nan")}, r"RareTasksConfig\.linear_prior: nan, expected at least 0"),
    ],
)
def test_a_value_out_of_range_is_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RareTasksConfig(**values)


def test_a_snapshot_shrinks_the_linear_part_as_training_does() -> None:
    """Its tensors hold the counts: scores are those of the next step, and other ones without the prior."""
    config = ModelConfig("linear", rare=RareTasksConfig(linear_prior=200.0))
    learner = Learner(RICH_SCHEMA, config, OptimizerConfig(), device=torch.device("cpu"))
    *blocks, last = stream(RICH_SCHEMA, batches=6, size=64)
    for block in blocks:
        learner.step(learner.prepare(block))
    batch = learner.prepare(last)
    tensors = learner.serving_state()
    served = ServingModel.from_state(RICH_SCHEMA, config, tensors).score(last.ids, last.numerics)
    plain = ServingModel.from_state(RICH_SCHEMA, replace(config, rare=RareTasksConfig(linear_prior=0.0)), tensors)
    np.testing.assert_allclose(served, learner.step(batch).scores.numpy(), rtol=1e-5, atol=1e-6)
    difference_T = np.abs(plain.score(last.ids, last.numerics) - served).mean(axis=0)
    assert difference_T[1] == 0, "a regression task is not shrunk"
    assert min(difference_T[0], difference_T[2]) > 1e-3


def test_factors_change_what_a_learner_learns() -> None:
    """All but the first scores, and they are limited to one at a limit of one."""
    scores = {}
    for name, rare in {
        "plain": RareTasksConfig(gradient_power=0.0),
        "default": RareTasksConfig(),
        "limited to 1": RareTasksConfig(gradient_limit=1.0),
    }.items():
        config = ModelConfig(embedding_dim=8, rare=rare, smes=_SMES)
        learner = Learner(RICH_SCHEMA, config, OptimizerConfig(), device=torch.device("cpu"))
        scores[name] = [learner.step(learner.prepare(b)).scores for b in stream(RICH_SCHEMA, batches=3, size=64)]
    assert torch.equal(scores["default"][0], scores["plain"][0])
    assert not torch.allclose(scores["default"][2], scores["plain"][2], rtol=1e-5, atol=1e-7)
    for limited, plain in zip(scores["limited to 1"], scores["plain"], strict=True):
        assert torch.equal(limited, plain)


def test_scores_do_not_depend_on_the_gradients_factor() -> None:
    assert torch.equal(_model()(_inputs()).logits_BT, _model(gradient_power=1.0)(_inputs()).logits_BT)
