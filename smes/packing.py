"""Packing and combining for routings in which no two choices of an instance are the same expert.

Letters: B instances, T routers, K experts of one router, U = T·K slots of an instance, P = B·U packed rows, D input
width, H output width of an expert.

Every packed row is then read in exactly one place and has exactly one reader, so that the gradients are gathered, too.
Left to autograd they would be scattered (``index_add_``): several times slower on the CPU, and in an order that differs
from run to run on a GPU.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def pack_rows(x_BD: Tensor, instance_P: Tensor, row_BU: Tensor) -> Tensor:
    """Row p is that of instance ``instance_P[p]``. [B, D] → [P, D].

    Args:
        x_BD: Of the instances.
        instance_P: int64.
        row_BU: int64, the packed rows of each instance; together a permutation of P.
    """
    packed: Tensor = _Pack.apply(x_BD, instance_P, row_BU)  # type: ignore[no-untyped-call]  # torch has no type
    return packed


def combine_rows(y_PH: Tensor, weights_BTK: Tensor, row_BU: Tensor, slot_P: Tensor) -> Tensor:
    """``Σ_k w_btk y[row_btk]`` for every router. → [B, T, H].

    Args:
        y_PH: Outputs of the packed rows.
        weights_BTK: w.
        row_BU: As for :func:`pack_rows`; slot ``t·K + k`` is router t's k-th.
        slot_P: int64, the inverse permutation: for each row its place in ``row_BU`` seen as [P].
    """
    B, T, K = weights_BTK.shape
    combined_RH: Tensor = _Combine.apply(y_PH, weights_BTK.view(B * T, K), row_BU.view(B * T, K), slot_P)  # type: ignore[no-untyped-call]  # torch has no type
    return combined_RH.view(B, T, -1)


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
    """Here R = B·T readers of K rows each."""

    @staticmethod
    def forward(ctx: Any, y_PH: Tensor, weights_RK: Tensor, row_RK: Tensor, slot_P: Tensor) -> Tensor:
        weights_RK = weights_RK.to(y_PH.dtype)
        ctx.save_for_backward(y_PH, weights_RK, row_RK, slot_P)
        return F.embedding_bag(row_RK, y_PH, mode="sum", per_sample_weights=weights_RK)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (of_sums_RH,) = gradients
        y_PH, weights_RK, row_RK, slot_P = ctx.saved_tensors
        K = row_RK.shape[1]
        of_reader_PH = of_sums_RH.index_select(0, slot_P // K)
        of_weight_P = (of_reader_PH * y_PH).sum(dim=1)
        of_rows_PH = of_reader_PH.mul_(weights_RK.view(-1).index_select(0, slot_P).unsqueeze(1))
        return of_rows_PH, of_weight_P.index_select(0, row_RK.view(-1)).view_as(row_RK), None, None
