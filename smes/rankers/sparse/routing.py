"""Progressive expert routing (SMES, arXiv 2602.09386), with a stage per task group between the paper's two.

:class:`Selection` chooses the experts. :class:`EarlyChoice` chooses more of them for each task group while the stream
is young.

Letters: B instances, R routers (one per task, or one per task group), G groups of routers, E experts, L experts that a
router chooses from (all, or its group's own), C = K_0 + L columns of its logits, P pools (1, or one per group), K
experts of one router: K_0 fixed, K_s shared, K_g of its group, K_a its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smes.rankers.kernels import on_host
from smes.rankers.sparse.config import SmesConfig
from smes.rankers.sparse.kernels import best, weighed
from smes.rankers.sparse.stages import Stages


@dataclass(frozen=True, slots=True)
class Routing:
    """Which experts each router uses for each instance, and with which weights.

    Attributes:
        experts_BRK: int64. In this order: the fixed experts, those of stage I (both are the same for all routers),
            those of stage II (the same within a group), those of stage III.
        weights_BRK: p̃, the probabilities renormalised over the router's own K experts; sums to 1.
        probs_BRL: The full softmax over the experts that the router chooses from, before selection; no gradient.
        mean_RL: The mean of ``probs_BRL`` over the instances; the balance loss learns through it.
        num_experts: E.
        bound: The most experts that an instance can use.
        disjoint: Whether no two routers can choose the same expert.
        load_RE: How many instances each router sends to each expert, if it is known already (:meth:`load`).
    """

    experts_BRK: Tensor
    weights_BRK: Tensor
    probs_BRL: Tensor
    mean_RL: Tensor
    num_experts: int
    bound: int
    disjoint: bool = False
    load_RE: Tensor | None = None

    def load(self) -> Tensor:
        """How many instances each router sends to each expert. int64 [R, E]."""
        return expert_load(self.experts_BRK, self.num_experts) if self.load_RE is None else self.load_RE


class Selection(nn.Module):
    """Selects experts in up to three stages. TopK gives exactly K experts, also on ties, and passes no gradient.

    - Stage I, for all routers: ``s_e = Σ_r w_r p_re``, ``S = TopK(s, K_s)``.
    - Stage II, for each group (our addition): ``G_g = TopK(mean_{r ∈ g} p_re, e ∉ S; K_g)``.
    - Stage III, for each router: ``A_r = TopK(z_re, e ∉ S ∪ G_g; K_a)``.

    Then ``p̃_r = softmax(z_r restricted to the router's K experts)``. Routers learn through p̃ and the balance loss.

    A budget (our addition) bounds the union of an instance's experts: ``|U| ≤ max_active`` for any number of routers.
    If the union could exceed the budget, stages II and III choose only from open experts. The number of open experts is
    what the budget leaves after stage I. They are the experts with the highest ``max_r p_re`` over the routers of the
    pool. Own pools share the budget equally.

    Args:
        stages: How many experts each stage chooses, and from which.
        weights_R: w_r of stage I, summing to 1.
    """

    weights_R: Tensor
    group_R: Tensor
    first_R: Tensor
    mean_GR: Tensor
    own_RP: Tensor
    members_PM: Tensor
    bounded_P: Tensor

    def __init__(self, stages: Stages, weights_R: Tensor) -> None:
        super().__init__()
        self.stages = stages
        self._bound, self._quota = stages.bound, stages.quota
        self._router_is_group = stages.group_R == tuple(range(stages.num_groups))
        alone = self._router_is_group and not stages.num_shared and not stages.num_adaptive and self._quota is None
        self._by_logit = alone  # stage II alone, of one router each: the largest probabilities are the largest logits
        routers = range(len(stages.group_R))
        groups = [[r for r in routers if stages.group_R[r] == g] for g in range(stages.num_groups)]
        pools = groups if stages.own_pools else [list(routers)]
        pool_R = stages.group_R if stages.own_pools else (0,) * len(routers)
        widest, quota = max(map(len, pools)), self._quota
        buffers = {
            "weights_R": weights_R,
            "group_R": torch.tensor(stages.group_R),
            "first_R": torch.tensor(pool_R) * stages.pool_size,
            "mean_GR": torch.tensor([[(r in g) / len(g) for r in routers] for g in groups]),
            "own_RP": F.one_hot(torch.tensor(pool_R), stages.num_pools).float(),
            # Short pools repeat members, which changes no maximum.
            "members_PM": torch.tensor([(pool * widest)[:widest] for pool in pools]),
            "bounded_P": torch.tensor([quota is not None and n > quota for n in stages.pool_bounds]),
        }
        for name, value in buffers.items():
            self.register_buffer(name, value, persistent=False)

    def forward(self, z_BRC: Tensor) -> Routing:
        """The routing by float32 logits."""
        z_BRL = z_BRC[..., self.stages.num_fixed :]
        if on_host(z_BRC) and z_BRC.dtype == torch.float32:
            return self._weighed(z_BRC, z_BRL.detach())
        probs_BRL = z_BRL.detach().softmax(dim=-1)
        chosen_BRK = self._chosen(z_BRL.detach(), probs_BRL)
        columns_BRK, experts_BRK = self._with_fixed(chosen_BRK)
        mean_RL, z_BRK = mean_and_chosen(z_BRC, probs_BRL, columns_BRK)
        return Routing(
            experts_BRK=experts_BRK,
            weights_BRK=z_BRK.softmax(dim=-1),
            probs_BRL=probs_BRL,
            mean_RL=mean_RL,
            num_experts=self.stages.num_experts,
            bound=self._bound,
            disjoint=self.stages.disjoint,
        )

    def _weighed(self, z_BRC: Tensor, z_BRL: Tensor) -> Routing:
        """:meth:`forward` by compiled loops."""
        stages = self.stages
        chosen_BRK = None if self._by_logit else self._chosen(z_BRL, z_BRL.softmax(dim=-1))
        experts_BRK, weights_BRK, probs_BRL, mean_RL, load_RE = weighed(
            z_BRC, chosen_BRK, stages.num_chosen, stages.num_fixed, self.first_R, stages.num_experts
        )
        return Routing(
            experts_BRK, weights_BRK, probs_BRL, mean_RL, stages.num_experts, self._bound, stages.disjoint, load_RE
        )

    def mean_probs(self, routing: Routing) -> Tensor:
        """Mean probability of each expert over the instances, 0 outside the router's pool. [R, E − K_0]."""
        return (self.own_RP.unsqueeze(2) * routing.mean_RL.unsqueeze(1)).flatten(1)

    def _chosen(self, z_BRL: Tensor, probs_BRL: Tensor) -> Tensor:
        """The three stages: places in the router's pool, without the fixed experts. int64 [B, R, K − K_0]."""
        shared_BS = self._for_all(probs_BRL)
        closed_BPL = self._closed(probs_BRL, shared_BS)
        chosen_BRK = _for_each(shared_BS, probs_BRL.shape[1])
        if self.stages.num_group:
            of_group_BRK = self._for_groups(probs_BRL, shared_BS, closed_BPL)
            chosen_BRK = torch.cat([chosen_BRK, of_group_BRK], dim=-1)
        if self.stages.num_adaptive:
            chosen_BRK = torch.cat([chosen_BRK, self._for_routers(z_BRL, chosen_BRK, closed_BPL)], dim=-1)
        return chosen_BRK

    def _with_fixed(self, chosen_BRK: Tensor) -> tuple[Tensor, Tensor]:
        """The columns of the logits, and the numbers of the experts, of fixed and chosen experts; both [B, R, K]."""
        fixed = self.stages.num_fixed
        if not fixed and not self.stages.own_pools:
            return chosen_BRK, chosen_BRK
        B, R, _ = chosen_BRK.shape
        fixed_BRK = torch.arange(fixed, device=chosen_BRK.device).expand(B, R, fixed)
        columns_BRK = torch.cat([fixed_BRK, fixed + chosen_BRK], dim=-1)
        return columns_BRK, torch.cat([fixed_BRK, fixed + self.first_R.view(1, R, 1) + chosen_BRK], dim=-1)

    def _for_all(self, probs_BRL: Tensor) -> Tensor:
        """Stage I. int64 [B, K_s]."""
        if self.stages.num_shared == 0:
            return probs_BRL.new_empty((probs_BRL.shape[0], 0), dtype=torch.int64)
        weighted_BL = torch.einsum("brl,r->bl", probs_BRL, self.weights_R)
        return best(weighted_BL, self.stages.num_shared)

    def _closed(self, probs_BRL: Tensor, shared_BS: Tensor) -> Tensor | None:
        """The experts that stages II and III may not choose. bool [B, P, L]; None without a binding budget."""
        if self._quota is None:
            return None
        P, M = self.members_PM.shape
        B, _, L = probs_BRL.shape
        highest_BPL = probs_BRL.index_select(1, self.members_PM.view(-1)).view(B, P, M, L).amax(dim=2)
        highest_BPL = highest_BPL.scatter(2, _for_each(shared_BS, P), -1.0)
        open_BPQ = best(highest_BPL, self._quota - self.stages.num_shared)
        closed_BPL = torch.ones_like(highest_BPL, dtype=torch.bool).scatter_(2, open_BPQ, False)
        return closed_BPL & self.bounded_P.view(1, P, 1)

    def _for_groups(self, probs_BRL: Tensor, shared_BS: Tensor, closed_BPL: Tensor | None) -> Tensor:
        """Stage II, for the routers of each group. int64 [B, R, K_g]."""
        mean_BGL = probs_BRL if self._router_is_group else torch.matmul(self.mean_GR, probs_BRL)
        if self.stages.num_shared:  # probabilities are at least 0, so that -1 puts an expert last
            mean_BGL = mean_BGL.scatter(2, _for_each(shared_BS, self.stages.num_groups), -1.0)
        if closed_BPL is not None:
            mean_BGL = mean_BGL.masked_fill(closed_BPL, -1.0)
        chosen_BGK = best(mean_BGL, self.stages.num_group)
        return chosen_BGK if self._router_is_group else chosen_BGK.index_select(1, self.group_R)

    def _for_routers(self, z_BRL: Tensor, chosen_BRK: Tensor, closed_BPL: Tensor | None) -> Tensor:
        """Stage III. int64 [B, R, K_a]."""
        rest_BRL = z_BRL.scatter(2, chosen_BRK, float("-inf"))
        if closed_BPL is not None:
            closed = closed_BPL.index_select(1, self.group_R) if self.stages.own_pools else closed_BPL
            rest_BRL = rest_BRL.masked_fill(closed, float("-inf"))
        return best(rest_BRL, self.stages.num_adaptive)


def route(
    z_BRE: Tensor, weights_R: Tensor, num_shared: int, num_adaptive: int, max_active: int | None = None
) -> Routing:
    """The paper's two stages: :class:`Selection` without its second stage.

    Args:
        z_BRE: Router logits.
        weights_R: w_r of stage I, summing to 1.
        num_shared: K_s ≥ 0.
        num_adaptive: K_a ≥ 0, with 1 ≤ K_s + K_a ≤ E.
        max_active: Budget of an instance's union, ≥ K_s + K_a; None for no budget.
    """
    stages = Stages(
        num_experts=z_BRE.shape[2],
        group_R=(0,) * z_BRE.shape[1],
        num_shared=num_shared,
        num_adaptive=num_adaptive,
        max_active=max_active,
    )
    routing: Routing = Selection(stages, weights_R).to(z_BRE.device)(z_BRE)
    return routing


def expert_load(experts_BRK: Tensor, num_experts: int) -> Tensor:
    """How many instances each router sends to each expert. int64 [R, E]."""
    R, device = experts_BRK.shape[1], experts_BRK.device
    # A router's K experts are distinct, so counting them counts instances; bincount would wait for a GPU.
    cells = (experts_BRK + num_experts * torch.arange(R, device=device).view(1, R, 1)).view(-1)
    load = torch.zeros(R * num_experts, dtype=torch.int64, device=device)
    return load.scatter_add_(0, cells, torch.ones_like(cells)).view(R, num_experts)


def mean_and_chosen(z_BRC: Tensor, probs_BRL: Tensor, columns_BRK: Tensor) -> tuple[Tensor, Tensor]:
    """The two quantities through which router logits learn, with one fused gradient.

    Args:
        z_BRC: Logits.
        probs_BRL: Softmax of their last L columns, without a gradient of its own.
        columns_BRK: int64, the columns of the chosen logits, no column twice.

    Returns:
        The mean of the softmax over the instances [R, L], and the chosen logits [B, R, K].
    """
    mean_RL, chosen_BRK = _MeanAndChosen.apply(  # type: ignore[no-untyped-call]  # torch has no type
        z_BRC, probs_BRL, columns_BRK
    )
    return mean_RL, chosen_BRK


class _MeanAndChosen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z_BRC: Tensor, probs_BRL: Tensor, columns_BRK: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(probs_BRL, columns_BRK)
        ctx.fixed = z_BRC.shape[2] - probs_BRL.shape[2]
        return probs_BRL.mean(dim=0), z_BRC.gather(-1, columns_BRK)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        of_mean_RL, of_chosen_BRK = gradients
        probs_BRL, columns_BRK = ctx.saved_tensors
        # d mean / d z = p ⊙ (g − ⟨p, g⟩) / B
        gradient = probs_BRL * (of_mean_RL / len(probs_BRL))
        gradient.addcmul_(probs_BRL, gradient.sum(dim=-1, keepdim=True), value=-1)
        if ctx.fixed:
            gradient = F.pad(gradient, (ctx.fixed, 0))
        return gradient.scatter_add_(2, columns_BRK, of_chosen_BRK), None, None


def _for_each(shared_BS: Tensor, count: int) -> Tensor:
    return shared_BS.unsqueeze(1).expand(-1, count, -1)


class EarlyChoice(nn.Module):
    """Selections that replace each other as the stream goes on.

    The number of instances trained on decides which one is current. It is part of the model's state.

    Args:
        stages: The stages of each selection; they differ in ``num_group`` only.
        until: For each selection but the last: it ends after this many instances.
        weights_R: As for :class:`smes.rankers.sparse.routing.Selection`.
    """

    seen: Tensor

    def __init__(self, stages: Sequence[Stages], until: Sequence[int], weights_R: Tensor) -> None:
        super().__init__()
        assert len(until) == len(stages) - 1, "the last selection has no end"
        self._until = tuple(until)
        self._selections = nn.ModuleList(Selection(one, weights_R) for one in stages)
        self.register_buffer("seen", torch.tensor(0), persistent=bool(until))
        self._seen = 0  # the same number beside the tensor: reading the tensor would wait for a GPU

    @property
    def current(self) -> Selection:
        """The selection in force now."""
        return self._selection(sum(self._seen >= end for end in self._until))

    @property
    def final(self) -> Selection:
        """The selection in force once the stream is no longer young."""
        return self._selection(-1)

    def forward(self, z_BRC: Tensor) -> Routing:
        """The current routing by float32 logits."""
        routing: Routing = self.current(z_BRC)
        return routing

    def observe(self, instances: int) -> None:
        """Count instances that were trained on."""
        self._seen += instances
        self.seen += instances

    def forget(self, instances: int) -> None:
        """Take back instances that were observed. The tensor is a buffer, and put back as others are."""
        self._seen -= instances

    def _selection(self, index: int) -> Selection:
        selection = self._selections[index]
        assert isinstance(selection, Selection), "the list has nothing else"
        return selection

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._seen = int(self.seen)


def early_stages(config: SmesConfig, group_R: tuple[int, ...]) -> tuple[list[Stages], tuple[int, ...]]:
    """The arguments ``stages`` and ``until`` of :class:`EarlyChoice`, those with the most experts first.

    Args:
        config: Shape of the ranker.
        group_R: The group of each router.

    Raises:
        ValueError: The numbers of experts do not fit this many groups, or ``early.num_group`` is more than a group can
            choose from.
    """
    early = config.early
    pool_size = config.stages(group_R).pool_size
    if early.num_group > pool_size:
        wanted = f"expected at most the experts that a group chooses from ({pool_size})"
        raise ValueError(f"SmesConfig.early.num_group: {early.num_group}, {wanted}")
    counts, until = halved(early.num_group, config.num_group, early.until)
    try:
        return [config.stages(group_R, count) for count in counts], until
    except ValueError as error:  # the later num_group fits: config.stages accepted it above
        message = f"expected a number that fits the other keys ({error})"
        raise ValueError(f"SmesConfig.early.num_group: {early.num_group}, {message}") from error


def halved(early: int, last: int, until: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Halve a number of experts, each for twice as many instances as the one before, down to ``last``.

    Returns:
        The number of experts of each selection, and after how many instances each but the last ends.

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
