"""The weights of experts say what the representation of each task is made of: checked against the forward pass.

Letters: B instances, T tasks, E experts, O own experts of newcomers, I input width, H output width.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from smes.model.serving import ServingModel
from smes.rankers.sparse.config import EarlyConfig, ExpertsConfig, GroupsConfig, RouterConfig, SmesConfig
from smes.rankers.sparse.newcomers import OwnExperts
from smes.rankers.sparse.packing import dispatch_all
from smes.rankers.sparse.ranker import SMES
from smes.rankers.structure import NEWCOMER, Structure
from smes.schema_change import NEW
from tests.smes.schema_changes import with_new_values
from tests.smes.test_carry_over import _Changed

_EXPERTS = ExpertsConfig(num=8, dims=(8,), narrow_dim=8)
_COMMON = GroupsConfig(pools="common")
_OWN_POOLS = SmesConfig(encoder_dims=(8,), trunk_dims=(), experts=_EXPERTS, num_group=2)
FORMS = {
    "declared groups with own pools": _OWN_POOLS,
    "a router per task, two stages": replace(
        _OWN_POOLS, num_shared=2, num_group=0, num_adaptive=2, router=RouterConfig(per="task"), groups=_COMMON
    ),
    "fixed experts, and more while the stream is young": replace(
        _OWN_POOLS,
        num_shared=2,
        num_group=1,
        shared_experts="always_on",
        early=EarlyConfig(num_group=2, until=100),
        groups=_COMMON,
    ),
    "groups to be found": replace(_OWN_POOLS, groups=GroupsConfig(found=2)),
}
NEWCOMERS = Structure((0, NEWCOMER, 1, NEWCOMER), (0, 1), (0.5, 0.5), (0, 0, 0, 3))


def ranker(config: SmesConfig, structure: Structure | None = None) -> SMES:
    torch.manual_seed(0)
    model = SMES(5, 4, config, (0, 0, 1, 1), structure=structure)
    with torch.no_grad():
        for weights in model.parameters():
            weights.normal_(0, 0.7)
    return model.eval()


def of_every_expert(model: SMES, x_BI: Tensor) -> Tensor:
    """The output of every expert for every instance, own ones last. [E + O, B, H]."""
    h_BD = model.encoder(x_BI)
    padded_BD = F.pad(h_BD, (0, model._padding))
    outputs = [model.experts(padded_BD, dispatch_all(model.route(x_BI, h_BD)))]
    for own in model.newcomers.own.values() if model.newcomers is not None else ():
        assert isinstance(own, OwnExperts)
        outputs.append(own.experts(padded_BD, dispatch_all(own.selection(own.router(x_BI, h_BD)))))
    return torch.cat([y.view(-1, len(x_BI), y.shape[1]) for y in outputs])


@pytest.mark.parametrize("form", [*FORMS, "newcomers"])
@torch.no_grad()
def test_experts_times_weights_are_the_representations(form: str) -> None:
    newcomers = form == "newcomers"
    model = ranker(_OWN_POOLS if newcomers else FORMS[form], NEWCOMERS if newcomers else None)
    x_BI = torch.randn(40, 5)

    weights_BTE = model.expert_weights(x_BI)

    expected_BTH = model(x_BI).tasks_BTH
    got_BTH = torch.einsum("bte,ebh->bth", weights_BTE, of_every_expert(model, x_BI))
    torch.testing.assert_close(got_BTH, expected_BTH, rtol=1e-4, atol=1e-5)
    assert (weights_BTE >= 0).all()
    assert weights_BTE.shape[2] == 8 + 3 * newcomers
    assert weights_BTE[..., :8].sum(dim=2).sub(1).abs().max() < 1e-5
    assert weights_BTE.std(dim=0).max() > 0.1  # they differ from instance to instance


def test_right_after_a_change_of_the_schema_they_are_those_of_the_model_that_still_scores() -> None:
    changed = _Changed("smes-default", 0)
    block = with_new_values(changed.rng, changed.change, changed.block)
    now_P = np.flatnonzero(changed.change.tasks != NEW)

    was, now = (
        ServingModel.from_state(schema, model, learner.serving_state()).explain(one.ids, one.numerics)
        for schema, model, learner, one in (
            (changed.change.was, changed.models[0], changed.was, changed.block),
            (changed.change.now, changed.models[1], changed.now, block),
        )
    )

    assert was.experts_NTE is not None
    assert now.experts_NTE is not None
    was_NPE = was.experts_NTE[:, changed.change.tasks[now_P]]
    np.testing.assert_array_equal(now.experts_NTE[:, now_P, : was_NPE.shape[2]], was_NPE)
