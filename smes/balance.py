"""Losses that spread the routers' traffic over the experts.

Letters: B instances, T tasks, E experts, K experts of one task.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from smes.routing import Routing, balance_loss


def per_gate_loss(routing: Routing, load_TE: Tensor) -> Tensor:
    """Every task's gate balanced by itself: ``(E/K) · mean_t Σ_e f̄_te p̄_te``; an even load of each gives 1.

    What SMES's global loss is set against: it forbids a task to prefer any experts over the stream.
    """
    B, _, K = routing.experts_BTK.shape
    E = routing.probs_BTE.shape[-1]
    used_TE = load_TE.to(torch.float32) / B
    return (E / K) * (used_TE * routing.probs_BTE.mean(dim=0)).sum(dim=1).mean()


def mutual_information_loss(routing: Routing, load_TE: Tensor) -> Tensor:
    """``−I(T; E) = H(E|T) − H(E)`` of the mean probabilities (Mod-Squad, arXiv 2212.08066), in nats; −log T … 0.

    All experts are used alike over all tasks together, few of them by each task.
    """
    probs_TE = routing.probs_BTE.mean(dim=0)
    return _entropy(probs_TE).mean() - _entropy(probs_TE.mean(dim=0))


def _entropy(probs: Tensor) -> Tensor:
    # A probability that underflowed to 0 has an infinite slope, and no share in the entropy.
    probs = probs.clamp(min=1e-12)
    return -(probs * probs.log()).sum(dim=-1)


BALANCE_LOSSES: dict[str, Callable[[Routing, Tensor], Tensor] | None] = {
    "global": balance_loss,
    "per_gate": per_gate_loss,
    "mutual_information": mutual_information_loss,
    "none": None,
}
"""Balance losses of (routing, its expert load) by their name in the configuration."""
