"""SMES: sparse mixture of experts with progressive routing (arXiv 2602.09386).

Letters: B instances, T tasks, R routers (one per task, or one per task group), E experts, K experts of one router, I
input width, D encoder width, H output width of an expert.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from smes.rankers.ranker import Clusters, Encoder, ExpertLimits, RankerOutput, RoutingStats
from smes.rankers.sparse.balance import BALANCE_LOSSES
from smes.rankers.sparse.config import SmesConfig
from smes.rankers.sparse.dispatch import combine, dispatch
from smes.rankers.sparse.early import EarlyChoice, early_stages
from smes.rankers.sparse.experts import EXPERT_FORMS
from smes.rankers.sparse.groups import GroupFinder
from smes.rankers.sparse.reads import task_reads
from smes.rankers.sparse.router import Router
from smes.rankers.sparse.routing import Routing, expert_load


class SMES(nn.Module):
    """Encode, route in stages, run each chosen expert once per instance, combine the outputs for each task.

    Args:
        input_dim: I.
        num_tasks: T.
        config: Its shape.
        group_T: The group of each task, numbered from 0 without gaps; None puts all tasks into one. Ignored when groups
            are found from the stream.
        trim: Whether the dispatch cuts off unused rows, which reads numbers back to the host; None: on the CPU.

    Raises:
        ValueError: The configuration does not fit the number of tasks or groups, see :mod:`smes.rankers.sparse.reads`
            and :func:`smes.rankers.sparse.early.early_stages`.
    """

    def __init__(
        self,
        input_dim: int,
        num_tasks: int,
        config: SmesConfig,
        group_T: Sequence[int] | None = None,
        *,
        trim: bool | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.trim = trim
        self.input_dim, self.output_dim = input_dim, config.experts.dims[-1]
        self.reads = task_reads(num_tasks, config, group_T)
        stages, until = early_stages(config, self.reads.group_R)
        self.expert_limits: ExpertLimits | None = ExpertLimits(
            stages[0].bound, config.experts.num, stages[0].num_fixed, stages[0].num_pools
        )
        self.encoder = Encoder(input_dim, config.encoder_dims)
        width = self.encoder.output_dim
        self.router = Router(input_dim, width, len(self.reads.group_R), stages[0].columns, config.router)
        self.selection = EarlyChoice(stages, until, self.reads.stage_one_weights())
        self._padding = -width % 8  # a raw input may have any width, the rows of a grouped GEMM may not
        self.experts = EXPERT_FORMS[config.experts.form](width + self._padding, config.experts)
        self.trunk = Encoder(input_dim, config.trunk_dims) if config.trunk_dims else None

    def forward(self, x_BI: Tensor) -> RankerOutput:
        """Encode, route, run each chosen expert once per instance, combine the outputs for each task.

        Takes B ≥ 1 instances. In training the output also has the balance loss and the routing's figures.
        """
        h_BD = self.encoder(x_BI)
        routing = self.route(x_BI, h_BD)
        plan = dispatch(routing, trim=x_BI.device.type == "cpu" if self.trim is None else self.trim)
        y_PH = self.experts(F.pad(h_BD, (0, self._padding)) if self._padding else h_BD, plan)
        tasks_BTH = self.reads.outputs(combine(y_PH, routing.weights_BRK, plan))
        if self.trunk is not None:
            tasks_BTH = tasks_BTH + self.trunk(x_BI).unsqueeze(1)
        if not self.training:
            return RankerOutput(tasks_BTH)
        load_RE = expert_load(routing.experts_BRK, self.config.experts.num)
        balance_loss = self.balance(routing, load_RE)
        self.selection.observe(len(x_BI))
        return RankerOutput(tasks_BTH, balance_loss, RoutingStats(plan.active_B, self.reads.load(load_RE)))

    def route(self, x_BI: Tensor, h_BD: Tensor) -> Routing:
        """Which experts each router uses for each instance.

        Args:
            x_BI: The ranker's input.
            h_BD: The encoder's output.
        """
        routing: Routing = self.selection(self.router(x_BI, h_BD))
        return routing

    def balance(self, routing: Routing, load_RE: Tensor) -> Tensor | None:
        """The balance loss times its weight β; None without such a loss.

        Args:
            routing: Of a mini-batch.
            load_RE: Its :func:`smes.rankers.sparse.routing.expert_load`.
        """
        loss = BALANCE_LOSSES[self.config.balance.loss]
        if loss is None:
            return None
        selection = self.selection.current
        chosen_RE = load_RE[:, selection.stages.num_fixed :].float()
        traffic_RE = chosen_RE / (len(routing.experts_BRK) * selection.stages.num_chosen)
        probs_RE = selection.mean_probs(routing)
        return self.config.balance.weight * loss(self.reads.gates(traffic_RE), self.reads.gates(probs_RE))

    def choices(self, x_BI: Tensor) -> Tensor:
        """The experts that each task chooses for each instance, without the fixed ones. int64 [B, T, K].

        They are those of the final selection: while the stream is young, the first of the current ones.
        """
        final = self.selection.final
        routing: Routing = final(self.router(x_BI, self.encoder(x_BI)))
        return self.reads.choices(routing.experts_BRK[..., final.stages.num_fixed :])

    def group_finder(self) -> GroupFinder | None:
        """A new search for the task groups; None where they are declared."""
        return self.reads.finder(self.input_dim)

    def regroup(self, groups: Clusters) -> None:
        """Route the tasks by groups that the search found."""
        self.reads.regroup(groups)
