"""Experts as compiled loops against torch's operators, and what the loops are made of."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from numba import cfunc, njit
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from smes import team
from smes.rankers.sparse import expert_kernels as kernels
from smes.rankers.sparse import experts as forms
from smes.rankers.sparse.config import ExpertNorm
from smes.rankers.sparse.experts import FullExperts, LowRankExperts, ResidualExperts, mixed
from smes.rankers.sparse.host_experts import KINDS, Rows, expert_layer, mixture, runs_here
from smes.rankers.sparse.packing import Dispatch, combine, dispatch
from smes.rankers.sparse.routing import Routing, Selection, route
from smes.rankers.sparse.stages import Stages
from smes.vector_code import product, product_kernel, sigmoid, transpose

_D = 24  # no multiple of 16, the numbers of the longest vector


def _build(form: str, norm: ExpertNorm, num: int = 8) -> nn.Module:
    torch.manual_seed(0)
    built: dict[str, Callable[[], nn.Module]] = {
        "full": lambda: FullExperts(num, _D, (136, 40), norm),
        "low_rank": lambda: LowRankExperts(num, _D, 40, 8, norm),
        "residual": lambda: ResidualExperts(num, _D, 40, 16, norm),
    }
    experts = built[form]()
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)  # differences start at zero
    return experts


def _routing(instances: int, *, disjoint: bool) -> Routing:
    generator = torch.Generator().manual_seed(instances)
    if disjoint:
        stages = Stages(num_experts=8, group_R=(0, 1), num_group=3, own_pools=True)
        routing: Routing = Selection(stages, torch.ones(2) / 2)(torch.randn(instances, 2, 4, generator=generator))
        return routing
    return route(torch.randn(instances, 3, 8, generator=generator), torch.full((3,), 1 / 3), 1, 2)


def _values(experts: nn.Module, plan: Dispatch, weights_BRK: Tensor) -> list[Tensor]:
    """The combined outputs, and all gradients."""
    B = len(weights_BRK)
    h_BD = torch.randn(B, _D, generator=torch.Generator().manual_seed(1)).requires_grad_()
    weights_BRK = weights_BRK.clone().requires_grad_()
    out_BRH = mixed(experts, h_BD, weights_BRK, plan)
    goal_BRH = torch.randn(out_BRH.shape, generator=torch.Generator().manual_seed(2))
    gradients = torch.autograd.grad((out_BRH * goal_BRH).sum(), [h_BD, weights_BRK, *experts.parameters()])
    return [out_BRH.detach(), *gradients]


@contextmanager
def _operators() -> Iterator[None]:
    with patch.object(forms, "runs_here", lambda x: False):
        yield


@pytest.mark.parametrize("instances", [1, 5, 150])  # at one, most experts have no row; at 150, a row in several blocks
@pytest.mark.parametrize("disjoint", [True, False])
@pytest.mark.parametrize("norm", KINDS)
@pytest.mark.parametrize("form", forms.EXPERT_FORMS)
def test_values_and_gradients_are_those_of_the_operators(
    form: str, norm: ExpertNorm, disjoint: bool, instances: int
) -> None:
    experts, routing = _build(form, norm), _routing(instances, disjoint=disjoint)
    for trim in (True, False):
        plan = dispatch(routing, trim=trim)
        loops = _values(experts, plan, routing.weights_BRK)
        with torch.no_grad():
            h_BD = torch.randn(instances, _D, generator=torch.Generator().manual_seed(1))
            scored = mixed(experts, h_BD, routing.weights_BRK, plan)
            apart = combine(experts(h_BD, plan), routing.weights_BRK, plan)
        with _operators():
            expected = _values(experts, plan, routing.weights_BRK)
        for got, wanted in zip([*loops, scored, apart], [*expected, expected[0], expected[0]], strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=2e-5)


def test_two_threads_give_the_values_of_one_and_always_the_same_bits() -> None:
    experts, routing = _build("full", "layer"), _routing(1500, disjoint=True)
    plan = dispatch(routing, trim=True)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = _values(experts, plan, routing.weights_BRK)
        torch.set_num_threads(2)
        together = [_values(experts, plan, routing.weights_BRK) for _ in range(5)]
        with patch.object(team, "_parallel", return_value=None):  # no OpenMP
            together.append(_values(experts, plan, routing.weights_BRK))
    finally:
        torch.set_num_threads(before)
    for one, *two in zip(alone, *together, strict=True):
        torch.testing.assert_close(two[0], one, rtol=1e-4, atol=2e-5)
        assert all(torch.equal(each, two[0]) for each in two)


def test_what_is_not_finite_stays_with_its_instance() -> None:
    for form in forms.EXPERT_FORMS:
        experts, routing = _build(form, "layer"), _routing(40, disjoint=False)
        plan = dispatch(routing, trim=True)
        h_BD = torch.randn(40, _D)
        h_BD[7], h_BD[9, 3] = float("nan"), float("inf")
        with torch.no_grad():
            finite_B = mixed(experts, h_BD, routing.weights_BRK, plan).isfinite().all(dim=2).all(dim=1)
        assert (~finite_B).nonzero().flatten().tolist() == [7, 9], form


def test_gradients_that_nobody_asks_for_are_not_made() -> None:
    experts = ResidualExperts(8, _D, 40, 16)
    plan = dispatch(_routing(20, disjoint=True), trim=True)
    for asked in ("differences", "base"):
        for name, parameter in experts.named_parameters():
            parameter.requires_grad_(name == asked)
        experts(torch.randn(20, _D), plan).sum().backward()
        assert [name for name, parameter in experts.named_parameters() if parameter.grad is not None] == [asked]
        experts.zero_grad()


def test_the_operators_run_where_loops_cannot() -> None:
    x = torch.zeros(2, 8)
    assert runs_here(x)
    assert not runs_here(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert not runs_here(x)
    experts, plan = _build("full", "none"), dispatch(_routing(20, disjoint=True), trim=True)
    with _Seen() as seen:
        experts(torch.randn(20, _D), plan)
    assert torch.ops.aten._grouped_mm.default in seen.operators


class _Seen(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no type
    """What watches torch's operators, such as a count of them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no type
        self.operators: list[Any] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators.append(operator)
        return operator(*args, **(kwargs or {}))


