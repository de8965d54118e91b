"""Shape of the SMES ranker: nested parts, each beside what it configures, and three complete configurations.

Importing this does not import torch.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import MinLen

from smes.ranges import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Width, check_ranges
from smes.rankers.config import check_groups
from smes.rankers.sparse.stages import Stages

ExpertForm = Literal["residual", "low_rank", "full"]
"""Forms of an expert; the modules are in :data:`smes.rankers.sparse.experts.EXPERT_FORMS`."""
ExpertNorm = Literal["layer", "rms", "none"]
"""Norms of an expert; the functions are in :data:`smes.rankers.sparse.experts.EXPERT_NORMS`."""
RouterNorm = Literal["batch", "layer", "none"]
"""Norms of a router's input; :class:`smes.rankers.sparse.router.Router` implements them."""
BalanceLoss = Literal["global", "per_gate", "mutual_information", "none"]
"""Balance losses; the functions are in :data:`smes.rankers.sparse.router.BALANCE_LOSSES`."""


@dataclass(frozen=True)
class RouterConfig:
    """The routers: what they read, and how they map it to logits of the experts.

    Attributes:
        per: ``task``, one router per task (the paper's); ``group``, one per task group, whose tasks then share experts
            and weights.
        input: ``encoder``, the encoder's output (the paper's); ``raw``, the encoder's input; or ``both``.
        rank: Width of a low-rank router; None for a linear one.
        maps: First map of low-rank routers: ``own``, one for each router, or ``shared``, one for all.
        norm: Norm of the input. ``layer`` normalises each instance by itself; ``batch`` standardises each column by its
            moments over the stream.
        scale: Factor of the routers' first weights.
    """

    per: Literal["group", "task"] = "group"
    input: Literal["raw", "encoder", "both"] = "raw"
    rank: PositiveInt | None = 16
    maps: Literal["own", "shared"] = "own"
    norm: RouterNorm = "batch"
    scale: PositiveFloat = 1.0

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.maps == "own" and self.rank is None:
            raise ValueError("RouterConfig.maps: 'own', expected a rank with it: linear routers have only one map")


@dataclass(frozen=True)
class ExpertsConfig:
    """The experts.

    Attributes:
        num: E, all experts, those of all groups and tasks together. A multiple of the number of task groups where
            groups have their own pools.
        form: ``full`` is the paper's; ``low_rank`` and ``residual`` experts are differences from a shared base, of one
            layer.
        dims: Widths of an expert's layers.
        rank: Rank of ``low_rank`` experts.
        narrow_dim: Width of the projection that ``residual`` experts read.
        norm: Norm of each expert's output, for all forms.
    """

    num: PositiveInt = 64
    form: ExpertForm = "residual"
    dims: Annotated[tuple[Width, ...], MinLen(1)] = (64,)
    rank: Width = 8
    narrow_dim: Width = 32
    norm: ExpertNorm = "none"

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.form != "full" and len(self.dims) > 1:
            raise ValueError(f"ExpertsConfig.dims: {list(self.dims)}, expected one layer for {self.form} experts")


@dataclass(frozen=True)
class GroupsConfig:
    """The task groups, declared or found from the stream, and which experts each may choose.

    Attributes:
        declared: Names of tasks by the name of their group, as in :attr:`smes.rankers.config.HomeConfig.groups`.
        found: G, the number of task groups to find from the stream; 0: the groups are those of ``declared``. Until they
            are found, every task reads the mean of what the groups' pools give (:mod:`smes.rankers.sparse.groups`).
        found_until: The search for groups ends after this many instances.
        pools: ``own``: each group chooses from its own equal part of the experts. ``common``: all choose from one pool.
        probe_until: A task that a change of the schema brings reads the experts of the others for at most this many
            instances before it is known whether these serve it (:mod:`smes.model.probing`); only if they do not, it
            gets experts of its own.
    """

    declared: dict[str, tuple[str, ...]] = field(default_factory=dict)
    found: NonNegativeInt = 0
    found_until: PositiveInt = 131_072
    pools: Literal["own", "common"] = "own"
    probe_until: PositiveInt = 262_144

    def __post_init__(self) -> None:
        check_ranges(self)
        check_groups("GroupsConfig.declared", self.declared)
        if self.found == 1:
            raise ValueError("GroupsConfig.found: 1, expected 0 or at least 2")
        if self.found and self.declared:
            raise ValueError(f"GroupsConfig.declared: {self.declared}, expected {{}} where groups are found")
        if self.found and self.pools != "own":
            raise ValueError(f"GroupsConfig.pools: {self.pools!r}, expected 'own' where groups are found")


