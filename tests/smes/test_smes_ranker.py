"""The grouped execution equals the dense-masked one, in values and in every gradient."""

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smes.model.config import RANKER_NAMES
from smes.model.rank_model import RANKERS
from smes.rankers.config import DenseNorm
from smes.rankers.dense_experts import NORMS
from smes.rankers.sparse.config import BalanceLoss, ExpertForm, ExpertNorm
from smes.rankers.sparse.experts import EXPERT_FORMS, EXPERT_NORMS
from smes.rankers.sparse.ranker import SMES
from smes.rankers.sparse.router import BALANCE_LOSSES
from smes.rankers.sparse.routing import expert_load
from tests.smes.dense_reference import dense_smes
from tests.smes.plain_smes import plain

_INPUT = 12


def _ranker(num_tasks: int, changes: Mapping[str, Any], *, seed: int = 0, trim: bool | None = None) -> SMES:
    torch.manual_seed(seed)
    shape = {"encoder_dims": (16,), "experts.dims": (16, 8), "balance.weight": 0.1, **changes}
    return SMES(_INPUT, num_tasks, plain(shape), trim=trim)


def _gradients(ranker: SMES, x_BI: Tensor, loss: Tensor) -> dict[str, Tensor]:
    names = ["x", *(n for n, _ in ranker.named_parameters())]
    gradients = torch.autograd.grad(loss, [x_BI, *ranker.parameters()], allow_unused=True)
    return {n: torch.zeros(()) if g is None else g for n, g in zip(names, gradients, strict=True)}


