"""The batch of one step over all ranks, and what is learned from it by all ranks together.

N ranks with a part of a batch each take the step that one rank takes with all of it. So whatever a step learns from the
whole batch is summed over the ranks: some while the model computes (what the loss is not linear in), the rest in one
message behind the gradients.

Letters: N ranks.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from smes.world import World

Numbers = TypeVar("Numbers", bound=NDArray[Any])


@dataclass(frozen=True, slots=True)
class JointBatch:
    """What every rank knows of the batches of all ranks in a step.

    Attributes:
        world: The ranks.
        instances_N: How many examples each rank has, ≥ 0; at least one rank has some.
        observed_N: How many of them count for running moments of features.
        weight: Sum of the sample weights of all ranks, when they are bounded.
        factor: What bounds the sample weights: their sum is at most the number of instances.
        delayed: Whether some feedback is still to come for an example of any rank.
    """

    world: World
    instances_N: tuple[int, ...]
    observed_N: tuple[int, ...]
    weight: float
    factor: float
    delayed: bool

    @classmethod
    def of(cls, world: World, *, instances: int, observed: int, weight: float, delayed: bool) -> "JointBatch":
        """Tell all ranks of this one's batch, and learn of theirs.

        Raises:
            ValueError: No rank has an example.
        """
        own = torch.tensor([instances, observed, weight, float(delayed)], dtype=torch.float64)
        each = world.trade(own.repeat(world.size), [len(own)] * world.size, [len(own)] * world.size)
        instances_N, observed_N, weight_N, delayed_N = each.view(world.size, len(own)).T.tolist()
        total, count = sum(weight_N), int(sum(instances_N))
        if count == 0:
            raise ValueError("examples: 0 rows on every rank, expected at least 1 on one of them")
        bounded = total <= count
        factor = 1.0 if bounded else count / total  # 0 by an infinite weight: it becomes NaN, the step is not taken
        return cls(
            world=world,
            instances_N=tuple(map(int, instances_N)),
            observed_N=tuple(map(int, observed_N)),
            weight=total if bounded else float(count),
            factor=factor,
            delayed=any(delayed_N),
        )

    @property
    def own(self) -> int:
        """How many examples this rank has."""
        return self.instances_N[self.world.rank]

    @property
    def instances(self) -> int:
        """How many examples all ranks have."""
        return sum(self.instances_N)

    @property
    def share(self) -> float:
        """Which part of the batch this rank has, 0 … 1."""
        return self.own / self.instances

    def trade(self, values: Numbers, going_N: Sequence[int], coming_N: Sequence[int]) -> Numbers:
        """:meth:`smes.world.World.trade` of arrays on the host."""
        return cast(Numbers, self.world.trade(torch.from_numpy(values), going_N, coming_N).numpy())

    def gathered(self, values: Numbers, counts_N: Sequence[int]) -> Numbers:
        """What all ranks have, in their order, on every rank; ``counts_N`` says how long each one's is."""
        size = self.world.size
        return self.trade(cast(Numbers, np.concatenate([values] * size)), [len(values)] * size, counts_N)

    def decided(self, groups: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
        """What rank 0 decided: processors of another kind may round otherwise, and all ranks have to do the same."""
        return tuple(tuple(group) for group in json.loads(self.world.broadcast(json.dumps(groups).encode())))

    def means(self, *means: Tensor) -> list[Tensor]:
        """Means over the instances of all ranks, from the means over this rank's; one message.

        A gradient goes to this rank's part alone: every rank computes the same from the means, and the sum over ranks
        of what each passes on is the gradient of that.

        Args:
            means: float32, of the same shapes on every rank; of a rank without instances anything finite.
        """
        flat: Tensor = _Mean.apply(  # type: ignore[no-untyped-call]  # torch has no type
            torch.cat([mean.reshape(-1) for mean in means]), self.world, self.share
        )
        parts = torch.split(flat, [mean.numel() for mean in means])
        return [part.view(mean.shape) for part, mean in zip(parts, means, strict=True)]

    def sum_of_losses(self, x: Tensor) -> Tensor:
        """The sum over ranks, on which the losses of all ranks depend: gradients are summed likewise."""
        total: Tensor = _Sum.apply(x, self.world)  # type: ignore[no-untyped-call]  # torch has no type
        return total


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, world: World, share: float) -> Tensor:
        ctx.share, mean = share, x * share
        world.sum([mean])
        return mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0] * ctx.share, None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, world: World) -> Tensor:
        ctx.world, total = world, x.clone(memory_format=torch.contiguous_format)
        world.sum([total])
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        ctx.world.sum([total])
        return total, None


class Joining:
    """What the parts of a model know of the batch of the present step, and what they want to be summed over ranks.

    Attributes:
        batch: Of the present step; set before the model computes.
    """

    def __init__(self) -> None:
        self.batch: JointBatch | None = None
        self._waiting: list[tuple[Tensor, Callable[[Tensor], None]]] = []

    def __deepcopy__(self, memo: object) -> "Joining":
        return self

    @property
    def present(self) -> JointBatch:
        """The batch of the present step."""
        assert self.batch is not None, "a step says which batch it has before the model computes"
        return self.batch

    def begin(self, batch: JointBatch) -> None:
        """A step begins; what an interrupted one has left is forgotten."""
        self.batch = batch
        self._waiting.clear()

    def later(self, sums: Tensor, take: Callable[[Tensor], None]) -> None:
        """Sum a float64 tensor over all ranks when the gradients are there, and hand the sum over."""
        self._waiting.append((sums, take))

    def sum(self, gradients: Tensor, more: Sequence[Tensor]) -> None:
        """Sum over all ranks, in place; and what waits, which is then handed over.

        Args:
            gradients: float32.
            more: float64.
        """
        waiting = [*more, *(sums for sums, _ in self._waiting)]
        doubles = [torch.cat([tensor.reshape(-1) for tensor in waiting])] if waiting else []
        self.present.world.sum([gradients, *doubles])
        parts = list(torch.split(doubles[0], [tensor.numel() for tensor in waiting])) if doubles else []
        for tensor, part in zip(more, parts, strict=False):
            tensor.copy_(part.view(tensor.shape))
        for (sums, take), part in zip(self._waiting, parts[len(more) :], strict=True):
            take(part.view(sums.shape))
        self._waiting.clear()


class Joined:
    """A part of a model that learns from the whole batch. Mixed into modules.

    Attributes:
        joining: None where one rank has the whole batch.
    """

    joining: Joining | None = None


def join_parts(module: nn.Module, joining: Joining | None) -> None:
    """Let all parts of a module learn from the batches of all ranks."""
    for part in module.modules():
        if isinstance(part, Joined):
            part.joining = joining
