"""The experts, executed as grouped GEMMs over packed rows (:mod:`smes.rankers.sparse.packing`).

Letters: B instances, R routers (one per task, or one per task group), E experts, K experts of one router, P packed rows
(one per executed pair), U slots of an instance (the most experts it can use), N = B·R sums to combine, D input width, H
output width of an expert, R rank of a low-rank expert (in its own class), Q width of the narrow projection.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smes.rankers.sparse.config import ExpertForm, ExpertNorm, ExpertsConfig
from smes.rankers.sparse.expert_kernels import LINEAR
from smes.rankers.sparse.host_experts import KINDS, expert_layer, mixture, runs_here
from smes.rankers.sparse.packing import Dispatch, combine, neutralise, pack


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


@dataclass(frozen=True, slots=True)
class LastLayer:
    """What an expert's last layer is computed from: ``SiLU(Norm(base + x W_e))``.

    Attributes:
        x: Its input: of the instances, [B, D], or if ``packed`` of the rows, [P, D].
        weight_EDH: W.
        packed: As said.
        base_BH: What is added for each instance; None: nothing.
    """

    x: Tensor
    weight_EDH: Tensor
    packed: bool
    base_BH: Tensor | None = None


class _Experts(nn.Module, ABC):
    """What the forms have in common.

    Args:
        output_dim: H.
        norm: Name in :data:`EXPERT_NORMS`.
    """

    def __init__(self, output_dim: int, norm: ExpertNorm) -> None:
        super().__init__()
        self.output_dim = output_dim
        self.norm, self.kind = EXPERT_NORMS[norm], KINDS[norm]

    @abstractmethod
    def last_layer(self, h_BD: Tensor, plan: Dispatch) -> LastLayer:
        """Everything before the last layer."""

    def forward(self, h_BD: Tensor, plan: Dispatch) -> Tensor:
        """The output of every executed pair, [P, H]. Unused rows are finite."""
        last = self.last_layer(h_BD, plan)
        y_PH = layer_products(last.x, last.weight_EDH, plan, packed=last.packed)
        if last.base_BH is not None:
            y_PH = pack(last.base_BH, plan) + y_PH
        return _silu(self.norm(y_PH))


class FullExperts(_Experts):
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
        super().__init__(dims[-1], norm)
        widths = [input_dim, *dims]
        self.weights = nn.ParameterList(
            nn.Parameter(torch.empty(num_experts, d_in, d_out).uniform_(-bound, bound))
            for d_in, d_out in pairwise(widths)
            for bound in [math.sqrt(3 / d_in)]
        )

    def last_layer(self, h_BD: Tensor, plan: Dispatch) -> LastLayer:
        *hidden, last = self.weights
        x = h_BD
        for layer, weight_E in enumerate(hidden):
            if runs_here(x):
                x = expert_layer(x, weight_E, plan.rows, self.kind, packed=layer > 0)
            else:
                x = _silu(self.norm(layer_products(x, weight_E, plan, packed=layer > 0)))
        return LastLayer(x, last, packed=bool(hidden))


class LowRankExperts(_Experts):
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
        super().__init__(output_dim, norm)
        self.base = nn.Parameter(_uniform(input_dim, output_dim))
        self.down = nn.Parameter(_uniform(num_experts, input_dim, rank))
        self.up = nn.Parameter(torch.zeros(num_experts, rank, output_dim))

    def last_layer(self, h_BD: Tensor, plan: Dispatch) -> LastLayer:
        narrow_PR = layer_products(h_BD, self.down, plan, packed=False)
        return LastLayer(narrow_PR, self.up, packed=True, base_BH=h_BD @ self.base)


class ResidualExperts(_Experts):
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
        super().__init__(output_dim, norm)
        self.base = nn.Parameter(_uniform(input_dim, output_dim))
        self.narrow = nn.Parameter(_uniform(input_dim, narrow_dim))
        self.differences = nn.Parameter(torch.zeros(num_experts, narrow_dim, output_dim))

    def last_layer(self, h_BD: Tensor, plan: Dispatch) -> LastLayer:
        if runs_here(h_BD):  # loops read rows of a wider matrix
            both = h_BD @ torch.cat([self.narrow, self.base], dim=1)
            q_BQ, base_BH = torch.split(both, [self.narrow.shape[1], self.output_dim], dim=1)
        else:
            q_BQ, base_BH = h_BD @ self.narrow, h_BD @ self.base
        return LastLayer(q_BQ, self.differences, packed=False, base_BH=base_BH)


def mixed(experts: nn.Module, h_BD: Tensor, weights_BRK: Tensor, plan: Dispatch) -> Tensor:
    """:func:`combine` of the experts' outputs, which compiled loops do without writing these. → [B, R, H].

    Args:
        experts: That are :class:`Experts`.
        h_BD: What they read.
        weights_BRK: As of :func:`combine`.
        plan: Which run for which instance.
    """
    if not isinstance(experts, _Experts) or not runs_here(h_BD):
        return combine(experts(h_BD, plan), weights_BRK, plan)
    last = experts.last_layer(h_BD, plan)
    return mixture(
        last.x, last.weight_EDH, weights_BRK, plan.rows, experts.kind, packed=last.packed, base_BH=last.base_BH
    )  # fmt: skip


def layer_products(x: Tensor, weight_EDH: Tensor, plan: Dispatch, *, packed: bool) -> Tensor:
    """Each row times its expert's weight. → [P, H]; unused rows are 0.

    Args:
        x: Of the instances, [B, D], or if ``packed`` of the rows, [P, D].
        weight_EDH: Of every expert.
        plan: Which row is whose.
        packed: As said.
    """
    if runs_here(x):
        return expert_layer(x, weight_EDH, plan.rows, LINEAR, packed=packed)
    return neutralise(grouped_linear(x if packed else pack(x, plan), weight_EDH, plan.offsets_E), plan)


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
    if torch.compiler.is_exporting():  # after dispatch_all; torch.export takes grouped_mm in bfloat16 alone
        return torch.bmm(x_PD.reshape(weight_EDH.shape[0], -1, x_PD.shape[1]), weight_EDH).flatten(0, 1)
    return F.grouped_mm(x_PD, weight_EDH, offs=offsets_E)


EXPERT_FORMS: dict[ExpertForm, Callable[[int, ExpertsConfig], nn.Module]] = {
    "full": lambda i, c: FullExperts(c.num, i, c.dims, c.norm),
    "low_rank": lambda i, c: LowRankExperts(c.num, i, c.dims[0], c.rank, c.norm),
    "residual": lambda i, c: ResidualExperts(c.num, i, c.dims[0], c.narrow_dim, c.norm),
}
"""Form of an expert → (input width, a multiple of 8; configuration) → a module that is :class:`Experts`."""
