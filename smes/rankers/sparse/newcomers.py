"""Tasks that came later: each reads, by a router of its own, the experts that run for the others anyway.

A newcomer chooses no expert for an instance: it weights the outputs of those that the other tasks' routers have chosen.
That costs a router and no expert, and it moves nothing of what the others read. It is a *probe*, after LLaVA-CMoE
(arXiv 2503.21227): where it turns out that the others' experts do not serve the task (:mod:`smes.model.probing`), the
newcomer gets experts of its own beside them, as many as a task group has. They are ``residual`` ones without a norm,
whatever the form of the others, because those can begin at 0: scores do not jump, and they learn at once.

Letters: B instances, N newcomers, E experts, U slots of an instance, I input width, D width that experts read, H output
width of an expert, K experts of one router, R routers, P packed rows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from smes.joint_batch import Joined
from smes.rankers.ranker_input import RankerInput
from smes.rankers.sparse.config import SmesConfig
from smes.rankers.sparse.experts import ResidualExperts, mixed
from smes.rankers.sparse.packing import Dispatch, dispatch, dispatch_all
from smes.rankers.sparse.router import BALANCE_LOSSES, Router
from smes.rankers.sparse.routing import Routing, Selection
from smes.rankers.sparse.stages import Stages


class Newcomers(nn.Module):
    """Representations of N newcomers.

    Args:
        input_dim: I.
        encoder_dim: Width of the encoder's output.
        expert_dim: D, the encoder's width padded.
        own_N: How many experts of its own each has; 0: none so far.
        config: Shape of the ranker.
    """

    def __init__(
        self, input_dim: int, encoder_dim: int, expert_dim: int, own_N: Sequence[int], config: SmesConfig
    ) -> None:
        super().__init__()
        self.router = Router(input_dim, encoder_dim, len(own_N), config.experts.num, config.router)
        with torch.no_grad():
            self.router.up.weight.zero_()  # at first the mean of all that runs
        self.own = nn.ModuleDict(
            {str(n): OwnExperts(input_dim, encoder_dim, expert_dim, own, config) for n, own in enumerate(own_N) if own}
        )

    def forward(self, x_BI: RankerInput, h_BD: Tensor, padded_BD: Tensor, shared: "SharedExperts") -> Tensor:
        """float32 [B, N, H].

        Args:
            x_BI: The ranker's input.
            h_BD: The encoder's output.
            padded_BD: What the experts read.
            shared: What runs for the other tasks.
        """
        z_BNU = self._of_slots(self.router(x_BI, h_BD), shared.experts_BU)
        weights_BNU = z_BNU.masked_fill(~shared.used_BU.unsqueeze(1), float("-inf")).softmax(dim=-1)
        y_BNH = torch.bmm(weights_BNU.to(shared.y_BUH.dtype), shared.y_BUH)
        if not self.own:
            return y_BNH
        each = list(y_BNH.unbind(dim=1))
        for n, own in self.own.items():
            each[int(n)] = each[int(n)] + own(x_BI, h_BD, padded_BD)
        return torch.stack(each, dim=1)

    def choices(self, z_BNE: Tensor, experts_BU: Tensor, count: int) -> Tensor:
        """Of the experts that run, the ``count`` that each newcomer weights most. int64 [B, N, count], distinct."""
        again_BU = (experts_BU.unsqueeze(2) == experts_BU.unsqueeze(1)).tril(diagonal=-1).any(dim=2)
        z_BNU = self._of_slots(z_BNE, experts_BU).masked_fill(again_BU.unsqueeze(1), float("-inf"))
        places = z_BNU.topk(count, dim=-1).indices
        return experts_BU.unsqueeze(1).expand(-1, places.shape[1], -1).gather(2, places)

    def expert_weights(self, x_BI: RankerInput, h_BD: Tensor, runs_BE: Tensor) -> Tensor:
        """How much each expert counts for each newcomer: E shared ones, then all own ones. float32 [B, N, E + O].

        Args:
            x_BI: The ranker's input.
            h_BD: The encoder's output.
            runs_BE: Which shared experts run for the others.
        """
        z_BNE = self.router(x_BI, h_BD)
        parts = [z_BNE.masked_fill(~runs_BE.unsqueeze(1), float("-inf")).softmax(dim=-1)]
        for n, own in self.own.items():
            assert isinstance(own, OwnExperts), "the dictionary has nothing else"
            weights_BO = own.expert_weights(x_BI, h_BD)
            part_BNO = weights_BO.new_zeros(len(weights_BO), z_BNE.shape[1], weights_BO.shape[1])
            part_BNO[:, int(n)] = weights_BO
            parts.append(part_BNO)
        return torch.cat(parts, dim=2)

    def balance(self) -> list[Tensor]:
        """The balance losses of own experts, of the forward pass before."""
        losses = [own.balance() for own in self.own.values() if isinstance(own, OwnExperts)]
        return [loss for loss in losses if loss is not None]

    def _of_slots(self, z_BNE: Tensor, experts_BU: Tensor) -> Tensor:
        return z_BNE.gather(2, experts_BU.unsqueeze(1).expand(-1, z_BNE.shape[1], -1))


class SharedExperts:
    """The experts that run for an instance, and what they gave.

    Attributes:
        y_BUH: The output in each slot.
        experts_BU: int64, the expert in each slot; any where there is none.
        used_BU: bool, in which slots there is one.
    """

    def __init__(self, y_PH: Tensor, routing: Routing, plan: Dispatch) -> None:
        B, U = plan.row_BU.shape
        self.y_BUH = y_PH.index_select(0, plan.row_BU.reshape(-1)).view(B, U, -1)
        slot_BS, experts_BS = plan.slot_BRK.reshape(B, -1), routing.experts_BRK.reshape(B, -1)
        self.experts_BU = torch.zeros_like(plan.row_BU).scatter(1, slot_BS, experts_BS)
        self.used_BU = torch.zeros_like(plan.row_BU, dtype=torch.bool).scatter(1, slot_BS, True)


class OwnExperts(Joined, nn.Module):
    """A pool of experts that one task has for itself, with a router.

    Args:
        input_dim, encoder_dim, expert_dim, config: As for :class:`Newcomers`.
        num: How many.
    """

    def __init__(self, input_dim: int, encoder_dim: int, expert_dim: int, num: int, config: SmesConfig) -> None:
        super().__init__()
        chosen = min(num, config.num_group + config.num_adaptive or config.num_shared)
        stages = Stages(num_experts=num, group_R=(0,), num_group=chosen)
        self.router = Router(input_dim, encoder_dim, 1, num, config.router)
        self.selection = Selection(stages, torch.ones(1))
        self.experts = ResidualExperts(num, expert_dim, config.experts.dims[-1], config.experts.narrow_dim, norm="none")
        with torch.no_grad():
            self.experts.base.zero_()  # the differences are 0 already
        self._balance = config.balance
        self._routing: Routing | None = None

    def forward(self, x_BI: RankerInput, h_BD: Tensor, padded_BD: Tensor) -> Tensor:
        """[B, H]."""
        routing: Routing = self.selection(self.router(x_BI, h_BD))
        self._routing = routing if self.training else None
        plan = dispatch_all(routing) if torch.compiler.is_exporting() else dispatch(routing, trim=False)
        return mixed(self.experts, padded_BD, routing.weights_BRK, plan).squeeze(1)

    def expert_weights(self, x_BI: RankerInput, h_BD: Tensor) -> Tensor:
        """The weight of each expert, 0 for those not chosen. float32 [B, O]."""
        routing: Routing = self.selection(self.router(x_BI, h_BD))
        weights_BRO = routing.weights_BRK.new_zeros(len(x_BI), 1, routing.num_experts)
        return weights_BRO.scatter(2, routing.experts_BRK, routing.weights_BRK).squeeze(1)

    def balance(self) -> Tensor | None:
        """The balance loss times its weight, of the forward pass before."""
        loss, routing = BALANCE_LOSSES[self._balance.loss], self._routing
        if loss is None or routing is None:
            return None
        chosen_1E = routing.load().float()
        traffic_1E = chosen_1E / (len(routing.experts_BRK) * self.selection.stages.num_chosen)
        probs_1E = self.selection.mean_probs(routing)
        if self.joining is not None:
            traffic_1E, probs_1E = self.joining.present.means(traffic_1E, probs_1E)
        return self._balance.weight * loss(traffic_1E, probs_1E)
