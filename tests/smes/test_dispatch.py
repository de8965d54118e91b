"""The plan of the grouped execution, against sets and loops. Letters as in smes.rankers.sparse.packing."""

from dataclasses import replace
from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smes.rankers.sparse.packing import combine, dispatch, neutralise, pack
from smes.rankers.sparse.routing import Selection, route
from smes.rankers.sparse.stages import Stages

_SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 6), st.integers(1, 20), st.integers(0, 3), st.integers(0, 3))


@settings(max_examples=120, deadline=None)
@given(_SHAPES, st.booleans(), st.sampled_from([1, 3, 1000]), st.integers(0, 2**31))
def test_every_pair_is_executed_once_and_found_again(
    shape: tuple[int, int, int, int, int], trim: bool, levels: int, seed: int
) -> None:
    B, R, E, shared, adaptive = shape
    shared = min(shared, E)
    adaptive = max(min(adaptive, E - shared), 0 if shared else 1)
    generator = torch.Generator().manual_seed(seed)
    z_BRE = torch.randint(0, levels, (B, R, E), generator=generator).float()
    routing = route(z_BRE, torch.full((R,), 1 / R), shared, adaptive)
    plan = dispatch(routing, trim=trim)
    wanted = {(b, e) for b in range(B) for e in set(routing.experts_BRK[b].flatten().tolist())}
    starts = [0, *plan.offsets_E.tolist()]
    executed = [
        (int(plan.instance_P[p]), e) for e, (start, end) in enumerate(pairwise(starts)) for p in range(start, end)
    ]
    assert len(executed) == len(set(executed)) == starts[-1]
    assert set(executed) == wanted
    assert len(plan.instance_P) == (len(wanted) if trim else B * min(shared + R * adaptive, E))
    if plan.used_P is not None:
        assert plan.used_P.tolist() == [p < len(wanted) for p in range(len(plan.instance_P))]
    rows_BRK = plan.row_BU.gather(1, plan.slot_BRK.view(B, -1)).view_as(routing.experts_BRK)
    for b in range(B):
        for r in range(R):
            for k, e in enumerate(routing.experts_BRK[b, r].tolist()):
                assert executed[int(rows_BRK[b, r, k])] == (b, e)


def test_rubbish_in_unused_rows_reaches_neither_values_nor_gradients() -> None:
    B, R, E, H = 6, 3, 12, 8
    generator = torch.Generator().manual_seed(1)
    z_BRE = torch.zeros(B, R, E)  # all tasks choose the same experts, so that most rows are unused
    routing = route(z_BRE, torch.full((R,), 1 / R), 1, 2)
    h_BD = torch.randn(B, H, generator=generator)
    results = []
    for trim in (True, False):
        plan = dispatch(routing, trim=trim)
        x_BD = h_BD.clone().requires_grad_()
        y_PH = _Rubbish.apply(  # type: ignore[no-untyped-call]  # torch ships no type for it
            pack(x_BD, plan), int(plan.offsets_E[-1])
        )
        out_BRH = combine(neutralise(y_PH, plan).tanh(), routing.weights_BRK, plan)
        out_BRH.square().sum().backward()  # type: ignore[no-untyped-call]  # torch ships no type for it
        results.append((out_BRH.detach(), x_BD.grad))
    torch.testing.assert_close(results[1], results[0])


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(1, 6), st.integers(1, 6)),
    st.sampled_from([2, 1000]),
    st.integers(0, 2**31),
)
def test_where_no_expert_is_chosen_twice_values_and_gradients_are_the_same(
    shape: tuple[int, int, int, int], levels: int, seed: int
) -> None:
    B, R, K, more = shape
    generator = torch.Generator().manual_seed(seed)
    stages = Stages(num_experts=R * (K + more), group_R=tuple(range(R)), num_group=K, own_pools=True)
    z_BRL = torch.randint(0, levels, (B, R, K + more), generator=generator).float()
    routing = Selection(stages, torch.full((R,), 1 / R))(z_BRL)
    assert routing.disjoint
    x_BD, scale_E = torch.randn(B, 3, generator=generator), torch.randn(stages.num_experts, generator=generator)
    goal_BRH = torch.randn(B, R, 3, generator=generator)
    results = []
    for disjoint in (True, False):
        plan = dispatch(replace(routing, disjoint=disjoint), trim=True)
        leaves = x_BD.clone().requires_grad_(), routing.weights_BRK.clone().requires_grad_()
        expert_P = torch.searchsorted(plan.offsets_E, torch.arange(len(plan.instance_P)), right=True)
        y_PH = (pack(leaves[0], plan) * scale_E[expert_P].unsqueeze(1)).tanh()
        out_BRH = combine(y_PH, leaves[1], plan)
        (out_BRH * goal_BRH).sum().backward()  # type: ignore[no-untyped-call]  # torch ships no type for it
        results.append((plan.instance_P, plan.offsets_E, plan.active_B, out_BRH.detach(), *(x.grad for x in leaves)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


class _Rubbish(torch.autograd.Function):
    """The identity on used rows; NaN elsewhere, forward and backward, as a grouped GEMM on a GPU may leave there."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: torch.Tensor, used: int) -> torch.Tensor:
        ctx.used = used  # type: ignore[attr-defined]  # autograd's way to carry values to backward
        return _spoiled(x, used)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _spoiled(gradient, ctx.used), None  # type: ignore[attr-defined]  # set in forward


def _spoiled(x: torch.Tensor, used: int) -> torch.Tensor:
    x = x.clone()
    x[used:] = float("nan")
    return x
