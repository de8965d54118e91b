"""Routing against what the paper's text demands of it. Letters as in smes.rankers.sparse.routing."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smes.rankers.sparse.config import RouterConfig
from smes.rankers.sparse.kernels import best
from smes.rankers.sparse.packing import dispatch
from smes.rankers.sparse.router import Router
from smes.rankers.sparse.routing import expert_load, route


@st.composite
def _shapes(draw: st.DrawFn) -> tuple[int, int, int, int, int]:
    E = draw(st.integers(1, 24))
    k = draw(st.integers(1, E))
    shared = draw(st.integers(0, k))
    return draw(st.integers(1, 9)), draw(st.integers(1, 6)), E, shared, k - shared


def _z(B: int, R: int, E: int, levels: int, seed: int) -> Tensor:
    """Router logits; few levels make many ties, one makes them all equal."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, levels, (B, R, E), generator=generator).float() / 2


def _mean(R: int) -> Tensor:
    return torch.full((R,), 1 / R)


@settings(max_examples=150, deadline=None)
@given(_shapes(), st.sampled_from([1, 2, 5, 10_000]), st.integers(0, 2**31))
def test_each_task_has_exactly_its_k_experts_and_they_are_the_best(
    shape: tuple[int, int, int, int, int], levels: int, seed: int
) -> None:
    B, R, E, shared, adaptive = shape
    z_BRE = _z(B, R, E, levels, seed)
    routing = route(z_BRE, _mean(R), shared, adaptive)
    assert routing.experts_BRK.shape == (B, R, shared + adaptive)
    torch.testing.assert_close(routing.weights_BRK.sum(-1), torch.ones(B, R))
    demand_BE = routing.probs_BRL.mean(dim=1)
    active_B = dispatch(routing, trim=True).active_B.tolist()
    for b in range(B):
        shared_set = set(routing.experts_BRK[b, 0, :shared].tolist())
        assert len(shared_set) == shared
        _assert_top(demand_BE[b], shared_set, excluded=set())
        union = set()
        for r in range(R):
            chosen = routing.experts_BRK[b, r].tolist()
            assert set(chosen[:shared]) == shared_set, "stage I is the same for all tasks"
            assert len(set(chosen)) == shared + adaptive, "S and A_t are disjoint, no expert twice"
            _assert_top(z_BRE[b, r], set(chosen[shared:]), excluded=shared_set)
            union |= set(chosen)
        assert len(union) <= min(shared + R * adaptive, E)
        assert active_B[b] == len(union)


def _assert_top(score_E: Tensor, chosen: set[int], excluded: set[int]) -> None:
    others = [float(s) for e, s in enumerate(score_E) if e not in chosen | excluded]
    if chosen and others:
        assert min(float(score_E[e]) for e in chosen) >= max(others) - 1e-6


def test_stage_one_follows_the_task_weights() -> None:
    z_BRE = torch.tensor([[[5.0, 0.0, 0.0], [0.0, 5.0, 0.0]]])
    assert route(z_BRE, torch.tensor([0.9, 0.1]), 1, 0).experts_BRK[0, 0].tolist() == [0]
    assert route(z_BRE, torch.tensor([0.1, 0.9]), 1, 0).experts_BRK[0, 0].tolist() == [1]


def test_selection_passes_no_gradient_but_weights_do() -> None:
    z_BRE = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    routing = route(z_BRE, _mean(3), 1, 2)
    routing.weights_BRK[..., 0].sum().backward()  # type: ignore[no-untyped-call]  # torch ships no type for it
    assert z_BRE.grad is not None
    selected = torch.zeros(4, 3, 8, dtype=torch.bool).scatter_(2, routing.experts_BRK, True)
    assert (z_BRE.grad[~selected] == 0).all()
    assert (z_BRE.grad[selected] != 0).all()


@settings(max_examples=50, deadline=None)
@given(_shapes(), st.integers(0, 2**31))
def test_expert_load_counts(shape: tuple[int, int, int, int, int], seed: int) -> None:
    B, R, E, shared, adaptive = shape
    experts_BRK = route(_z(B, R, E, 1000, seed), _mean(R), shared, adaptive).experts_BRK
    expected = [[sum(e in experts_BRK[b, r].tolist() for b in range(B)) for e in range(E)] for r in range(R)]
    assert expert_load(experts_BRK, E).tolist() == expected


