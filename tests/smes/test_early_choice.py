"""More experts at first: when, for whom, and through a restart and a snapshot."""

import doctest
from typing import Any

import numpy as np
import pytest
import torch

import smes.rankers.sparse.routing
from smes.model.config import ModelConfig, OptimizerConfig
from smes.model.learner import Learner
from smes.model.serving import ServingModel
from smes.rankers.sparse.config import SmesConfig
from tests.smes.plain_smes import changed
from tests.smes.streams import RICH_SCHEMA, stream

_GROUPS: dict[str, tuple[str, ...]] = {"rare": ("like", "watch")}
_SMES = changed(
    SmesConfig(),
    {
        "experts.num": 32,
        "num_group": 2,
        "early.num_group": 8,
        "early.until": 60,
        "groups.declared": _GROUPS,
        "encoder_dims": (16,),
        "trunk_dims": (8,),
        "experts.dims": (8,),
    },
)
_SIZE = 40


def learner(shape: SmesConfig = _SMES) -> Learner:
    config = ModelConfig(embedding_dim=8, embedding_scale=1.0, smes=shape)
    return Learner(RICH_SCHEMA, config, OptimizerConfig(), device=torch.device("cpu"))


def executed(one: Learner, batches: int, skip: int = 0) -> list[int]:
    """Experts that every instance of each batch executes."""
    counts = []
    for block in stream(RICH_SCHEMA, batches=skip + batches, size=_SIZE)[skip:]:
        active_B = one.step(one.prepare(block)).active_experts
        assert active_B is not None
        (count,) = set(active_B.tolist())
        counts.append(count)
    return counts


def test_half_as_many_each_time_the_stream_has_doubled() -> None:
    # Instances seen before each batch: 0, 40, 80, 120, 160, 200. Two groups.
    assert executed(learner(), 6) == [16, 16, 8, 4, 4, 4]
    assert executed(learner(changed(_SMES, {"early.num_group": 5})), 4) == [10, 10, 4, 4], "5, then 2 and not less"
    assert executed(learner(changed(_SMES, {"early.num_group": 0})), 2) == [4, 4]
    limits = learner().expert_limits
    assert limits is not None
    assert limits.bound == 16
    assert doctest.testmod(smes.rankers.sparse.routing).failed == 0


def test_a_restart_and_a_server_go_on_where_the_stream_is() -> None:
    one = learner()
    assert executed(one, 2) == [16, 16]
    (examples,) = stream(RICH_SCHEMA, batches=3, size=_SIZE)[2:]
    batch = one.prepare(examples)  # ids that are new have their rows from here on
    other = learner()
    other.load_state(one.state())
    model = ServingModel.from_state(RICH_SCHEMA, one.config, one.serving_state())
    scores = model.score(examples.ids, examples.numerics)
    np.testing.assert_allclose(scores, one.step(batch).scores.numpy(), rtol=1e-5, atol=1e-6)
    assert executed(other, 2, skip=2) == [8, 4]
    executed(one, 1, skip=3)
    same, again = one.state(), other.state()
    assert all(torch.equal(same[name], again[name]) for name in same)


def test_scoring_does_not_make_the_stream_older() -> None:
    one = learner()
    (examples,) = stream(RICH_SCHEMA, batches=1, size=_SIZE)
    model = ServingModel.from_state(RICH_SCHEMA, one.config, one.serving_state())
    first = model.score(examples.ids, examples.numerics)
    for _ in range(8):
        model.score(examples.ids, examples.numerics)
    assert np.array_equal(first, model.score(examples.ids, examples.numerics))


def test_choices_are_those_of_the_final_selection() -> None:
    one = learner()
    (examples,) = stream(RICH_SCHEMA, batches=1, size=_SIZE)
    one.prepare(examples)
    choices = one.choices(examples.ids, examples.numerics)
    assert choices is not None
    assert choices.shape == (_SIZE, RICH_SCHEMA.num_tasks, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"early.num_group": 2}, r"SmesConfig\.early\.num_group: 2, expected 0, or more than num_group \(2\)"),
        (
            {"max_active": 8},
            r"early\.num_group: 8, expected .*fits .*\(SmesConfig\.max_active: 8, expected .* \(16\)\)",
        ),
        (
            {"early.num_group": 17},
            r"SmesConfig\.early\.num_group: 17, expected at most the experts that a group chooses from \(16\)",
        ),
        ({"early.until": 0}, r"EarlyConfig\.until: 0, expected at least 1"),
        ({"num_group": 0, "num_adaptive": 2, "router.per": "task"}, r"more than num_group \(0\)"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        learner(changed(_SMES, changes))
