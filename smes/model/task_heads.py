"""The task heads: from the tasks' representations to logits.

Letters: B instances, T tasks, H width of a task's representation.
"""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from smes.arrays import F32
from smes.model.task_kernels import gradients_of_streams, logits_of_streams
from smes.model.task_outputs import TaskRates
from smes.rankers.kernels import on_host
from smes.rankers.streams import SharedStreams


class TaskHeads(nn.Module):
    """A small MLP per task, ``logit = SiLU(h_t V_t + c_t) · w_t + b_t``. [B, T, H] → [B, T].

    Args:
        num_tasks: T.
        input_dim: H.
        hidden_dim: Width of the hidden layer; 0 for linear heads.
    """

    def __init__(self, num_tasks: int, input_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.hidden = nn.Parameter(_uniform(num_tasks, input_dim, hidden_dim)) if hidden_dim else None
        self.hidden_bias = nn.Parameter(torch.zeros(num_tasks, 1, hidden_dim)) if hidden_dim else None
        self.out = nn.Parameter(_uniform(num_tasks, hidden_dim or input_dim, 1).squeeze(2))
        self.out_bias = nn.Parameter(torch.zeros(num_tasks))

    def forward(self, h_BTH: Tensor) -> Tensor:
        if self.hidden is not None and self.hidden_bias is not None:
            h_BTH = F.silu(torch.baddbmm(self.hidden_bias, h_BTH.transpose(0, 1), self.hidden)).transpose(0, 1)
        # Multiply and sum: on the CPU a batch of matrix-vector products is several times slower.
        return (h_BTH.float() * self.out).sum(dim=2) + self.out_bias

    def read_at_once(self, shared: SharedStreams) -> bool:
        """Whether :meth:`of_streams` can read them: linear heads, on the CPU, in float32."""
        streams_BSH = shared.streams_BSH
        return self.hidden is None and on_host(streams_BSH) and streams_BSH.dtype == torch.float32

    def of_streams(self, shared: SharedStreams, wide_BT: Tensor | None, rates: TaskRates) -> Tensor:
        """Logits with linear part and base rates, without a representation for each task in memory. float32 [B, T].

        Each task's gradient on its way into the streams is multiplied by its factor.
        """
        given = shared.streams_BSH, shared.common_BH, self.out, self.out_bias, wide_BT, shared.share_TS, rates
        if not torch.is_grad_enabled():
            return _logits(*given)
        logits_BT: Tensor = _OfStreams.apply(*given)  # type: ignore[no-untyped-call]  # torch has no type
        return logits_BT

    def gradient(self, of_logits_BT: Tensor, factor_T: Tensor) -> Tensor:
        """The tasks' gradients by their representations, of linear heads, times their factors. [B, T, H]."""
        return of_logits_BT.unsqueeze(2) * (factor_T.unsqueeze(1) * self.out.detach())


class _OfStreams(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        streams_BSH: Tensor,
        common_BH: Tensor | None,
        out_TH: Tensor,
        bias_T: Tensor,
        wide_BT: Tensor | None,
        share_TS: Tensor,
        rates: TaskRates,
    ) -> Tensor:
        ctx.save_for_backward(streams_BSH, common_BH, out_TH, wide_BT, share_TS)
        ctx.rates = rates
        return _logits(streams_BSH, common_BH, out_TH, bias_T, wide_BT, share_TS, rates)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        streams_BSH, common_BH, out_TH, wide_BT, share_TS = ctx.saved_tensors
        of_streams_BSH, of_out_TH = torch.empty(streams_BSH.shape), torch.zeros(out_TH.shape)
        of_common_BH = None if common_BH is None else torch.empty(common_BH.shape)
        of_wide_BT = None if wide_BT is None else torch.empty(wide_BT.shape)
        of_bias_T = torch.zeros(len(out_TH))
        gradients_of_streams(
            _array(streams_BSH),
            _array(common_BH, 2),
            _array(out_TH),
            _array(share_TS),
            _array(ctx.rates.factor_T),
            _array(ctx.rates.trust_T),
            _array(gradients[0]),
            of_streams_BSH.numpy(),
            _array(of_common_BH, 2),
            of_out_TH.numpy(),
            of_bias_T.numpy(),
            _array(of_wide_BT, 2),
        )
        return of_streams_BSH, of_common_BH, of_out_TH, of_bias_T, of_wide_BT, None, None


def _logits(
    streams_BSH: Tensor,
    common_BH: Tensor | None,
    out_TH: Tensor,
    bias_T: Tensor,
    wide_BT: Tensor | None,
    share_TS: Tensor,
    rates: TaskRates,
) -> Tensor:
    logits_BT = torch.empty(len(streams_BSH), len(out_TH))
    logits_of_streams(
        _array(streams_BSH),
        _array(common_BH, 2),
        _array(out_TH),
        _array(bias_T),
        _array(share_TS),
        _array(wide_BT, 2),
        _array(rates.trust_T),
        _array(rates.base_T),
        logits_BT.numpy(),
    )
    return logits_BT


def _array(tensor: Tensor | None, dimensions: int = 0) -> F32:
    """The tensor's memory, in order; for none an empty array of so many dimensions."""
    if tensor is None:
        return np.zeros((0,) * dimensions, np.float32)
    array: F32 = tensor.detach().contiguous().numpy()
    return array


def _uniform(num_tasks: int, d_in: int, d_out: int) -> Tensor:
    bound = 1 / math.sqrt(d_in)
    return torch.empty(num_tasks, d_in, d_out).uniform_(-bound, bound)
