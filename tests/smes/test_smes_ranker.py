"""The grouped execution equals the dense-masked one, in values and in every gradient."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import smes.rankers.sparse.ranker
from smes.rankers.config import HomeConfig
from smes.rankers.dense_experts import NORMS
from smes.rankers.sparse.balance import BALANCE_LOSSES
from smes.rankers.sparse.config import SmesConfig
from smes.rankers.sparse.dispatch import dispatch
from smes.rankers.sparse.experts import EXPERT_NORMS
from smes.rankers.sparse.ranker import SMES
from smes.rankers.sparse.routing import expert_load
from tests.smes.dense_reference import dense_smes
from tests.smes.plain_smes import plain

_INPUT = 12


def _ranker(num_tasks: int, seed: int = 0, groups: Sequence[int] | None = None, **config: Any) -> SMES:
    torch.manual_seed(seed)
    shape = {"encoder_dims": (16,), "expert_dims": (16, 8), "balance": 0.1, **config}
    return SMES(_INPUT, num_tasks, plain(**shape), groups)


def _gradients(ranker: SMES, x_BI: Tensor, loss: Tensor) -> dict[str, Tensor]:
    names = ["x", *(n for n, _ in ranker.named_parameters())]
    gradients = torch.autograd.grad(loss, [x_BI, *ranker.parameters()], allow_unused=True)
    return {n: torch.zeros(()) if g is None else g for n, g in zip(names, gradients, strict=True)}


def _experts(ranker: SMES, x_BI: Tensor) -> Tensor:
    """Of every task."""
    return ranker.route(x_BI, ranker.encoder(x_BI)).experts_BTK[:, ranker.router_T]


def _assert_equal_to_dense(ranker: SMES, x_BI: Tensor, groups: Sequence[int] | None = None) -> None:
    x_BI.requires_grad_()
    fast = ranker(x_BI)
    assert fast.auxiliary_loss is not None
    assert fast.tasks_BTH is not None
    tasks_BTH, balance = dense_smes(ranker, x_BI, _experts(ranker, x_BI), groups)
    torch.testing.assert_close(fast.tasks_BTH, tasks_BTH, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fast.auxiliary_loss, balance, rtol=1e-4, atol=1e-5, check_dtype=False)
    probe = torch.randn(tasks_BTH.shape, generator=torch.Generator().manual_seed(7), dtype=tasks_BTH.dtype)
    got = _gradients(ranker, x_BI, (fast.tasks_BTH * probe).sum() + fast.auxiliary_loss)
    expected = _gradients(ranker, x_BI, (tasks_BTH * probe).sum() + balance)
    for name, gradient in expected.items():
        assert torch.allclose(got[name], gradient, rtol=1e-3, atol=1e-4), name


@settings(max_examples=25, deadline=None)
@given(
    st.tuples(st.integers(1, 7), st.integers(1, 4), st.integers(1, 9), st.integers(0, 3), st.integers(0, 3)),
    st.integers(0, 2**20),
    st.sampled_from([None, 2]),
)
def test_grouped_equals_dense(shape: tuple[int, int, int, int, int], seed: int, rank: int | None) -> None:
    B, T, E, shared, adaptive = shape
    shared = min(shared, E)
    adaptive = max(min(adaptive, E - shared), 0 if shared else 1)
    ranker = _ranker(T, seed, num_experts=E, num_shared=shared, num_adaptive=adaptive, router_rank=rank)
    _assert_equal_to_dense(ranker, torch.randn(B, _INPUT, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize(("shared", "adaptive"), [(2, 2), (0, 3), (3, 0)])
def test_grouped_equals_dense_when_every_router_ties(shared: int, adaptive: int) -> None:
    ranker = _ranker(3, num_experts=8, num_shared=shared, num_adaptive=adaptive)
    with torch.no_grad():
        for parameter in ranker.router.parameters():
            parameter.zero_()
    x_BI = torch.randn(6, _INPUT, generator=torch.Generator().manual_seed(3))
    stats = ranker(x_BI).stats
    assert stats is not None
    assert stats.load_TE.sum(dim=1).tolist() == [6 * (shared + adaptive)] * 3
    _assert_equal_to_dense(ranker, x_BI)


@pytest.mark.parametrize("router_rank", [None, 4])
def test_grouped_equals_dense_with_routers_on_the_raw_input(router_rank: int | None) -> None:
    ranker = _ranker(3, num_experts=8, num_shared=1, num_adaptive=2, router_input="raw", router_rank=router_rank)
    assert next(ranker.router.parameters()).shape[1] == _INPUT
    _assert_equal_to_dense(ranker, torch.randn(9, _INPUT, generator=torch.Generator().manual_seed(2)))


@pytest.mark.parametrize("trim", [True, False])
def test_grouped_equals_dense_within_a_budget(trim: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ranker = _ranker(6, num_experts=16, num_shared=1, num_adaptive=2, max_active=5)
    assert ranker.expert_limits is not None
    assert ranker.expert_limits.bound == 5
    monkeypatch.setattr(smes.rankers.sparse.ranker, "dispatch", lambda routing, **_: dispatch(routing, trim=trim))
    x_BI = torch.randn(9, _INPUT, generator=torch.Generator().manual_seed(2))
    stats = ranker(x_BI).stats
    assert stats is not None
    assert int(stats.active_B.max()) == 5
    _assert_equal_to_dense(ranker, x_BI)


def test_the_balance_loss_is_chosen_by_its_name() -> None:
    x_BI = torch.randn(9, _INPUT, generator=torch.Generator().manual_seed(2))
    losses = {}
    for name, loss in BALANCE_LOSSES.items():
        ranker = _ranker(3, num_experts=8, balance=0.5, balance_loss=name)
        routing = ranker.route(x_BI, ranker.encoder(x_BI))
        losses[name] = ranker(x_BI).auxiliary_loss
        traffic_TE = expert_load(routing.experts_BTK, 8) / routing.experts_BTK[:, 0].numel()
        if loss is not None:
            assert losses[name] == 0.5 * loss(traffic_TE, routing.probs_BTL.mean(dim=0))
    assert losses.pop("none") is None
    assert len({float(value.detach()) for value in losses.values()}) == 3


def _different(ranker: SMES) -> SMES:
    """Experts that are zero differences from a base, as they start, would hide mistakes."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in ranker.named_parameters():
            if name in ("experts.up", "experts.differences"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return ranker


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(["low_rank", "residual"]),
    st.tuples(st.integers(1, 7), st.integers(1, 4), st.integers(4, 9), st.integers(0, 2), st.integers(1, 2)),
    st.integers(0, 2**20),
)
def test_differences_from_a_base_equal_dense(form: str, shape: tuple[int, int, int, int, int], seed: int) -> None:
    B, T, E, shared, adaptive = shape
    config: dict[str, Any] = {"num_experts": E, "num_shared": shared, "num_adaptive": adaptive, "expert_dims": (16,)}
    ranker = _different(_ranker(T, seed, experts=form, expert_rank=8, expert_narrow_dim=8, **config))
    _assert_equal_to_dense(ranker, torch.randn(B, _INPUT, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("form", ["low_rank", "residual"])
def test_at_first_every_expert_is_the_base(form: str) -> None:
    ranker = _ranker(3, num_experts=8, num_shared=1, num_adaptive=2, experts=form, expert_dims=(16,))
    x_BI = torch.randn(5, _INPUT, generator=torch.Generator().manual_seed(3))
    base_BH = torch.nn.functional.silu(torch.layer_norm(ranker.encoder(x_BI) @ ranker.experts.base, (16,)))
    torch.testing.assert_close(ranker(x_BI).tasks_BTH, base_BH.unsqueeze(1).expand(5, 3, 16))
    ranker(x_BI).tasks_BTH.square().sum().backward()
    zero = "up" if form == "low_rank" else "differences"
    for name, parameter in ranker.experts.named_parameters():
        assert parameter.requires_grad
        assert bool((parameter == 0).all()) == (name == zero), name
        if name in ("base", zero):
            assert parameter.grad is not None
            assert float(parameter.grad.abs().max()) > 0, f"{name} learns from the first step on"


@pytest.mark.parametrize("form", ["full", "low_rank", "residual"])
def test_the_layout_for_gpus_gives_the_same(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dims = (16, 8) if form == "full" else (16,)
    ranker = _different(_ranker(4, num_experts=8, num_shared=1, num_adaptive=2, experts=form, expert_dims=dims))
    x_BI = torch.randn(9, _INPUT, generator=torch.Generator().manual_seed(5))
    monkeypatch.setattr(smes.rankers.sparse.ranker, "dispatch", lambda routing, trim: dispatch(routing, trim=False))
    _assert_equal_to_dense(ranker, x_BI)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_experts": 4, "num_shared": 3, "num_adaptive": 2}, "num_shared 3, num_group 0 and num_adaptive 2"),
        ({"num_shared": 0, "num_adaptive": 0}, "expected all ≥ 0, one to choose at least"),
        ({"num_shared": -1}, "expected all ≥ 0"),
        ({"num_shared": 2, "num_adaptive": 0, "shared_experts": "always_on"}, "one to choose at least"),
        ({"num_shared": 1, "group_pools": "own"}, "num_shared: 1, expected 0 where groups have their own pools"),
        ({"group_pools": "mine"}, "group_pools: 'mine', expected one of \\['common', 'own'\\]"),
        ({"routers": "group"}, "num_adaptive: 1, expected 0 with routers per group"),
        ({"router_maps": "per_task"}, "expected a router_rank with it"),
        ({"router_norm": "batched"}, "router_norm: 'batched', expected one of"),
        ({"router_scale": 0.0}, "router_scale: 0.0, expected more than 0"),
        ({"router_input": "both", "encoder_dims": ()}, "expected encoder_dims with it"),
        ({"expert_norm": "batch"}, "expert_norm: 'batch', expected one of \\['layer', 'rms', 'none'\\]"),
        ({"trunk_dims": (32,)}, "trunk_dims: \\[32\\], expected the last to be that of expert_dims \\(64\\)"),
        ({"groups": {"a": ("x", "y"), "b": ("x",)}}, "smes.groups: .* no task twice"),
        ({"form": "papers"}, "form: 'papers', expected 'paper' or none"),
        ({"form": "paper", "experts": "residual"}, "experts: 'residual', expected 'full' in the paper's form"),
        ({"form": "paper", "encoder_dims": ()}, "expected an encoder in the paper's form"),
        ({"expert_dims": (12,)}, "multiples of 8"),
        ({"encoder_dims": (4,)}, "no or more positive multiples of 8"),
        ({"expert_dims": ()}, "one or more positive multiples of 8"),
        ({"experts": "tiny"}, "expected one of \\['full', 'low_rank', 'residual'"),
        ({"balance": -1.0}, "balance"),
        ({"balance_loss": "local"}, "balance_loss: 'local', expected one of \\['global', 'per_gate'"),
        ({"router_input": "none"}, "router_input: 'none', expected one of \\['encoder', 'raw', 'both'\\]"),
        ({"num_shared": 2, "num_adaptive": 2, "max_active": 3}, "max_active: 3, expected none or at least"),
        ({"experts": "residual", "expert_dims": (16, 8)}, "expected one layer for residual"),
        ({"expert_rank": 4}, "expert_rank: 4, expected a positive multiple of 8"),
        ({"expert_narrow_dim": 0}, "expert_narrow_dim: 0"),
    ],
)
def test_a_wrong_shape_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plain(**config)


def test_stage_one_weights_of_the_wrong_length_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 3 weights"):
        SMES(8, 3, plain(stage_one_weights=(0.5, 0.5)))


@pytest.mark.parametrize(
    ("config", "key", "implemented"),
    [
        (SmesConfig, "balance_loss", list(BALANCE_LOSSES)),
        (SmesConfig, "expert_norm", list(EXPERT_NORMS)),
        (HomeConfig, "norm", sorted(NORMS)),
    ],
)
def test_the_configuration_names_what_is_implemented(
    config: Callable[..., object], key: str, implemented: list[str]
) -> None:
    """It cannot look it up: the implementations are in modules that import torch."""
    with pytest.raises(ValueError, match=re.escape(f"expected one of {implemented}")):
        config(**{key: "unheard of"})