def _experts(ranker: SMES, x_BI: Tensor) -> Tensor:
    """Of every task."""
    return ranker.reads.choices(ranker.route(x_BI, ranker.encoder(x_BI)).experts_BRK)


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
    ranker = _ranker(
        T, {"experts.num": E, "num_shared": shared, "num_adaptive": adaptive, "router.rank": rank}, seed=seed
    )
    _assert_equal_to_dense(ranker, torch.randn(B, _INPUT, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize(("shared", "adaptive"), [(2, 2), (0, 3), (3, 0)])
def test_grouped_equals_dense_when_every_router_ties(shared: int, adaptive: int) -> None:
    ranker = _ranker(3, {"experts.num": 8, "num_shared": shared, "num_adaptive": adaptive})
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
    ranker = _ranker(
        3, {"experts.num": 8, "num_shared": 1, "num_adaptive": 2, "router.input": "raw", "router.rank": router_rank}
    )
    assert next(ranker.router.parameters()).shape[1] == _INPUT
    _assert_equal_to_dense(ranker, torch.randn(9, _INPUT, generator=torch.Generator().manual_seed(2)))


@pytest.mark.parametrize("trim", [True, False])
def test_grouped_equals_dense_within_a_budget(trim: bool) -> None:
    ranker = _ranker(6, {"experts.num": 16, "num_shared": 1, "num_adaptive": 2, "max_active": 5}, trim=trim)
    assert ranker.expert_limits is not None
    assert ranker.expert_limits.bound == 5
    x_BI = torch.randn(9, _INPUT, generator=torch.Generator().manual_seed(2))
    stats = ranker(x_BI).stats
    assert stats is not None
    assert int(stats.active_B.max()) == 5
    _assert_equal_to_dense(ranker, x_BI)


def test_the_balance_loss_is_chosen_by_its_name() -> None:
    x_BI = torch.randn(9, _INPUT, generator=torch.Generator().manual_seed(2))
    losses = {}
    for name, loss in BALANCE_LOSSES.items():
        ranker = _ranker(3, {"experts.num": 8, "balance.weight": 0.5, "balance.loss": name})
        routing = ranker.route(x_BI, ranker.encoder(x_BI))
        losses[name] = ranker(x_BI).auxiliary_loss
        traffic_RE = expert_load(routing.experts_BRK, 8) / routing.experts_BRK[:, 0].numel()
        if loss is not None:
            expected = 0.5 * loss(traffic_RE, routing.probs_BRL.mean(dim=0))
            torch.testing.assert_close(losses[name], expected, rtol=1e-6, atol=1e-6)
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
    config: dict[str, Any] = {"experts.num": E, "num_shared": shared, "num_adaptive": adaptive, "experts.dims": (16,)}
    ranker = _different(
        _ranker(T, {"experts.form": form, "experts.rank": 8, "experts.narrow_dim": 8, **config}, seed=seed)
    )
    _assert_equal_to_dense(ranker, torch.randn(B, _INPUT, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("form", ["low_rank", "residual"])
def test_at_first_every_expert_is_the_base(form: str) -> None:
    ranker = _ranker(
        3, {"experts.num": 8, "num_shared": 1, "num_adaptive": 2, "experts.form": form, "experts.dims": (16,)}
    )
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
def test_the_layout_for_gpus_gives_the_same(form: str) -> None:
    dims = (16, 8) if form == "full" else (16,)
    shape = {"experts.num": 8, "num_shared": 1, "num_adaptive": 2, "experts.form": form, "experts.dims": dims}
    ranker = _different(_ranker(4, shape, trim=False))
    x_BI = torch.randn(9, _INPUT, generator=torch.Generator().manual_seed(5))
    _assert_equal_to_dense(ranker, x_BI)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"experts.num": 4, "num_shared": 3, "num_adaptive": 2},
            r"SmesConfig\.num_shared: 3 with num_group 0 and num_adaptive 2, .* at most experts\.num \(4\)",
        ),
        ({"num_shared": 0, "num_adaptive": 0}, "expected at least one expert to choose"),
        ({"num_shared": -1}, r"SmesConfig\.num_shared: -1, expected at least 0"),
        ({"num_shared": 2, "num_adaptive": 0, "shared_experts": "always_on"}, "at least one expert to choose"),
        (
            {"num_shared": 1, "groups.pools": "own"},
            r"SmesConfig\.num_shared: 1, expected 0 where groups have their own pools",
        ),
        ({"groups.pools": "mine"}, r"GroupsConfig\.pools: 'mine', expected one of own, common"),
        ({"router.per": "group"}, r"SmesConfig\.num_adaptive: 1, expected 0 with a router per group"),
        ({"router.maps": "own"}, r"RouterConfig\.maps: 'own', expected a rank with it"),
        ({"router.norm": "batched"}, r"RouterConfig\.norm: 'batched', expected one of batch, layer, none"),
        ({"router.scale": 0.0}, r"RouterConfig\.scale: 0\.0, expected more than 0"),
        ({"router.rank": 0}, r"RouterConfig\.rank: 0, expected at least 1, or null"),
        ({"router.input": "both", "encoder_dims": ()}, r"SmesConfig\.router\.input: .* expected encoder_dims with it"),
        ({"experts.norm": "batch"}, r"ExpertsConfig\.norm: 'batch', expected one of layer, rms, none"),
        (
            {"trunk_dims": (32,)},
            r"SmesConfig\.trunk_dims: \[32\], expected the last to be that of experts\.dims \(64\)",
        ),
        ({"trunk_input": "both"}, r"SmesConfig\.trunk_input: 'both', expected one of raw, encoder"),
        ({"groups.declared": {"a": ("x", "y"), "b": ("x",)}}, r"GroupsConfig\.declared: .* no task twice"),
        ({"shared_experts": "on"}, r"SmesConfig\.shared_experts: 'on', expected one of routed, always_on"),
        ({"experts.dims": (12,)}, r"ExpertsConfig\.dims: \[12\], expected each at least 8, a multiple of 8"),
        ({"encoder_dims": (4,)}, r"SmesConfig\.encoder_dims: \[4\], expected each at least 8, a multiple of 8"),
        ({"experts.dims": ()}, r"ExpertsConfig\.dims: \[\], expected .*, 1 or more entries"),
        ({"experts.form": "tiny"}, r"ExpertsConfig\.form: 'tiny', expected one of residual, low_rank, full"),
        ({"balance.weight": -1.0}, r"BalanceConfig\.weight: -1\.0, expected at least 0"),
        ({"balance.loss": "local"}, r"BalanceConfig\.loss: 'local', expected one of global, per_gate"),
        ({"router.input": "none"}, r"RouterConfig\.input: 'none', expected one of raw, encoder, both"),
        (
            {"num_shared": 2, "num_adaptive": 2, "max_active": 3},
            r"SmesConfig\.max_active: 3, expected null or at least .* \(4\)",
        ),
        ({"experts.form": "residual", "experts.dims": (16, 8)}, "expected one layer for residual experts"),
        ({"experts.rank": 4}, r"ExpertsConfig\.rank: 4, expected at least 8, a multiple of 8"),
        ({"experts.narrow_dim": 0}, r"ExpertsConfig\.narrow_dim: 0, expected at least 8"),
    ],
)
def test_a_wrong_shape_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plain(changes)


def test_stage_one_weights_of_the_wrong_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"SmesConfig\.stage_one_weights: \[0\.5, 0\.5\], expected 3 weights"):
        SMES(8, 3, plain({"stage_one_weights": (0.5, 0.5)}))


@pytest.mark.parametrize(
    ("names", "implemented"),
    [
        (get_args(BalanceLoss), BALANCE_LOSSES),
        (get_args(ExpertForm), EXPERT_FORMS),
        (get_args(ExpertNorm), EXPERT_NORMS),
        (get_args(DenseNorm), NORMS),
        (RANKER_NAMES, RANKERS),
    ],
)
def test_the_configuration_names_what_is_implemented(names: Sequence[str], implemented: Mapping[str, object]) -> None:
    """It cannot look the names up: the implementations are in modules that import torch."""
    assert set(names) == implemented.keys()
