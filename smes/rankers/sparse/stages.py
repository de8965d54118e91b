"""How many experts each stage of the routing chooses, and from which of them.

Letters: E experts, L experts of a pool, T tasks, R routers (one per task, or one per task group), G task groups.
"""

from dataclasses import dataclass

from smes.ranges import NonNegativeInt, PositiveInt, check_ranges


@dataclass(frozen=True, slots=True)
class Stages:
    """The three stages: experts for all tasks, for a task group, for one router.

    The first ``num_fixed`` experts belong to every router's set, for every instance. The others are the pool that the
    stages choose from. With ``own_pools`` they are G equal pools, and each group chooses from its own.

    Attributes:
        num_experts: E.
        group_R: The group of each router, numbered from 0 without gaps.
        num_shared: K_s, chosen in stage I for all routers together; fixed experts do not count.
        num_group: K_g, chosen in stage II for each group.
        num_adaptive: K_a, chosen in stage III by each router for itself.
        num_fixed: K_0.
        own_pools: Whether each group chooses from its own pool. Then there is no stage I.
        max_active: Budget of experts that run for an instance, whatever R and G; None for no budget.

    Raises:
        ValueError: The numbers do not fit together; the message names the keys of
            :class:`smes.rankers.sparse.config.SmesConfig`.
    """

    num_experts: PositiveInt
    group_R: tuple[NonNegativeInt, ...]
    num_shared: NonNegativeInt = 0
    num_group: NonNegativeInt = 0
    num_adaptive: NonNegativeInt = 0
    num_fixed: NonNegativeInt = 0
    own_pools: bool = False
    max_active: PositiveInt | None = None

    def __post_init__(self) -> None:
        check_ranges(self)
        if not 1 <= self.num_chosen <= self.num_experts - self.num_fixed:
            raise ValueError(
                f"SmesConfig.num_shared: {self.num_shared or self.num_fixed} with num_group {self.num_group} and "
                f"num_adaptive {self.num_adaptive}, expected at least one expert to choose, and together at most "
                f"experts.num ({self.num_experts})"
            )
        if self.own_pools:
            self._check_own_pools()
        least = self.num_fixed + self.num_pools * self.num_chosen
        if self.max_active is not None and self.max_active < least:
            what = "num_shared + num_group + num_adaptive"
            if self.num_pools > 1:
                what = f"num_group + num_adaptive for each of {self.num_pools} own pools, and the fixed experts"
            raise ValueError(f"SmesConfig.max_active: {self.max_active}, expected null or at least {what} ({least})")

    def _check_own_pools(self) -> None:
        if self.num_shared:
            wanted = "expected 0 where groups have their own pools (or shared_experts: always_on)"
            raise ValueError(f"SmesConfig.num_shared: {self.num_shared}, {wanted}")
        routed = self.num_experts - self.num_fixed
        if routed % self.num_groups or self.pool_size < self.num_chosen:
            each = max(round(routed / self.num_groups), self.num_chosen)
            raise ValueError(
                f"SmesConfig.experts.num: {routed} to choose from, expected a multiple of the number of task groups "
                f"({self.num_groups}), at least {self.num_chosen} for each, for own pools: set experts.num to "
                f"{self.num_fixed + each * self.num_groups}, say, or groups.pools to common"
            )

    @property
    def num_groups(self) -> int:
        """G."""
        return max(self.group_R) + 1

    @property
    def num_chosen(self) -> int:
        """Experts chosen for each router; fixed experts do not count."""
        return self.num_shared + self.num_group + self.num_adaptive

    @property
    def per_router(self) -> int:
        """K, the experts of each router."""
        return self.num_fixed + self.num_chosen

    @property
    def num_pools(self) -> int:
        """P: G where groups have their own pools, else 1."""
        return self.num_groups if self.own_pools else 1

    @property
    def disjoint(self) -> bool:
        """Whether no two routers can choose the same expert: there is one router, or each has a pool of its own."""
        return len(self.group_R) == 1 or (self.num_fixed == 0 and len(self.group_R) == self.num_pools)

    @property
    def pool_size(self) -> int:
        """L, the experts that a router chooses from."""
        return (self.num_experts - self.num_fixed) // self.num_pools

    @property
    def columns(self) -> int:
        """C, the logits of a router: one for each fixed expert, then one for each expert of its pool."""
        return self.num_fixed + self.pool_size

    @property
    def pool_bounds(self) -> tuple[int, ...]:
        """The most experts of each pool that an instance could use without a budget. [P]."""
        groups = [[g] for g in range(self.num_groups)] if self.own_pools else [range(self.num_groups)]
        wanted = [
            self.num_shared + len(pool) * self.num_group + sum(g in pool for g in self.group_R) * self.num_adaptive
            for pool in groups
        ]
        return tuple(min(n, self.pool_size) for n in wanted)

    @property
    def quota(self) -> int | None:
        """The most experts of each pool that the budget allows; None where the budget cannot be exceeded."""
        if self.max_active is None or self.max_active >= self.num_fixed + sum(self.pool_bounds):
            return None
        return (self.max_active - self.num_fixed) // self.num_pools

    @property
    def bound(self) -> int:
        """The most experts that an instance can use.

        Without a budget ``K_0 + min(K_s + G·K_g + R·K_a, L)``; with own pools ``K_0 + Σ_g min(K_g + R_g·K_a, L)`` for
        groups of R_g routers.
        """
        quota = self.quota
        return self.num_fixed + sum(n if quota is None else min(n, quota) for n in self.pool_bounds)
