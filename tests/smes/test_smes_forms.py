"""Everything of SMES that is chosen by configuration, against the slow references."""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import smes.rankers.sparse.experts
import smes.rankers.sparse.ranker
from smes.model.config import ModelConfig
from smes.rankers.sparse.config import PAPER_FORM, SmesConfig
from smes.rankers.sparse.dispatch import dispatch
from smes.rankers.sparse.ranker import SMES
from smes.rankers.sparse.router import Router
from tests.smes.dense_reference import dense_smes
from tests.smes.naive_routing import chosen, router_logits
from tests.smes.plain_smes import plain

_INPUT = 13  # no multiple of 8: a raw input may have any width
_GROUPS = (0, 1, 1, 0, 2)
_CONFIGURATION = Path(__file__).resolve().parents[2] / "docs/configuration.md"


def _ranker(groups: Sequence[int] = _GROUPS, seed: int = 0, **config: Any) -> SMES:
    shape = {"num_experts": 12, "encoder_dims": (16,), "expert_dims": (8,), "balance": 0.1, **config}
    torch.manual_seed(seed)
    ranker = SMES(_INPUT, len(groups), plain(**shape), groups)
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
    monkeypatch.setattr(smes.rankers.sparse.ranker, "dispatch", lambda routing, **_: dispatch(routing, trim=trim))
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


