"""Everything of SMES that is chosen by configuration, against the slow references."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from smes.model.config import ModelConfig, Preset, model_preset
from smes.rankers.sparse.config import RouterConfig, SmesConfig, smes_default, smes_large, smes_paper
from smes.rankers.sparse.ranker import SMES
from smes.rankers.sparse.router import Router
from tests.smes.dense_reference import dense_smes
from tests.smes.naive_routing import chosen, router_logits
from tests.smes.plain_smes import changed, plain

_INPUT = 13  # no multiple of 8: a raw input may have any width
_GROUPS = (0, 1, 1, 0, 2)


def _ranker(
    changes: Mapping[str, Any] | None = None, groups: Sequence[int] = _GROUPS, *, trim: bool | None = None
) -> SMES:
    shape = {"experts.num": 12, "encoder_dims": (16,), "experts.dims": (8,), "balance.weight": 0.1, **(changes or {})}
    torch.manual_seed(0)
    ranker = SMES(_INPUT, len(groups), plain(shape), groups, trim=trim)
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
    "own pools": {"num_shared": 0, "num_group": 1, "num_adaptive": 2, "groups.pools": "own"},
    "own pools in a budget": {"num_shared": 0, "num_group": 1, "groups.pools": "own", "max_active": 6},
    "three stages in a budget": {"num_shared": 1, "num_group": 1, "num_adaptive": 2, "max_active": 6},
    "routers per group": {"num_shared": 1, "num_group": 2, "num_adaptive": 0, "router.per": "group"},
    "routers per group on own pools": {
        "num_shared": 0,
        "num_group": 2,
        "num_adaptive": 0,
        "router.per": "group",
        "groups.pools": "own",
        "router.rank": 4,
        "router.maps": "own",
    },
    "always on": {"num_shared": 2, "num_adaptive": 2, "shared_experts": "always_on"},
    "always on beside own pools": {
        "experts.num": 14,
        "num_shared": 2,
        "num_group": 1,
        "shared_experts": "always_on",
        "groups.pools": "own",
    },
    "own maps": {"router.rank": 3, "router.maps": "own"},
    "own maps on own pools": {"num_shared": 0, "groups.pools": "own", "router.rank": 3, "router.maps": "own"},
    "shared map on own pools": {"num_shared": 0, "groups.pools": "own", "router.rank": 3},
    "routers on both": {"router.input": "both", "router.rank": 4},
    "normalised routers": {"router.input": "both", "router.norm": "layer"},
    "a trunk on the encoder": {"trunk_dims": (16, 8), "trunk_input": "encoder"},
    "a trunk on the raw input": {"trunk_dims": (16, 8), "trunk_input": "raw"},
    "a trunk without an encoder": {"trunk_dims": (8,), "encoder_dims": ()},
    "no encoder": {"encoder_dims": ()},
    "no encoder, low-rank experts": {"encoder_dims": (), "experts.form": "low_rank"},
    "no encoder, residual experts": {"encoder_dims": (), "experts.form": "residual", "experts.narrow_dim": 8},
    "rms": {"experts.norm": "rms", "experts.form": "residual", "experts.narrow_dim": 8},
    "no norm": {"experts.norm": "none", "experts.dims": (16, 8)},
}


def _logits(ranker: SMES, x_BI: Tensor, groups: Sequence[int]) -> list[list[dict[int, float]]]:
    z = router_logits(ranker, groups, x_BI, ranker.encoder(x_BI))
    return [[{e: float(v.detach()) for e, v in of_task.items()} for of_task in row] for row in z]


@pytest.mark.parametrize("trim", [True, False])
@pytest.mark.parametrize("name", FORMS)
def test_values_and_gradients_are_those_of_the_loops(name: str, trim: bool) -> None:
    ranker = _ranker(FORMS[name], trim=trim)
    x_BI = _x().requires_grad_()

    experts_BTK = ranker.reads.choices(ranker.route(x_BI, ranker.encoder(x_BI)).experts_BRK)

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
        assert load_E == [sum(e in row[t] for row in expected) for e in range(ranker.config.experts.num)]


@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("name", FORMS)
def test_no_shape_waits_for_a_value(name: str, norm: str) -> None:
    """Fake tensors have shapes but no values: whatever reads a value on the host, as on a GPU it would wait, raises."""
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
        ranker = _ranker({"router.norm": norm, **FORMS[name]}, trim=False)
        x_BI = torch.empty(9, _INPUT, requires_grad=True)

        output = ranker(x_BI)
        (output.tasks_BTH.sum() + output.auxiliary_loss).backward()

        assert output.tasks_BTH.shape == (9, 5, 8)
        for parameter, tensor in [*ranker.named_parameters(), ("x", x_BI)]:
            assert tensor.grad is not None, parameter
        with pytest.raises(DataDependentOutputException):
            float(output.tasks_BTH.sum())


def test_the_group_stage_lets_a_group_outvote_its_tasks() -> None:
    """Experts 0 and 1 are each the favourite of one task of the group, expert 2 the second of both: it has the mean."""
    ranker = _ranker({"experts.num": 4, "num_shared": 0, "num_group": 1, "num_adaptive": 0}, (0, 0))
    z_BRC = torch.tensor([[[2.0, -9.0, 1.9, -9.0], [-9.0, 2.0, 1.9, -9.0]]])
    assert ranker.selection(z_BRC).experts_BRK.tolist() == [[[2], [2]]]


def test_own_pools_make_routers_narrower() -> None:
    common = _ranker({"num_shared": 0})
    own = _ranker({"num_shared": 0, "groups.pools": "own"})
    assert common.router.up.weight.numel() == 3 * own.router.up.weight.numel()
    per_group = _ranker(
        {"num_shared": 0, "num_group": 1, "num_adaptive": 0, "groups.pools": "own", "router.per": "group"}
    )
    assert own.router.up.weight.numel() * 3 == 5 * per_group.router.up.weight.numel()


def test_routers_start_by_their_scale() -> None:
    configs: list[dict[str, Any]] = [{}, {"router.rank": 4}, {"router.rank": 4, "router.maps": "own"}]
    for config in configs:
        x_BI = _x()
        once, scaled = _ranker(config), _ranker({"router.scale": 3.0, **config})
        h_BD = once.encoder(x_BI)
        torch.testing.assert_close(scaled.router(x_BI, h_BD), 3 * once.router(x_BI, h_BD))


def test_router_input_is_standardised_by_the_stream_before_the_batch() -> None:
    torch.manual_seed(0)
    router = Router(3, 4, 2, 5, RouterConfig(input="raw", rank=None, maps="shared", norm="batch"))
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
        h_BD = torch.zeros(size, 4)
        router.eval()
        torch.testing.assert_close(router(x_BI, h_BD).detach(), logits, rtol=1e-4, atol=1e-4)
        router.train()
        torch.testing.assert_close(router(x_BI, h_BD).detach(), logits, rtol=1e-4, atol=1e-4)
        seen.append(x_BI)


def test_always_on_experts_are_not_balanced() -> None:
    ranker = _ranker(
        {"experts.num": 6, "num_shared": 2, "num_adaptive": 1, "shared_experts": "always_on", "balance.weight": 1.0}
    )
    with torch.no_grad():
        for parameter in ranker.router.parameters():
            parameter.zero_()
    loss = ranker(_x()).auxiliary_loss
    torch.testing.assert_close(loss, torch.tensor(1.0))  # uniform over the four that are chosen from


def test_one_group_where_none_is_named() -> None:
    ranker = SMES(_INPUT, 4, plain({"num_shared": 0, "num_group": 2, "num_adaptive": 0}))
    output = ranker(_x())
    assert output.stats is not None
    assert output.stats.active_B.tolist() == [2] * 9
    with pytest.raises(ValueError, match="group_T: 3 groups, expected one for each of 4 tasks"):
        SMES(_INPUT, 4, SmesConfig(), (0, 1, 1))


def test_the_papers_form_is_two_stages_on_the_encoder_with_full_experts() -> None:
    """Said key by key, from a configuration that differs in most of them."""
    paper = changed(
        smes_large(),
        {
            "encoder_dims": (128,),
            "num_shared": 2,
            "num_group": 0,
            "num_adaptive": 1,
            "shared_experts": "routed",
            "trunk_dims": (),
            "max_active": None,
            "router.per": "task",
            "router.input": "encoder",
            "router.rank": None,
            "router.maps": "shared",
            "router.norm": "none",
            "router.scale": 1.0,
            "experts.num": 16,
            "experts.form": "full",
            "experts.dims": (64,),
            "experts.norm": "layer",
            "groups.pools": "common",
            "early.num_group": 0,
            "balance.loss": "global",
        },
    )

    assert smes_paper() == paper


def test_the_large_configuration_has_256_full_experts_for_groups() -> None:
    """Said key by key, but for the trunk."""
    changes = {
        "encoder_dims": (128,),
        "trunk_dims": (),
        "num_group": 4,
        "router.input": "raw",
        "router.rank": 64,
        "router.maps": "own",
        "experts.num": 256,
        "experts.form": "full",
        "experts.dims": (32,),
        "experts.norm": "layer",
        "early.num_group": 16,
    }

    assert replace(smes_large(), trunk_dims=()) == changed(smes_default(), changes)


@pytest.mark.parametrize("name", get_args(Preset))
def test_a_preset_is_complete_and_can_be_changed_key_by_key(name: Preset) -> None:
    preset = model_preset(name)
    by_name = {"default": SmesConfig(), "paper": smes_paper(), "large": smes_large()}
    assert preset == ModelConfig(smes=by_name[name])

    smes = replace(preset.smes, encoder_dims=(64,), experts=replace(preset.smes.experts, num=32))
    other = replace(preset, smes=smes)

    back = {"encoder_dims": preset.smes.encoder_dims, "experts.num": preset.smes.experts.num}
    assert changed(smes, back) == preset.smes
    assert ModelConfig.from_dict(json.loads(json.dumps(other.to_dict()))) == other


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.preset: 'papers', expected one of default, paper, large"):
        model_preset("papers")  # type: ignore[arg-type]  # no such preset


def test_the_default_shares_experts_within_a_task_group() -> None:
    """The whole of it, trunk and all, at the size that it has, against the loops."""
    torch.manual_seed(0)
    groups = (0, 1, 1, 0)
    ranker = SMES(_INPUT, 4, SmesConfig(), groups)
    assert ranker.trunk is not None
    with torch.no_grad():  # zero differences from a base, as they start, would hide mistakes
        ranker.get_parameter("experts.differences").uniform_(-0.5, 0.5)
    ranker(_x(64, seed=5))  # moments of a step before
    ranker.eval()
    x_BI = _x()
    expected = [chosen(ranker.config, groups, z) for z in _logits(ranker, x_BI, groups)]
    experts_BTK = ranker.choices(x_BI)
    assert experts_BTK.tolist() == expected
    assert experts_BTK.shape == (9, 4, 4)
    assert bool((experts_BTK[:, 0] < ranker.config.experts.num // 2).all())
    assert bool((experts_BTK[:, 1] >= ranker.config.experts.num // 2).all())
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
