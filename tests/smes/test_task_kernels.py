"""The compiled loops over tasks against the same in torch's operations."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from smes.model.borrowing import LabelRegression
from smes.model.config import RareTasksConfig
from smes.model.delayed_feedback import DelayedWeights
from smes.model.task_heads import TaskHeads
from smes.model.task_outputs import TaskOutputs, TaskRates
from smes.rankers.streams import SharedStreams
from smes.schema import Schema, Task

_SCHEMA = Schema(
    "tasks",
    tasks=(Task("click", loss_weight=2.0), Task("watch", kind="regression", max_value=100.0), Task("like")),
)
_HOMES = ("smes.model.borrowing", "smes.model.task_outputs", "smes.rankers.ranker")


@contextmanager
def _without_loops() -> Iterator[None]:
    """As on a GPU."""
    patches = [patch(f"{home}.on_host", return_value=False) for home in _HOMES]
    for one in patches:
        one.start()
    yield
    for one in patches:
        one.stop()


def _streams(share_TS: Tensor, size: int, width: int, *, common: bool) -> SharedStreams:
    one = (share_TS == 1).any(dim=1).all()
    return SharedStreams(
        torch.randn(size, share_TS.shape[1], width, requires_grad=True),
        share_TS,
        share_TS.argmax(dim=1) if one else None,
        torch.randn(size, width, requires_grad=True) if common else None,
    )


@pytest.mark.parametrize("size", [1, 37])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(
    "share",
    [
        [[1, 0], [0, 1], [1, 0], [0, 1], [0, 1]],
        [[1.0], [1.0], [1.0]],
        [[0, 1], [1, 0]],
        [[0.5, 0.5, 0], [1, 0, 0], [0, 0, 1]],
    ],
)
def test_heads_of_shared_streams_are_those_of_each_tasks_representation(
    share: list[list[float]], wide: bool, size: int
) -> None:
    torch.manual_seed(len(share))
    share_TS = torch.tensor(share, dtype=torch.float32)
    shared, heads, T = _streams(share_TS, size, 13, common=wide), TaskHeads(len(share), 13, 0), len(share)
    wide_BT = torch.randn(size, T, requires_grad=True) if wide else None
    rates = TaskRates(*torch.rand(3, T).unbind())
    torch.nn.init.uniform_(heads.out_bias)

    got_BT = heads.of_streams(shared, wide_BT, rates)
    tasks_BTH = shared.for_tasks()
    tasks_BTH.register_hook(rates.factor_T.unsqueeze(1).mul)  # type: ignore[no-untyped-call]  # torch has no type
    expected_BT = heads(tasks_BTH) + rates.base_T
    if wide_BT is not None:
        expected_BT = expected_BT + wide_BT * rates.trust_T

    torch.testing.assert_close(got_BT, expected_BT, rtol=1e-5, atol=1e-5)
    of_BT = torch.randn(size, T)
    leaves = [t for t in (shared.streams_BSH, shared.common_BH, wide_BT, *heads.parameters()) if t is not None]
    for ours, theirs in zip(
        torch.autograd.grad(got_BT, leaves, of_BT), torch.autograd.grad(expected_BT, leaves, of_BT), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    of_tasks_BTH = torch.autograd.grad(heads(shared.for_tasks()), heads.out, of_BT)  # the heads' own have no factor
    torch.testing.assert_close(
        torch.autograd.grad(heads.of_streams(shared, None, rates), heads.out, of_BT), of_tasks_BTH
    )


def test_a_logit_depends_on_no_other_task_and_no_other_instance() -> None:
    """To the last bit: a schema change or a larger call moves no score of the others."""
    torch.manual_seed(0)
    heads, few = TaskHeads(3, 64, 0), TaskHeads(1, 64, 0)
    few.out.data.copy_(heads.out.data[1:2])
    shared = _streams(torch.eye(3), 29, 64, common=True)
    assert shared.common_BH is not None
    rates = TaskRates(*torch.rand(3, 3).unbind())
    alone = SharedStreams(shared.streams_BSH[7:9, 1:2], torch.ones(1, 1), None, shared.common_BH[7:9])
    one = TaskRates(rates.base_T[1:2], rates.factor_T[1:2], rates.trust_T[1:2])
    assert torch.equal(few.of_streams(alone, None, one)[:, 0], heads.of_streams(shared, None, rates)[7:9, 1])


def test_a_second_derivative_is_refused_and_not_left_out() -> None:
    logits_BT, shared = torch.randn(4, 3, requires_grad=True), _streams(torch.eye(3), 4, 8, common=False)
    heads, rates = TaskHeads(3, 8, 0), TaskRates(*torch.rand(3, 3).unbind())
    for value, leaf in (
        (TaskOutputs(_SCHEMA).loss(logits_BT, *_labels(4)).square(), logits_BT),
        (heads.of_streams(shared, None, rates).square().sum(), shared.streams_BSH),
    ):
        (slope,) = torch.autograd.grad(value, leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            slope.sum().backward()  # type: ignore[no-untyped-call]  # torch has no type


def _labels(size: int) -> tuple[Tensor, Tensor, Tensor]:
    labels_BT = torch.tensor([[1.0, 50.0, 0.0], [0.0, 0.5, 1.0], [1.0, 3.0, 1.0]]).repeat(size, 1)[:size]
    mask_BT = torch.rand(size, 3) < 0.7
    return torch.where(mask_BT, labels_BT, float("nan")), mask_BT, torch.rand(size)


@pytest.mark.parametrize("size", [1, 40])
@pytest.mark.parametrize("delayed", [False, True])
def test_the_loss_and_its_gradient_are_torchs(size: int, delayed: bool) -> None:
    torch.manual_seed(size)
    labels_BT, mask_BT, weight_B = _labels(size)
    logits_BT = (torch.randn(size, 3) * 8).requires_grad_()
    weights = DelayedWeights.of(logits_BT, labels_BT, torch.tensor([0.3, 0.0, 0.5]).expand(size, 3).contiguous())
    outputs = TaskOutputs(_SCHEMA)
    arguments = (logits_BT, labels_BT, mask_BT, weight_B, weights if delayed else None)
    ours = outputs.loss(*arguments)
    with _without_loops():
        theirs = outputs.loss(*arguments)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(3 * ours, logits_BT), torch.autograd.grad(3 * theirs, logits_BT))


def test_a_logit_that_is_no_number_makes_the_loss_none() -> None:
    labels_BT, mask_BT, weight_B = torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool), torch.ones(2)
    for t in range(3):
        for spoilt in (float("nan"), float("inf"), float("-inf")):
            logits_BT = torch.zeros(2, 3)
            logits_BT[1, t] = spoilt
            assert not TaskOutputs(_SCHEMA).loss(logits_BT, labels_BT, mask_BT, weight_B).isfinite()


def test_what_is_counted_of_labels_is_what_torch_counts() -> None:
    """Base rates, factors, what tasks borrow: after batches with masked labels, delayed ones, and rare positives."""
    schema = Schema("many", (*_SCHEMA.tasks, *(Task(f"rare{t}") for t in range(4))))
    torch.manual_seed(0)
    rate_T = torch.tensor([0.5, 1.0, 0.2, 0.05, 0.03, 0.01, 0.0])
    rare = RareTasksConfig(borrow_ratio=3.0, gradient_limit=3.0)
    ours, theirs = TaskOutputs(schema, rare), TaskOutputs(schema, rare)
    for size in (1, 300, 77, 2000):
        labels_BT = (torch.rand(size, 7) < rate_T) * torch.tensor([1.0, 40.0, 1.0, 1.0, 1.0, 1.0, 1.0])
        labels_BT[:, 3] *= labels_BT[:, 0]  # what comes with another label borrows from it
        mask_BT, weight_B = torch.rand(size, 7) < 0.8, torch.rand(size) * (torch.rand(size) < 0.9)
        late_BT = torch.full((size, 7), 0.3)
        delayed = DelayedWeights.of(torch.randn(size, 7), labels_BT, late_BT) if size == 77 else None
        ours.observe(labels_BT, mask_BT, weight_B, delayed)
        with _without_loops():
            theirs.observe(labels_BT, mask_BT, weight_B, delayed)
    ours.observe_final(labels_BT, mask_BT, weight_B)
    with _without_loops():
        theirs.observe_final(labels_BT, mask_BT, weight_B)
        rates = theirs.rates()
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, theirs.state_dict()[name], rtol=1e-5, atol=1e-7)
    for got, expected in zip(
        (ours.rates().base_T, ours.rates().factor_T, ours.rates().trust_T),
        (rates.base_T, rates.factor_T, rates.trust_T),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)
    assert ours.borrowing is not None
    assert ours.borrowing.weight_TT[3, 0] > 0.02
    logits_BT = torch.randn(50, 7) * 3
    borrowed_BT = ours.with_borrowed(logits_BT, rates.base_T)
    with _without_loops():
        torch.testing.assert_close(borrowed_BT, theirs.with_borrowed(logits_BT, rates.base_T), rtol=1e-4, atol=1e-5)
    assert (borrowed_BT - logits_BT)[:, 3].abs().max() > 0.1


def test_labels_of_other_examples_have_no_system_and_nothing_changes() -> None:
    """Each task on other examples: covariances without a Cholesky factor, in both."""
    ours, theirs = LabelRegression(2, 2.0), LabelRegression(2, 2.0)
    for regression in (ours, theirs):
        regression.count_TT.copy_(torch.tensor([[100.0, 1.0], [1.0, 100.0]]))
        regression.sum_TT.copy_(torch.tensor([[50.0, 1.0], [1.0, 10.0]]))
        regression.product_TT.copy_(torch.tensor([[50.0, 9.0], [9.0, 10.0]]))
        regression.weight_TT.fill_(0.25)
    nothing_BT = torch.zeros(1, 2)
    ours.observe(nothing_BT, nothing_BT, torch.ones(2, dtype=torch.bool))
    with _without_loops():
        theirs.observe(nothing_BT, nothing_BT, torch.ones(2, dtype=torch.bool))
    assert torch.equal(ours.weight_TT, theirs.weight_TT)
    assert (ours.weight_TT == 0.25).all()
