"""The first products of an encoder and of routers over a split input, with gradients.

Letters: N instances, R requests, I input width, J and K its columns that belong to requests and to instances, O and Q
output width of the encoder's and the routers' product.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from smes.rankers.clip_kernels import add_clipped
from smes.rankers.ranker import FAR_FROM_ZERO, RunningMoments
from smes.rankers.ranker_input import RequestRows, SplitInput
from smes.rankers.split_kernels import observe_columns, unclip_gradients


def read_split(
    x: SplitInput, encoder_OI: Tensor, down_QI: Tensor, moments: RunningMoments, clip: float
) -> tuple[Tensor, Tensor] | None:
    """``x Wᵀ`` of the encoder, and of the routers ``clipped(standardised(x)) Vᵀ``; then the batch counts for moments.

    Args:
        x: float32, on the host.
        encoder_OI: W.
        down_QI: V.
        moments: They standardise.
        clip: Where standardised values end.

    Returns:
        [N, O] and [N, Q]; None if a value lies so far out that rounding would show. No batch was counted then.
    """
    scale_I, shift_I = (column.float() for column in moments.affine())
    if (shift_I.abs() > FAR_FROM_ZERO).any():
        return None
    read = _Read.apply(  # type: ignore[no-untyped-call]  # torch
        x.request_RJ, x.item_NK, encoder_OI, down_QI, scale_I, shift_I, clip, x.columns_J, x.columns_K, x.rows
    )
    products: tuple[Tensor, Tensor] | None = read if isinstance(read[0], Tensor) else None
    if products is not None:
        state = (moments.count_C.numpy(), moments.mean_C.numpy(), moments.variance_C.numpy())
        for part, times, columns in (
            (x.request_RJ, x.rows.counts_R.float(), x.columns_J),
            (x.item_NK, torch.ones(len(x)), x.columns_K),
        ):
            if len(columns):
                rows = part.detach().contiguous().numpy()
                observe_columns(rows, times.numpy(), columns.numpy(), moments.horizon, *state)
    return products


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        request_RJ: Tensor,
        item_NK: Tensor,
        encoder_OI: Tensor,
        down_QI: Tensor,
        scale_I: Tensor,
        shift_I: Tensor,
        clip: float,
        columns_J: Tensor,
        columns_K: Tensor,
        rows: RequestRows,
    ) -> tuple[Tensor | None, Tensor | None]:
        request_RJ, item_NK, first = request_RJ.contiguous(), item_NK.contiguous(), len(encoder_OI)
        weight_MI = torch.cat([encoder_OI, down_QI * scale_I])
        bias_M = torch.cat([down_QI.new_zeros(first), down_QI @ shift_I])
        sides, outputs, far = [], [], 0.0
        for part, columns, bias in ((request_RJ, columns_J, bias_M), (item_NK, columns_K, None)):
            weight, down_CQ = weight_MI.index_select(1, columns), down_QI.index_select(1, columns).t().contiguous()
            scale, shift = scale_I.index_select(0, columns), shift_I.index_select(0, columns)
            norm = scale.numpy(), shift.numpy(), np.float32(clip), down_CQ.numpy()
            outputs.append(F.linear(part, weight, bias))
            far = max(far, add_clipped(part.numpy(), *norm, outputs[-1].numpy(), first))
            sides.append((columns, weight, norm))
        if far > FAR_FROM_ZERO:
            return None, None
        ctx.save_for_backward(request_RJ, item_NK)
        ctx.sides, ctx.rows, ctx.width = sides, rows, len(scale_I)
        of_both_NM = outputs[1].add_(rows.spread(outputs[0]))
        return of_both_NM[:, :first], of_both_NM[:, first:]

    @staticmethod
    def backward(ctx: Any, of_encoder_NO: Tensor, of_routers_NQ: Tensor) -> tuple[Tensor | None, ...]:
        request_RJ, item_NK = ctx.saved_tensors
        first, of_item_NM = of_encoder_NO.shape[1], torch.cat([of_encoder_NO, of_routers_NQ], dim=1)
        of_request_RM = ctx.rows.summed(of_item_NM)
        total_Q = of_request_RM[:, first:].sum(dim=0)
        encoder_IO = of_item_NM.new_empty(ctx.width, first)
        down_IQ = of_item_NM.new_empty(ctx.width, len(total_Q))
        of_parts = []
        for part, of_product, (columns, weight, norm) in zip(
            (request_RJ, item_NK), (of_request_RM, of_item_NM), ctx.sides, strict=True
        ):
            of_part, of_weight_CM = of_product @ weight, part.t() @ of_product
            scale, shift, *_ = norm
            of_down_CQ = of_weight_CM[:, first:] * torch.from_numpy(scale).unsqueeze(1)
            of_down_CQ += torch.outer(torch.from_numpy(shift), total_Q)
            unclip_gradients(part.numpy(), *norm, of_product.numpy(), first, of_part.numpy(), of_down_CQ.numpy())
            encoder_IO.index_copy_(0, columns, of_weight_CM[:, :first])
            down_IQ.index_copy_(0, columns, of_down_CQ)
            of_parts.append(of_part)
        return *of_parts, encoder_IO.t(), down_IQ.t(), None, None, None, None, None, None
