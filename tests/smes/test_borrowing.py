"""Rare tasks borrow from denser ones: the counted regression, and what it does to a model's logits."""

import numpy as np
import pytest
import torch
from torch import Tensor

from smes.model.borrowing import LabelRegression
from smes.model.config import RareTasksConfig

BINARY = torch.tensor([True, True, False, True])


def labels(seed: int, size: int = 20_000) -> Tensor:
    """Two dense tasks, a regression task, and a rare task that needs the second. float32 [size, 4]."""
    rng = np.random.default_rng(seed)
    dense = rng.random((size, 2)) < [0.4, 0.1]
    rare = dense[:, 1] & (rng.random(size) < 0.05)
    return torch.tensor(np.column_stack([dense, rng.random(size) * 9, rare]), dtype=torch.float32)


def test_it_is_the_ridge_regression_on_the_labels_of_the_denser_binary_tasks() -> None:
    y = labels(0)
    regression = LabelRegression(4, ratio=3)
    for batch in torch.split(y, 1000):
        regression.observe(batch, torch.ones_like(batch), BINARY)
    covariance = np.cov(y.numpy().T.astype(np.float64), bias=True)
    ridge = covariance[:2, :2] + np.diag(0.1 * covariance.diagonal()[:2])
    expected = torch.zeros(4, 4)
    expected[3, :2] = torch.from_numpy(np.linalg.solve(ridge, covariance[:2, 3]))
    expected[1, 0] = covariance[0, 1] / (1.1 * covariance[0, 0])
    torch.testing.assert_close(regression.weight_TT, expected, rtol=1e-4, atol=1e-6)


def test_masked_labels_do_not_count() -> None:
    y = labels(1)
    mask = torch.rand(y.shape, generator=torch.Generator().manual_seed(0)) < 0.7
    kept, spoilt = LabelRegression(4, ratio=3), LabelRegression(4, ratio=3)
    kept.observe(y, mask.float(), BINARY)
    spoilt.observe(torch.where(mask, y, 1.0), mask.float(), BINARY)
    torch.testing.assert_close(kept.weight_TT, spoilt.weight_TT)
    assert kept.weight_TT[3, 1] > 0.03


def test_a_rare_task_follows_the_prediction_of_the_task_it_needs() -> None:
    y = labels(2)
    regression = LabelRegression(4, ratio=3)
    regression.observe(y, torch.ones_like(y), BINARY)
    mean = y.mean(dim=0)
    rates = mean.repeat(3, 1)
    rates[:, 1] *= torch.tensor([1.0, 2.0, 0.0])
    moved = regression(rates, mean)
    assert torch.equal(moved[0], torch.zeros(4))
    assert moved[1, 3] == pytest.approx(np.log(1 + 1 / 1.1), abs=0.03)  # twice the rate, but for the ridge
    assert moved[2, 3] == pytest.approx(np.log(1 - 1 / 1.1), abs=0.2)
    assert torch.equal(moved[:, [0, 2]], torch.zeros(3, 2))


def test_before_the_first_label_and_without_positives_nothing_is_borrowed() -> None:
    regression = LabelRegression(4, ratio=3)
    anything = torch.rand(5, 4)
    assert torch.equal(regression(anything, torch.full((4,), 0.5)), torch.zeros(5, 4))
    y = labels(3) * torch.tensor([1.0, 1.0, 1.0, 0.0])
    regression.observe(y, torch.ones_like(y), BINARY)
    assert torch.equal(regression.weight_TT[3], torch.zeros(4))


@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_a_ratio_of_at_most_one_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match=r"RareTasksConfig\.borrow_ratio: .*, expected 0, or more than 1"):
        RareTasksConfig(borrow_ratio=ratio)


def test_many_tasks_with_missing_labels_equal_a_system_solved_for_each() -> None:
    rng = np.random.default_rng(3)
    size, tasks = 4000, 24
    latent = rng.normal(size=size)
    rates = rng.permutation(np.geomspace(0.5, 0.003, tasks))
    y = (rng.normal(size=(size, tasks)) + latent[:, None] > np.quantile(rng.normal(size=9999), 1 - rates)).astype(float)
    mask = rng.random((size, tasks)) < 0.9
    weight = rng.choice([0.5, 1.0, 2.0], size=(size, 1)) * mask
    is_binary = np.arange(tasks) % 8 != 5
    y[:, ~is_binary] *= 7.0
    regression = LabelRegression(tasks, ratio=3)

    regression.observe(torch.tensor(y).float(), torch.tensor(weight).float(), torch.tensor(is_binary))

    both = weight.T @ mask
    means = (weight * y).T @ mask / both
    covariance = (weight * y).T @ (y * mask) / both - means * means.T
    positives = (weight * y).sum(axis=0)
    expected = np.zeros((tasks, tasks))
    for t in np.flatnonzero(is_binary):
        s = np.flatnonzero(is_binary & (positives >= 3 * positives[t]))
        block = covariance[np.ix_(s, s)]
        expected[t, s] = np.linalg.solve(block + np.diag(0.1 * block.diagonal() + 1e-9), covariance[s, t])
    assert (expected != 0).sum() > tasks
    np.testing.assert_allclose(regression.weight_TT.numpy(), expected, rtol=1e-4, atol=1e-7)


def test_labels_that_contradict_each_other_leave_the_regression_as_it_was() -> None:
    """Each pair of tasks is labelled on other examples: two pairs agree, the third pair never does."""
    pairs = [(0, 1, 1.0), (1, 2, 1.0), (0, 2, 0.0)]
    y, mask = torch.zeros(3 * 400, 4), torch.zeros(3 * 400, 4)
    for number, (a, b, agree) in enumerate(pairs):
        rows = slice(400 * number, 400 * number + 400)
        y[rows, a] = (torch.arange(400) % 2).float()
        y[rows, b] = y[rows, a] if agree else 1 - y[rows, a]
        mask[rows, a] = mask[rows, b] = 1.0
    y[::40, 3], mask[:, 3] = 1.0, 1.0
    regression = LabelRegression(4, ratio=3)
    regression.weight_TT[3, 0] = 0.25

    regression.observe(y, mask, torch.ones(4, dtype=torch.bool))

    assert float(regression.weight_TT[3, 0]) == 0.25
    assert int((regression.weight_TT != 0).sum()) == 1
