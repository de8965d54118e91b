"""Progressive expert routing and its balance loss (SMES, arXiv 2602.09386).

Letters: B instances, T tasks, E experts, K = K_s + K_a experts of one task, D width of the routed representation.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Routing:
    """Which experts each task of each instance uses, and how much of each.

    Attributes:
        experts_BTK: int64; the first K_s are the task-shared set S (the same for all tasks), the others A_t.
        weights_BTK: p̃, renormalised over the task's own K experts; sums to 1.
        probs_BTE: The full softmax, before selection.
        num_shared: K_s.
        max_active: Budget of the union, where there is one.
    """

    experts_BTK: Tensor
    weights_BTK: Tensor
    probs_BTE: Tensor
    num_shared: int
    max_active: int | None = None

    @property
    def bound(self) -> int:
        """The most experts that an instance can use."""
        _, T, K = self.experts_BTK.shape
        E = self.probs_BTE.shape[-1]
        return union_bound(T, E, self.num_shared, K - self.num_shared, self.max_active)


class Router(nn.Module):
    """One bias-free router per task over all E experts.

    Args:
        input_dim: D.
        num_tasks: T.
        num_experts: E.
        rank: Width of a low-rank map ``D → rank → T·E`` (our answer to a router that costs more than the experts when
            T·E is large); None for the plain linear map (bias-free: our choice).
    """

    def __init__(self, input_dim: int, num_tasks: int, num_experts: int, rank: int | None = None) -> None:
        super().__init__()
        self.num_tasks = num_tasks
        self.num_experts = num_experts
        self.down = nn.Linear(input_dim, rank, bias=False) if rank else nn.Identity()
        self.up = nn.Linear(rank or input_dim, num_tasks * num_experts, bias=False)

    def forward(self, h_BD: Tensor) -> Tensor:
        """float32 logits z_BTE. Never in half precision: near-ties would be decided by rounding."""
        with torch.autocast(h_BD.device.type, enabled=False):
            z: Tensor = self.up(self.down(h_BD.float()))
            return z.view(-1, self.num_tasks, self.num_experts)


def union_bound(num_tasks: int, num_experts: int, num_shared: int, num_adaptive: int, max_active: int | None) -> int:
    """The most experts that an instance can use: ``min(K_s + T·K_a, E)``, or the budget where that is less."""
    natural = min(num_shared + num_tasks * num_adaptive, num_experts)
    return natural if max_active is None else min(natural, max_active)


def route(
    z_BTE: Tensor, task_weights_T: Tensor, num_shared: int, num_adaptive: int, max_active: int | None = None
) -> Routing:
    """Select experts in SMES's two stages.

    Stage I: ``s_e = Σ_t w_t p_te``, ``S = TopK(s, K_s)``. Stage II: ``A_t = TopK({z_te : e ∉ S}, K_a)``. Then
    ``p̃_t = softmax(z_t restricted to S ∪ A_t)``. TopK gives exactly K experts, on ties as well, and passes no
    gradient: routers learn through p̃ and the balance loss.

    With a budget, stage II chooses only from a pool of ``max_active − K_s`` experts, picked for all tasks together:
    those outside S with the highest ``max_t p_te``. Then ``|U| ≤ max_active`` however many tasks there are (our
    addition). A budget that the union cannot exceed anyway changes nothing.

    Args:
        z_BTE: Router logits.
        task_weights_T: w_t of stage I, summing to 1.
        num_shared: K_s ≥ 0.
        num_adaptive: K_a ≥ 0, with 1 ≤ K_s + K_a ≤ E.
        max_active: Budget of an instance's union, ≥ K_s + K_a; None for none.
    """
    B, T, E = z_BTE.shape
    probs_BTE = z_BTE.softmax(dim=-1)
    demand_BE = torch.einsum("bte,t->be", probs_BTE.detach(), task_weights_T)
    shared_BS = demand_BE.topk(num_shared, dim=-1).indices
    rest_BTE = z_BTE.detach()
    if num_shared:
        taken_BE = torch.zeros_like(demand_BE, dtype=torch.bool).scatter_(1, shared_BS, True)
        rest_BTE = rest_BTE.masked_fill(taken_BE.unsqueeze(1), float("-inf"))
    if max_active is not None and max_active < union_bound(T, E, num_shared, num_adaptive, None):
        unmet_BE = probs_BTE.detach().amax(dim=1).scatter(1, shared_BS, -1.0)
        pool_BP = unmet_BE.topk(max_active - num_shared, dim=-1).indices
        closed_BE = torch.ones_like(unmet_BE, dtype=torch.bool).scatter_(1, pool_BP, False)
        rest_BTE = rest_BTE.masked_fill(closed_BE.unsqueeze(1), float("-inf"))
    adaptive_BTA = rest_BTE.topk(num_adaptive, dim=-1).indices
    experts_BTK = torch.cat([shared_BS.unsqueeze(1).expand(B, T, num_shared), adaptive_BTA], dim=-1)
    weights_BTK = z_BTE.gather(-1, experts_BTK).softmax(dim=-1)
    return Routing(experts_BTK, weights_BTK, probs_BTE, num_shared, max_active)


def expert_load(experts_BTK: Tensor, num_experts: int) -> Tensor:
    """How many instances each task sends to each expert. int64 [T, E]."""
    B, T, _ = experts_BTK.shape
    used_BTE = torch.zeros(B, T, num_experts, dtype=torch.bool, device=experts_BTK.device)
    return used_BTE.scatter_(2, experts_BTK, True).sum(dim=0)


def balance_loss(routing: Routing, load_TE: Tensor) -> Tensor:
    """Global multi-gate load balancing: ``L_lb = (E/K) Σ_e f̄_e p̄_e``, a scalar.

    ``f̄_e`` is the share of (task, instance) pairs that use expert e (no gradient), ``p̄_e`` the mean probability before
    selection, both over every task and instance of the mini-batch. An even load gives 1.

    Args:
        routing: Of the mini-batch.
        load_TE: Its :func:`expert_load`.
    """
    B, T, K = routing.experts_BTK.shape
    E = routing.probs_BTE.shape[-1]
    used_E = load_TE.sum(dim=0).to(torch.float32) / (B * T)
    return (E / K) * torch.dot(used_E, routing.probs_BTE.mean(dim=(0, 1)))
