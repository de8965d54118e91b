"""SMES: sparse mixture of experts with progressive routing (arXiv 2602.09386).

Letters: B instances, T tasks, R routers (T, or the number of task groups), E experts, K experts of one task, I input
width, D encoder width, H output width of an expert.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smes.rankers.ranker import Encoder, ExpertLimits, RankerOutput, RoutingStats
from smes.rankers.sparse.balance import BALANCE_LOSSES
from smes.rankers.sparse.config import SmesConfig
from smes.rankers.sparse.dispatch import combine, dispatch
from smes.rankers.sparse.experts import EXPERT_FORMS, ExpertShape
from smes.rankers.sparse.groups import Clusters, GroupFinder, TaskReads
from smes.rankers.sparse.router import Router
from smes.rankers.sparse.routing import EarlyChoice, Routing, expert_load, halved


class SMES(nn.Module):
    """The ranker: encoder → routing in stages → experts, each once per instance → one h_t per task.

    Args:
        input_dim: I.
        num_tasks: T.
        config: Its shape.
        group_T: The group of each task, numbered from 0 without gaps; None puts all into one. Where groups are found it
            says nothing.

    Raises:
        ValueError: ``stage_one_weights`` has another length than T, or no positive sum; or numbers of experts that do
            not fit the number of groups; or more groups to find than tasks; or ``early_group`` above what a group
            chooses from.
    """

    router_T: Tensor

    def __init__(
        self, input_dim: int, num_tasks: int, config: SmesConfig, group_T: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        group_T = tuple(group_T or (0,) * num_tasks)
        if len(group_T) != num_tasks:
            raise ValueError(f"group_T: {len(group_T)} groups, expected one for each of {num_tasks} tasks")
        self.reads = TaskReads(num_tasks, config.found_groups) if config.found_groups else None
        if self.reads is not None:
            group_T = tuple(range(config.found_groups))  # of the routers: which tasks read them is found
        router_T = group_T if config.routers == "group" else tuple(range(num_tasks))
        groups_R = tuple(dict(zip(router_T, group_T, strict=True))[r] for r in range(max(router_T) + 1))
        if config.early_group > (pool := config.stages(groups_R).pool_size):
            what = "the experts that a group chooses from"
            raise ValueError(f"smes.early_group: {config.early_group}, expected at most {what} ({pool})")
        counts, until = halved(config.early_group, config.num_group, config.early_until)
        try:
            selections = [config.stages(groups_R, count) for count in counts]
        except ValueError as error:  # those of num_group, above, do fit
            raise ValueError(f"smes.early_group: {config.early_group}, which does not fit: {error}") from error
        stages = selections[0]  # those of the most experts
        self.config = config
        self.input_dim, self.output_dim = input_dim, config.expert_dims[-1]
        self.expert_limits: ExpertLimits | None = ExpertLimits(
            stages.bound, config.num_experts, stages.num_fixed, stages.num_pools
        )
        self.encoder = Encoder(input_dim, config.encoder_dims)
        width = self.encoder.output_dim
        self.router = Router(
            {"encoder": (width,), "raw": (input_dim,), "both": (input_dim, width)}[config.router_input],
            len(stages.group_T),
            stages.columns,
            config.router_rank,
            own_maps=config.router_maps == "per_task",
            norm=config.router_norm,
            scale=config.router_scale,
        )
        self._padding = -width % 8  # a raw input may have any width, a grouped GEMM's rows may not
        self.experts = _experts(width + self._padding, config)
        self.trunk = Encoder(input_dim, config.trunk_dims) if config.trunk_dims else None
        self.register_buffer("router_T", torch.tensor(router_T), persistent=False)
        self.selection = EarlyChoice(selections, until, _router_weights(config, router_T))

    def forward(self, x_BI: Tensor) -> RankerOutput:
        """Representations per task, for B ≥ 1 instances; in training also the balance loss (times β) and the routing's
        figures.
        """
        h_BD = self.encoder(x_BI)
        routing = self.route(x_BI, h_BD)
        plan = dispatch(routing, trim=h_BD.device.type == "cpu")
        y_PH = self.experts(F.pad(h_BD, (0, self._padding)) if self._padding else h_BD, plan)
        routers_BRH = combine(y_PH, routing.weights_BTK, plan)
        tasks_BTH = self._for_tasks(routers_BRH, dim=1) if self.reads is None else self.reads.outputs(routers_BRH)
        if self.trunk is not None:
            tasks_BTH = tasks_BTH + self.trunk(x_BI).unsqueeze(1)
        if not self.training:
            return RankerOutput(tasks_BTH)
        load_RE = expert_load(routing.experts_BTK, self.config.num_experts)
        balance_loss = self._balance(routing, load_RE)
        self.selection.observe(len(x_BI))
        return RankerOutput(
            tasks_BTH=tasks_BTH,
            auxiliary_loss=balance_loss,
            stats=RoutingStats(
                active_B=plan.active_B,
                load_TE=self._for_tasks(load_RE, dim=0) if self.reads is None else self.reads.load(load_RE),
            ),
        )

    def group_finder(self) -> GroupFinder | None:
        """What finds the task groups; None where they are declared."""
        if self.reads is None:
            return None
        config, num_tasks = self.config, len(self.reads.share_TG)
        return GroupFinder(num_tasks, self.input_dim, config.found_groups, config.found_until)

    def regroup(self, groups: Clusters) -> None:
        """Route the tasks by groups that were found."""
        assert self.reads is not None, "whoever was given a finder finds groups"
        self.reads.regroup(groups)

    def route(self, x_BI: Tensor, h_BD: Tensor) -> Routing:
        """Which experts each router of each instance uses.

        Args:
            x_BI: What the encoder read.
            h_BD: What it made of it.
        """
        routing: Routing = self.selection(self._logits(x_BI, h_BD))
        return routing

    def choices(self, x_BI: Tensor) -> Tensor:
        """The experts that each task chooses for each instance, the fixed ones left out. int64 [B, T, K].

        While groups are still to be found, those that one pool gives to all; while more are chosen, the first of them.
        """
        reads_encoder = self.config.router_input != "raw"
        last = self.selection.at_last
        routing: Routing = last(self._logits(x_BI, self.encoder(x_BI) if reads_encoder else x_BI))
        chosen_BRK = routing.experts_BTK[..., last.stages.num_fixed :]
        return self._for_tasks(chosen_BRK, dim=1) if self.reads is None else chosen_BRK[:, self.reads.main()]

    def _logits(self, x_BI: Tensor, h_BD: Tensor) -> Tensor:
        parts = {"encoder": (h_BD,), "raw": (x_BI,), "both": (x_BI, h_BD)}[self.config.router_input]
        logits_BRC: Tensor = self.router(*parts)
        return logits_BRC

    def _balance(self, routing: Routing, load_RE: Tensor) -> Tensor | None:
        loss = BALANCE_LOSSES[self.config.balance_loss]
        if loss is None:
            return None
        stages = self.selection.now.stages
        chosen_RE = load_RE[:, stages.num_fixed :].float()
        traffic_RE = chosen_RE / (len(routing.experts_BTK) * stages.num_chosen)
        probs_RE = self.selection.now.mean_probs(routing)
        if self.reads is not None:  # a group's load counts the same however many tasks read it
            return self.config.balance * loss(traffic_RE, probs_RE)
        return self.config.balance * loss(self._for_tasks(traffic_RE, dim=0), self._for_tasks(probs_RE, dim=0))

    def _for_tasks(self, of_routers: Tensor, dim: int) -> Tensor:
        return of_routers.index_select(dim, self.router_T) if self.config.routers == "group" else of_routers


def _experts(input_dim: int, config: SmesConfig) -> nn.Module:
    shape = ExpertShape(
        num_experts=config.num_experts,
        input_dim=input_dim,
        dims=config.expert_dims,
        rank=config.expert_rank,
        narrow_dim=config.expert_narrow_dim,
        norm=config.expert_norm,
    )
    return EXPERT_FORMS[config.experts](shape)


def _router_weights(config: SmesConfig, router_T: tuple[int, ...]) -> Tensor:
    """w of stage I for each router: what its tasks have together; summing to 1."""
    weights = config.stage_one_weights or (1.0,) * len(router_T)
    if len(weights) != len(router_T) or min(weights) < 0 or not sum(weights) > 0:
        raise ValueError(
            f"smes.stage_one_weights: {list(weights)}, expected {len(router_T)} weights ≥ 0, one > 0 at least"
        )
    weights_T = torch.tensor(weights)
    return torch.zeros(max(router_T) + 1).index_add(0, torch.tensor(router_T), weights_T / weights_T.sum())
