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
from smes.rankers.split_kernels import observe_columns, put_side, take_side, unclip_gradients


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
    read = _Read.apply(  # type: ignore[no-untyped-call]  # torch
        x.request_RJ, x.item_NK, encoder_OI, down_QI, moments, clip, x.columns_J, x.columns_K, x.rows
    )
    products: tuple[Tensor, Tensor] | None = read if isinstance(read[0], Tensor) else None
    if products is not None and moments.joining is not None:
        moments.joining.later(moments.sums_of_split(moments.joining.present, x), moments.take_in)
    elif products is not None:
        state = (moments.count_C.numpy(), moments.mean_C.numpy(), moments.variance_C.numpy())
        for part, times, columns in (
            (x.request_RJ, x.rows.counts_R.float(), x.columns_J),
            (x.item_NK, torch.ones(len(x)), x.columns_K),
        ):
            if len(columns):
                rows = part.detach().contiguous().numpy()
                observe_columns(rows, times.numpy(), columns.numpy(), moments.horizon, *state)
        moments.changed()
    return products


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        request_RJ: Tensor,
        item_NK: Tensor,
        encoder_OI: Tensor,
        down_QI: Tensor,
        moments: RunningMoments,
        clip: float,
        columns_J: Tensor,
        columns_K: Tensor,
        rows: RequestRows,
    ) -> tuple[Tensor | None, Tensor | None]:
        request_RJ, item_NK, first = request_RJ.contiguous(), item_NK.contiguous(), len(encoder_OI)
        maps = encoder_OI.numpy(), down_QI.numpy()
        norm = moments.mean_C.numpy(), moments.variance_C.numpy()
        bias_M, width = torch.zeros(first + len(down_QI)), encoder_OI.shape[1]
        sides = []
        for columns in (columns_J, columns_K):
            weight_MC, down_CQ = (
                torch.empty(len(bias_M), len(columns)),
                np.empty((len(columns), len(down_QI)), np.float32),
            )
            scale_C, shift_C = np.empty((2, len(columns)), np.float32)
            take_side(*maps, *norm, columns.numpy(), weight_MC.numpy(), down_CQ, scale_C, shift_C, bias_M.numpy())
            if (np.abs(shift_C) > FAR_FROM_ZERO).any():
                return None, None
            sides.append((columns.numpy(), weight_MC, (scale_C, shift_C, np.float32(clip), down_CQ)))
        outputs, beyond = [], []
        for part, (_, weight_MC, side_norm), bias in zip((request_RJ, item_NK), sides, (bias_M, None), strict=True):
            outputs.append(F.linear(part, weight_MC, bias))
            beyond.append(np.empty(len(part), np.bool_))
            if add_clipped(part.numpy(), *side_norm, outputs[-1].numpy(), beyond[-1]) > FAR_FROM_ZERO:
                return None, None
        ctx.save_for_backward(request_RJ, item_NK)
        ctx.sides, ctx.beyond, ctx.rows, ctx.width = sides, beyond, rows, width
        of_both_NM = outputs[1].add_(rows.spread(outputs[0]))
        return of_both_NM[:, :first], of_both_NM[:, first:]

    @staticmethod
    def backward(ctx: Any, of_encoder_NO: Tensor, of_routers_NQ: Tensor) -> tuple[Tensor | None, ...]:
        request_RJ, item_NK = ctx.saved_tensors
        first, of_item_NM = of_encoder_NO.shape[1], torch.cat([of_encoder_NO, of_routers_NQ], dim=1)
        of_request_RM = ctx.rows.summed(of_item_NM)
        total_M = of_request_RM.sum(dim=0).numpy()
        encoder_OI = of_item_NM.new_empty(first, ctx.width)
        down_QI = of_item_NM.new_empty(len(total_M) - first, ctx.width)
        of_parts = []
        for part, of_product, (columns, weight_MC, norm), beyond in zip(
            (request_RJ, item_NK), (of_request_RM, of_item_NM), ctx.sides, ctx.beyond, strict=True
        ):
            of_parts.append(of_product @ weight_MC)
            scale_C, shift_C, *_ = norm
            of_weight_MC = (of_product.t() @ part).numpy()
            put_side(of_weight_MC, scale_C, shift_C, total_M, columns, encoder_OI.numpy(), down_QI.numpy())
            unclip_gradients(
                part.numpy(), *norm, beyond, of_product.numpy(), columns, of_parts[-1].numpy(), down_QI.numpy()
            )
        return *of_parts, encoder_OI, down_QI, None, None, None, None, None
