"""Weights of delayed labels: the expected gradient by enumeration, exact ones without delay, unbiased base rates."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from smes.model.delayed_feedback import DelayedWeights
from smes.model.task_outputs import TaskOutputs
from smes.schema import Schema, Task

SCHEMA = Schema("tasks", tasks=(Task("click"), Task("watch", kind="regression", max_value=100.0), Task("like")))
PROBABILITIES = (0.001, 0.05, 0.3, 0.7, 0.98)
SHARES = (0.0, 0.2, 0.75, 1.0)


def fates(r: float, s: float) -> list[tuple[float, list[float]]]:
    """What can become of an impression: (probability, labels of its examples in order)."""
    return [(r * (1 - s), [1.0]), (r * s, [0.0, 1.0]), (1 - r, [0.0])]


def expected_gradient(r: float, p: float, s: float) -> float:
    """Mean gradient of the weighted cross-entropy by the logit, over everything that can become of an impression."""
    total = 0.0
    for probability, labels in fates(r, s):
        for label in labels:
            logit = torch.tensor([[np.log(p / (1 - p))]], dtype=torch.float64, requires_grad=True)
            label_BT = torch.tensor([[label]], dtype=torch.float64)
            weight = DelayedWeights.of(logit, label_BT, torch.tensor([[s]])).loss_BT
            loss = F.binary_cross_entropy_with_logits(logit, label_BT, weight=weight.double())
            (gradient,) = torch.autograd.grad(loss, logit)
            total += probability * gradient.item()
    return total


@pytest.mark.parametrize("s", SHARES)
@pytest.mark.parametrize(("r", "p"), list(itertools.product(PROBABILITIES, PROBABILITIES)))
def test_the_expected_gradient_is_that_of_the_final_labels_times_the_documented_factor(
    r: float, p: float, s: float
) -> None:
    factor = (1 + p * s) * (1 - p) / (1 - p * (1 - s))

    assert expected_gradient(r, p, s) == pytest.approx(factor * (p - r), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("s", SHARES)
@pytest.mark.parametrize("r", PROBABILITIES)
def test_where_the_model_is_right_an_impression_counts_as_its_final_label_does(r: float, s: float) -> None:
    logit, shares = torch.tensor([[np.log(r / (1 - r))]]), torch.tensor([[s]])
    weights = {y: DelayedWeights.of(logit, torch.tensor([[y]]), shares) for y in (0.0, 1.0)}

    mean = {0.0: 0.0, 1.0: 0.0}
    loss = {0.0: 0.0, 1.0: 0.0}
    for probability, labels in fates(r, s):
        for label in labels:
            mean[label] += probability * weights[label].mean_BT.item()
            loss[label] += probability * weights[label].loss_BT.item()

    assert mean == pytest.approx({1.0: r, 0.0: 1 - r}, rel=1e-4)
    assert loss == pytest.approx({1.0: (1 + r * s) * r, 0.0: (1 + r * s) * (1 - r)}, rel=1e-4)


def test_fnw_has_the_weights_of_the_paper() -> None:
    p = torch.tensor([[0.1, 0.5, 0.9]])

    positive = DelayedWeights.of(p.logit(), torch.ones(1, 3), torch.ones(1, 3)).loss_BT
    negative = DelayedWeights.of(p.logit(), torch.zeros(1, 3), torch.ones(1, 3)).loss_BT

    torch.testing.assert_close(positive, 1 + p)
    torch.testing.assert_close(negative, (1 + p) * (1 - p))


def test_without_late_positives_every_weight_is_exactly_one() -> None:
    logits = torch.tensor([[-200.0, -3.0, 0.0, 3.0, 20.0, 200.0]])
    for label in (0.0, 1.0):
        weights = DelayedWeights.of(logits, torch.full((1, 6), label), torch.zeros(1, 6))
        assert (weights.loss_BT == 1).all()
        assert (weights.mean_BT == 1).all()


@pytest.mark.parametrize("s", [1e-7, 0.5, 1.0])
def test_weights_are_finite_at_every_logit_and_carry_no_gradient(s: float) -> None:
    logits = torch.tensor([[-1e4, -50.0, 0.0, 17.0, 50.0, 1e4]], requires_grad=True)
    for label in (0.0, 1.0):
        weights = DelayedWeights.of(logits, torch.full((1, 6), label), torch.full((1, 6), s))
        assert weights.loss_BT.isfinite().all()
        assert (weights.loss_BT >= 0).all()
        assert (weights.loss_BT <= 2).all()
        assert not weights.loss_BT.requires_grad


def test_the_loss_and_the_residuals_are_weighted_and_regression_is_not() -> None:
    logits_BT = torch.tensor([[0.5, 1.0, -1.0], [-2.0, 0.3, 0.7]])
    labels_BT = torch.tensor([[1.0, 3.0, 0.0], [0.0, 0.0, 1.0]])
    mask_BT, weight_B = torch.tensor([[True, True, True], [True, False, True]]), torch.tensor([1.0, 0.5])
    shares_BT = torch.tensor([[0.4, 0.0, 0.9], [0.4, 0.0, 0.9]])
    outputs = TaskOutputs(SCHEMA)
    delayed = DelayedWeights.of(logits_BT, labels_BT, shares_BT)

    losses = outputs.losses(logits_BT, labels_BT, mask_BT, weight_B, delayed)
    residuals = outputs.residuals(logits_BT, labels_BT, mask_BT, weight_B, delayed)

    p, s, y = logits_BT.double().sigmoid().numpy(), shares_BT.double().numpy(), labels_BT.numpy()
    expected = np.where(y > 0, 1 + p * s, (1 + p * s) * (1 - p) / (1 - p * (1 - s)))
    expected[:, 1] = 1
    plain = outputs.losses(logits_BT, labels_BT, mask_BT, weight_B)
    np.testing.assert_allclose(losses.numpy(), plain.numpy() * expected, rtol=1e-5)
    plain = outputs.residuals(logits_BT, labels_BT, mask_BT, weight_B)
    np.testing.assert_allclose(residuals.numpy(), plain.numpy() * expected, rtol=1e-5)


def delayed_labels(r_N: Tensor, s: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Final labels, and which of the positives come late."""
    final_N = (torch.rand(len(r_N), generator=generator) < r_N).float()
    return final_N, (final_N > 0) & (torch.rand(len(r_N), generator=generator) < s)


