"""Losses that spread the routers' traffic over the experts.

Letters: T tasks, E experts (fixed ones, which no router chooses, left out). Every loss takes, of a mini-batch:

- ``traffic_TE``: the share of a task's choices that fell on each expert; sums to 1 over E, no gradient;
- ``probs_TE``: the mean probability before selection; sums to 1 over E.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def global_loss(traffic_TE: Tensor, probs_TE: Tensor) -> Tensor:
    """Global multi-gate load balancing (SMES, arXiv 2602.09386): ``L_lb = (E/K) Σ_e f̄_e p̄_e``, a scalar.

    ``f̄_e / K`` is the traffic and ``p̄_e`` the mean probability over every task and instance. An even load gives 1
    (with own pools of unequally many tasks, somewhat more).
    """
    return traffic_TE.shape[1] * torch.dot(traffic_TE.mean(dim=0), probs_TE.mean(dim=0))


def per_gate_loss(traffic_TE: Tensor, probs_TE: Tensor) -> Tensor:
    """Every task's gate balanced by itself: ``(E/K) · mean_t Σ_e f̄_te p̄_te``; an even load of each gives 1.

    What SMES's global loss is set against: it forbids a task to prefer any experts over the stream.
    """
    return traffic_TE.shape[1] * (traffic_TE * probs_TE).sum(dim=1).mean()


def mutual_information_loss(traffic_TE: Tensor, probs_TE: Tensor) -> Tensor:
    """``−I(T; E) = H(E|T) − H(E)`` of the mean probabilities (Mod-Squad, arXiv 2212.08066), in nats; −log T … 0.

    All experts are used alike over all tasks together, few of them by each task.
    """
    return _entropy(probs_TE).mean() - _entropy(probs_TE.mean(dim=0))


def _entropy(probs: Tensor) -> Tensor:
    # A probability that underflowed to 0 has an infinite slope, and no share in the entropy.
    probs = probs.clamp(min=1e-12)
    return -(probs * probs.log()).sum(dim=-1)


BALANCE_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor] | None] = {
    "global": global_loss,
    "per_gate": per_gate_loss,
    "mutual_information": mutual_information_loss,
    "none": None,
}
"""Balance losses of (traffic, mean probabilities) by their name in the configuration."""
