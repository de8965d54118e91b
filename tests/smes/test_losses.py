"""Losses, scores and base rates compared with the documented formulas in NumPy."""

import numpy as np
import pytest
import torch

from smes.model.task_heads import TaskHeads
from smes.model.task_outputs import TaskOutputs
from smes.schema import Schema, Task

_SCHEMA = Schema(
    "tasks",
    tasks=(Task("click", loss_weight=2.0), Task("watch", kind="regression", max_value=100.0), Task("like")),
)


def _batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits_BT = torch.randn(8, 3, generator=generator) * 2
    labels_BT = torch.tensor([[1.0, 50.0, 0.0], [0.0, 0.5, 1.0]]).repeat(4, 1)
    mask_BT = torch.rand(8, 3, generator=generator) < 0.7
    return logits_BT, labels_BT, mask_BT, torch.rand(8, generator=generator) + 0.1


def test_the_loss_equals_the_formula() -> None:
    logits_BT, labels_BT, mask_BT, weight_B = _batch()

    total = TaskOutputs(_SCHEMA).loss(logits_BT, labels_BT, mask_BT, weight_B)

    z, y, m, w = (a.double().numpy() for a in (logits_BT, labels_BT, mask_BT, weight_B))
    p = 1 / (1 + np.exp(-z))
    loss = -(y * np.log(p) + (1 - y) * np.log(1 - p))
    d = np.abs(z[:, 1] - np.log1p(y[:, 1]))
    loss[:, 1] = np.where(d < 1, d**2 / 2, d - 0.5)
    sums = (loss * m * w[:, None]).sum(0)
    assert total.item() == pytest.approx((sums * [2.0, 1.0, 1.0]).sum() / w.sum(), rel=1e-5)


def test_residuals_equal_the_formulas() -> None:
    logits_BT, labels_BT, mask_BT, weight_B = _batch()
    spoiled_BT = torch.where(mask_BT, labels_BT, float("nan"))
    z, y, m, w = (a.double().numpy() for a in (logits_BT, labels_BT, mask_BT, weight_B))
    expected = y - 1 / (1 + np.exp(-z))
    expected[:, 1] = np.log1p(y[:, 1]) - z[:, 1]
    got = TaskOutputs(_SCHEMA).residuals(logits_BT, spoiled_BT, mask_BT, weight_B)
    np.testing.assert_allclose(got.numpy(), expected * m * w[:, None], rtol=1e-5, atol=1e-6)


def test_masked_cells_and_weightless_rows_add_nothing_whatever_they_hold() -> None:
    logits_BT, labels_BT, mask_BT, weight_B = _batch()
    mask_BT[:, 2] = False
    weight_B[3] = 0
    logits_BT.requires_grad_()
    outputs = TaskOutputs(_SCHEMA)
    spoiled = torch.where(mask_BT, labels_BT, float("nan"))

    total = outputs.loss(logits_BT, labels_BT, mask_BT, weight_B)
    again = outputs.loss(logits_BT, spoiled, mask_BT, weight_B)

    (gradient,) = torch.autograd.grad(total, logits_BT)
    assert (gradient[~mask_BT] == 0).all()
    assert (gradient[3] == 0).all()
    assert again.item() == total.item()
    assert torch.equal(torch.autograd.grad(again, logits_BT)[0], gradient)


def test_a_batch_without_any_label_has_loss_zero() -> None:
    logits_BT, labels_BT, mask_BT, weight_B = _batch()
    logits_BT.requires_grad_()

    total = TaskOutputs(_SCHEMA).loss(logits_BT, labels_BT, torch.zeros_like(mask_BT), weight_B)

    assert total.item() == 0
    assert (torch.autograd.grad(total, logits_BT)[0] == 0).all()


def test_scores_are_probabilities_and_values_in_the_labels_unit() -> None:
    logits_BT = torch.tensor([[0.0, np.log(31.0), -2.0], [1.0, 99.0, 0.0], [1.0, -3.0, 0.0]], dtype=torch.float32)
    scores = TaskOutputs(_SCHEMA).scores(logits_BT)
    assert scores[:, 1].tolist() == pytest.approx([30.0, 100.0, 0.0])
    assert scores[:, 0].tolist() == pytest.approx([0.5, 1 / (1 + np.exp(-1)), 1 / (1 + np.exp(-1))])


def test_base_rates_are_those_of_the_labels_seen() -> None:
    outputs = TaskOutputs(_SCHEMA)
    assert outputs.base_logits().tolist() == [0, 0, 0]
    labels_BT = torch.zeros(1000, 3)
    labels_BT[:10, 0], labels_BT[:, 1] = 1, 9.0
    mask_BT = torch.ones(1000, 3, dtype=torch.bool)
    mask_BT[:, 2] = False
    outputs.observe(labels_BT, mask_BT, torch.ones(1000))
    rate = 10.5 / 1001
    assert outputs.base_logits().tolist() == pytest.approx([np.log(rate / (1 - rate)), np.log(10.0), 0.0])


@pytest.mark.parametrize("hidden", [0, 5])
def test_heads_equal_a_loop_over_tasks(hidden: int) -> None:
    torch.manual_seed(0)
    heads = TaskHeads(3, 4, hidden)
    h_BTH = torch.randn(6, 3, 4)
    got = heads(h_BTH)
    for t in range(3):
        x = h_BTH[:, t]
        if heads.hidden is not None:
            x = torch.nn.functional.silu(x @ heads.hidden[t])
        torch.testing.assert_close(got[:, t], x @ heads.out[t] + heads.out_bias[t])
