"""Shape of the SMES ranker: every part of it that can be chosen, and what fits together."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from smes.rankers.config import check_groups
from smes.rankers.sparse.experts import EXPERT_FORMS
from smes.rankers.sparse.stages import Stages

PAPER_FORM: Mapping[str, object] = {
    "experts": "full",
    "num_group": 0,
    "group_pools": "common",
    "routers": "task",
    "router_maps": "shared",
    "router_input": "encoder",
    "router_norm": "none",
    "router_scale": 1.0,
    "shared_experts": "routed",
    "trunk_dims": (),
    "balance_loss": "global",
    "max_active": None,
}
"""What ``form: paper`` stands for: the parts that the paper describes. It publishes no figures."""

_BY_FORM: Any = object()  # a key's default where the form decides it; Any, as it stands in for values of every type

_OWN_DEFAULTS: Mapping[str, object] = {
    "num_experts": 64,
    "num_shared": 0,
    "num_group": 4,
    "num_adaptive": 0,
    "expert_dims": (32,),
    "group_pools": "own",
    "routers": "group",
    "router_maps": "per_task",
    "experts": "residual",
    "router_rank": 16,
    "router_input": "raw",
    "router_norm": "batch",
}
_PAPER_DEFAULTS: Mapping[str, object] = {
    **PAPER_FORM,
    "num_experts": 16,
    "num_shared": 2,
    "num_adaptive": 1,
    "expert_dims": (64,),
    "router_rank": None,
}


@dataclass(frozen=True)
class SmesConfig:
    """Shape of the SMES ranker. The paper publishes none of the figures: all defaults are ours.

    The default is not the paper's form: a router per task group, on the standardised raw input, chooses 4 of the
    group's own 32 experts (for two groups), which its tasks share. With ``form: paper`` the keys that are not given
    have other defaults, as said below; a key that is given is never changed.

    Attributes:
        num_experts: E, all experts, those of all groups and tasks together. 16 in the paper's form. A multiple of the
            number of task groups where they have their own pools.
        num_shared: K_s, experts for all tasks together. 2 in the paper's form.
        num_adaptive: K_a, experts that each task adds for itself. 1 in the paper's form.
        encoder_dims: Widths of the shared encoder's layers (``SiLU(LayerNorm(Linear))``), multiples of 8; none: experts
            and routers read the raw input.
        expert_dims: Widths of an expert's layers; multiples of 8 (the GPU's grouped GEMM wants 16-byte rows). (64,) in
            the paper's form.
        experts: Form of an expert: ``full`` is the paper's; ``low_rank`` and ``residual`` are differences from a shared
            base, of one layer.
        expert_rank: Rank of ``low_rank`` experts; a multiple of 8.
        expert_narrow_dim: Width of the projection that ``residual`` experts read; a multiple of 8.
        router_rank: Width of a low-rank router; None for a linear one, as in the paper's form.
        router_input: What routers read: ``encoder``, its output (the paper's), ``raw``, what the encoder reads, or
            ``both``.
        balance: β, the weight of the balance loss.
        balance_loss: ``global`` over all tasks (the paper's), ``per_gate``, ``mutual_information`` or ``none``.
        max_active: Budget of experts executed per instance, whatever the number of tasks; None for none.
        stage_one_weights: w_t of stage I per task, in the schema's order; None for 1/T each.
        form: ``paper`` for the parts as the paper has them (:data:`PAPER_FORM`): they are these keys' defaults then,
            and other values are refused. None: what the keys say.
        groups: Task groups: the names of the tasks of each, as in :attr:`smes.rankers.config.HomeConfig.groups`.
        found_groups: G, task groups found from the stream in place of declared ones; 0 for those that ``groups`` says.
            Until they are found, every task reads the mean of what the groups' pools give
            (:mod:`smes.rankers.sparse.groups`).
        found_until: Groups are looked for, and again, over so many instances.
        num_group: K_g, experts for each task group, chosen between those for all tasks and those for one.
        early_group: K_g while the stream is young, above ``num_group``; 0 for the same throughout
            (:mod:`smes.rankers.sparse.routing`).
        early_until: It is so up to so many instances, half of it up to twice as many, and so on down to ``num_group``.
        group_pools: Where groups and their tasks choose: ``common``, in one pool; ``own``, each group in its own equal
            part of the experts. Then there are no shared ones, or fixed ones beside the parts.
        routers: One per ``task`` (the paper's), or one per ``group``, whose tasks then share experts and weights.
        router_maps: The first map of low-rank routers: ``shared`` by all, or ``per_task``, one of each router's own.
        router_norm: How what routers read is normalised: ``none``, ``layer`` or ``batch``, as
            :class:`smes.rankers.sparse.router.Router` says.
        router_scale: Factor of the routers' first weights, > 0.
        shared_experts: ``routed``, K_s chosen for each instance (the paper's), or ``always_on``, the first K_s of the
            pool for every instance, weighted together with the routed ones (as in arXiv 2510.00570).
        trunk_dims: Widths of an always-on network on the ranker's input, whose output is added to every task's; none
            for no trunk. The last must be the experts' last.
        expert_norm: ``layer``, ``rms`` or ``none``, in all forms of experts.
    """

    num_experts: int = _BY_FORM
    num_shared: int = _BY_FORM
    num_adaptive: int = _BY_FORM
    encoder_dims: tuple[int, ...] = (128,)
    expert_dims: tuple[int, ...] = _BY_FORM
    experts: str = _BY_FORM
    expert_rank: int = 8
    expert_narrow_dim: int = 32
    router_rank: int | None = _BY_FORM
    router_input: str = _BY_FORM
    balance: float = 1e-2
    balance_loss: str = "global"
    max_active: int | None = None
    stage_one_weights: tuple[float, ...] | None = None
    form: str | None = None
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)
    found_groups: int = 0
    found_until: int = 131_072
    num_group: int = _BY_FORM
    early_group: int = 0
    early_until: int = 16_384
    group_pools: str = _BY_FORM
    routers: str = _BY_FORM
    router_maps: str = _BY_FORM
    router_norm: str = _BY_FORM
    router_scale: float = 1.0
    shared_experts: str = "routed"
    trunk_dims: tuple[int, ...] = ()
    expert_norm: str = "layer"

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", check_groups("smes", self.groups))
        _take_form(self)
        _check_choices(self)
        _check_widths(self)
        _check_routers(self)
        _check_found_groups(self)
        _check_early_group(self)
        self.stages(tuple(range(self.found_groups)) or (0,))

    def stages(self, group_T: tuple[int, ...], num_group: int | None = None) -> Stages:
        """The stages of the routing.

        Args:
            group_T: The group of each router, numbered from 0 without gaps.
            num_group: K_g, where it is another one than the configured.

        Raises:
            ValueError: Numbers of experts that do not fit together, or not with so many groups.
        """
        fixed = self.num_shared if self.shared_experts == "always_on" else 0
        return Stages(
            num_experts=self.num_experts,
            group_T=group_T,
            num_shared=self.num_shared - fixed,
            num_group=self.num_group if num_group is None else num_group,
            num_adaptive=self.num_adaptive,
            num_fixed=fixed,
            own_pools=self.group_pools == "own",
            max_active=self.max_active,
        )


def _take_form(config: SmesConfig) -> None:
    if config.form not in (None, "paper"):
        raise ValueError(f"smes.form: {config.form!r}, expected 'paper' or none")
    for name, default in (_PAPER_DEFAULTS if config.form else _OWN_DEFAULTS).items():
        if getattr(config, name) is _BY_FORM:
            object.__setattr__(config, name, default)
    if config.form is None:
        return
    if not config.encoder_dims:
        raise ValueError("smes.encoder_dims: [], expected an encoder in the paper's form")
    for name, paper in PAPER_FORM.items():
        if (value := getattr(config, name)) != paper:
            raise ValueError(f"smes.{name}: {value!r}, expected {paper!r} in the paper's form")


def _check_choices(config: SmesConfig) -> None:
    known: dict[str, Iterable[str]] = {
        "experts": EXPERT_FORMS,
        "expert_norm": ("layer", "rms", "none"),
        "group_pools": ("common", "own"),
        "routers": ("task", "group"),
        "router_input": ("encoder", "raw", "both"),
        "router_maps": ("shared", "per_task"),
        "router_norm": ("none", "layer", "batch"),
        "shared_experts": ("routed", "always_on"),
        "balance_loss": ("global", "per_gate", "mutual_information", "none"),
    }
    for name, choices in known.items():
        if getattr(config, name) not in choices:
            raise ValueError(f"smes.{name}: {getattr(config, name)!r}, expected one of {list(choices)}")
    if config.balance < 0:
        raise ValueError(f"smes.balance: {config.balance}, expected at least 0")


def _check_widths(config: SmesConfig) -> None:
    for name, least in (("encoder_dims", 0), ("expert_dims", 1), ("trunk_dims", 0)):
        dims = getattr(config, name)
        if len(dims) < least or any(d < 8 or d % 8 for d in dims):
            many = "one or more" if least else "no or more"
            raise ValueError(f"smes.{name}: {list(dims)}, expected {many} positive multiples of 8")
    if config.experts != "full" and len(config.expert_dims) > 1:
        raise ValueError(f"smes.expert_dims: {list(config.expert_dims)}, expected one layer for {config.experts}")
    for name in ("expert_rank", "expert_narrow_dim"):
        if (width := getattr(config, name)) < 8 or width % 8:
            raise ValueError(f"smes.{name}: {width}, expected a positive multiple of 8")
    if config.trunk_dims and config.trunk_dims[-1] != config.expert_dims[-1]:
        raise ValueError(
            f"smes.trunk_dims: {list(config.trunk_dims)}, expected the last to be that of expert_dims "
            f"({config.expert_dims[-1]})"
        )


def _check_routers(config: SmesConfig) -> None:
    if config.router_rank is not None and config.router_rank < 1:
        raise ValueError(f"smes.router_rank: {config.router_rank}, expected at least 1, or none")
    if not config.router_scale > 0:
        raise ValueError(f"smes.router_scale: {config.router_scale}, expected more than 0")
    if config.router_maps == "per_task" and config.router_rank is None:
        raise ValueError(
            "smes.router_maps: 'per_task', expected a router_rank with it: linear routers have no such map"
        )
    if config.router_input == "both" and not config.encoder_dims:
        raise ValueError("smes.router_input: 'both', expected encoder_dims with it: without, both are the same")
    if config.routers == "group" and config.num_adaptive:
        raise ValueError(
            f"smes.num_adaptive: {config.num_adaptive}, expected 0 with routers per group: their tasks share experts"
        )


def _check_found_groups(config: SmesConfig) -> None:
    if config.found_until < 1:
        raise ValueError(f"smes.found_until: {config.found_until}, expected at least 1")
    if not config.found_groups:
        return
    if config.found_groups < 2:
        raise ValueError(f"smes.found_groups: {config.found_groups}, expected 0, or 2 at least")
    needed: dict[str, object] = {"groups": {}, "routers": "group", "group_pools": "own", "stage_one_weights": None}
    for name, value in needed.items():
        if getattr(config, name) != value:
            raise ValueError(f"smes.{name}: {getattr(config, name)!r}, expected {value!r} where groups are found")


def _check_early_group(config: SmesConfig) -> None:
    if config.early_group and not 1 <= config.num_group < config.early_group:
        raise ValueError(
            f"smes.early_group: {config.early_group}, expected 0, or more than num_group ({config.num_group}), which "
            "must be 1 at least"
        )
    if config.early_until < 1:
        raise ValueError(f"smes.early_until: {config.early_until}, expected at least 1")
