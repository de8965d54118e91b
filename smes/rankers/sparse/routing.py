"""Progressive expert routing (SMES, arXiv 2602.09386), with a stage per task group between the paper's two.

Letters: B instances, T routers (one per task, or per task group), G groups of them, E experts, L experts that a router
chooses from (all, or its group's own), C = K_0 + L columns of its logits, P pools (1, or one per group), K experts of
one router: K_0 fixed, K_s shared, K_g of its group, K_a its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smes.rankers.sparse.stages import Stages


@dataclass(frozen=True, slots=True)
class Routing:
    """Which experts each router of each instance uses, and how much of each.

    Attributes:
        experts_BTK: int64; first the fixed ones, then those of stage I (both the same for all routers), of stage II
            (the same within a group), of stage III.
        weights_BTK: p̃, renormalised over the router's own K experts; sums to 1.
        probs_BTL: The full softmax over what the router chooses from, before selection; no gradient.
        mean_TL: Its mean over the instances, from which the balance loss learns.
        num_experts: E.
        bound: The most experts that an instance can use.
        disjoint: Whether no two routers can choose the same expert.
    """

    experts_BTK: Tensor
    weights_BTK: Tensor
    probs_BTL: Tensor
    mean_TL: Tensor
    num_experts: int
    bound: int
    disjoint: bool = False


class Selection(nn.Module):
    """Selects experts in up to three stages. TopK gives exactly K experts, on ties as well, and passes no gradient.

    - Stage I, for all: ``s_e = Σ_t w_t p_te``, ``S = TopK(s, K_s)``.
    - Stage II, for each group (our addition): ``G_g = TopK(mean_{t ∈ g} p_te, e ∉ S; K_g)``.
    - Stage III, for each router: ``A_t = TopK(z_te, e ∉ S ∪ G_g; K_a)``.

    Then ``p̃_t = softmax(z_t restricted to the router's K experts)``: routers learn through p̃ and the balance loss.

    With a budget that the union could exceed, stages II and III choose only from what is open: as many experts as the
    budget has left after stage I, picked for all routers together, those with the highest ``max_t p_te``. Then
    ``|U| ≤ max_active`` however many routers there are (our addition). Own pools share the budget equally, each picking
    for the routers of its group.

    Args:
        stages: How many experts each stage chooses, and from where.
        weights_T: w_t of stage I, summing to 1.
    """

    weights_T: Tensor
    group_T: Tensor
    first_T: Tensor
    mean_GT: Tensor
    own_TP: Tensor
    members_PM: Tensor
    bounded_P: Tensor

    def __init__(self, stages: Stages, weights_T: Tensor) -> None:
        super().__init__()
        self.stages = stages
        groups = [[t for t, of in enumerate(stages.group_T) if of == g] for g in range(stages.num_groups)]
        pools = groups if stages.own_pools else [list(range(len(stages.group_T)))]
        self._bound, self._quota = stages.bound, stages.quota
        self._router_is_group = stages.group_T == tuple(range(stages.num_groups))
        widest, quota = max(map(len, pools)), self._quota
        pool_T = stages.group_T if stages.own_pools else (0,) * len(stages.group_T)
        buffers = {
            "weights_T": weights_T,
            "group_T": torch.tensor(stages.group_T),
            "first_T": torch.tensor(pool_T) * stages.pool_size,
            "mean_GT": torch.tensor([[(t in g) / len(g) for t in range(len(stages.group_T))] for g in groups]),
            "own_TP": torch.nn.functional.one_hot(torch.tensor(pool_T), stages.num_pools).float(),
            # Repeating a member changes no maximum.
            "members_PM": torch.tensor([(pool * widest)[:widest] for pool in pools]),
            "bounded_P": torch.tensor([quota is not None and n > quota for n in stages.pool_bounds]),
        }
        for name, value in buffers.items():
            self.register_buffer(name, value, persistent=False)

    def forward(self, z_BTC: Tensor) -> Routing:
        """The routing by float32 logits."""
        stages, (B, T, _) = self.stages, z_BTC.shape
        fixed = stages.num_fixed
        z_BTL = z_BTC[..., fixed:]
        probs_BTL = z_BTL.detach().softmax(dim=-1)
        shared_BS = self._for_all(probs_BTL)
        closed_BPL = self._closed(probs_BTL, shared_BS)
        chosen = shared_BS.unsqueeze(1).expand(B, T, -1)
        if stages.num_group:
            group_BGK = self._for_groups(probs_BTL, shared_BS, closed_BPL)
            of_group = group_BGK if self._router_is_group else group_BGK.index_select(1, self.group_T)
            chosen = torch.cat([chosen, of_group], dim=-1)
        if stages.num_adaptive:
            chosen = torch.cat([chosen, self._for_routers(z_BTL.detach(), chosen, closed_BPL)], dim=-1)
        columns_BTK = experts_BTK = chosen
        if fixed or stages.own_pools:
            fixed_BTK = torch.arange(fixed, device=chosen.device).expand(B, T, fixed)
            columns_BTK = torch.cat([fixed_BTK, fixed + chosen], dim=-1)
            experts_BTK = torch.cat([fixed_BTK, fixed + self.first_T.view(1, T, 1) + chosen], dim=-1)
        mean_TL, chosen_BTK = mean_and_chosen(z_BTC, probs_BTL, columns_BTK)
        return Routing(
            experts_BTK=experts_BTK,
            weights_BTK=chosen_BTK.softmax(dim=-1),
            probs_BTL=probs_BTL,
            mean_TL=mean_TL,
            num_experts=stages.num_experts,
            bound=self._bound,
            disjoint=stages.disjoint,
        )

    def mean_probs(self, routing: Routing) -> Tensor:
        """Mean probability of each expert over the instances, 0 outside the router's pool. [T, E − K_0]."""
        return (self.own_TP.unsqueeze(2) * routing.mean_TL.unsqueeze(1)).flatten(1)

    def _for_all(self, demand_BTL: Tensor) -> Tensor:
        if self.stages.num_shared == 0:
            return demand_BTL.new_empty((len(demand_BTL), 0), dtype=torch.int64)
        weighted_BL = torch.einsum("btl,t->bl", demand_BTL, self.weights_T)
        return weighted_BL.topk(self.stages.num_shared, dim=-1).indices

    def _closed(self, demand_BTL: Tensor, shared_BS: Tensor) -> Tensor | None:
        """Where stages II and III may not choose; [B, P, L], None where there is no binding budget."""
        if self._quota is None:
            return None
        P, M = self.members_PM.shape
        B, _, L = demand_BTL.shape
        unmet_BPL = demand_BTL.index_select(1, self.members_PM.view(-1)).view(B, P, M, L).amax(dim=2)
        unmet_BPL = unmet_BPL.scatter(2, _for_each(shared_BS, P), -1.0)
        open_BPQ = unmet_BPL.topk(self._quota - self.stages.num_shared, dim=-1).indices
        closed_BPL = torch.ones_like(unmet_BPL, dtype=torch.bool).scatter_(2, open_BPQ, False)
        return closed_BPL & self.bounded_P.view(1, P, 1)

    def _for_groups(self, demand_BTL: Tensor, shared_BS: Tensor, closed_BPL: Tensor | None) -> Tensor:
        mean_BGL = demand_BTL if self._router_is_group else torch.matmul(self.mean_GT, demand_BTL)
        if self.stages.num_shared:  # probabilities are at least 0: with -1 an expert comes after all others
            mean_BGL = mean_BGL.scatter(2, _for_each(shared_BS, self.stages.num_groups), -1.0)
        if closed_BPL is not None:
            mean_BGL = mean_BGL.masked_fill(closed_BPL, -1.0)
        return mean_BGL.topk(self.stages.num_group, dim=-1).indices

    def _for_routers(self, z_BTL: Tensor, chosen_BTK: Tensor, closed_BPL: Tensor | None) -> Tensor:
        rest_BTL = z_BTL.scatter(2, chosen_BTK, float("-inf"))
        if closed_BPL is not None:
            closed = closed_BPL.index_select(1, self.group_T) if self.stages.own_pools else closed_BPL
            rest_BTL = rest_BTL.masked_fill(closed, float("-inf"))
        return rest_BTL.topk(self.stages.num_adaptive, dim=-1).indices


def route(
    z_BTE: Tensor, weights_T: Tensor, num_shared: int, num_adaptive: int, max_active: int | None = None
) -> Routing:
    """The paper's two stages, for all tasks and for each: :class:`Selection` without its second.

    Args:
        z_BTE: Router logits.
        weights_T: w_t of stage I, summing to 1.
        num_shared: K_s ≥ 0.
        num_adaptive: K_a ≥ 0, with 1 ≤ K_s + K_a ≤ E.
        max_active: Budget of an instance's union, ≥ K_s + K_a; None for none.
    """
    stages = Stages(
        num_experts=z_BTE.shape[2],
        group_T=(0,) * z_BTE.shape[1],
        num_shared=num_shared,
        num_adaptive=num_adaptive,
        max_active=max_active,
    )
    routing: Routing = Selection(stages, weights_T).to(z_BTE.device)(z_BTE)
    return routing


def expert_load(experts_BTK: Tensor, num_experts: int) -> Tensor:
    """How many instances each router sends to each expert. int64 [T, E]."""
    T, device = experts_BTK.shape[1], experts_BTK.device
    # A router's K experts are distinct, so counting them counts instances; bincount would wait for a GPU.
    cells = (experts_BTK + num_experts * torch.arange(T, device=device).view(1, T, 1)).view(-1)
    load = torch.zeros(T * num_experts, dtype=torch.int64, device=device)
    return load.scatter_add_(0, cells, torch.ones_like(cells)).view(T, num_experts)


def _for_each(shared_BS: Tensor, count: int) -> Tensor:
    return shared_BS.unsqueeze(1).expand(-1, count, -1)


# TODO(merge) was smes.early_choice: More experts for each task group while the stream is young.


class EarlyChoice(nn.Module):
    """Selections one after the other. How many instances were trained on is part of the model's state.

    Args:
        stages: Of each selection; they differ in ``num_group`` only.
        until: How many instances each but the last serves.
        weights_T: As for :class:`smes.rankers.sparse.routing.Selection`.
    """

    seen: Tensor

    def __init__(self, stages: Sequence[Stages], until: Sequence[int], weights_T: Tensor) -> None:
        super().__init__()
        assert len(until) == len(stages) - 1, "the last one has no end"
        self._until = tuple(until)
        self._selections = nn.ModuleList(Selection(one, weights_T) for one in stages)
        self.register_buffer("seen", torch.tensor(0), persistent=bool(until))
        self._seen = 0  # the same number, beside the tensor: a GPU would have to be waited for

    @property
    def now(self) -> Selection:
        """The selection of this moment."""
        selection = self._selections[sum(self._seen >= end for end in self._until)]
        assert isinstance(selection, Selection), "that is all there are"
        return selection

    @property
    def at_last(self) -> Selection:
        """The selection that all ends with."""
        selection = self._selections[-1]
        assert isinstance(selection, Selection), "that is all there are"
        return selection

    def forward(self, z_BTC: Tensor) -> Routing:
        """The routing by float32 logits, as of this moment."""
        routing: Routing = self.now(z_BTC)
        return routing

    def observe(self, instances: int) -> None:
        """So many more instances were trained on."""
        self._seen += instances
        self.seen += instances

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._seen = int(self.seen)


def halved(early: int, last: int, until: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(experts of each selection, instances until which each but the last serves).

    ``early`` up to ``until`` instances, half of it up to twice as many, and so on down to ``last``.

    >>> halved(16, 4, 1000)
    ((16, 8, 4), (1000, 2000))
    >>> halved(0, 4, 1000)
    ((4,), ())
    """
    chosen = []
    while early > last:
        chosen.append(early)
        early //= 2
    return (*chosen, last), tuple(until << n for n in range(len(chosen)))


# TODO(merge) was smes.logit_gradient: One gradient for the two ways in which router logits learn:


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
