"""One gradient for the two ways in which router logits learn: through the experts chosen, and through the mean softmax.

Letters: B instances, T routers, C columns of a router's logits, L of them under the softmax (the last ones), K chosen.

Left to autograd, the two ways meet as five tensors of the size of the logits (an expanded gradient, the softmax's, the
gather's zeros, their sum), and at E = 256 writing those costs more than the experts. Here it is one.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def mean_and_chosen(z_BTC: Tensor, probs_BTL: Tensor, columns_BTK: Tensor) -> tuple[Tensor, Tensor]:
    """(mean of the softmax over the instances, [T, L]; the logits chosen, [B, T, K]); both pass a gradient on.

    Args:
        z_BTC: Logits.
        probs_BTL: Softmax of their last L columns; taken as given, no gradient.
        columns_BTK: int64, which logits are chosen, no column twice.
    """
    mean_TL, chosen_BTK = _MeanAndChosen.apply(z_BTC, probs_BTL, columns_BTK)  # type: ignore[no-untyped-call]  # torch has no type
    return mean_TL, chosen_BTK


class _MeanAndChosen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z_BTC: Tensor, probs_BTL: Tensor, columns_BTK: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(probs_BTL, columns_BTK)
        ctx.fixed = z_BTC.shape[2] - probs_BTL.shape[2]
        return probs_BTL.mean(dim=0), z_BTC.gather(-1, columns_BTK)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        of_mean_TL, of_chosen_BTK = gradients
        probs_BTL, columns_BTK = ctx.saved_tensors
        # d mean / d z = p ⊙ (g − ⟨p, g⟩) / B
        gradient = probs_BTL * (of_mean_TL / len(probs_BTL))
        gradient.addcmul_(probs_BTL, gradient.sum(dim=-1, keepdim=True), value=-1)
        if ctx.fixed:
            gradient = F.pad(gradient, (ctx.fixed, 0))
        return gradient.scatter_add_(2, columns_BTK, of_chosen_BTK), None, None
