"""How many experts each stage of the routing chooses, from where, and the most that an instance can use.

Letters: E experts, L experts of a pool, T routers (one per task, or per task group), G groups of them.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stages:
    """The three stages: experts for all tasks, for a task group, for one task.

    The first ``num_fixed`` experts are in every task's set, for every instance. The others are the pool that the stages
    choose from, or, with ``own_pools``, G equal parts of it: each group chooses from its own.

    Attributes:
        num_experts: E.
        group_T: The group of each router, numbered from 0 without gaps.
        num_shared: K_s, chosen in stage I for all tasks together (those that are fixed not counted).
        num_group: K_g, chosen in stage II for each group.
        num_adaptive: K_a, chosen in stage III by each router for itself.
        num_fixed: K_0.
        own_pools: Whether each group chooses from its own part of the pool. Then there is no stage I.
        max_active: Budget of an instance's union, whatever T and G; None for none.
    """

    num_experts: int
    group_T: tuple[int, ...]
    num_shared: int = 0
    num_group: int = 0
    num_adaptive: int = 0
    num_fixed: int = 0
    own_pools: bool = False
    max_active: int | None = None

    def __post_init__(self) -> None:
        counts = (self.num_shared, self.num_group, self.num_adaptive, self.num_fixed)
        if min(counts) < 0 or not 1 <= self.num_chosen <= self.num_experts - self.num_fixed:
            raise ValueError(
                f"smes: stages of num_shared {self.num_shared or self.num_fixed}, num_group {self.num_group} and "
                f"num_adaptive {self.num_adaptive} experts, expected all ≥ 0, one to choose at least, and together at "
                f"most num_experts ({self.num_experts})"
            )
        if self.own_pools:
            self._check_own_pools()
        least = self.num_fixed + self.num_pools * self.num_chosen
        if self.max_active is not None and self.max_active < least:
            what = "num_shared + num_group + num_adaptive"
            if self.num_pools > 1:
                what = f"num_group + num_adaptive for each of {self.num_pools} own pools, and the fixed ones"
            raise ValueError(f"smes.max_active: {self.max_active}, expected none or at least {what} ({least})")

    def _check_own_pools(self) -> None:
        routed = self.num_experts - self.num_fixed
        if self.num_shared:
            raise ValueError(
                f"smes.num_shared: {self.num_shared}, expected 0 where groups have their own pools (or always_on)"
            )
        if routed % self.num_groups or self.pool_size < self.num_chosen:
            each = max(round(routed / self.num_groups), self.num_chosen)
            raise ValueError(
                f"smes.num_experts: {routed} to choose from, expected a multiple of the number of task groups "
                f"({self.num_groups}), at least {self.num_chosen} for each, for own pools: set num_experts to "
                f"{self.num_fixed + each * self.num_groups}, say, or group_pools to common"
            )

    @property
    def num_groups(self) -> int:
        """G."""
        return max(self.group_T) + 1

    @property
    def num_chosen(self) -> int:
        """Experts chosen for each task, the fixed ones not counted."""
        return self.num_shared + self.num_group + self.num_adaptive

    @property
    def per_task(self) -> int:
        """K, experts of each task."""
        return self.num_fixed + self.num_chosen

    @property
    def num_pools(self) -> int:
        """G where groups have their own, else 1."""
        return self.num_groups if self.own_pools else 1

    @property
    def disjoint(self) -> bool:
        """Whether no two routers can choose the same expert: one router, or each with a pool of its own."""
        return len(self.group_T) == 1 or (self.num_fixed == 0 and len(self.group_T) == self.num_pools)

    @property
    def pool_size(self) -> int:
        """L, experts that a router chooses from."""
        return (self.num_experts - self.num_fixed) // self.num_pools

    @property
    def columns(self) -> int:
        """Logits that a router gives: for the fixed experts, then for those of its pool."""
        return self.num_fixed + self.pool_size

    @property
    def pool_bounds(self) -> tuple[int, ...]:
        """The most experts of each pool that an instance could use if there were no budget."""
        groups = [[g] for g in range(self.num_groups)] if self.own_pools else [range(self.num_groups)]
        wanted = [
            self.num_shared + len(pool) * self.num_group + sum(g in pool for g in self.group_T) * self.num_adaptive
            for pool in groups
        ]
        return tuple(min(n, self.pool_size) for n in wanted)

    @property
    def quota(self) -> int | None:
        """The most experts of each pool that the budget allows; None where the union cannot exceed the budget."""
        if self.max_active is None or self.max_active >= self.num_fixed + sum(self.pool_bounds):
            return None
        return (self.max_active - self.num_fixed) // self.num_pools

    @property
    def bound(self) -> int:
        """The most experts that an instance can use: ``K_0 + min(K_s + G·K_g + T·K_a, L)``, or what the budget allows.

        With own pools, ``K_0 + Σ_g min(K_g + T_g·K_a, L)`` for groups of T_g routers.
        """
        quota = self.quota
        return self.num_fixed + sum(n if quota is None else min(n, quota) for n in self.pool_bounds)
