"""SMES: sparse mixture of experts with progressive routing (arXiv 2602.09386).

Letters: B instances, T tasks, R routers (one per task, or one per task group), G task groups, E experts, K experts of
one router, I input width, D encoder width, H output width of an expert.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smes.joint_batch import Joined
from smes.rankers.kernels import on_host
from smes.rankers.ranker import Clusters, Encoder, ExpertLimits, RankerOutput, RoutingStats
from smes.rankers.ranker_input import RankerInput, SplitInput
from smes.rankers.sparse.config import SmesConfig
from smes.rankers.sparse.experts import EXPERT_FORMS, mixed
from smes.rankers.sparse.groups import GroupFinder
from smes.rankers.sparse.newcomers import Newcomers, SharedExperts
from smes.rankers.sparse.packing import combine, dispatch, dispatch_all
from smes.rankers.sparse.reads import DeclaredReads, FoundReads, TaskReads
from smes.rankers.sparse.router import BALANCE_LOSSES, Router
from smes.rankers.sparse.routing import EarlyChoice, Routing, early_stages
from smes.rankers.streams import SharedStreams
from smes.rankers.structure import NEWCOMER, Structure


def declared_structure(num_tasks: int, config: SmesConfig, group_T: Sequence[int] | None = None) -> Structure:
    """The routers that a configuration gives its tasks.

    Args:
        num_tasks: T.
        config: Shape of the ranker.
        group_T: The group of each task, numbered from 0 without gaps; None puts all tasks into one. Ignored when groups
            are found from the stream: then every task reads all routers until they are.

    Raises:
        ValueError: ``group_T`` or ``stage_one_weights`` has another length than T, or the weights no positive sum.
    """
    group_T = tuple(group_T or (0,) * num_tasks)
    if len(group_T) != num_tasks:
        raise ValueError(f"group_T: {len(group_T)} groups, expected one for each of {num_tasks} tasks")
    if G := config.groups.found:
        if num_tasks < G:
            raise ValueError(f"GroupsConfig.found: {G}, expected at most the number of tasks ({num_tasks})")
        return Structure((0,) * num_tasks, tuple(range(G)), (1 / G,) * G, (0,) * num_tasks)
    router_T = group_T if config.router.per == "group" else tuple(range(num_tasks))
    group_of = dict(zip(router_T, group_T, strict=True))
    weights = config.stage_one_weights or (1.0,) * num_tasks
    if len(weights) != num_tasks or not sum(weights) > 0:
        wanted = f"expected {num_tasks} weights, at least one of them positive"
        raise ValueError(f"SmesConfig.stage_one_weights: {list(weights)}, {wanted}")
    weights_T, weight_R = np.array(weights, np.float32), np.zeros(len(group_of), np.float32)
    np.add.at(weight_R, list(router_T), weights_T / weights_T.sum())
    group_R = tuple(group_of[r] for r in range(len(group_of)))
    return Structure(router_T, group_R, tuple(weight_R.tolist()), (0,) * num_tasks)


class SMES(Joined, nn.Module):
    """Encode, route in stages, run each chosen expert once per instance, combine the outputs for each task.

    Args:
        input_dim: I.
        num_tasks: T.
        config: Its shape.
        group_T: The group of each task, numbered from 0 without gaps; None puts all tasks into one. Ignored when groups
            are found from the stream.
        structure: The routers and their readers, where changes of the schema have made them others than the
            configuration's; instead of ``group_T``.
        trim: Whether the dispatch cuts off unused rows, which reads numbers back to the host; None: on the CPU.

    Attributes:
        structure: The routers and their readers.
        founders: The tasks that are no newcomers.
        pool_size: How many experts a task group chooses from.

    Raises:
        ValueError: The configuration does not fit the number of tasks or groups, see :func:`declared_structure` and
            :func:`smes.rankers.sparse.routing.early_stages`.
    """

    place_T: Tensor
    stream_T: Tensor
    share_TS: Tensor
    newcomers_NN: Tensor

    def __init__(
        self,
        input_dim: int,
        num_tasks: int,
        config: SmesConfig,
        group_T: Sequence[int] | None = None,
        *,
        structure: Structure | None = None,
        trim: bool | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.trim = trim
        self.structure = structure = structure or declared_structure(num_tasks, config, group_T)
        self.input_dim, self.output_dim = input_dim, config.experts.dims[-1]
        self.founders = structure.founders
        self.reads: TaskReads
        if config.groups.found:
            self.reads = FoundReads(len(self.founders), config)
        else:
            self.reads = DeclaredReads(structure)
        stages, until = early_stages(config, self.reads.group_R)
        self.expert_limits: ExpertLimits | None = ExpertLimits(
            stages[0].bound, config.experts.num, stages[0].num_fixed, stages[0].num_pools
        )
        self.encoder = Encoder(input_dim, config.encoder_dims)
        width = self.encoder.output_dim
        self.pool_size = stages[0].pool_size
        self.router = Router(input_dim, width, len(self.reads.group_R), stages[0].columns, config.router)
        self.selection = EarlyChoice(stages, until, self.reads.stage_one_weights())
        self._padding = -width % 8  # a raw input may have any width, the rows of a grouped GEMM may not
        self.experts = EXPERT_FORMS[config.experts.form](width + self._padding, config.experts)
        trunk_width = input_dim if config.trunk_input == "raw" else width
        self.trunk = Encoder(trunk_width, config.trunk_dims) if config.trunk_dims else None
        self.newcomers: Newcomers | None = None
        if structure.newcomers:
            own_N = [structure.own_T[t] for t in structure.newcomers]
            self.newcomers = Newcomers(input_dim, width, width + self._padding, own_N, config)
        order = torch.tensor([*structure.founders, *structure.newcomers])
        self.register_buffer("place_T", order.argsort(), persistent=False)
        streams = len(self.reads.group_R) + len(structure.newcomers)
        new = iter(range(len(self.reads.group_R), streams))
        stream_T = [next(new) if router == NEWCOMER else router for router in structure.router_T]
        self._one_each = stream_T == list(range(streams))
        self.register_buffer("stream_T", torch.tensor(stream_T), persistent=False)
        self.register_buffer("share_TS", F.one_hot(self.stream_T, streams).float(), persistent=False)
        self.register_buffer("newcomers_NN", torch.eye(len(structure.newcomers)), persistent=False)

    def forward(self, x_BI: RankerInput) -> RankerOutput:
        """Encode, route, run each chosen expert once per instance, combine the outputs for each task.

        Takes B ≥ 1 instances. In training the output also has the balance loss and the routing's figures.
        """
        h_BD, z_BRC = self._read(x_BI)
        routing: Routing = self.selection(z_BRC)
        if torch.compiler.is_exporting():
            plan = dispatch_all(routing)
        else:
            plan = dispatch(routing, trim=x_BI.device.type == "cpu" if self.trim is None else self.trim)
        padded_BD = F.pad(h_BD, (0, self._padding)) if self._padding else h_BD
        if self.newcomers is None:
            streams_BSH = mixed(self.experts, padded_BD, routing.weights_BRK, plan)
        else:
            y_PH = self.experts(padded_BD, plan)
            streams_BSH = combine(y_PH, routing.weights_BRK, plan)
            new_BNH = self.newcomers(x_BI, h_BD, padded_BD, SharedExperts(y_PH, routing, plan))
            streams_BSH = torch.cat([streams_BSH, new_BNH.to(streams_BSH.dtype)], dim=1)
        common_BH = None
        if self.trunk is not None:
            common_BH = self.trunk(x_BI if self.config.trunk_input == "raw" else h_BD)
        shared = self._shared(streams_BSH, common_BH)
        if not self.training:
            return RankerOutput(shared)
        load_RE = routing.load()
        balance_loss = self.balance(routing, load_RE)
        self.selection.observe(len(x_BI) if self.joining is None else self.joining.present.instances)
        load_TE = self.reads.load(load_RE)
        if self.newcomers is not None:
            for loss in self.newcomers.balance():
                balance_loss = loss if balance_loss is None else balance_loss + loss
            every_NE = load_RE.amax(dim=0).expand(len(self.structure.newcomers), -1)
            load_TE = self._in_order(load_TE, every_NE, dim=0)
        return RankerOutput(shared, balance_loss, RoutingStats(plan.active_B, load_TE))

    def _read(self, x_BI: RankerInput) -> tuple[Tensor, Tensor]:
        """The encoder's output, and the routers' logits: in training on the CPU with one product for both."""
        autocast = torch.is_autocast_enabled(x_BI.device.type)
        if isinstance(x_BI, SplitInput) and not self.training and self.config.encoder_dims and not autocast:
            products = self.router.of_split(self.encoder.first_weight, x_BI)
            if products is not None:
                return self.encoder.after_product(products[0]), self.router.after_product(products[1])
        folds = self.training and self.config.encoder_dims and not autocast and x_BI.dtype == torch.float32
        if folds and (isinstance(x_BI, SplitInput) or on_host(x_BI)):
            products = self.router.read_with(self.encoder.first_weight, x_BI)
            if products is not None:
                return self.encoder.after_product(products[0]), self.router.after_product(products[1])
        h_BD = self.encoder(x_BI)
        return h_BD, self.router(x_BI, h_BD)

    @property
    def trains_split(self) -> bool:
        """Whether a split input costs less in training: not if the routers read the whole of it."""
        config = self.config
        router = config.router
        by_column = router.input == "raw" and router.norm == "batch" and router.rank
        return bool(by_column and config.encoder_dims and self.newcomers is None and not config.groups.found)

    def route(self, x_BI: RankerInput, h_BD: Tensor) -> Routing:
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
            load_RE: Its :meth:`smes.rankers.sparse.routing.Routing.load`.
        """
        loss = BALANCE_LOSSES[self.config.balance.loss]
        if loss is None:
            return None
        selection = self.selection.current
        chosen_RE = load_RE[:, selection.stages.num_fixed :].float()
        traffic_RE = chosen_RE / (len(routing.experts_BRK) * selection.stages.num_chosen)
        probs_RE = selection.mean_probs(routing)
        if self.joining is not None:
            traffic_RE, probs_RE = self.joining.present.means(traffic_RE, probs_RE)
        return self.config.balance.weight * loss(self.reads.gates(traffic_RE), self.reads.gates(probs_RE))

    def choices(self, x_BI: RankerInput) -> Tensor:
        """The experts that each task chooses for each instance, without the fixed ones. int64 [B, T, K].

        They are those of the final selection: while the stream is young, the first of the current ones.
        """
        final = self.selection.final
        h_BD, z_BRC = self._read(x_BI)
        routing: Routing = final(z_BRC)
        chosen_BRK = routing.experts_BRK[..., final.stages.num_fixed :]
        choices_BTK = self.reads.choices(chosen_BRK)
        if self.newcomers is None:
            return choices_BTK
        new_BNK = self.newcomers.choices(self.newcomers.router(x_BI, h_BD), chosen_BRK.flatten(1), chosen_BRK.shape[2])
        return self._in_order(choices_BTK, new_BNK, dim=1)

    def expert_weights(self, x_BI: RankerInput) -> Tensor:
        """As of :class:`smes.rankers.ranker.RoutedRanker`, by the routing of :meth:`forward`."""
        h_BD, z_BRC = self._read(x_BI)
        routing: Routing = self.selection(z_BRC)
        B, R, _ = routing.experts_BRK.shape
        weights_BRE = routing.weights_BRK.new_zeros(B, R, routing.num_experts)
        weights_BRE = weights_BRE.scatter(2, routing.experts_BRK, routing.weights_BRK)
        weights_BTE = self.reads.outputs(weights_BRE)
        if self.newcomers is None:
            return weights_BTE
        runs_BE = torch.zeros(B, routing.num_experts, dtype=torch.bool, device=x_BI.device)
        new_BNE = self.newcomers.expert_weights(x_BI, h_BD, runs_BE.scatter(1, routing.experts_BRK.flatten(1), True))
        weights_BTE = F.pad(weights_BTE, (0, new_BNE.shape[2] - weights_BTE.shape[2]))
        return self._in_order(weights_BTE, new_BNE, dim=1)

    def forget(self, instances: int) -> None:
        """Take so many instances back: the step on them was not taken."""
        self.selection.forget(instances)

    def group_finder(self) -> GroupFinder | None:
        """A new search for the task groups; None where they are declared."""
        return self.reads.finder(self.input_dim)

    def regroup(self, groups: Clusters) -> None:
        """Route the tasks by groups that the search found."""
        self.reads.regroup(groups)

    def _shared(self, streams_BSH: Tensor, common_BH: Tensor | None) -> SharedStreams:
        """What each task reads of the routers' outputs, behind which those of the newcomers follow."""
        if not isinstance(self.reads, FoundReads):
            return SharedStreams(streams_BSH, self.share_TS, self.stream_T, common_BH, self._one_each)
        share_TS = self.reads.share_TG
        if self.newcomers is not None:
            founders_TS = F.pad(share_TS, (0, len(self.newcomers_NN)))
            newcomers_NS = F.pad(self.newcomers_NN, (share_TS.shape[1], 0))
            share_TS = self._in_order(founders_TS, newcomers_NS, dim=0)
        return SharedStreams(streams_BSH, share_TS, None, common_BH)

    def _in_order(self, founders: Tensor, newcomers: Tensor, dim: int) -> Tensor:
        """Rows of the founding tasks and of the newcomers, in the order of the tasks."""
        return torch.cat([founders, newcomers], dim=dim).index_select(dim, self.place_T)
