"""Routers, and the losses that spread their traffic over the experts.

A router maps an instance to the logits of the experts that a task, or a task group, may choose. A balance loss takes
two figures of a mini-batch:

- ``traffic_NE``: the share of each expert in a gate's choices; sums to 1 over E, no gradient;
- ``probs_NE``: the mean probability before selection; sums to 1 over E.

Letters: B instances, I width of the ranker's input, D width of the encoder's output, V width of what routers read,
R routers, C columns of one router's logits, Q rank of a low-rank map, N gates to balance (one per task; one per router
if the task groups are found from the stream), E experts without the fixed ones.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smes.rankers.clip_kernels import add_clipped
from smes.rankers.folded import read_folded
from smes.rankers.ranker import FAR_FROM_ZERO, RunningMoments
from smes.rankers.ranker_input import RankerInput, SplitInput, whole
from smes.rankers.sparse.config import BalanceLoss, RouterConfig
from smes.rankers.split_read import read_split

_HORIZON = 1e5  # the encoder's output drifts as it learns, so the moments look back over about this many instances
_CLIP = 8.0  # as in the feature layer's numerics


class Router(nn.Module):
    """R routers over C experts each, without bias (our choice).

    Low-rank maps ``V → Q → C`` are our addition: with a large R·C, linear routers cost more than the experts.

    Args:
        input_dim: I.
        encoder_dim: D.
        num_routers: R.
        columns: C.
        config: What the routers read, and how they map it to logits.
    """

    def __init__(self, input_dim: int, encoder_dim: int, num_routers: int, columns: int, config: RouterConfig) -> None:
        super().__init__()
        width = {"raw": input_dim, "encoder": encoder_dim, "both": input_dim + encoder_dim}[config.input]
        rank, own_maps = config.rank, config.maps == "own"
        self.config = config
        self.num_routers = num_routers
        self.columns = columns
        self.moments = RunningMoments(width, horizon=_HORIZON) if config.norm == "batch" else None
        self.down = nn.Linear(width, rank * (num_routers if own_maps else 1), bias=False) if rank else nn.Identity()
        self.up: OwnMaps | nn.Linear
        if own_maps:
            assert rank is not None, "RouterConfig refuses own maps without a rank"
            self.up = OwnMaps(num_routers, rank, columns)
        else:
            self.up = nn.Linear(rank or width, num_routers * columns, bias=False)
        if config.scale != 1.0:
            with torch.no_grad():
                self.up.weight.mul_(config.scale)

    def forward(self, x_BI: RankerInput, h_BD: Tensor) -> Tensor:
        """float32 logits [B, R, C]. Half precision would decide near-ties by rounding.

        Args:
            x_BI: The ranker's input.
            h_BD: The encoder's output.
        """
        if isinstance(x_BI, SplitInput) and (q := self._of_split(x_BI)) is not None:
            return self.after_product(q)
        of_input = {"raw": (x_BI,), "encoder": (h_BD,), "both": (x_BI, h_BD)}[self.config.input]
        parts = [whole(part) for part in of_input]
        with torch.autocast(x_BI.device.type, enabled=False):
            v_BV = self._normalised([part.float() for part in parts])
            z: Tensor = self.up(self.down(v_BV))
            return z.view(-1, self.num_routers, self.columns)

    def _of_split(self, x: SplitInput) -> Tensor | None:
        """The first map's product, if it reads the input alone, column by column, and no batch counts for moments."""
        by_column = self.config.norm != "layer" and not (self.training and self.moments is not None)
        if self.config.input != "raw" or not by_column or not isinstance(self.down, nn.Linear):
            return None
        with torch.autocast(x.device.type, enabled=False):
            if self.moments is not None:
                x = self.moments.standardise_split(x, _CLIP)
            return x.linear(self.down.weight)

    def of_split(self, encoder_OI: Tensor, x: SplitInput) -> tuple[Tensor, Tensor] | None:
        """The first products of an encoder and of the routers, as one product; in evaluation.

        The norm is folded into the weights, and what it clips is put right afterwards.

        Args:
            encoder_OI: The encoder's weight.
            x: The ranker's input, float32 on the host.

        Returns:
            Both products, [N, O] and the routers'; None if the routers read something else, or a value lies so far out
            that rounding would show.
        """
        moments, down, first = self.moments, self.down, len(encoder_OI)
        if moments is None or self.config.input != "raw" or not isinstance(down, nn.Linear):
            return None
        maps = x.kept(self, "folded", lambda: _folded(encoder_OI, down.weight, moments, x))
        if maps is None:
            return None
        of_request_RO = F.linear(x.request_RJ, maps.request.weight_OC, maps.bias_O)
        far = maps.request.clip(x.request_RJ, of_request_RO)
        y_NO = x.added(of_request_RO, F.linear(x.item_NK, maps.item.weight_OC))
        if max(far, maps.item.clip(x.item_NK, y_NO)) > FAR_FROM_ZERO:
            return None
        return y_NO[:, :first], y_NO[:, first:]

    def read_with(self, encoder_OI: Tensor, x_BI: RankerInput) -> tuple[Tensor, Tensor] | None:
        """The first products of an encoder and of the routers, as one product, with gradients.

        In training the batch counts for the moments, as in :meth:`forward`.

        Args:
            encoder_OI: The encoder's weight.
            x_BI: The ranker's input, float32 on the host.

        Returns:
            [B, O] and the routers'; None if the routers read something else, or not column by column, or a value of a
            split input lies so far out that rounding would show.
        """
        if self.moments is None or self.config.input != "raw" or not isinstance(self.down, nn.Linear):
            return None
        if isinstance(x_BI, SplitInput):
            return read_split(x_BI, encoder_OI, self.down.weight, self.moments, _CLIP) if self.training else None
        alone = self.moments.joining is None
        both = read_folded(x_BI, encoder_OI, self.down.weight, self.moments, _CLIP, observe=self.training and alone)
        if self.training and not alone:
            self.moments.observe(x_BI.detach())
        return both

    def after_product(self, q: Tensor) -> Tensor:
        """What :meth:`forward` gives, from the first map's product."""
        z: Tensor = self.up(q)
        return z.view(-1, self.num_routers, self.columns)

    def _normalised(self, parts: list[Tensor]) -> Tensor:
        if self.config.norm == "layer":
            parts = [F.layer_norm(part, part.shape[1:]) for part in parts]
        v_BV = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        if self.moments is None:
            return v_BV
        standardised_BV = self.moments.standardise(v_BV, _CLIP, torch.float32)
        if self.training:  # after use: the scores of a step do not depend on its own batch
            self.moments.observe(v_BV.detach())
        return standardised_BV


