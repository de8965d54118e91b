"""Losses that spread the routers' traffic over the experts.

Letters: N gates to balance (one per task; one per router if the task groups are found from the stream), E experts
without the fixed ones. Every loss takes two figures of a mini-batch:

- ``traffic_NE``: the share of each expert in a gate's choices; sums to 1 over E, no gradient;
- ``probs_NE``: the mean probability before selection; sums to 1 over E.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from smes.rankers.sparse.config import BalanceLoss


def global_loss(traffic_NE: Tensor, probs_NE: Tensor) -> Tensor:
    """Global multi-gate load balancing (SMES, arXiv 2602.09386): ``L_lb = (E/K) Σ_e f̄_e p̄_e``, a scalar.

    ``f̄_e / K`` is the traffic and ``p̄_e`` the mean probability over all gates and instances. An even load gives 1, or
    somewhat more if the groups have own pools and differ in their number of tasks.
    """
    return traffic_NE.shape[1] * torch.dot(traffic_NE.mean(dim=0), probs_NE.mean(dim=0))


def per_gate_loss(traffic_NE: Tensor, probs_NE: Tensor) -> Tensor:
    """Every gate balanced by itself: ``(E/K) · mean_n Σ_e f̄_ne p̄_ne``. An even load of each gate gives 1.

    The SMES paper compares its global loss with this one, which keeps tasks from specialising on experts.
    """
    return traffic_NE.shape[1] * (traffic_NE * probs_NE).sum(dim=1).mean()


def mutual_information_loss(traffic_NE: Tensor, probs_NE: Tensor) -> Tensor:
    """``−I(N; E) = H(E|N) − H(E)`` of the mean probabilities (Mod-Squad, arXiv 2212.08066), in nats; −log N … 0.

    It is least when all gates together use all experts equally, and each gate uses few of them.
    """
    return _entropy(probs_NE).mean() - _entropy(probs_NE.mean(dim=0))


def _entropy(probs: Tensor) -> Tensor:
    # A probability of 0 (by underflow) adds nothing to the entropy, but its slope is infinite.
    probs = probs.clamp(min=1e-12)
    return -(probs * probs.log()).sum(dim=-1)


BALANCE_LOSSES: dict[BalanceLoss, Callable[[Tensor, Tensor], Tensor] | None] = {
    "global": global_loss,
    "per_gate": per_gate_loss,
    "mutual_information": mutual_information_loss,
    "none": None,
}
"""Balance losses of (traffic, mean probabilities) by their name in the configuration."""