def test_a_low_rank_router_is_the_product_of_its_maps() -> None:
    torch.manual_seed(0)
    router = Router(5, 16, 3, 8, RouterConfig(input="encoder", rank=4, maps="shared", norm="none"))
    assert sum(p.numel() for p in router.parameters()) == 16 * 4 + 4 * 24
    h_BD = torch.randn(5, 16)
    down, up = (p for p in router.parameters())
    torch.testing.assert_close(router(torch.randn(5, 5), h_BD), (h_BD @ down.t() @ up.t()).view(5, 3, 8))


@settings(max_examples=150, deadline=None)
@given(st.data(), _shapes(), st.sampled_from([1, 2, 5, 10_000]), st.integers(0, 2**31))
def test_a_budget_bounds_the_union_whatever_the_number_of_tasks(
    data: st.DataObject, shape: tuple[int, int, int, int, int], levels: int, seed: int
) -> None:
    B, R, E, shared, adaptive = shape
    budget = data.draw(st.integers(shared + adaptive, E + 2))
    z_BRE = _z(B, R, E, levels, seed)
    free, routing = route(z_BRE, _mean(R), shared, adaptive), route(z_BRE, _mean(R), shared, adaptive, budget)
    torch.testing.assert_close(routing.weights_BRK.sum(-1), torch.ones(B, R))
    assert torch.equal(routing.experts_BRK[..., :shared], free.experts_BRK[..., :shared]), "stage I is as without one"
    if budget >= shared + R * adaptive:
        assert torch.equal(routing.experts_BRK, free.experts_BRK), "a budget that cannot bind changes nothing"
    active_B = dispatch(routing, trim=False).active_B.tolist()
    assert routing.bound == min(shared + R * adaptive, E, budget)
    for b in range(B):
        per_task = [set(routing.experts_BRK[b, r].tolist()) for r in range(R)]
        assert [len(chosen) for chosen in per_task] == [shared + adaptive] * R, "every task has its K, none twice"
        union = set.union(*per_task)
        assert len(union) == active_B[b] <= budget
        common = set(routing.experts_BRK[b, 0, :shared].tolist())
        for r, chosen in enumerate(per_task):
            # Whatever else was executed for other tasks was open to this one too: it took the best of it.
            _assert_top(z_BRE[b, r], chosen - common, excluded=common | (set(range(E)) - union))


def test_the_pool_of_a_budget_has_what_some_task_wants_most() -> None:
    B, R, E, shared, adaptive, budget = 20, 5, 12, 2, 2, 5
    z_BRE = torch.randn(B, R, E, generator=torch.Generator().manual_seed(3))  # no ties
    routing = route(z_BRE, _mean(R), shared, adaptive, budget)
    p_BRE = z_BRE.exp() / z_BRE.exp().sum(-1, keepdim=True)
    for b in range(B):
        common = routing.experts_BRK[b, 0, :shared].tolist()
        rest = [e for e in range(E) if e not in common]
        pool = sorted(rest, key=lambda e: -max(float(p_BRE[b, r, e]) for r in range(R)))[: budget - shared]
        for r in range(R):
            expected = sorted(pool, key=lambda e: -float(z_BRE[b, r, e]))[:adaptive]
            assert routing.experts_BRK[b, r, shared:].tolist() == expected


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.sampled_from([2, 10_000]), st.integers(0, 2**31))
def test_the_compiled_loop_chooses_as_a_stable_sort_does(columns: int, count: int, levels: int, seed: int) -> None:
    """Ties go to the first, NaN comes before all, and every row gets so many different places."""
    values = _z(6, 2, columns, levels, seed)
    values[torch.rand(values.shape, generator=torch.Generator().manual_seed(seed)) < 0.2] = float("-inf")
    values[0, 0, 0], count = float("nan"), min(count, columns)
    ordered = torch.where(values.isnan(), float("inf"), values).sort(dim=-1, descending=True, stable=True).indices
    assert torch.equal(best(values, count), ordered[..., :count])
