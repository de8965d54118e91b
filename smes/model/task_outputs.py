"""From the tasks' logits to scores and to the loss; the base rates that are counted beside them.

Letters: B instances, T tasks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from smes.arrays import F32, Bool
from smes.joint_batch import JointBatch
from smes.model.borrowing import LabelRegression
from smes.model.config import RareTasksConfig
from smes.model.delayed_feedback import DelayedWeights
from smes.model.task_kernels import cells_of_labels, loss_and_gradient, rates_of_tasks
from smes.rankers.kept import Keeping
from smes.rankers.kernels import on_host
from smes.rankers.ranker import RunningMoments
from smes.schema import Schema
from smes.world import ALONE, World


@dataclass(frozen=True, slots=True)
class TaskRates:
    """What follows from the tasks' running mean labels; float32 [T] each.

    Attributes:
        base_T: Base rate as a logit (:meth:`TaskOutputs.base_logits`).
        factor_T: Of the gradient on its way into the ranker (:meth:`TaskOutputs.gradient_factors`).
        trust_T: Factor of the linear part (:meth:`TaskOutputs.trust`).
    """

    base_T: Tensor
    factor_T: Tensor
    trust_T: Tensor


class TaskOutputs(Keeping):
    """From logits to scores and to the loss, by kind of task; and the base rate of every task.

    - Binary task: the score is the probability ``sigmoid(logit)``; the loss is binary cross-entropy.
    - Regression task: the score is ``expm1(logit)``, clipped to 0 … ``max_value``; the loss is the Huber loss (δ = 1)
      of the logit against ``log1p(label)``. Watch times differ by orders of magnitude, and a few long ones must not
      dominate the gradient.

    The base rate is the running mean label, as a logit. The model adds it to every logit of the task. It is counted and
    not learned: otherwise a task with one positive in a thousand would spend its first thousand steps on learning it.

    Args:
        schema: Its tasks.
        rare: How tasks with few positives learn; None for the default.
    """

    is_binary_T: Tensor
    loss_weight_T: Tensor
    max_logit_T: Tensor

    def __init__(self, schema: Schema, rare: RareTasksConfig | None = None) -> None:
        super().__init__()
        tasks = schema.tasks
        self.register_buffer("is_binary_T", torch.tensor([t.kind == "binary" for t in tasks]), persistent=False)
        self.register_buffer("loss_weight_T", torch.tensor([t.loss_weight for t in tasks]), persistent=False)
        self._all_binary = all(t.kind == "binary" for t in tasks)
        max_logit = [math.log1p(t.max_value) for t in tasks]
        self.register_buffer("max_logit_T", torch.tensor(max_logit), persistent=False)
        self.labels = RunningMoments(len(tasks))
        self.rare = rare = rare or RareTasksConfig()
        self.borrowing = LabelRegression(len(tasks), rare.borrow_ratio) if rare.borrow_ratio else None

    def base_logits(self) -> Tensor:
        """Base rate of every task as a logit; 0 for a task without any label so far. float32 [T]."""
        seen_T = self.labels.count_C
        # Half a positive and half a negative are added. Otherwise a rare task's first batch would give an infinity.
        rate_T = (self.labels.mean_C * seen_T + 0.5) / (seen_T + 1.0)
        return torch.where(self.is_binary_T, torch.logit(rate_T, eps=1e-9), self.labels.mean_C).float()

    def with_borrowed(self, logits_BT: Tensor, base_T: Tensor) -> Tensor:
        """Add what tasks borrow from denser ones to logits with base rates. float32 [B, T]."""
        if self.borrowing is None:
            return logits_BT
        return self.borrowing.add_to(logits_BT, base_T)

    def rates(self) -> TaskRates:
        """Base rates, gradient factors and trust, as they are now."""
        return self.kept("rates", (self.labels.count_C, self.labels.mean_C), self._rates)

    def _rates(self) -> TaskRates:
        count_T, mean_T = self.labels.count_C, self.labels.mean_C
        if not on_host(mean_T):
            return TaskRates(self.base_logits(), self.gradient_factors(), self.trust())
        rates = TaskRates(*torch.empty(3, len(mean_T)).unbind())
        rates_of_tasks(
            count_T.numpy(),
            mean_T.numpy(),
            self.is_binary_T.numpy(),
            self.rare.gradient_power,
            self.rare.gradient_limit,
            self.rare.linear_prior,
            rates.base_T.numpy(),
            rates.factor_T.numpy(),
            rates.trust_T.numpy(),
        )
        return rates

    def gradient_factors(self) -> Tensor:
        """``(0.25 / (p (1 - p)))^α`` of each binary task, limited; 1 for regression. float32 [T]."""
        seen_T = self.labels.count_C
        rate_T = (self.labels.mean_C * seen_T + 1.0) / (seen_T + 4.0)  # one positive and three negatives are added
        factor_T = (0.25 / (rate_T * (1 - rate_T)).clamp(min=1e-9)).pow(self.rare.gradient_power)
        return torch.where(self.is_binary_T, factor_T.clamp(max=self.rare.gradient_limit), 1.0).float()

    def trust(self) -> Tensor:
        """``(n + 1) / (n + 1 + c)``, n the labels of a task's rarer kind so far; 1 for regression. float32 [T]."""
        rarer_T = self.labels.count_C * torch.minimum(self.labels.mean_C, 1 - self.labels.mean_C) + 1.0
        return torch.where(self.is_binary_T, rarer_T / (rarer_T + self.rare.linear_prior), 1.0).float()

    def scores(self, logits_BT: Tensor) -> Tensor:
        """Probabilities of binary tasks, values in the label's unit of regression tasks. [B, T] → float32 [B, T]."""
        if self._all_binary:
            return logits_BT.sigmoid()
        values_BT = torch.minimum(logits_BT.clamp(min=0.0), self.max_logit_T).expm1()
        return torch.where(self.is_binary_T, logits_BT.sigmoid(), values_BT)

    def loss(
        self,
        logits_BT: Tensor,
        labels_BT: Tensor,
        mask_BT: Tensor,
        weight_B: Tensor,
        delayed: DelayedWeights | None = None,
        divisor: float | None = None,
    ) -> Tensor:
        """The loss over all tasks, a scalar: ``Σ_t λ_t Σ_b w_b m_bt l_bt / Σ_b w_b``.

        λ are the tasks' loss weights, w the sample weights and m the mask. The divisor does not depend on the mask, so
        every label counts the same, however many labels the batch has. A task without labels adds 0.

        Args:
            logits_BT: float32, base rates included.
            labels_BT: float32, any value where masked.
            mask_BT: bool, true where there is a label.
            weight_B: Sample weights ≥ 0.
            delayed: Weights of the labels where some feedback is still to come; they multiply m.
            divisor: Instead of ``Σ_b w_b``: the sum over the whole batch, where this is a rank's part of it.
        """
        if on_host(logits_BT) and logits_BT.dtype == torch.float32:
            loss: Tensor = _Loss.apply(  # type: ignore[no-untyped-call]  # torch has no type
                logits_BT, labels_BT, mask_BT, weight_B, delayed, self.is_binary_T, self.loss_weight_T, divisor
            )
            return loss
        sum_T = self.losses(logits_BT, labels_BT, mask_BT, weight_B, delayed).sum(dim=0)
        total = weight_B.sum().clamp(min=1e-12) if divisor is None else max(divisor, 1e-12)
        return torch.dot(sum_T, self.loss_weight_T) / total

    def losses(
        self,
        logits_BT: Tensor,
        labels_BT: Tensor,
        mask_BT: Tensor,
        weight_B: Tensor,
        delayed: DelayedWeights | None = None,
    ) -> Tensor:
        """``w_b m_bt l_bt`` of :meth:`loss`. float32 [B, T], or [K, B, T] for K times as many logits."""
        target_BT = self._targets(labels_BT, mask_BT).expand_as(logits_BT)
        cross_entropy_BT = F.binary_cross_entropy_with_logits(logits_BT, target_BT, reduction="none")
        huber_BT = F.huber_loss(logits_BT, target_BT, reduction="none")
        return torch.where(self.is_binary_T, cross_entropy_BT, huber_BT) * _cell_weights(mask_BT, weight_B, delayed)

    def residuals(
        self,
        logits_BT: Tensor,
        labels_BT: Tensor,
        mask_BT: Tensor,
        weight_B: Tensor,
        delayed: DelayedWeights | None = None,
    ) -> Tensor:
        """Label minus prediction, times the sample weight; 0 where there is no label. float32 [B, T].

        For a regression task, label and prediction are ``log1p`` of the values.
        """
        target_BT = self._targets(labels_BT, mask_BT)
        predicted_BT = torch.where(self.is_binary_T, logits_BT.sigmoid(), logits_BT)
        return (target_BT - predicted_BT) * _cell_weights(mask_BT, weight_B, delayed)

    def observe(
        self, labels_BT: Tensor, mask_BT: Tensor, weight_B: Tensor, delayed: DelayedWeights | None = None
    ) -> None:
        """Update the base rates with a batch. Call it after the batch was scored.

        With ``delayed`` labels, what tasks borrow stays as it is: it needs all labels of an impression together, which
        :meth:`observe_final` brings.
        """
        target_BT, weight_BT = self._cells(labels_BT, mask_BT, weight_B, None if delayed is None else delayed.mean_BT)
        self.labels.observe(target_BT, weight_BT)
        if self.borrowing is not None and delayed is None:
            self.borrowing.observe(target_BT, weight_BT, self.is_binary_T)

    def observe_final(self, labels_BT: Tensor, mask_BT: Tensor, weight_B: Tensor, world: World = ALONE) -> None:
        """Update what tasks borrow with the final labels of impressions that were trained on before they were known.

        Those of all ranks of a world; a rank may have none.
        """
        if self.borrowing is None:
            return
        cells = self._cells(labels_BT, mask_BT, weight_B, None)
        if world.size == 1:
            self.borrowing.observe(*cells, self.is_binary_T)
            return
        sums_3TT = self.borrowing.sums(*cells)
        world.sum([sums_3TT])
        self.borrowing.take_in(sums_3TT, self.is_binary_T)

    def sums(
        self,
        batch: JointBatch,
        labels_BT: Tensor,
        mask_BT: Tensor,
        weight_B: Tensor,
        delayed: DelayedWeights | None = None,
    ) -> list[Tensor]:
        """What :meth:`take_in` takes, of this rank's part of a batch; see :meth:`observe`. float64."""
        cells = self._cells(labels_BT, mask_BT, weight_B, None if delayed is None else delayed.mean_BT)
        sums = [self.labels.sums(batch, *cells)]
        if self.borrowing is not None and delayed is None:
            sums.append(self.borrowing.sums(*cells))
        return sums

    def take_in(self, sums: Sequence[Tensor]) -> None:
        """Update the base rates with the :meth:`sums` of all ranks, summed."""
        self.labels.take_in(sums[0])
        if self.borrowing is not None and len(sums) > 1:
            self.borrowing.take_in(sums[1], self.is_binary_T)

    def _cells(
        self, labels_BT: Tensor, mask_BT: Tensor, weight_B: Tensor, delayed_BT: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What base rates count of a batch: targets and their weights. float64 [B, T] each."""
        if not on_host(labels_BT):
            weight_BT = mask_BT * weight_B.unsqueeze(1)
            if delayed_BT is not None:  # a masked one may not be finite
                weight_BT = torch.where(weight_BT > 0, weight_BT * delayed_BT, 0.0)
            return self._targets(labels_BT, mask_BT).double(), weight_BT.double()
        target_BT, weight_BT = torch.empty(2, *labels_BT.shape, dtype=torch.float64).unbind()
        cells_of_labels(
            *_label_arrays(labels_BT, mask_BT, weight_B, delayed_BT, self.is_binary_T),
            target_BT.numpy(),
            weight_BT.numpy(),
        )
        return target_BT, weight_BT

    def _targets(self, labels_BT: Tensor, mask_BT: Tensor) -> Tensor:
        labels_BT = torch.where(mask_BT, labels_BT, 0.0)
        return torch.where(self.is_binary_T, labels_BT, labels_BT.clamp(min=0.0).log1p())


def _cell_weights(mask_BT: Tensor, weight_B: Tensor, delayed: DelayedWeights | None) -> Tensor:
    weight_BT = mask_BT * weight_B.unsqueeze(1)
    return weight_BT if delayed is None else weight_BT * delayed.loss_BT


def _label_arrays(
    labels_BT: Tensor, mask_BT: Tensor, weight_B: Tensor, delayed_BT: Tensor | None, is_binary_T: Tensor
) -> tuple[F32, Bool, F32, F32, Bool]:
    labels, mask, weight = labels_BT.float().contiguous(), mask_BT.contiguous(), weight_B.float().contiguous()
    delayed: F32 = _NONE if delayed_BT is None else delayed_BT.contiguous().numpy()
    return labels.numpy(), mask.numpy(), weight.numpy(), delayed, is_binary_T.numpy()


_NONE: F32 = np.zeros((0, 0), np.float32)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_BT: Tensor,
        labels_BT: Tensor,
        mask_BT: Tensor,
        weight_B: Tensor,
        delayed: DelayedWeights | None,
        is_binary_T: Tensor,
        loss_weight_T: Tensor,
        divisor: float | None,
    ) -> Tensor:
        logits_BT = logits_BT.contiguous()
        gradient_BT = torch.empty_like(logits_BT)
        loss = loss_and_gradient(
            logits_BT.numpy(),
            logits_BT.sigmoid().numpy(),
            F.softplus(logits_BT).numpy(),
            *_label_arrays(labels_BT, mask_BT, weight_B, None if delayed is None else delayed.loss_BT, is_binary_T),
            loss_weight_T.numpy(),
            -1.0 if divisor is None else divisor,
            gradient_BT.numpy(),
        )
        ctx.save_for_backward(gradient_BT)
        return logits_BT.new_tensor(loss)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.saved_tensors[0] * gradients[0], None, None, None, None, None, None, None
