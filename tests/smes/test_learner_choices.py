"""``Learner.choices``: it returns what the next step chooses, and changes nothing."""

import numpy as np
import pytest
import torch

from smes.model.config import ModelConfig, OptimizerConfig
from smes.model.learner import Learner
from tests.smes.plain_smes import changed, plain
from tests.smes.streams import RICH_SCHEMA, stream

_SMALL = plain({"experts.num": 9, "num_shared": 1, "num_adaptive": 2, "encoder_dims": (16,), "experts.dims": (8,)})
_GROUPS: dict[str, tuple[str, ...]] = {"rare": ("like", "watch")}
_FORMS = {
    "two-stages": _SMALL,
    "raw": changed(_SMALL, {"router.input": "raw", "max_active": 4}),
    "moments-of-the-stream": changed(_SMALL, {"router.norm": "batch", "router.input": "both"}),
    "own-pools": changed(
        _SMALL, {"num_group": 1, "groups.pools": "own", "groups.declared": _GROUPS, "shared_experts": "always_on"}
    ),
    "group-routers": changed(
        _SMALL, {"num_adaptive": 0, "num_group": 2, "router.per": "group", "groups.declared": _GROUPS}
    ),
}


@pytest.mark.parametrize("form", _FORMS)
def test_choices_are_those_of_the_next_step_and_change_nothing(form: str) -> None:
    config = ModelConfig(embedding_dim=8, embedding_scale=1.0, smes=_FORMS[form])
    learner = Learner(RICH_SCHEMA, config, OptimizerConfig(), device=torch.device("cpu"))
    *seen, examples = stream(RICH_SCHEMA, batches=4, size=40)
    for block in seen:
        learner.step(learner.prepare(block))
    batch = learner.prepare(examples)  # ids that are new have their rows from here on
    before = learner.state()
    choices = learner.choices(examples.ids, examples.numerics)
    after = learner.state()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert choices is not None
    result, limits = learner.step(batch), learner.expert_limits
    assert result.expert_load is not None
    assert limits is not None
    counted = np.zeros((RICH_SCHEMA.num_tasks, limits.num_experts), np.int64)
    counted[:, : limits.num_fixed] = len(examples)
    for of_instance in choices.tolist():
        for t, experts in enumerate(of_instance):
            counted[t, experts] += 1
    assert result.expert_load.tolist() == counted.tolist()


def test_an_unknown_id_gets_no_row() -> None:
    learner = Learner(
        RICH_SCHEMA, ModelConfig(embedding_dim=8, smes=_SMALL), OptimizerConfig(), device=torch.device("cpu")
    )
    (examples,) = stream(RICH_SCHEMA, batches=1, size=40)
    rows = learner.num_rows
    choices = learner.choices(examples.ids, examples.numerics)
    assert choices is not None
    assert choices.shape == (40, RICH_SCHEMA.num_tasks, 3)
    assert learner.num_rows == rows


def test_the_pools_lie_one_after_the_other() -> None:
    """Each task uses the always-on experts and those of one pool, in the layout that the limits give."""
    config = ModelConfig(embedding_dim=8, embedding_scale=1.0, smes=_FORMS["own-pools"])
    learner = Learner(RICH_SCHEMA, config, OptimizerConfig(), device=torch.device("cpu"))
    (examples,) = stream(RICH_SCHEMA, batches=1, size=200)
    choices, limits = learner.choices(examples.ids, examples.numerics), learner.expert_limits
    assert choices is not None
    assert limits is not None
    assert (limits.num_fixed, limits.num_pools) == (1, 2)
    pool_NTK = (choices.numpy() - limits.num_fixed) // ((limits.num_experts - limits.num_fixed) // limits.num_pools)
    click, watch, like = (set(pool_NTK[:, t].ravel().tolist()) for t in range(3))
    assert watch == like
    assert click | watch == {0, 1}
    assert len(click) == len(watch) == 1
