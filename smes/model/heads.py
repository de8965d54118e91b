"""Task losses with label masks, and the labels' base rates. Letters: B instances, T tasks, H representation width."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smes.rankers.moments import RunningMoments
from smes.schema import Schema


class TaskOutputs(nn.Module):
    """What a logit of each task means: its score, its loss and its base rate.

    - binary: probability ``sigmoid(logit)``, binary cross-entropy;
    - regression: ``expm1(logit)`` cut to 0 … ``max_value``, Huber loss (δ = 1) of the logit against ``log1p(label)``:
      watch times spread over orders of magnitude, and a few of them should not rule the gradient.

    The base rate (the running mean label, as a logit) is added to every logit. It is counted, not learned, so that a
    task with one positive in a thousand does not spend its first thousand steps on learning just that.

    Args:
        schema: Its tasks.
    """

    is_binary_T: Tensor
    loss_weight_T: Tensor
    max_logit_T: Tensor

    def __init__(self, schema: Schema) -> None:
        super().__init__()
        tasks = schema.tasks
        self.register_buffer("is_binary_T", torch.tensor([t.kind == "binary" for t in tasks]), persistent=False)
        self.register_buffer("loss_weight_T", torch.tensor([t.loss_weight for t in tasks]), persistent=False)
        max_logit = [math.log1p(t.max_value) for t in tasks]
        self.register_buffer("max_logit_T", torch.tensor(max_logit), persistent=False)
        self.labels = RunningMoments(len(tasks))

    def base_logits(self) -> Tensor:
        """float32 [T]; 0 for a task that has had no label yet."""
        seen_T = self.labels.count_C
        # Half a positive and half a negative are added, so that the first batch of a rare task gives no infinity.
        rate_T = (self.labels.mean_C * seen_T + 0.5) / (seen_T + 1.0)
        return torch.where(self.is_binary_T, torch.logit(rate_T, eps=1e-9), self.labels.mean_C).float()

    def scores(self, logits_BT: Tensor) -> Tensor:
        """Probabilities, or values in the label's unit. float32 [B, T]."""
        values_BT = torch.minimum(logits_BT.clamp(min=0.0), self.max_logit_T).expm1()
        return torch.where(self.is_binary_T, logits_BT.sigmoid(), values_BT)

    def losses(self, logits_BT: Tensor, labels_BT: Tensor, mask_BT: Tensor, weight_B: Tensor) -> tuple[Tensor, Tensor]:
        """(total loss, scalar; mean loss of each task over its labelled instances, [T], no gradient).

        The total is ``Σ_t λ_t Σ_b w_b m_bt l_bt / Σ_b w_b``: every label counts the same, whatever else is masked in
        the batch. A task without any label in the batch has loss 0.

        Args:
            logits_BT: float32, base rates included.
            labels_BT: float32; anything where masked.
            mask_BT: bool, true where there is a label.
            weight_B: Sample weights ≥ 0.
        """
        target_BT = self._targets(labels_BT, mask_BT)
        cross_entropy_BT = F.binary_cross_entropy_with_logits(logits_BT, target_BT, reduction="none")
        huber_BT = F.huber_loss(logits_BT, target_BT, reduction="none")
        weight_BT = mask_BT * weight_B.unsqueeze(1)
        sum_T = (torch.where(self.is_binary_T, cross_entropy_BT, huber_BT) * weight_BT).sum(dim=0)
        total = torch.dot(sum_T, self.loss_weight_T) / weight_B.sum().clamp(min=1e-12)
        return total, sum_T.detach() / weight_BT.sum(dim=0).clamp(min=1e-12)

    def residuals(self, logits_BT: Tensor, labels_BT: Tensor, mask_BT: Tensor, weight_B: Tensor) -> Tensor:
        """Weighted label minus prediction, for a regression both as ``log1p``; 0 where there is no label. [B, T]."""
        target_BT = self._targets(labels_BT, mask_BT)
        predicted_BT = torch.where(self.is_binary_T, logits_BT.sigmoid(), logits_BT)
        return (target_BT - predicted_BT) * (mask_BT * weight_B.unsqueeze(1))

    def observe(self, labels_BT: Tensor, mask_BT: Tensor, weight_B: Tensor) -> None:
        """Let the base rates take in a batch; after it was scored."""
        self.labels.observe(self._targets(labels_BT, mask_BT), mask_BT * weight_B.unsqueeze(1))

    def _targets(self, labels_BT: Tensor, mask_BT: Tensor) -> Tensor:
        labels_BT = torch.where(mask_BT, labels_BT, 0.0)
        return torch.where(self.is_binary_T, labels_BT, labels_BT.clamp(min=0.0).log1p())


class TaskHeads(nn.Module):
    """A small MLP per task: ``h_t → SiLU(h_t V_t + c_t) → logit``. [B, T, H] → [B, T].

    Args:
        num_tasks: T.
        input_dim: H.
        hidden_dim: Width of the hidden layer; 0 for a linear head.
    """

    def __init__(self, num_tasks: int, input_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.hidden = nn.Parameter(_uniform(num_tasks, input_dim, hidden_dim)) if hidden_dim else None
        self.hidden_bias = nn.Parameter(torch.zeros(num_tasks, 1, hidden_dim)) if hidden_dim else None
        self.out = nn.Parameter(_uniform(num_tasks, hidden_dim or input_dim, 1).squeeze(2))
        self.out_bias = nn.Parameter(torch.zeros(num_tasks))

    def forward(self, h_BTH: Tensor) -> Tensor:
        if self.hidden is not None and self.hidden_bias is not None:
            h_BTH = F.silu(torch.baddbmm(self.hidden_bias, h_BTH.transpose(0, 1), self.hidden)).transpose(0, 1)
        # Products and sums: a batch of matrix-vector products is several times slower on the CPU.
        return (h_BTH.float() * self.out).sum(dim=2) + self.out_bias


def _uniform(num_tasks: int, d_in: int, d_out: int) -> Tensor:
    bound = 1 / math.sqrt(d_in)
    return torch.empty(num_tasks, d_in, d_out).uniform_(-bound, bound)
