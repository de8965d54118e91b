"""Everything of SMES that is chosen by configuration, against the slow references."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import smes.smes_ranker
from smes.dispatch import dispatch
from smes.smes_config import SmesConfig
from smes.smes_ranker import SMES
from tests.smes.dense_reference import dense_smes
from tests.smes.naive_routing import chosen, router_logits

_INPUT = 13  # no multiple of 8: a raw input may have any width
_GROUPS = (0, 1, 1, 0, 2)


def _ranker(groups: Sequence[int] = _GROUPS, seed: int = 0, **config: Any) -> SMES:
    shape = {"num_experts": 12, "encoder_dims": (16,), "expert_dims": (8,), "balance": 0.1, **config}
    torch.manual_seed(seed)
    ranker = SMES(_INPUT, len(groups), SmesConfig(**shape), groups)
    with torch.no_grad():  # zero differences from a base, as they start, would hide mistakes
        for name, parameter in ranker.named_parameters():
            if name in ("experts.up", "experts.differences"):
                parameter.uniform_(-0.5, 0.5)
            if name == "router.up.weight":
                parameter.mul_(4)
    return ranker


def _x(B: int = 9, seed: int = 2) -> Tensor:
    return torch.randn(B, _INPUT, generator=torch.Generator().manual_seed(seed))


FORMS: dict[str, dict[str, Any]] = {
    "three stages": {"num_shared": 1, "num_group": 2, "num_adaptive": 1},
    "group stage alone": {"num_shared": 0, "num_group": 2, "num_adaptive": 0},
    "own pools": {"num_shared": 0, "num_group": 1, "num_adaptive": 2, "group_pools": "own"},
    "own pools in a budget": {"num_shared": 0, "num_group": 1, "group_pools": "own", "max_active": 6},
    "three stages in a budget": {"num_shared": 1, "num_group": 1, "num_adaptive": 2, "max_active": 6},
    "routers per group": {"num_shared": 1, "num_group": 2, "num_adaptive": 0, "routers": "group"},
    "routers per group on own pools": {
        "num_shared": 0,
        "num_group": 2,
        "num_adaptive": 0,
        "routers": "group",
        "group_pools": "own",
        "router_rank": 4,
        "router_maps": "per_task",
    },
    "always on": {"num_shared": 2, "num_adaptive": 2, "shared_experts": "always_on"},
    "always on beside own pools": {
        "num_experts": 14,
        "num_shared": 2,
        "num_group": 1,
        "shared_experts": "always_on",
        "group_pools": "own",
    },
    "own maps": {"router_rank": 3, "router_maps": "per_task"},
    "own maps on own pools": {"num_shared": 0, "group_pools": "own", "router_rank": 3, "router_maps": "per_task"},
    "shared map on own pools": {"num_shared": 0, "group_pools": "own", "router_rank": 3},
    "routers on both": {"router_input": "both", "router_rank": 4},
    "normalised routers": {"router_input": "both", "router_norm": "layer"},
    "a trunk": {"trunk_dims": (16, 8)},
    "no encoder": {"encoder_dims": ()},
    "no encoder, low-rank experts": {"encoder_dims": (), "experts": "low_rank"},
    "no encoder, residual experts": {"encoder_dims": (), "experts": "residual", "expert_narrow_dim": 8},
    "rms": {"expert_norm": "rms", "experts": "residual", "expert_narrow_dim": 8},
    "no norm": {"expert_norm": "none", "expert_dims": (16, 8)},
}


def _logits(ranker: SMES, x_BI: Tensor, groups: Sequence[int]) -> list[list[dict[int, float]]]:
    z = router_logits(ranker, groups, x_BI, ranker.encoder(x_BI))
    return [[{e: float(v.detach()) for e, v in of_task.items()} for of_task in row] for row in z]


@pytest.mark.parametrize("trim", [True, False])
@pytest.mark.parametrize("name", FORMS)
def test_values_and_gradients_are_those_of_the_loops(name: str, trim: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smes.smes_ranker, "dispatch", lambda routing, **_: dispatch(routing, trim=trim))
    ranker = _ranker(**FORMS[name])
    x_BI = _x().requires_grad_()
    experts_BTK = ranker.route(x_BI, ranker.encoder(x_BI)).experts_BTK[:, ranker.router_T]
    expected = [chosen(ranker.config, _GROUPS, z) for z in _logits(ranker, x_BI, _GROUPS)]
    assert experts_BTK.tolist() == expected, "stage by stage, best first"
    fast = ranker(x_BI)
    tasks_BTH, balance = dense_smes(ranker, x_BI, experts_BTK, _GROUPS)
    torch.testing.assert_close(fast.tasks_BTH, tasks_BTH, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fast.auxiliary_loss, balance, rtol=1e-4, atol=1e-6)
    probe = torch.randn(tasks_BTH.shape, generator=torch.Generator().manual_seed(7))
    inputs = [x_BI, *ranker.parameters()]
    got = torch.autograd.grad((fast.tasks_BTH * probe).sum() + fast.auxiliary_loss, inputs)
    slow = torch.autograd.grad((tasks_BTH * probe).sum() + balance, inputs)
    for (parameter, _), a, b in zip([("x", x_BI), *ranker.named_parameters()], got, slow, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4), parameter
    assert fast.stats.active_B.tolist() == [len({e for task in row for e in task}) for row in expected]
    for t, load_E in enumerate(fast.stats.load_TE.tolist()):
        assert load_E == [sum(e in row[t] for row in expected) for e in range(ranker.config.num_experts)]