def test_another_width_is_refused() -> None:
    plan = dispatch(_routing(3, disjoint=True), trim=True)
    with pytest.raises(ValueError, match=r"\[8, 12, 16\], expected .* multiples of 8"):
        expert_layer(torch.zeros(3, 12), torch.zeros(8, 12, 16), plan.rows, kernels.PLAIN)


def test_what_the_loops_would_read_beyond_is_refused() -> None:
    routing = _routing(3, disjoint=True)
    rows, weights_BRK = dispatch(routing, trim=True).rows, routing.weights_BRK
    x_BD, weight_EDH = torch.zeros(3, 16), torch.zeros(8, 16, 24)
    for x, weight in (
        (x_BD[:, :8], weight_EDH),
        (x_BD[:1], weight_EDH),
        (x_BD, weight_EDH[:4]),
        (x_BD, weight_EDH.bfloat16()),
        (x_BD, weight_EDH.to("meta")),
    ):
        with pytest.raises(ValueError, match=r"^(input|weight): \[.*, expected \[.*\] in float32 on the CPU$"):
            expert_layer(x, weight, rows, kernels.PLAIN)
    with pytest.raises(ValueError, match=r"^base: \[3, 16\]"):
        mixture(x_BD, weight_EDH, weights_BRK, rows, kernels.PLAIN, base_BH=x_BD)
    with pytest.raises(ValueError, match=r"^routers' weights: \[3, 2, 2\]"):
        mixture(x_BD, weight_EDH, weights_BRK[..., :2], rows, kernels.PLAIN)


def test_a_loop_without_memory_is_an_error_and_not_whatever_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    @cfunc("void(int64)")
    def loop(address):  # type: ignore[no-untyped-def]  # numba infers the types
        np.empty(address << 8, np.int8)[0] = 0

    printed: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", printed.append)
    with pytest.raises(MemoryError, match="had no room"):
        team.run(loop, [], 1)
    assert printed[0].exc_type is MemoryError, "what numba prints"


def test_a_layer_without_rows_has_zero_gradients() -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    rows = Rows(torch.zeros(4, dtype=torch.int32), nothing, nothing.view(0, 1), None, nothing)
    x, weight = torch.zeros(0, 8, requires_grad=True), torch.zeros(4, 8, 16, requires_grad=True)
    expert_layer(x, weight, rows, kernels.PLAIN).sum().backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    assert not weight.grad.any()


def test_products_of_any_shape() -> None:
    @njit
    def multiply(kernel, c, a, b, M, N, K, row, term, add):  # type: ignore[no-untyped-def]  # numba infers the types
        product(kernel, c, N, a, row, term, b, N, M, N, K, add)

    rng = np.random.default_rng(0)
    kernel = product_kernel().address
    for M in (1, 4, 7):
        for N in (8, 24, 48, 136, 200):
            for K in (0, 1, 9):
                a, b = rng.normal(size=(M, K)).astype(np.float32), rng.normal(size=(K, N)).astype(np.float32)
                before = rng.normal(size=(M + 1, N)).astype(np.float32)
                for add in (0, 1):
                    for turned in (False, True):
                        c, held = before.copy(), np.ascontiguousarray(a.T if turned else a)
                        steps = (1, M) if turned else (K, 1)
                        multiply(kernel, c.ctypes.data, held.ctypes.data, b.ctypes.data, M, N, K, *steps, add)
                        np.testing.assert_allclose(c[:M], a @ b + add * before[:M], rtol=1e-5, atol=1e-5)
                        assert (c[M] == before[M]).all(), "beyond the rows"


def test_a_matrix_is_transposed() -> None:
    @njit
    def turn(c, a, M, N):  # type: ignore[no-untyped-def]  # numba infers the types
        transpose(c, a, M, N)

    a, c = np.arange(16 * 40, dtype=np.float32).reshape(16, 40), np.empty((40, 16), np.float32)
    turn(c.ctypes.data, a.ctypes.data, 16, 40)
    assert (c == a.T).all()


def test_the_sigmoid_is_right_to_its_last_places() -> None:
    @njit
    def of_all(x, y):  # type: ignore[no-untyped-def]  # numba infers the types
        for i in range(len(x)):
            y[i] = sigmoid(x[i])

    x = np.concatenate([np.linspace(-86, 86, 100_001), [-1e4, 1e4, -np.inf, np.inf]]).astype(np.float32)
    y = np.empty_like(x)
    of_all(x, y)
    with np.errstate(over="ignore"):
        exact = 1 / (1 + np.exp(-x.astype(np.float64)))
    np.testing.assert_allclose(y[:-4], exact[:-4], rtol=4e-7)
    np.testing.assert_allclose(y[-4:], [0, 1, 0, 1], atol=1e-37)
