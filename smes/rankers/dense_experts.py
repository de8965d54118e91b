"""Experts that all run on every instance, and the gates that mix them: the parts of the dense rankers.

Letters: B instances, N experts, G gates, D input width, H output width.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smes.joint_batch import Joined, JointBatch
from smes.rankers.config import DenseNorm

_MOMENTUM, _EPSILON = 0.01, 1e-5


class DenseExperts(nn.Module):
    """N MLPs of one shape, ``x ← SiLU(Norm(x W_n))`` per layer, like SMES's full experts. All of them run.

    Args:
        num_experts: N.
        input_dim: D.
        dims: Width of each layer; the last is H.
        norm: Norm of each expert by itself, without gain or bias.
    """

    def __init__(self, num_experts: int, input_dim: int, dims: tuple[int, ...], norm: DenseNorm = "layer") -> None:
        super().__init__()
        self.output_dim = dims[-1]
        widths = [input_dim, *dims]
        self.weights = nn.ParameterList(
            nn.Parameter(uniform(num_experts, d_in, d_out, gain=3.0)) for d_in, d_out in pairwise(widths)
        )
        self.norms = nn.ModuleList(NORMS[norm](num_experts, d_out) for d_out in dims)

    def forward(self, x: Tensor) -> Tensor:
        """[B, D], one input for all experts, or [N, B, D], one input per expert → [N, B, H]."""
        if x.dim() == 2:
            x = x.expand(len(self.weights[0]), *x.shape)
        for weight_N, norm in zip(self.weights, self.norms, strict=True):
            x = F.silu(norm(torch.bmm(x, weight_N)))
        return x


class LayerNorm(nn.Module):
    """Normalises each instance over the layer's width. Its output does not depend on the batch of the instance."""

    def __init__(self, num_experts: int, dim: int) -> None:
        super().__init__()
        self._shape = (dim,)

    def forward(self, y_NBH: Tensor) -> Tensor:
        return F.layer_norm(y_NBH, self._shape)


class BatchNorm(Joined, nn.Module):
    """HoME's norm of each column of each expert: over the mini-batch in training, by running moments in serving.

    A mini-batch of one instance has no moments, so it is normalised by the running ones. Joined with other ranks' the
    mini-batch is that of all ranks.
    """

    mean_M: Tensor
    var_M: Tensor

    def __init__(self, num_experts: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean_M", torch.zeros(num_experts * dim))
        self.register_buffer("var_M", torch.ones(num_experts * dim))

    def forward(self, y_NBH: Tensor) -> Tensor:
        N, B, H = y_NBH.shape
        y_BM = y_NBH.transpose(0, 1).reshape(B, N * H)
        joint = self.joining.present if self.training and self.joining is not None else None
        if joint is not None and joint.instances > 1:
            y_BM = self._by_all(y_BM, joint)
        else:
            alone = self.training and B > 1 and joint is None
            y_BM = F.batch_norm(y_BM, self.mean_M, self.var_M, training=alone, momentum=_MOMENTUM)
        return y_BM.view(B, N, H).transpose(0, 1)

    def _by_all(self, y_BM: Tensor, batch: JointBatch) -> Tensor:
        """As ``batch_norm`` in training, by the moments of the instances of all ranks."""
        y, B = y_BM.double(), batch.instances  # in float64 a mean of squares less a squared mean is exact enough
        of_own_2M = torch.stack([y.sum(dim=0), y.square().sum(dim=0)]) * (batch.own > 0)
        mean_M, square_M = (batch.sum_of_losses(of_own_2M) / B).unbind()
        var_M = (square_M - mean_M.square()).clamp(min=0.0)
        with torch.no_grad():
            self.mean_M.lerp_(mean_M.to(self.mean_M.dtype), _MOMENTUM)
            self.var_M.lerp_((var_M * (B / (B - 1))).to(self.var_M.dtype), _MOMENTUM)
        return ((y - mean_M) * (var_M + _EPSILON).rsqrt()).to(y_BM.dtype)


NORMS: dict[DenseNorm, type[LayerNorm] | type[BatchNorm]] = {"layer": LayerNorm, "batch": BatchNorm}
"""Norms of an expert by their name in the configuration."""


class Gates(nn.Module):
    """G bias-free linear gates over N experts: ``softmax`` of each gate over the experts it may use.

    Args:
        input_dim: D.
        num_gates: G.
        num_experts: N.
        allowed: Per gate, which experts it may use (at least one); None for all.
        stored: Whether ``allowed`` is part of the weights.
    """

    allowed_GN: Tensor | None

    def __init__(
        self,
        input_dim: int,
        num_gates: int,
        num_experts: int,
        allowed: list[list[bool]] | None = None,
        *,
        stored: bool = False,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(uniform(num_gates, input_dim, num_experts))
        self.register_buffer("allowed_GN", None if allowed is None else torch.tensor(allowed), persistent=stored)

    def forward(self, x: Tensor) -> Tensor:
        """[B, D], one input for all gates, or [G, B, D], one per gate → weights [G, B, N], 0 where not allowed."""
        if x.dim() == 2:
            x = x.expand(len(self.weight), *x.shape)
        z_GBN = torch.bmm(x, self.weight).float()
        if self.allowed_GN is not None:
            z_GBN = z_GBN.masked_fill(~self.allowed_GN.unsqueeze(1), float("-inf"))
        return z_GBN.softmax(dim=-1)


def mix(weights_GBN: Tensor, y_NBH: Tensor) -> Tensor:
    """``Σ_n w_gbn y_nbh`` for every gate. → [B, G, H]."""
    return torch.bmm(weights_GBN.transpose(0, 1).to(y_NBH.dtype), y_NBH.transpose(0, 1))


def uniform(*shape: int, gain: float = 1.0) -> Tensor:
    """First weights of stacked maps [..., D_in, D_out]: uniform in ± sqrt(gain / D_in)."""
    bound = math.sqrt(gain / shape[-2])
    return torch.empty(*shape).uniform_(-bound, bound)