@dataclass(frozen=True, slots=True)
class _FoldedPart:
    """The part of a folded map that reads some columns.

    Attributes:
        weight_OC: All maps, the norm folded into the routers'.
        down_CQ: The routers' map by itself.
        scale_C, shift_C: The norm.
    """

    weight_OC: Tensor
    down_CQ: Tensor
    scale_C: Tensor
    shift_C: Tensor

    def clip(self, x_BC: Tensor, y_BO: Tensor) -> float:
        """Put right what should have been clipped, in place; the largest value that should."""
        columns = (x_BC.contiguous().numpy(), self.scale_C.numpy(), self.shift_C.numpy())
        beyond_B = np.empty(len(x_BC), np.bool_)
        return float(add_clipped(*columns, np.float32(_CLIP), self.down_CQ.numpy(), y_BO.numpy(), beyond_B))


@dataclass(frozen=True, slots=True)
class _FoldedMaps:
    """Both parts of a folded map, and its bias."""

    request: _FoldedPart
    item: _FoldedPart
    bias_O: Tensor


def _folded(encoder_OI: Tensor, down_QI: Tensor, moments: RunningMoments, x: SplitInput) -> _FoldedMaps | None:
    scale_I, shift_I = (column.float() for column in moments.affine())
    if (shift_I.abs() > FAR_FROM_ZERO).any():
        return None
    weight_OI = torch.cat([encoder_OI, down_QI * scale_I])

    def part(columns: Tensor) -> _FoldedPart:
        down_CQ = down_QI.index_select(1, columns).t().contiguous()
        own = (weight_OI.index_select(1, columns), down_CQ, scale_I[columns], shift_I[columns])
        return _FoldedPart(*(tensor.detach() for tensor in own))

    bias_O = torch.cat([down_QI.new_zeros(len(encoder_OI)), down_QI @ shift_I]).detach()
    return _FoldedMaps(part(x.columns_J), part(x.columns_K), bias_O)


class OwnMaps(nn.Module):
    """A map ``Q → C`` for each router, on the router's own columns. [B, R·Q] → [B, R·C].

    Args:
        num_routers: R.
        rank: Q.
        columns: C.
    """

    def __init__(self, num_routers: int, rank: int, columns: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(rank)  # as in nn.Linear
        self.weight = nn.Parameter(torch.empty(num_routers, rank, columns).uniform_(-bound, bound))

    def forward(self, q: Tensor) -> Tensor:
        q_RBQ = q.view(-1, *self.weight.shape[:2]).transpose(0, 1)
        return torch.bmm(q_RBQ, self.weight).transpose(0, 1).flatten(1)


def global_loss(traffic_NE: Tensor, probs_NE: Tensor) -> Tensor:
    """Global multi-gate load balancing (SMES, arXiv 2602.09386): ``L_lb = (E/K) Σ_e f̄_e p̄_e``, a scalar.

    ``f̄_e / K`` is the traffic and ``p̄_e`` the mean probability over all gates and instances. An even load gives 1, or
    somewhat more if the groups have own pools and differ in their number of tasks.
    """
    return traffic_NE.shape[1] * torch.dot(traffic_NE.mean(dim=0), probs_NE.mean(dim=0))


def per_gate_loss(traffic_NE: Tensor, probs_NE: Tensor) -> Tensor:
    """Every gate balanced by itself: ``(E/K) · mean_n Σ_e f̄_ne p̄_ne``. An even load of each gate gives 1.

    The SMES paper compares its global loss with this one, which keeps tasks from specialising on experts.
    """
    return traffic_NE.shape[1] * (traffic_NE * probs_NE).sum(dim=1).mean()


def mutual_information_loss(traffic_NE: Tensor, probs_NE: Tensor) -> Tensor:
    """``−I(N; E) = H(E|N) − H(E)`` of the mean probabilities (Mod-Squad, arXiv 2212.08066), in nats; −log N … 0.

    It is least when all gates together use all experts equally, and each gate uses few of them.
    """
    return _entropy(probs_NE).mean() - _entropy(probs_NE.mean(dim=0))


def _entropy(probs: Tensor) -> Tensor:
    # A probability of 0 (by underflow) adds nothing to the entropy, but its slope is infinite.
    probs = probs.clamp(min=1e-12)
    return -(probs * probs.log()).sum(dim=-1)


BALANCE_LOSSES: dict[BalanceLoss, Callable[[Tensor, Tensor], Tensor] | None] = {
    "global": global_loss,
    "per_gate": per_gate_loss,
    "mutual_information": mutual_information_loss,
    "none": None,
}
"""Balance losses of (traffic, mean probabilities) by their name in the configuration."""