@pytest.mark.parametrize("s", [0.3, 1.0])
def test_the_base_rate_is_the_mean_of_the_final_labels(s: float) -> None:
    """Impressions of very different probabilities, a model that is right: examples one by one, corrections later."""
    generator = torch.Generator().manual_seed(7)
    r_N = 0.8 * torch.rand(200_000, generator=generator) ** 3
    final_N, late_N = delayed_labels(r_N, s, generator)
    outputs = TaskOutputs(Schema("one", tasks=(Task("click"),)))
    at_once_N = torch.where(late_N, 0.0, final_N)
    for rows, labels in ((torch.arange(len(r_N)), at_once_N), (late_N.nonzero().squeeze(1), final_N)):
        column = labels[rows].unsqueeze(1)
        delayed = DelayedWeights.of(r_N[rows].logit().unsqueeze(1), column, torch.full_like(column, s))
        outputs.observe(column, torch.ones_like(column, dtype=torch.bool), torch.ones(len(rows)), delayed)

    rate = outputs.base_logits().sigmoid().item()

    assert rate == pytest.approx(final_N.mean().item(), rel=0.02)  # 200,000 draws of a mean of 0.2


def test_a_masked_label_with_a_broken_prediction_does_not_enter_the_base_rate() -> None:
    outputs = TaskOutputs(Schema("one", tasks=(Task("click"),)))
    labels, shares = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.5], [0.5]])
    delayed = DelayedWeights.of(torch.tensor([[0.0], [float("nan")]]), labels, shares)

    outputs.observe(labels, torch.tensor([[True], [False]]), torch.ones(2), delayed)

    assert outputs.base_logits().isfinite().all()


def test_what_tasks_borrow_is_learned_from_final_labels_alone() -> None:
    generator = torch.Generator().manual_seed(3)
    click_N = (torch.rand(5000, generator=generator) < 0.4).float()
    like_N = click_N * (torch.rand(5000, generator=generator) < 0.1).float()
    labels_BT, mask_BT = torch.stack([click_N, torch.zeros(5000), like_N], dim=1), torch.ones(5000, 3).bool()
    whole, delayed = TaskOutputs(SCHEMA), TaskOutputs(SCHEMA)
    whole.observe(labels_BT, mask_BT, torch.ones(5000))

    nothing_yet = DelayedWeights.of(torch.zeros(5000, 3), torch.zeros(5000, 3), torch.ones(5000, 3))
    delayed.observe(torch.zeros(5000, 3), mask_BT, torch.ones(5000), nothing_yet)
    delayed.observe_final(labels_BT, mask_BT, torch.ones(5000))

    assert whole.borrowing is not None
    assert delayed.borrowing is not None
    torch.testing.assert_close(delayed.borrowing.weight_TT, whole.borrowing.weight_TT)
    assert (whole.borrowing.weight_TT != 0).any()
