"""Packed rows: which are executed for which instance and expert, their input, and the sums of their outputs.

A row is packed for each (instance, expert) pair that is executed, expert by expert, so that an expert's rows are one
segment of a grouped GEMM. A pair occurs once, however many routers use it: an expert runs at most once per instance.

If routers may choose the same expert, the packing is a counting sort made of cumulative sums. Its shapes do not depend
on the routing, so that nothing on a GPU waits for the host: P is the upper bound B·U, and rows from ``offsets_E[-1]``
on are unused. On the CPU, where it costs nothing to read a number back, the unused rows and slots are cut off.

If routers cannot choose the same expert (there is one router, or each has a pool of its own), a sort does the packing,
and no row or slot is unused.

Letters: B instances, R routers (one per task, or one per task group), E experts, K experts of one router, P packed rows
(one per executed pair), U slots of an instance (the most experts it can use), N = B·R sums to combine, D input width, H
output width of an expert.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from smes.rankers.kernels import on_host
from smes.rankers.sparse.host_experts import Rows
from smes.rankers.sparse.kernels import sorted_pairs
from smes.rankers.sparse.routing import Routing


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Where the executed pairs lie.

    Attributes:
        instance_P: int64, the instance of each packed row (0 for unused rows).
        offsets_E: int32, the end of each expert's segment.
        used_P: bool, false for unused rows; None if there are none.
        row_BU: int64, the packed row of each slot; unused slots point to row 0.
        slot_BRK: int64, the slot of each of a router's experts.
        slot_P: int64, the place of each packed row in ``row_BU`` viewed as [P]. It exists only if no expert can be
            chosen twice: then ``row_BU`` is a permutation. Otherwise None.
        active_B: int64, |U|: how many experts run for the instance.
    """

    instance_P: Tensor
    offsets_E: Tensor
    used_P: Tensor | None
    row_BU: Tensor
    slot_BRK: Tensor
    slot_P: Tensor | None
    active_B: Tensor

    @property
    def rows(self) -> Rows:
        """The same for compiled loops."""
        if self.slot_P is not None:
            return Rows(self.offsets_E, self.instance_P, self.row_BU, None, self.slot_P)
        row_BU, slot_BRK = self.row_BU.contiguous(), self.slot_BRK.contiguous()
        used_BU = torch.arange(row_BU.shape[1], device=row_BU.device) < self.active_B.unsqueeze(1)
        place_P = torch.empty_like(self.instance_P)
        place_P[row_BU[used_BU]] = used_BU.view(-1).nonzero().squeeze(1)
        return Rows(self.offsets_E, self.instance_P, row_BU, slot_BRK, place_P)


def dispatch(routing: Routing, *, trim: bool) -> Dispatch:
    """Plan the execution of a routing.

    Args:
        routing: Of B ≥ 1 instances.
        trim: Whether to cut off unused rows and slots; this reads two numbers back to the host.
    """
    if routing.disjoint:
        return _dispatch_disjoint(routing)
    B, R, K = routing.experts_BRK.shape
    E = routing.num_experts
    device = routing.experts_BRK.device
    num_slots = routing.bound
    chosen_BE = torch.zeros(B, E, dtype=torch.bool, device=device)
    chosen_BE.scatter_(1, routing.experts_BRK.reshape(B, R * K), True)
    # The n-th chosen expert of an instance gets slot n; the n-th instance of an expert gets its segment's n-th row.
    slot_BE = chosen_BE.cumsum(dim=1) - 1
    nth_BE = chosen_BE.cumsum(dim=0) - 1
    active_B = slot_BE[:, -1] + 1
    offsets_E = (nth_BE[-1] + 1).cumsum(dim=0)
    starts_E = offsets_E - (nth_BE[-1] + 1)
    row_BE = nth_BE + starts_E
    num_rows = B * num_slots
    if trim:
        num_rows, num_slots = int(offsets_E[-1]), int(active_B.max())
    # Experts not chosen are written to one spare place past the end, which is cut off.
    instance_BE = torch.arange(B, device=device).view(B, 1).expand(B, E)
    instance_P = torch.zeros(num_rows + 1, dtype=torch.int64, device=device)
    instance_P.scatter_(0, torch.where(chosen_BE, row_BE, num_rows).view(-1), instance_BE.reshape(-1))
    row_BU = torch.zeros(B, num_slots + 1, dtype=torch.int64, device=device)
    row_BU.scatter_(1, torch.where(chosen_BE, slot_BE, num_slots), row_BE)
    slot_BRK = slot_BE.gather(1, routing.experts_BRK.reshape(B, R * K)).view(B, R, K)
    return Dispatch(
        instance_P=instance_P[:num_rows],
        offsets_E=offsets_E.to(torch.int32),
        used_P=None if trim else torch.arange(num_rows, device=device) < offsets_E[-1],
        row_BU=row_BU[:, :num_slots],
        slot_BRK=slot_BRK,
        slot_P=None,
        active_B=active_B,
    )


def _dispatch_disjoint(routing: Routing) -> Dispatch:
    B, R, K = routing.experts_BRK.shape
    device = routing.experts_BRK.device
    num_slots = R * K
    expert_P = routing.experts_BRK.reshape(-1)
    if on_host(expert_P):
        slot_P, instance_P, row_P, offsets_E = sorted_pairs(expert_P, routing.num_experts, num_slots)
    else:
        sorted_P, slot_P = expert_P.sort(stable=True)
        experts_E = torch.arange(routing.num_experts, device=device)
        instance_P, offsets_E = slot_P // num_slots, torch.searchsorted(sorted_P, experts_E, right=True, out_int32=True)
        row_P = torch.empty_like(slot_P).scatter_(0, slot_P, torch.arange(B * num_slots, device=device))
    return Dispatch(
        instance_P=instance_P,
        offsets_E=offsets_E,
        used_P=None,
        row_BU=row_P.view(B, num_slots),
        slot_BRK=torch.arange(num_slots, device=device).view(1, R, K).expand(B, R, K),
        slot_P=slot_P,
        active_B=torch.full((B,), num_slots, device=device),
    )


