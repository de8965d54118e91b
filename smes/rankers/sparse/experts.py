"""Forms of an expert, each executing all experts of a dispatch as grouped GEMMs.

Letters: B instances, E experts, P packed rows, D input width, H output width, R rank, Q width of the narrow projection.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smes.rankers.sparse.dispatch import Dispatch, neutralise, pack


class Experts(Protocol):
    """E functions of the encoded instance. A form decides itself what it packs: some need only a narrow projection."""

    output_dim: int

    def __call__(self, h_BD: Tensor, plan: Dispatch) -> Tensor:
        """The output of every executed pair, y_PH; unused rows are finite."""
        ...


EXPERT_NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "layer": lambda y: F.layer_norm(y, y.shape[1:]),
    "rms": lambda y: F.rms_norm(y, y.shape[1:], eps=1e-5),
    "none": lambda y: y,
}
"""Norms of a packed row by their name in the configuration; without gain or bias."""


class FullExperts(nn.Module):
    """The paper's form: every expert an MLP of its own, ``x ← SiLU(Norm(x W_e))`` per layer.

    The norm has no gain or bias of its own (our choice: the next layer absorbs them, and a packed row need not look
    them up). BatchNorm, as in HoME, would see tiny batches in sparsely fed experts.

    Args:
        num_experts: E.
        input_dim: D.
        dims: Width of each layer; the last is H. Multiples of 8, as the GPU's grouped GEMM wants.
        norm: Name in :data:`EXPERT_NORMS`.
    """

    def __init__(self, num_experts: int, input_dim: int, dims: tuple[int, ...], norm: str = "layer") -> None:
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

    ``h W0`` is computed once per instance. ``B_e`` starts at zero, so that every expert starts as the base: in one pass
    over a stream, an expert that sees a fraction of it inherits what all instances teach (our form, not the paper's).

    Args:
        num_experts: E.
        input_dim: D.
        output_dim: H.
        rank: R, a multiple of 8.
        norm: Name in :data:`EXPERT_NORMS`.
    """

    def __init__(self, num_experts: int, input_dim: int, output_dim: int, rank: int, norm: str = "layer") -> None:
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

    As :class:`LowRankExperts`, with one GEMM of width Q per executed pair: only ``q`` is gathered. ``D_e`` starts at
    zero.

    Args:
        num_experts: E.
        input_dim: D.
        output_dim: H.
        narrow_dim: Q, a multiple of 8.
        norm: Name in :data:`EXPERT_NORMS`.
    """

    def __init__(self, num_experts: int, input_dim: int, output_dim: int, narrow_dim: int, norm: str = "layer") -> None:
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
    """In place where no gradient needs what it was: of packed rows there are many."""
    return F.silu(x_PH, inplace=not torch.is_grad_enabled())


def _uniform(*shape: int) -> Tensor:
    """Maps [..., D_in, D_out] that keep a unit variance, to be normalised after."""
    bound = math.sqrt(3 / shape[-2])
    return torch.empty(*shape).uniform_(-bound, bound)


def grouped_linear(x_PD: Tensor, weight_EDH: Tensor, offsets_E: Tensor) -> Tensor:
    """Rows of segment e times ``weight_EDH[e]``, in autocast's type where that is on. → [P, H]."""
    kind = x_PD.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x_PD, weight_EDH = x_PD.to(dtype), weight_EDH.to(dtype)
    return F.grouped_mm(x_PD, weight_EDH, offs=offsets_E)


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """What the experts of a ranker look like.

    Attributes:
        num_experts: E.
        input_dim: D, a multiple of 8.
        dims: Widths of an expert's layers.
        rank: Of ``low_rank`` experts.
        narrow_dim: Of ``residual`` experts.
        norm: Name in :data:`smes.rankers.sparse.experts.EXPERT_NORMS`.
    """

    num_experts: int
    input_dim: int
    dims: tuple[int, ...]
    rank: int
    narrow_dim: int
    norm: str


EXPERT_FORMS: dict[str, Callable[[ExpertShape], nn.Module]] = {
    "full": lambda s: FullExperts(s.num_experts, s.input_dim, s.dims, s.norm),
    "low_rank": lambda s: LowRankExperts(s.num_experts, s.input_dim, s.dims[0], s.rank, s.norm),
    "residual": lambda s: ResidualExperts(s.num_experts, s.input_dim, s.dims[0], s.narrow_dim, s.norm),
}
"""The forms of an expert by their name in the configuration; each is a module that is :class:`Experts`."""
