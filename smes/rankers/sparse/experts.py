"""Forms of an expert, each executing all experts of a dispatch as grouped GEMMs.

Letters: B instances, E experts, P packed rows, D input width, H output width, R rank, Q width of the narrow projection.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smes.rankers.sparse.config import ExpertForm, ExpertNorm, ExpertsConfig
from smes.rankers.sparse.dispatch import Dispatch, neutralise, pack


class Experts(Protocol):
    """E functions of the encoded instance. Each form packs only what it needs, such as a narrow projection."""

    output_dim: int

    def __call__(self, h_BD: Tensor, plan: Dispatch) -> Tensor:
        """The output of every executed pair, [P, H]. Unused rows are finite."""
        ...


EXPERT_NORMS: dict[ExpertNorm, Callable[[Tensor], Tensor]] = {
    "layer": lambda y: F.layer_norm(y, y.shape[1:]),
    "rms": lambda y: F.rms_norm(y, y.shape[1:], eps=1e-5),
    "none": lambda y: y,
}
"""Norms of a packed row, without gain or bias, by their name in the configuration."""


class FullExperts(nn.Module):
    """The paper's form: every expert an MLP of its own, ``x ← SiLU(Norm(x W_e))`` per layer.

    The norm has no gain or bias (our choice: the next layer absorbs them, and no packed row needs to look them up).
    BatchNorm, as in HoME, would see tiny batches in experts that few instances use.

    Args:
        num_experts: E.
        input_dim: D.
        dims: Width of each layer, a multiple of 8 as the GPU's grouped GEMM needs; the last is H.
        norm: Name in :data:`EXPERT_NORMS`.
    """

    def __init__(self, num_experts: int, input_dim: int, dims: tuple[int, ...], norm: ExpertNorm = "layer") -> None:
        super().__init__()
        self.output_dim = dims[-1]
        self.norm = EXPERT_NORMS[norm]
        widths = [input_dim, *dims]
        self.weights = nn.ParameterList(
            nn.Parameter(torch.empty(num_experts, d_in, d_out).uniform_(-bound, bound))
            for d_in, d_out in pairwise(widths)
            for bound in [math.sqrt(3 / d_in)]
        )

    def forward(self, h_BD: Tensor, plan: Dispatch) -> Tensor:
        x_P = pack(h_BD, plan)
        for weight_E in self.weights:
            y_P = neutralise(grouped_linear(x_P, weight_E, plan.offsets_E), plan)
            x_P = _silu(self.norm(y_P))
        return x_P


class LowRankExperts(nn.Module):
    """Low-rank differences from a shared base: ``f_e(h) = SiLU(Norm(h W0 + h A_e B_e))``.

    This form is ours, not the paper's. ``h W0`` is computed once per instance. ``B_e`` starts at zero, so that every
    expert starts as the base. In one pass over a stream each expert sees few instances; the base learns from all.

    Args:
        num_experts: E.
        input_dim: D.
        output_dim: H.
        rank: R, a multiple of 8.
        norm: Name in :data:`EXPERT_NORMS`.
    """

    def __init__(
        self, num_experts: int, input_dim: int, output_dim: int, rank: int, norm: ExpertNorm = "layer"
    ) -> None:
        super().__init__()
        self.norm = EXPERT_NORMS[norm]
        self.output_dim = output_dim
        self.base = nn.Parameter(_uniform(input_dim, output_dim))
        self.down = nn.Parameter(_uniform(num_experts, input_dim, rank))
        self.up = nn.Parameter(torch.zeros(num_experts, rank, output_dim))

    def forward(self, h_BD: Tensor, plan: Dispatch) -> Tensor:
        narrow_PR = neutralise(grouped_linear(pack(h_BD, plan), self.down, plan.offsets_E), plan)
        difference_PH = neutralise(grouped_linear(narrow_PR, self.up, plan.offsets_E), plan)
        return _silu(self.norm(pack(h_BD @ self.base, plan) + difference_PH))


class ResidualExperts(nn.Module):
    """Differences that read one narrow projection: ``q = h P``, ``f_e(h) = SiLU(Norm(h W0 + q D_e))``.

    Like :class:`LowRankExperts`, but with one GEMM of width Q per executed pair: only ``q`` and the base's output are
    gathered. ``D_e`` starts at zero.

    Args:
        num_experts: E.
        input_dim: D.
        output_dim: H.
        narrow_dim: Q, a multiple of 8.
        norm: Name in :data:`EXPERT_NORMS`.
    """

    def __init__(
        self, num_experts: int, input_dim: int, output_dim: int, narrow_dim: int, norm: ExpertNorm = "layer"
    ) -> None:
        super().__init__()
        self.norm = EXPERT_NORMS[norm]
        self.output_dim = output_dim
        self.base = nn.Parameter(_uniform(input_dim, output_dim))
        self.narrow = nn.Parameter(_uniform(input_dim, narrow_dim))
        self.differences = nn.Parameter(torch.zeros(num_experts, narrow_dim, output_dim))

    def forward(self, h_BD: Tensor, plan: Dispatch) -> Tensor:
        q_PQ = pack(h_BD @ self.narrow, plan)
        difference_PH = neutralise(grouped_linear(q_PQ, self.differences, plan.offsets_E), plan)
        return _silu(self.norm(pack(h_BD @ self.base, plan) + difference_PH))


def _silu(x_PH: Tensor) -> Tensor:
    """SiLU, in place if no gradient needs the input: packed rows take much memory."""
    return F.silu(x_PH, inplace=not torch.is_grad_enabled())


def _uniform(*shape: int) -> Tensor:
    """First weights of maps [..., D_in, D_out] that keep the variance at one."""
    bound = math.sqrt(3 / shape[-2])
    return torch.empty(*shape).uniform_(-bound, bound)


def grouped_linear(x_PD: Tensor, weight_EDH: Tensor, offsets_E: Tensor) -> Tensor:
    """Multiply the rows of segment e by ``weight_EDH[e]``, in autocast's type if autocast is on. → [P, H]."""
    kind = x_PD.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x_PD, weight_EDH = x_PD.to(dtype), weight_EDH.to(dtype)
    return F.grouped_mm(x_PD, weight_EDH, offs=offsets_E)


EXPERT_FORMS: dict[ExpertForm, Callable[[int, ExpertsConfig], nn.Module]] = {
    "full": lambda i, c: FullExperts(c.num, i, c.dims, c.norm),
    "low_rank": lambda i, c: LowRankExperts(c.num, i, c.dims[0], c.rank, c.norm),
    "residual": lambda i, c: ResidualExperts(c.num, i, c.dims[0], c.narrow_dim, c.norm),
}
"""Form of an expert → (input width, a multiple of 8; configuration) → a module that is :class:`Experts`."""
