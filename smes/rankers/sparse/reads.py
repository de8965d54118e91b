"""Which routers each task reads: :class:`DeclaredReads` for declared groups, :class:`FoundReads` for those found.

A task *reads* a router when it uses the output of the experts that this router chose.

Letters: B instances, T tasks, R routers (one per task, or one per task group), G task groups, E experts, K experts of
one router, H output width of an expert.
"""

from abc import ABC, abstractmethod
from itertools import product

import torch
from torch import Tensor, nn

from smes.rankers.ranker import Clusters
from smes.rankers.sparse.config import SmesConfig
from smes.rankers.sparse.groups import GroupFinder
from smes.rankers.structure import Structure


class TaskReads(nn.Module, ABC):
    """Attributes figures of routers to tasks.

    Args:
        group_R: The group of each router, numbered from 0 without gaps.
    """

    def __init__(self, group_R: tuple[int, ...]) -> None:
        super().__init__()
        self.group_R = group_R

    @abstractmethod
    def stage_one_weights(self) -> Tensor:
        """w of stage I for each router, summing to 1. [R]."""

    @abstractmethod
    def outputs(self, y_BRH: Tensor) -> Tensor:
        """The representation of each task, from the routers' combined outputs. [B, R, H] → [B, T, H]."""

    @abstractmethod
    def choices(self, experts_BRK: Tensor) -> Tensor:
        """The experts chosen for each task. [B, R, K] → [B, T, K]."""

    @abstractmethod
    def load(self, load_RE: Tensor) -> Tensor:
        """Instances that each task sends to each expert, from those that each router sends. [R, E] → [T, E]."""

    @abstractmethod
    def gates(self, of_routers_RE: Tensor) -> Tensor:
        """The rows that the balance loss counts equally: one per task, or one per router. [R, E] → [T or R, E]."""

    @abstractmethod
    def finder(self, input_dim: int) -> GroupFinder | None:
        """A new search for the groups in a ranker's input of this width; None where they are declared."""

    @abstractmethod
    def regroup(self, groups: Clusters) -> None:
        """Let the tasks of each group read one router."""


class DeclaredReads(TaskReads):
    """Declared groups: each task reads one router, its own or its group's, for good.

    Args:
        structure: Its routers; newcomers are left out.
    """

    router_T: Tensor

    def __init__(self, structure: Structure) -> None:
        super().__init__(structure.group_R)
        router_T = [structure.router_T[t] for t in structure.founders]
        self._one_each = router_T == list(range(len(structure.group_R)))
        self._weights = structure.weight_R
        self.register_buffer("router_T", torch.tensor(router_T), persistent=False)

    def stage_one_weights(self) -> Tensor:
        """Each router's is the sum of its tasks' weights."""
        return torch.tensor(self._weights)

    def outputs(self, y_BRH: Tensor) -> Tensor:
        return self._for_tasks(y_BRH, dim=1)

    def choices(self, experts_BRK: Tensor) -> Tensor:
        return self._for_tasks(experts_BRK, dim=1)

    def load(self, load_RE: Tensor) -> Tensor:
        return self._for_tasks(load_RE, dim=0)

    def gates(self, of_routers_RE: Tensor) -> Tensor:
        return self._for_tasks(of_routers_RE, dim=0)

    def finder(self, input_dim: int) -> None:
        return None

    def regroup(self, groups: Clusters) -> None:
        raise AssertionError("declared groups have no finder")

    def _for_tasks(self, of_routers: Tensor, dim: int) -> Tensor:
        return of_routers if self._one_each else of_routers.index_select(dim, self.router_T)


class FoundReads(TaskReads):
    """Found groups: each task reads the mean of all routers until groups are found, then its group's router.

    There is one router per group. Which tasks read it is found, and may change while the search lasts.

    Args:
        num_tasks: T.
        config: Shape of the ranker, with ``groups.found`` = G.
    """

    share_TG: Tensor

    def __init__(self, num_tasks: int, config: SmesConfig) -> None:
        G = config.groups.found
        super().__init__(tuple(range(G)))
        self._until = config.groups.found_until
        self.register_buffer("share_TG", torch.full((num_tasks, G), 1 / G))

    def stage_one_weights(self) -> Tensor:
        return torch.full((len(self.group_R),), 1 / len(self.group_R))

    def outputs(self, y_BRH: Tensor) -> Tensor:
        return torch.matmul(self.share_TG.to(y_BRH.dtype), y_BRH)

    def choices(self, experts_BRK: Tensor) -> Tensor:
        """While a task reads all routers, the choices of the first."""
        return experts_BRK[:, self.share_TG.argmax(dim=1)]

    def load(self, load_RE: Tensor) -> Tensor:
        return ((self.share_TG > 0).unsqueeze(2) * load_RE).sum(dim=1)

    def gates(self, of_routers_RE: Tensor) -> Tensor:
        """One row per router: a group counts the same however many tasks read it."""
        return of_routers_RE

    def finder(self, input_dim: int) -> GroupFinder:
        num_tasks, num_groups = self.share_TG.shape
        return GroupFinder(num_tasks, input_dim, num_groups, self._until)

    def regroup(self, groups: Clusters) -> None:
        """Each group reads the router that most of its tasks read already, so that little has to be relearned."""
        share_TG = self.share_TG.cpu()
        stay_GG = torch.stack([share_TG[list(group)].sum(dim=0) for group in groups])
        G = len(groups)
        router_of: dict[int, int] = {}
        for group, router in sorted(product(range(G), range(G)), key=lambda pair: -float(stay_GG[pair])):
            if group not in router_of and router not in router_of.values():
                router_of[group] = router
        share_TG = torch.zeros_like(share_TG)
        for group, tasks in enumerate(groups):
            share_TG[list(tasks), router_of[group]] = 1.0
        self.share_TG.copy_(share_TG)
