"""SMES: sparse mixture of experts with progressive routing (arXiv 2602.09386).

Letters: B instances, T tasks, E experts, K = K_s + K_a experts of one task, I input width, D encoder width, H output
width of an expert.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smes.balance import BALANCE_LOSSES
from smes.dispatch import combine, dispatch
from smes.encoder import Encoder
from smes.experts import Experts, FullExperts, LowRankExperts, ResidualExperts
from smes.ranker import ExpertLimits, RankerOutput, RoutingStats
from smes.routing import Router, Routing, expert_load, route, union_bound


@dataclass(frozen=True)
class SmesConfig:
    """Shape of the SMES ranker. The paper publishes none of these figures: all defaults are ours.

    Attributes:
        num_experts: E, the common pool of all tasks.
        num_shared: K_s, experts chosen per instance for all tasks together.
        num_adaptive: K_a, experts that each task adds for itself.
        encoder_dims: Widths of the shared encoder's layers (``SiLU(LayerNorm(Linear))``); multiples of 8.
        expert_dims: Widths of an expert's layers; multiples of 8 (the GPU's grouped GEMM wants 16-byte rows).
        experts: Form of an expert: ``full`` is the paper's; ``low_rank`` and ``residual`` are differences from a shared
            base, of one layer.
        expert_rank: Rank of ``low_rank`` experts; a multiple of 8.
        expert_narrow_dim: Width of the projection that ``residual`` experts read; a multiple of 8.
        router_rank: Width of a low-rank router; None for a linear one. Worth it above about 64 experts.
        router_input: What routers read: ``encoder``, its output (the paper's), or ``raw``, what the encoder reads.
        balance: β, the weight of the balance loss.
        balance_loss: ``global`` over all tasks (the paper's), ``per_gate``, ``mutual_information`` or ``none``.
        max_active: Budget of experts executed per instance, whatever the number of tasks; None for none.
        stage_one_weights: w_t of stage I per task, in the schema's order; None for 1/T each.
    """

    num_experts: int = 16
    num_shared: int = 2
    num_adaptive: int = 1
    encoder_dims: tuple[int, ...] = (128,)
    expert_dims: tuple[int, ...] = (64,)
    experts: str = "full"
    expert_rank: int = 8
    expert_narrow_dim: int = 32
    router_rank: int | None = None
    router_input: str = "encoder"
    balance: float = 1e-2
    balance_loss: str = "global"
    max_active: int | None = None
    stage_one_weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        per_task = self.num_shared + self.num_adaptive
        if self.num_shared < 0 or self.num_adaptive < 0 or not 1 <= per_task <= self.num_experts:
            raise ValueError(
                f"smes: num_shared {self.num_shared} + num_adaptive {self.num_adaptive}, "
                f"expected both ≥ 0 and 1 … num_experts ({self.num_experts}) together"
            )
        for name in ("encoder_dims", "expert_dims"):
            dims = getattr(self, name)
            if not dims or any(d < 8 or d % 8 for d in dims):
                raise ValueError(f"smes.{name}: {list(dims)}, expected one or more positive multiples of 8")
        if self.experts not in EXPERT_FORMS:
            raise ValueError(f"smes.experts: {self.experts!r}, expected one of {sorted(EXPERT_FORMS)}")
        if self.experts != "full" and len(self.expert_dims) > 1:
            raise ValueError(f"smes.expert_dims: {list(self.expert_dims)}, expected one layer for {self.experts}")
        for name in ("expert_rank", "expert_narrow_dim"):
            if (width := getattr(self, name)) < 8 or width % 8:
                raise ValueError(f"smes.{name}: {width}, expected a positive multiple of 8")
        if self.router_rank is not None and self.router_rank < 1:
            raise ValueError(f"smes.router_rank: {self.router_rank}, expected at least 1, or none")
        if self.balance < 0:
            raise ValueError(f"smes.balance: {self.balance}, expected at least 0")
        for name, known in (("router_input", ("encoder", "raw")), ("balance_loss", sorted(BALANCE_LOSSES))):
            if getattr(self, name) not in known:
                raise ValueError(f"smes.{name}: {getattr(self, name)!r}, expected one of {list(known)}")
        if self.max_active is not None and self.max_active < per_task:
            raise ValueError(
                f"smes.max_active: {self.max_active}, expected none or at least num_shared + num_adaptive ({per_task})"
            )


def _full(config: SmesConfig) -> Experts:
    return FullExperts(config.num_experts, config.encoder_dims[-1], config.expert_dims)


def _low_rank(config: SmesConfig) -> Experts:
    return LowRankExperts(config.num_experts, config.encoder_dims[-1], config.expert_dims[0], config.expert_rank)


def _residual(config: SmesConfig) -> Experts:
    return ResidualExperts(config.num_experts, config.encoder_dims[-1], config.expert_dims[0], config.expert_narrow_dim)


EXPERT_FORMS: dict[str, Callable[[SmesConfig], Experts]] = {"full": _full, "low_rank": _low_rank, "residual": _residual}
"""Forms of an expert by their name in the configuration; each builder returns a module."""


class SMES(nn.Module):
    """The ranker of the paper: encoder → routing in two stages → experts, each once per instance → one h_t per task.

    Args:
        input_dim: I.
        num_tasks: T.
        config: Its shape.

    Raises:
        ValueError: ``stage_one_weights`` has another length than T, or no positive sum.
    """

    stage_one_weights_T: Tensor

    def __init__(self, input_dim: int, num_tasks: int, config: SmesConfig) -> None:
        super().__init__()
        self.config = config
        self.output_dim = config.expert_dims[-1]
        bound = union_bound(num_tasks, config.num_experts, config.num_shared, config.num_adaptive, config.max_active)
        self.expert_limits: ExpertLimits | None = ExpertLimits(bound, config.num_experts)
        self.encoder = Encoder(input_dim, config.encoder_dims)
        routed_dim = input_dim if config.router_input == "raw" else config.encoder_dims[-1]
        self.router = Router(routed_dim, num_tasks, config.num_experts, config.router_rank)
        self.experts = EXPERT_FORMS[config.experts](config)
        weights = torch.tensor(config.stage_one_weights or (1.0,) * num_tasks)
        if len(weights) != num_tasks or bool((weights < 0).any()) or not float(weights.sum()) > 0:
            raise ValueError(
                f"smes.stage_one_weights: {weights.tolist()}, expected {num_tasks} weights ≥ 0, one > 0 at least"
            )
        self.register_buffer("stage_one_weights_T", weights / weights.sum(), persistent=False)

    def forward(self, x_BI: Tensor) -> RankerOutput:
        """Representations per task, the balance loss (times β) and the routing's figures, for B ≥ 1 instances."""
        h_BD = self.encoder(x_BI)
        routing = self.route(x_BI, h_BD)
        plan = dispatch(routing, trim=h_BD.device.type == "cpu")
        tasks_BTH = combine(self.experts(h_BD, plan), routing.weights_BTK, plan)
        load_TE = expert_load(routing.experts_BTK, self.config.num_experts)
        balance = BALANCE_LOSSES[self.config.balance_loss]
        return RankerOutput(
            tasks_BTH=tasks_BTH,
            auxiliary_loss=None if balance is None else self.config.balance * balance(routing, load_TE),
            stats=RoutingStats(active_B=plan.active_B, load_TE=load_TE),
        )

    def route(self, x_BI: Tensor, h_BD: Tensor) -> Routing:
        """Which experts each task of each instance uses.

        Args:
            x_BI: What the encoder read.
            h_BD: What it made of it.
        """
        config = self.config
        z_BTE = self.router(x_BI if config.router_input == "raw" else h_BD)
        return route(z_BTE, self.stage_one_weights_T, config.num_shared, config.num_adaptive, config.max_active)