@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("name", FORMS)
def test_no_shape_waits_for_a_value(name: str, norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of the meta device have no values: whatever needs one on the host, as on a GPU it would wait, raises."""
    # Neither autocast nor the grouped GEMM knows that device.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)
    monkeypatch.setattr(smes.rankers.sparse.experts, "grouped_linear", lambda x_PD, weight_EDH, _: x_PD @ weight_EDH[0])
    ranker = _ranker(**{"router_norm": norm, **FORMS[name]}).to("meta")
    x_BI = torch.empty(9, _INPUT, device="meta", requires_grad=True)
    output = ranker(x_BI)
    assert output.tasks_BTH.shape == (9, 5, 8)
    (output.tasks_BTH.sum() + output.auxiliary_loss).backward()
    for name, tensor in [*ranker.named_parameters(), ("x", x_BI)]:
        assert tensor.grad is not None, name
    with pytest.raises(RuntimeError, match="meta"):
        float(output.tasks_BTH.sum())


def test_the_group_stage_lets_a_group_outvote_its_tasks() -> None:
    """Experts 0 and 1 are each the favourite of one task of the group, expert 2 the second of both: it has the mean."""
    ranker = _ranker((0, 0), num_experts=4, num_shared=0, num_group=1, num_adaptive=0)
    z_BTC = torch.tensor([[[2.0, -9.0, 1.9, -9.0], [-9.0, 2.0, 1.9, -9.0]]])
    assert ranker.selection(z_BTC).experts_BTK.tolist() == [[[2], [2]]]


def test_own_pools_make_routers_narrower() -> None:
    common = _ranker(num_shared=0)
    own = _ranker(num_shared=0, group_pools="own")
    assert common.router.up.weight.numel() == 3 * own.router.up.weight.numel()
    per_group = _ranker(num_shared=0, num_group=1, num_adaptive=0, group_pools="own", routers="group")
    assert own.router.up.weight.numel() * 3 == 5 * per_group.router.up.weight.numel()


def test_routers_start_by_their_scale() -> None:
    for config in ({}, {"router_rank": 4}, {"router_rank": 4, "router_maps": "per_task"}):
        x_BI = _x()
        plain, scaled = _ranker(**config), _ranker(router_scale=3.0, **config)
        h_BD = plain.encoder(x_BI)
        torch.testing.assert_close(scaled.router(h_BD), 3 * plain.router(h_BD))


def test_router_input_is_standardised_by_the_stream_before_the_batch() -> None:
    torch.manual_seed(0)
    router = Router((3,), 2, 5, norm="batch")
    weight = router.up.weight.detach().double()
    generator = torch.Generator().manual_seed(1)
    seen: list[Tensor] = []
    for size in (50, 1, 40, 30):
        x_BI = torch.randn(size, 3, generator=generator) * torch.tensor([0.01, 1.0, 50.0]) + 7
        expected = x_BI.double()  # nothing seen before: as it is
        if seen:
            before = torch.cat(seen).double()
            expected = (expected - before.mean(0)) / before.var(0, correction=0).sqrt()
        logits = (expected.clamp(-8, 8) @ weight.t()).view(size, 2, 5).float()
        router.eval()
        torch.testing.assert_close(router(x_BI).detach(), logits, rtol=1e-4, atol=1e-4)
        router.train()
        torch.testing.assert_close(router(x_BI).detach(), logits, rtol=1e-4, atol=1e-4)
        seen.append(x_BI)


def test_always_on_experts_are_not_balanced() -> None:
    ranker = _ranker(num_experts=6, num_shared=2, num_adaptive=1, shared_experts="always_on", balance=1.0)
    with torch.no_grad():
        for parameter in ranker.router.parameters():
            parameter.zero_()
    loss = ranker(_x()).auxiliary_loss
    torch.testing.assert_close(loss, torch.tensor(1.0))  # uniform over the four that are chosen from


def test_one_group_where_none_is_named() -> None:
    ranker = SMES(_INPUT, 4, plain(num_shared=0, num_group=2, num_adaptive=0))
    output = ranker(_x())
    assert output.stats is not None
    assert output.stats.active_B.tolist() == [2] * 9
    with pytest.raises(ValueError, match="group_T: 3 groups, expected one for each of 4 tasks"):
        SMES(_INPUT, 4, SmesConfig(), (0, 1, 1))


def test_the_papers_form_by_its_name() -> None:
    """Whatever the defaults are: equal to a configuration that says each of the paper's parts and our counts for it."""
    parts = dict(PAPER_FORM)
    said: dict[str, Any] = {"num_experts": 16, "num_shared": 2, "num_adaptive": 1, "expert_dims": (64,), **parts}
    said |= {"router_rank": None}
    assert replace(SmesConfig(**said), form="paper") == SmesConfig(form="paper")
    config = SmesConfig(form="paper", num_experts=64, balance=0.1, expert_dims=(64, 32))
    assert {name: getattr(config, name) for name in PAPER_FORM} == parts
    assert replace(config, num_shared=0, balance=0.0).num_shared == 0, "the paper's own ablations are within its form"
    for key, value in {"num_group": 2, "routers": "group", "router_norm": "batch", "balance_loss": "none"}.items():
        with pytest.raises(ValueError, match=f"{key}: {value!r}, expected {parts[key]!r} in the paper's form"):
            SmesConfig(**{"form": "paper", key: value})  # type: ignore[arg-type]  # of mixed types
    documented = yaml.safe_load(fenced_yaml(_CONFIGURATION.read_text(), "### The paper's form"))["model"]["smes"]
    assert {name: tuple(v) if isinstance(v, list) else v for name, v in documented.items()} == parts


def test_a_key_that_is_given_stays_as_it_is_given() -> None:
    """Also where the value is the default of the other form: it is kept, or refused, never replaced."""
    own, paper = SmesConfig(), SmesConfig(form="paper")
    free = ("num_experts", "num_shared", "num_adaptive", "expert_dims", "router_rank")
    for key in free:
        value = getattr(own, key)
        assert value != getattr(paper, key), "a key of two defaults"
        keys: dict[str, Any] = {"form": "paper", key: value} | ({"num_adaptive": 2} if key == "num_shared" else {})
        assert getattr(SmesConfig(**keys), key) == value
    for key, value in PAPER_FORM.items():
        if getattr(own, key) != value:
            with pytest.raises(ValueError, match=f"smes.{key}: .*in the paper's form"):
                SmesConfig(**{"form": "paper", key: getattr(own, key)})
    with pytest.raises(ValueError, match="in the paper's form"):
        replace(own, form="paper")  # all its keys are given
    for config in (own, paper, SmesConfig(form="paper", num_experts=256)):
        model = ModelConfig(smes=config)
        assert ModelConfig.from_dict(json.loads(json.dumps(model.to_dict()))) == model


def test_the_default_shares_experts_within_a_task_group() -> None:
    """The whole of it, at the size that it has, against the loops."""
    torch.manual_seed(0)
    groups = (0, 1, 1, 0)
    ranker = SMES(_INPUT, 4, SmesConfig(), groups)
    ranker(_x(64, seed=5))  # moments of a step before
    ranker.eval()
    x_BI = _x()
    expected = [chosen(ranker.config, groups, z) for z in _logits(ranker, x_BI, groups)]
    experts_BTK = ranker.choices(x_BI)
    assert experts_BTK.tolist() == expected
    assert experts_BTK.shape == (9, 4, 4)
    assert bool((experts_BTK[:, 0] < ranker.config.num_experts // 2).all())
    assert bool((experts_BTK[:, 1] >= ranker.config.num_experts // 2).all())
    assert torch.equal(experts_BTK[:, [0, 1]], experts_BTK[:, [3, 2]])
    output = ranker(x_BI)
    tasks_BTH, balance = dense_smes(ranker, x_BI, experts_BTK, groups)
    torch.testing.assert_close(output.tasks_BTH, tasks_BTH, rtol=1e-4, atol=1e-5)
    assert (output.auxiliary_loss, output.stats) == (None, None), "they are for training"
    output = ranker.train()(x_BI)
    torch.testing.assert_close(output.auxiliary_loss, balance, rtol=1e-4, atol=1e-6)
    assert ranker.expert_limits is not None
    assert ranker.expert_limits.bound == 8
    assert output.stats.active_B.tolist() == [8] * 9


def fenced_yaml(text: str, heading: str) -> str:
    """The first YAML block under a heading."""
    return text.partition(f"\n{heading}\n")[2].partition("```yaml\n")[2].partition("```")[0]
