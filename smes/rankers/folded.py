"""A map of raw columns and one of standardised columns, in one product on the CPU.

Standardising by moments over the stream is affine, so it is folded into the weights that read it. Columns in which a
value is clipped, and those whose mean is so many deviations from 0 that rounding would show, are *exact*: they are
standardised, clipped and multiplied by themselves.

Letters: B instances, C columns, O and Q outputs of the two maps, K exact columns.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from smes.rankers.column_kernels import fold_columns, unfold_gradient
from smes.rankers.ranker import FAR_FROM_ZERO, RunningMoments

_ROUNDED = 0.9999  # a value so near to the clip counts as beyond it


def read_folded(
    x_BC: Tensor, raw_OC: Tensor, standard_QC: Tensor, moments: RunningMoments, clip: float, *, observe: bool
) -> tuple[Tensor, Tensor]:
    """``x raw_OCᵀ``, and ``standardised(x) standard_QCᵀ`` (:meth:`smes.rankers.ranker.RunningMoments.standardise`).

    Args:
        x_BC: float32, on the host; B ≥ 1.
        raw_OC: The map of the columns as they are.
        standard_QC: The map of the standardised columns.
        moments: What standardises them.
        clip: Where standardised values end.
        observe: Whether to take the batch in afterwards, as :meth:`smes.rankers.ranker.RunningMoments.observe` does.

    Returns:
        float32 [B, O] and [B, Q]; views of one matrix.
    """
    both: tuple[Tensor, Tensor] = _ReadFolded.apply(  # type: ignore[no-untyped-call]  # torch has no type
        x_BC, raw_OC, standard_QC, moments, clip, observe
    )
    return both


class _ReadFolded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_BC: Tensor, raw_OC: Tensor, standard_QC: Tensor, moments: RunningMoments, clip: float, observe: bool
    ) -> tuple[Tensor, Tensor]:
        O, Q, C = len(raw_OC), len(standard_QC), x_BC.shape[1]  # noqa: E741
        x_BC = x_BC.contiguous()
        weight_MC, bias_M = torch.empty(O + Q, C), torch.zeros(O + Q)
        weight_MC[:O] = raw_OC
        scale_C, shift_C = torch.empty(2, C).unbind()
        exact_C = torch.empty(C, dtype=torch.bool)
        exact = fold_columns(
            x_BC.numpy(),
            *(column.numpy() for column in (moments.count_C, moments.mean_C, moments.variance_C)),
            clip * _ROUNDED,
            FAR_FROM_ZERO,
            moments.horizon,
            observe,
            standard_QC.contiguous().numpy(),
            weight_MC[O:].numpy(),
            bias_M[O:].numpy(),
            scale_C.numpy(),
            shift_C.numpy(),
            exact_C.numpy(),
        )
        if observe:
            moments.changed()
        y_BM = torch.addmm(bias_M, x_BC, weight_MC.t())
        exact_K = exact_C.nonzero().squeeze(1) if exact else None
        if exact_K is not None:
            z_BK = _standardised(x_BC, exact_K, scale_C, shift_C).clamp_(-clip, clip)
            y_BM[:, O:].addmm_(z_BK, standard_QC.index_select(1, exact_K).t())
        ctx.save_for_backward(x_BC, weight_MC, standard_QC, scale_C, shift_C, exact_C, exact_K)
        ctx.clip = clip
        return y_BM[:, :O], y_BM[:, O:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        of_y_BM, of_q_BQ = torch.cat(gradients, dim=1), gradients[1]
        x_BC, weight_MC, standard_QC, scale_C, shift_C, exact_C, exact_K = ctx.saved_tensors
        O = len(weight_MC) - len(standard_QC)  # noqa: E741
        of_x_BC = of_y_BM @ weight_MC if ctx.needs_input_grad[0] else None
        of_weight_MC = of_y_BM.t() @ x_BC
        of_standard_QC = torch.empty_like(standard_QC)
        unfold_gradient(
            of_weight_MC[O:].numpy(),
            of_q_BQ.sum(dim=0).numpy(),
            scale_C.numpy(),
            shift_C.numpy(),
            exact_C.numpy(),
            of_standard_QC.numpy(),
        )
        if exact_K is not None:
            z_BK = _standardised(x_BC, exact_K, scale_C, shift_C)
            inside_BK = z_BK.abs() <= ctx.clip
            of_standard_QC.index_copy_(1, exact_K, of_q_BQ.t() @ z_BK.clamp_(-ctx.clip, ctx.clip))
            if of_x_BC is not None:
                of_z_BK = of_q_BQ @ standard_QC.index_select(1, exact_K)
                of_x_BC.index_add_(1, exact_K, of_z_BK * inside_BK * scale_C.index_select(0, exact_K))
        return of_x_BC, of_weight_MC[:O], of_standard_QC, None, None, None


def _standardised(x_BC: Tensor, exact_K: Tensor, scale_C: Tensor, shift_C: Tensor) -> Tensor:
    scale_K, shift_K = scale_C.index_select(0, exact_K), shift_C.index_select(0, exact_K)
    return torch.addcmul(shift_K, x_BC.index_select(1, exact_K), scale_K)
