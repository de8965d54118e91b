"""The seam between the model and its ranker, and what rankers share: the encoder, and moments of columns over a stream.

Letters: B instances, T tasks, E experts, C columns of the input, I input width, D encoder width, H width of a task's
representation.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from smes.joint_batch import Joined, JointBatch
from smes.rankers.column_kernels import merge_weighted
from smes.rankers.kept import Keeping
from smes.rankers.kernels import on_host
from smes.rankers.ranker_input import RankerInput, SplitInput
from smes.rankers.streams import SharedStreams

FAR_FROM_ZERO = 64.0
"""Deviations; where a value or a mean lies farther out, folding a norm into weights would round too much."""


class RunningMoments(Joined, Keeping):
    """Mean and variance per column over the values seen so far (Chan et al.'s merge of batch moments, in float64).

    Joined with other ranks' they take in the values of all ranks.

    Args:
        columns: C.
        horizon: From this many values on, old values fade out exponentially, so that the moments follow a drift.

    Attributes:
        horizon: As given.
    """

    count_C: Tensor
    mean_C: Tensor
    variance_C: Tensor

    def __init__(self, columns: int, horizon: float = 1e6) -> None:
        super().__init__()
        self.horizon = horizon
        self.register_buffer("count_C", torch.zeros(columns, dtype=torch.float64))
        self.register_buffer("mean_C", torch.zeros(columns, dtype=torch.float64))
        self.register_buffer("variance_C", torch.ones(columns, dtype=torch.float64))

    @torch.no_grad()
    def observe(self, x_BC: Tensor, weight_BC: Tensor | None = None) -> None:
        """Take in a batch.

        Args:
            x_BC: The values, all finite.
            weight_BC: Their weights; values of weight 0 do not count. None: all weights are 1, and the batch's moments
                are computed in the precision of ``x_BC``, which is much faster. Columns must then deviate by at least
                about 1e-5 of their size, as embeddings do.
        """
        if self.joining is not None:
            self.joining.later(self.sums(self.joining.present, x_BC, weight_BC), self.take_in)
        elif weight_BC is None:
            mean_C, variance_C = _moments(x_BC, self._near(x_BC))
            self._merge(torch.full_like(mean_C, len(x_BC)), mean_C, variance_C)
        elif on_host(self.mean_C):
            cells = (x_BC.double().contiguous(), weight_BC.double().contiguous())
            moments = (self.count_C, self.mean_C, self.variance_C)
            merge_weighted(*(t.numpy() for t in cells), self.horizon, *(t.numpy() for t in moments))
            self.changed()
        else:
            x_BC, weight_BC = x_BC.double(), weight_BC.double()
            new_C = weight_BC.sum(dim=0)
            mean_C = (x_BC * weight_BC).sum(dim=0) / new_C.clamp(min=1e-12)
            variance_C = ((x_BC - mean_C).square() * weight_BC).sum(dim=0) / new_C.clamp(min=1e-12)
            self._merge(new_C, mean_C, variance_C)

    @torch.no_grad()
    def sums(self, batch: JointBatch, x_BC: Tensor, weight_BC: Tensor | None = None) -> Tensor:
        """What :meth:`take_in` takes of this rank's part of a batch. float64 [3, C].

        Args:
            batch: A rank without instances computes on one, which does not count.
            x_BC, weight_BC: As for :meth:`observe`.
        """
        if batch.own == 0:
            return self.mean_C.new_zeros(3, len(self.mean_C))
        if weight_BC is None:
            return self._as_sums(len(x_BC), *_moments(x_BC, self._near(x_BC)), self.mean_C)
        difference_BC, weight_BC = x_BC.double() - self.mean_C, weight_BC.double()
        weighted_BC = difference_BC * weight_BC
        return torch.stack([weight_BC.sum(dim=0), weighted_BC.sum(dim=0), (weighted_BC * difference_BC).sum(dim=0)])

    @torch.no_grad()
    def sums_of_split(self, batch: JointBatch, x: SplitInput) -> Tensor:
        """:meth:`sums` of an input in two parts."""
        sums_3C = self.mean_C.new_zeros(3, len(self.mean_C))
        for part, times, columns in ((x.request_RJ, x.rows.counts_R, x.columns_J), (x.item_NK, None, x.columns_K)):
            if batch.own and len(columns):
                mean_C, count_C = self.mean_C[columns], self.count_C[columns]
                near_C = torch.where(count_C > 0, mean_C.to(part.dtype), part[0])
                moments = _moments(part, near_C, times)
                sums_3C[:, columns] = self._as_sums(len(x), *moments, mean_C)
        return sums_3C

    @torch.no_grad()
    def take_in(self, sums_3C: Tensor) -> None:
        """Take in a batch of all ranks.

        Args:
            sums_3C: float64: weights, and the weighted sums of the differences from the mean as it is now, and of their
                squares.
        """
        weight_C = sums_3C[0].clamp(min=1e-12)
        delta_C = sums_3C[1] / weight_C
        variance_C = (sums_3C[2] / weight_C - delta_C.square()).clamp(min=0.0)
        self._merge(sums_3C[0], self.mean_C + delta_C, variance_C)

    @staticmethod
    def _as_sums(rows: int, batch_C: Tensor, variance_C: Tensor, mean_C: Tensor) -> Tensor:
        delta_C = batch_C - mean_C
        return rows * torch.stack([torch.ones_like(delta_C), delta_C, variance_C + delta_C.square()])

    def changed(self) -> None:
        """Tell torch that a compiled loop has written the moments."""
        increment_version((self.count_C, self.mean_C, self.variance_C))

    def _merge(self, new_C: Tensor, mean_C: Tensor, variance_C: Tensor) -> None:
        total_C = self.count_C + new_C
        share_C = new_C / total_C.clamp(min=1e-12)
        delta_C = mean_C - self.mean_C
        # For the first batch share is 1, so the initial variance of 1 drops out.
        merged_C = (1 - share_C) * self.variance_C + share_C * variance_C + share_C * (1 - share_C) * delta_C.square()
        self.variance_C.copy_(merged_C)
        self.mean_C.add_(share_C * delta_C)
        self.count_C.copy_(total_C.clamp(max=self.horizon))

    def standardise(self, x_BC: Tensor, clip: float, dtype: torch.dtype = torch.float64) -> Tensor:
        """``(x - mean) / std``, clipped at ±``clip`` and computed in ``dtype``. float32 [B, C]."""
        scale_C, shift_C = self.affine(dtype)
        z_BC = torch.addcmul(shift_C, x_BC.to(dtype), scale_C)
        return F.hardtanh_(z_BC, -clip, clip).float()  # in place: each pass over [B, C] costs time

    def standardise_split(self, x: SplitInput, clip: float) -> SplitInput:
        """:meth:`standardise` of either part, in float32."""
        (scale_J, scale_K), (shift_J, shift_K) = x.sliced(self, lambda: tuple(c.float() for c in self.affine()))
        z_RJ = torch.addcmul(shift_J, x.request_RJ, scale_J)
        z_NK = torch.addcmul(shift_K, x.item_NK, scale_K)
        return x.mapped(F.hardtanh_(z_RJ, -clip, clip), F.hardtanh_(z_NK, -clip, clip))

    def affine(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """Factor and summand that standardise; [C] each, computed in float64."""
        return self.kept(f"affine in {dtype}", (self.mean_C, self.variance_C), lambda: self._affine(dtype))

    def _affine(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        # The least variance is what rounding leaves of a constant: a column may have any unit.
        scale_C = torch.maximum(self.variance_C, 1e-24 * self.mean_C.square() + 1e-60).rsqrt()
        return scale_C.to(dtype), (-self.mean_C * scale_C).to(dtype)

    def _near(self, x_BC: Tensor) -> Tensor:
        return torch.where(self.count_C > 0, self.mean_C.to(x_BC.dtype), x_BC[0])


def _moments(x_BC: Tensor, near_C: Tensor, times_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and variance of rows, which count so many times. float64 [C] each."""
    # Sums of differences from an estimate of the mean, and of their squares: along columns on the CPU this takes a
    # tenth of the time of torch.var_mean, and is as exact if the estimate is good.
    difference_BC = x_BC - near_C
    if times_B is None:
        mean_C = difference_BC.mean(dim=0).double()
        variance_C = difference_BC.square_().mean(dim=0).double() - mean_C.square()
    else:
        share_B = times_B.to(x_BC.dtype) / times_B.sum()
        mean_C = (share_B @ difference_BC).double()
        variance_C = (share_B @ difference_BC.square_()).double() - mean_C.square()
    return near_C + mean_C, variance_C.clamp_(min=0.0)


class Undo:
    """Puts the persistent buffers of a module back, without waiting for a GPU.

    Args:
        module: Changes its buffers in place only.
    """

    def __init__(self, module: nn.Module) -> None:
        weights = dict(module.named_parameters())
        self._buffers = [t for name, t in module.state_dict(keep_vars=True).items() if name not in weights]
        self._saved: list[Tensor] = []

    def save(self) -> None:
        """Copy the buffers as they are now."""
        self._saved = [buffer.clone() for buffer in self._buffers]

    def unless(self, taken: Tensor) -> None:
        """Put the saved copies back if a bool scalar is false."""
        for buffer, saved in zip(self._buffers, self._saved, strict=True):
            buffer.copy_(torch.where(taken, buffer, saved))


Clusters = tuple[tuple[int, ...], ...]
"""The tasks of each group."""


@dataclass(frozen=True, slots=True)
class RoutingStats:
    """Figures of one batch's routing.

    Attributes:
        active_B: int64, the number of experts that run for each instance (|U|).
        load_TE: int64, the number of instances that each task sends to each expert.
    """

    active_B: Tensor
    load_TE: Tensor


@dataclass(frozen=True, slots=True)
class ExpertLimits:
    """Which experts a ranker has, and how many of them may run.

    Attributes:
        bound: The most experts that may run for one instance.
        num_experts: E.
        num_fixed: K_0: the first K_0 experts run for every instance, whatever the routing.
        num_pools: The other experts are this many equal pools, one after the other, each for its own tasks; 1: one pool
            for all tasks.
    """

    bound: int
    num_experts: int
    num_fixed: int = 0
    num_pools: int = 1


@dataclass(frozen=True, slots=True)
class RankerOutput:
    """Result of one forward pass.

    Attributes:
        representations: One per task, from which the task heads predict: [B, T, H], or what tasks share; None for a
            ranker that leaves everything to the linear part.
        auxiliary_loss: Scalar to add to the task losses; None for no such loss, and outside training.
        stats: None for a ranker without experts, and outside training.
    """

    representations: Tensor | SharedStreams | None
    auxiliary_loss: Tensor | None = None
    stats: RoutingStats | None = None

    @property
    def tasks_BTH(self) -> Tensor | None:
        """The tasks' representations; where tasks share, they are laid out anew with each call."""
        if isinstance(self.representations, SharedStreams):
            return self.representations.for_tasks()
        return self.representations


class Ranker(Protocol):
    """Maps an instance's features to a representation per task; a ``torch.nn.Module``.

    Attributes:
        output_dim: H; 0 for a ranker without representations.
        expert_limits: None for a ranker without experts.
    """

    output_dim: int
    expert_limits: ExpertLimits | None

    def __call__(self, x_BI: RankerInput) -> RankerOutput: ...


@runtime_checkable
class RoutedRanker(Protocol):
    """A ranker that chooses experts."""

    def choices(self, x_BI: RankerInput) -> Tensor:
        """The experts that each task chooses for each instance, without those that always run; int64 [B, T, K]."""
        ...

    def expert_weights(self, x_BI: RankerInput) -> Tensor:
        """How much each expert counts in each task's representation, as a forward pass in evaluation has it.

        float32 [B, T, E], 0 for an expert that the task does not use. Experts that one task has for itself follow
        after the E, task by task; they are added to the others' mean, and their weights sum to 1, too.
        """
        ...


@runtime_checkable
class CountingRanker(Protocol):
    """A ranker that counts, on the host, the instances that it was trained on."""

    def forget(self, instances: int) -> None:
        """Take so many instances back: the step on them was not taken."""
        ...


class GroupSearch(Protocol):
    """A search for task groups in the stream; its state is part of the learner's."""

    @property
    def done(self) -> bool:
        """Whether the search has ended."""
        ...

    def to(self, device: torch.device) -> "GroupSearch":
        """Move to a device."""
        ...

    def observe(
        self, x_BC: Tensor, residual_BT: Tensor, taken: Tensor | None = None, batch: JointBatch | None = None
    ) -> Clusters | None:
        """Take in a batch after it was scored; return the groups when it is time for new ones.

        Args:
            x_BC: The ranker's input.
            residual_BT: Label minus prediction, 0 where there is no label.
            taken: bool scalar. If it is false, only the count of instances changes. None: it is true.
            batch: The batch of all ranks that these instances are part of; None: there is one rank.
        """
        ...

    def forget(self, instances: int) -> None:
        """Take so many instances back: the step on them was not taken."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Copies, on the CPU, of everything that :meth:`load_state` needs."""
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a :meth:`state`.

        Raises:
            KeyError, RuntimeError: A tensor is missing, unknown or of another shape.
        """
        ...


@runtime_checkable
class GroupingRanker(Protocol):
    """A ranker that routes by task groups, declared or found from the stream.

    Attributes:
        founders: The tasks that groups are found for; in groups they are numbered as they stand here.
    """

    founders: tuple[int, ...]

    def group_finder(self) -> GroupSearch | None:
        """A new search for the groups; None where they are declared."""
        ...

    def regroup(self, groups: Clusters) -> None:
        """Route the tasks by groups that the search found."""
        ...


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

    def forward(self, x_BI: RankerInput) -> Tensor:
        if isinstance(x_BI, SplitInput):
            return self.after_product(x_BI.linear(self.first_weight)) if len(self.layers) else x_BI.whole()
        for layer in self.layers:
            x_BI = F.silu(layer(x_BI))
        return x_BI

    @property
    def first_weight(self) -> Tensor:
        """Of the first layer's product, [D, I]. There is a layer."""
        weight: Tensor = self.layers[0][0].weight  # type: ignore[index]
        return weight

    def after_product(self, y_BD: Tensor) -> Tensor:
        """What :meth:`forward` gives, from the first layer's product."""
        x_BD = F.silu(self.layers[0][1](y_BD))  # type: ignore[index]
        for layer in self.layers[1:]:
            x_BD = F.silu(layer(x_BD))
        return x_BD
