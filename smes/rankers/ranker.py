"""What a ranker is to the model around it: the seam behind which SMES and its rivals stand.

Letters: B instances, T tasks, E experts, I input width, H width of a task's representation.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, runtime_checkable

import torch.nn.functional as F
from torch import Tensor, nn

from smes.rankers.sparse.groups import Clusters, GroupFinder


@dataclass(frozen=True, slots=True)
class RoutingStats:
    """What a ranker with experts tells about its routing.

    Attributes:
        active_B: int64, experts executed for each instance (|U|).
        load_TE: int64, instances that each task sends to each expert.
    """

    active_B: Tensor
    load_TE: Tensor


@dataclass(frozen=True, slots=True)
class ExpertLimits:
    """What a ranker with experts allows.

    Attributes:
        bound: Most experts that one instance may execute.
        num_experts: E.
        num_fixed: K_0 of them, the first, run for every instance whatever the routing.
        num_pools: The others are this many equal pools, one after the other, each for its own tasks; 1: for all.
    """

    bound: int
    num_experts: int
    num_fixed: int = 0
    num_pools: int = 1


@dataclass(frozen=True, slots=True)
class RankerOutput:
    """One forward pass.

    Attributes:
        tasks_BTH: A representation per task, from which the task heads predict; None for a ranker that leaves
            everything to the linear part.
        auxiliary_loss: Scalar to add to the task losses; None for none, and outside of training.
        stats: None for a ranker without experts, and outside of training.
    """

    tasks_BTH: Tensor | None
    auxiliary_loss: Tensor | None = None
    stats: RoutingStats | None = None


class Ranker(Protocol):
    """From an instance's features to a representation per task; a ``torch.nn.Module``.

    Attributes:
        output_dim: H; 0 for a ranker without representations.
        expert_limits: None for a ranker without experts.
    """

    output_dim: int
    expert_limits: ExpertLimits | None

    def __call__(self, x_BI: Tensor) -> RankerOutput: ...


@runtime_checkable
class GroupingRanker(Protocol):
    """What a ranker that routes by task groups, and may have to find them, can be asked besides."""

    def group_finder(self) -> GroupFinder | None:
        """What finds the groups; None where they are declared."""
        ...

    def regroup(self, groups: Clusters) -> None:
        """Route the tasks by groups that its finder found."""
        ...


@runtime_checkable
class RoutedRanker(Protocol):
    """What a ranker that chooses experts can be asked besides."""

    def choices(self, x_BI: Tensor) -> Tensor:
        """The experts that each task chooses for each instance, those that run anyway left out; int64 [B, T, K]."""
        ...


# TODO(merge) was smes.encoder: The shared encoder that rankers start with. Letters: B insta


class Encoder(nn.Module):
    """``x ← SiLU(LayerNorm(Linear(x)))`` per layer; without layers, the identity. [B, I] → [B, D].

    Args:
        input_dim: I.
        dims: Width of each layer; the last is D.
    """

    def __init__(self, input_dim: int, dims: tuple[int, ...]) -> None:
        super().__init__()
        widths = [input_dim, *dims]
        self.output_dim = widths[-1]
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(d_in, d_out, bias=False), nn.LayerNorm(d_out)) for d_in, d_out in pairwise(widths)
        )

    def forward(self, x_BI: Tensor) -> Tensor:
        for layer in self.layers:
            x_BI = F.silu(layer(x_BI))
        return x_BI