def dispatch_all(routing: Routing) -> Dispatch:
    """Plan the execution of every expert for every instance, for an exported model (:mod:`smes.model.export`).

    Those that no router chose count with weight 0. All segments are B rows long.
    """
    B, E = routing.experts_BRK.shape[0], routing.num_experts
    device = routing.experts_BRK.device
    instance_B = torch.arange(B, device=device)
    return Dispatch(
        instance_P=instance_B.repeat(E),
        offsets_E=torch.arange(1, E + 1, device=device, dtype=torch.int32) * B,
        used_P=None,
        row_BU=instance_B.unsqueeze(1) + B * torch.arange(E, device=device),
        slot_BRK=routing.experts_BRK,
        slot_P=None,
        active_B=torch.full_like(instance_B, E),
    )


def neutralise(x_PD: Tensor, plan: Dispatch) -> Tensor:
    """Zero the unused rows, and their gradient on the way back.

    A grouped GEMM does not write rows that no segment covers. They may hold NaN, so they are replaced, not multiplied.
    """
    if plan.used_P is None:
        return x_PD
    return torch.where(plan.used_P.unsqueeze(1), x_PD, x_PD.new_zeros(()))


def pack(x_BD: Tensor, plan: Dispatch) -> Tensor:
    """The input of every packed row. [B, D] → [P, D]."""
    if plan.slot_P is not None:
        return pack_rows(x_BD, plan.instance_P, plan.row_BU)
    return neutralise(x_BD.index_select(0, plan.instance_P), plan)


def combine(y_PH: Tensor, weights_BRK: Tensor, plan: Dispatch) -> Tensor:
    """``h_r = Σ_{e ∈ K_r} p̃_re f_e`` for every router, from outputs computed once. [P, H] → [B, R, H]."""
    if plan.slot_P is not None:
        return combine_rows(y_PH, weights_BRK, plan.row_BU, plan.slot_P)
    B, R, _ = weights_BRK.shape
    num_slots = plan.row_BU.shape[1]
    # Unused slots read row 0, which is always in use and so finite, with weight 0.
    y_BUH = y_PH.index_select(0, plan.row_BU.reshape(-1)).view(B, num_slots, y_PH.shape[1])
    weights_BRU = weights_BRK.new_zeros(B, R, num_slots).scatter(2, plan.slot_BRK, weights_BRK)
    return torch.bmm(weights_BRU.to(y_BUH.dtype), y_BUH)


def pack_rows(x_BD: Tensor, instance_P: Tensor, row_BU: Tensor) -> Tensor:
    """:func:`pack` where no expert can be chosen twice. [B, D] → [P, D].

    Args:
        x_BD: The instances' input.
        instance_P: int64, the instance of each packed row.
        row_BU: int64, the packed rows of each instance; together a permutation of P.
    """
    packed: Tensor = _Pack.apply(x_BD, instance_P, row_BU)  # type: ignore[no-untyped-call]  # torch has no type
    return packed


def combine_rows(y_PH: Tensor, weights_BRK: Tensor, row_BU: Tensor, slot_P: Tensor) -> Tensor:
    """:func:`combine` where no expert can be chosen twice: ``Σ_k w_brk y[row_brk]``. → [B, R, H].

    Args:
        y_PH: Outputs of the packed rows.
        weights_BRK: w.
        row_BU: As for :func:`pack_rows`; slot ``r·K + k`` is router r's k-th.
        slot_P: int64, the inverse permutation: for each row its place in ``row_BU`` viewed as [P].
    """
    B, R, K = weights_BRK.shape
    combined_NH: Tensor = _Combine.apply(  # type: ignore[no-untyped-call]  # torch has no type
        y_PH, weights_BRK.view(B * R, K), row_BU.view(B * R, K), slot_P
    )
    return combined_NH.view(B, R, -1)


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BD: Tensor, instance_P: Tensor, row_BU: Tensor) -> Tensor:
        ctx.save_for_backward(row_BU)
        return x_BD.index_select(0, instance_P)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (of_rows_PD,) = gradients
        return F.embedding_bag(ctx.saved_tensors[0], of_rows_PD.contiguous(), mode="sum"), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_PH: Tensor, weights_NK: Tensor, row_NK: Tensor, slot_P: Tensor) -> Tensor:
        weights_NK = weights_NK.to(y_PH.dtype)
        ctx.save_for_backward(y_PH, weights_NK, row_NK, slot_P)
        return F.embedding_bag(row_NK, y_PH, mode="sum", per_sample_weights=weights_NK)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (of_sums_NH,) = gradients
        y_PH, weights_NK, row_NK, slot_P = ctx.saved_tensors
        K = row_NK.shape[1]
        of_sum_PH = of_sums_NH.index_select(0, slot_P // K)
        of_weight_P = (of_sum_PH * y_PH).sum(dim=1)
        of_rows_PH = of_sum_PH.mul_(weights_NK.view(-1).index_select(0, slot_P).unsqueeze(1))
        return of_rows_PH, of_weight_P.index_select(0, row_NK.view(-1)).view_as(row_NK), None, None
