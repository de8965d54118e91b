"""Routers: from an instance to the logits of the experts that each task, or task group, may choose.

Letters: B instances, I width of the ranker's input, D width of the encoder's output, V width of what routers read,
R routers, C columns of one router's logits, Q rank of a low-rank map.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smes.rankers.moments import RunningMoments
from smes.rankers.sparse.config import RouterConfig

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

    def forward(self, x_BI: Tensor, h_BD: Tensor) -> Tensor:
        """float32 logits [B, R, C]. Half precision would decide near-ties by rounding.

        Args:
            x_BI: The ranker's input.
            h_BD: The encoder's output.
        """
        parts = {"raw": (x_BI,), "encoder": (h_BD,), "both": (x_BI, h_BD)}[self.config.input]
        with torch.autocast(x_BI.device.type, enabled=False):
            v_BV = self._normalised([part.float() for part in parts])
            z: Tensor = self.up(self.down(v_BV))
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
        q_RBQ = q.view(len(q), *self.weight.shape[:2]).transpose(0, 1)
        return torch.bmm(q_RBQ, self.weight).transpose(0, 1).reshape(len(q), -1)