@dataclass(frozen=True)
class EarlyConfig:
    """More experts for each task group while the stream is young: large pools learn faster so.

    Attributes:
        num_group: K_g at first, more than the later ``num_group``; 0 for the same K_g throughout.
        until: The first K_g holds for this many instances, half of it up to twice as many, and so on down to the later
            K_g (:mod:`smes.rankers.sparse.routing`).
    """

    num_group: NonNegativeInt = 0
    until: PositiveInt = 16_384

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class BalanceConfig:
    """The loss that spreads the routers' traffic over the experts.

    Attributes:
        weight: β, the weight of the loss.
        loss: ``global`` over all tasks (the paper's), ``per_gate``, ``mutual_information`` or ``none``
            (:mod:`smes.rankers.sparse.router`).
    """

    weight: NonNegativeFloat = 1e-2
    loss: BalanceLoss = "global"

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class SmesConfig:
    """Shape of the SMES ranker. The defaults are those of :func:`smes_default`.

    Attributes:
        encoder_dims: Widths of the shared encoder's layers (``SiLU(LayerNorm(Linear))``); empty: experts and routers
            read the raw input.
        trunk_dims: Widths of a network that always runs and whose output is added to every task's representation;
            empty for none. The last must be that of ``experts.dims``.
        trunk_input: What the trunk reads: ``raw``, the ranker's input, or ``encoder``, the encoder's output.
        num_shared: K_s, the experts chosen for all tasks together (stage I).
        num_group: K_g, the experts chosen for each task group (stage II).
        num_adaptive: K_a, the experts that each task adds for itself (stage III).
        shared_experts: ``routed``: the K_s experts are chosen for each instance (the paper's). ``always_on``: the first
            K_s experts run for every instance, weighted together with the routed ones (as in arXiv 2510.00570).
        max_active: Budget of experts that run for an instance, whatever the number of tasks; None for no budget.
        stage_one_weights: w_t of stage I per task, in the schema's order; None for 1/T each.
        router, experts, groups, early, balance: The parts.
    """

    encoder_dims: tuple[Width, ...] = (64,)
    trunk_dims: tuple[Width, ...] = (64,)
    trunk_input: Literal["raw", "encoder"] = "encoder"
    num_shared: NonNegativeInt = 0
    num_group: NonNegativeInt = 4
    num_adaptive: NonNegativeInt = 0
    shared_experts: Literal["routed", "always_on"] = "routed"
    max_active: PositiveInt | None = None
    stage_one_weights: tuple[NonNegativeFloat, ...] | None = None
    router: RouterConfig = field(default_factory=RouterConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    groups: GroupsConfig = field(default_factory=GroupsConfig)
    early: EarlyConfig = field(default_factory=EarlyConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)

    def __post_init__(self) -> None:
        check_ranges(self)
        self._check_routers()
        self._check_found_groups()
        if self.trunk_dims and self.trunk_dims[-1] != self.experts.dims[-1]:
            wanted = f"expected the last to be that of experts.dims ({self.experts.dims[-1]})"
            raise ValueError(f"SmesConfig.trunk_dims: {list(self.trunk_dims)}, {wanted}")
        if self.early.num_group and not 1 <= self.num_group < self.early.num_group:
            wanted = f"expected 0, or more than num_group ({self.num_group}), which must be at least 1"
            raise ValueError(f"SmesConfig.early.num_group: {self.early.num_group}, {wanted}")
        self.stages(tuple(range(self.groups.found)) or (0,))

    def stages(self, group_R: tuple[int, ...], num_group: int | None = None) -> Stages:
        """The stages of the routing.

        Args:
            group_R: The group of each router, numbered from 0 without gaps.
            num_group: K_g; None for the configured one.

        Raises:
            ValueError: The numbers of experts do not fit together, or do not fit this many groups.
        """
        fixed = self.num_shared if self.shared_experts == "always_on" else 0
        return Stages(
            num_experts=self.experts.num,
            group_R=group_R,
            num_shared=self.num_shared - fixed,
            num_group=self.num_group if num_group is None else num_group,
            num_adaptive=self.num_adaptive,
            num_fixed=fixed,
            own_pools=self.groups.pools == "own",
            max_active=self.max_active,
        )

    def _check_routers(self) -> None:
        if self.router.input == "both" and not self.encoder_dims:
            wanted = "expected encoder_dims with it: without an encoder both are the same"
            raise ValueError(f"SmesConfig.router.input: 'both', {wanted}")
        if self.router.per == "group" and self.num_adaptive:
            wanted = "expected 0 with a router per group: its tasks share their experts"
            raise ValueError(f"SmesConfig.num_adaptive: {self.num_adaptive}, {wanted}")

    def _check_found_groups(self) -> None:
        if not self.groups.found:
            return
        if self.router.per != "group":
            raise ValueError(f"SmesConfig.router.per: {self.router.per!r}, expected 'group' where groups are found")
        if self.stage_one_weights is not None:
            weights = list(self.stage_one_weights)
            raise ValueError(f"SmesConfig.stage_one_weights: {weights}, expected null where groups are found")


def smes_default() -> SmesConfig:
    """The default: an always-on trunk, and for each task group a router that chooses 4 of the group's own experts.

    With two groups each has 32 of the 64 experts. All tasks of a group share the chosen experts. The trunk serves
    rare tasks (docs/experiments/rare-tasks.md).
    """
    return SmesConfig()


def smes_paper() -> SmesConfig:
    """SMES's parts as the paper describes them (arXiv 2602.09386). It publishes no sizes: those here are ours."""
    return SmesConfig(
        encoder_dims=(128,),
        trunk_dims=(),
        num_shared=2,
        num_group=0,
        num_adaptive=1,
        router=RouterConfig(per="task", input="encoder", rank=None, maps="shared", norm="none"),
        experts=ExpertsConfig(num=16, form="full", dims=(64,), norm="layer"),
        groups=GroupsConfig(pools="common"),
    )


def smes_large() -> SmesConfig:
    """256 full experts for long streams with many regimes, of which more run at first.

    It is what the benchmark of synthetic worlds compares with dense rankers, with task groups to be declared.
    """
    return SmesConfig(
        encoder_dims=(128,),
        trunk_dims=(),
        num_group=4,
        router=RouterConfig(input="raw", rank=64, maps="own"),
        experts=ExpertsConfig(num=256, form="full", dims=(32,), norm="layer"),
        early=EarlyConfig(num_group=16),
    )
