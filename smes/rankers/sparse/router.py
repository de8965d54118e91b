"""Routers: from an instance to the logits of the experts that each task, or task group, may choose.

Letters: B instances, I input width, R routers, C columns of one router's logits, Q rank of a low-rank map.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smes.rankers.moments import RunningMoments

_HORIZON = 1e5  # what routers read drifts as the encoder learns: the moments look back over about this many instances
_CLIP = 8.0  # as the feature layer cuts its numerics


class Router(nn.Module):
    """R bias-free routers over C experts each (bias-free: our choice).

    Args:
        input_dims: Widths of the parts that are read, side by side: the encoder's output, the raw input, or both.
        num_routers: R.
        columns: C.
        rank: Q of a low-rank map ``I → Q → C`` (our answer to routers that cost more than the experts when R·C is
            large); None for a linear one.
        own_maps: Whether each router has a map ``I → Q`` of its own, or one serves all. Needs a rank.
        norm: ``none``; ``layer`` normalises each part of each instance, without gain or bias; ``batch`` standardises
            each column by its moments over the stream, up to the last step.
        scale: Factor of the logits' first weights.
    """

    def __init__(
        self,
        input_dims: tuple[int, ...],
        num_routers: int,
        columns: int,
        rank: int | None = None,
        *,
        own_maps: bool = False,
        norm: str = "none",
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        width = sum(input_dims)
        self.num_routers = num_routers
        self.columns = columns
        self.layer_norm = norm == "layer"
        self.moments = RunningMoments(width, horizon=_HORIZON) if norm == "batch" else None
        self.down = nn.Linear(width, rank * (num_routers if own_maps else 1), bias=False) if rank else nn.Identity()
        self.up: OwnMaps | nn.Linear
        if own_maps:
            assert rank is not None, "a configuration with maps of each router's own has a rank"
            self.up = OwnMaps(num_routers, rank, columns)
        else:
            self.up = nn.Linear(rank or width, num_routers * columns, bias=False)
        if scale != 1.0:
            with torch.no_grad():
                self.up.weight.mul_(scale)

    def forward(self, *parts: Tensor) -> Tensor:
        """float32 logits [B, R, C]. Never in half precision: near-ties would be decided by rounding."""
        with torch.autocast(parts[0].device.type, enabled=False):
            x_BI = self._normalised([part.float() for part in parts])
            z: Tensor = self.up(self.down(x_BI))
            return z.view(-1, self.num_routers, self.columns)

    def _normalised(self, parts: list[Tensor]) -> Tensor:
        if self.layer_norm:
            parts = [F.layer_norm(part, part.shape[1:]) for part in parts]
        x_BI = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        if self.moments is None:
            return x_BI
        standardised_BI = self.moments.standardise(x_BI, _CLIP, torch.float32)
        if self.training:  # only now: a step's scores do not depend on its own batch
            self.moments.observe(x_BI.detach())
        return standardised_BI


class OwnMaps(nn.Module):
    """A map ``Q → C`` of each router on its own columns. [B, R·Q] → [B, R·C].

    Args:
        num_routers: R.
        rank: Q.
        columns: C.
    """

    def __init__(self, num_routers: int, rank: int, columns: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(rank)  # as nn.Linear starts
        self.weight = nn.Parameter(torch.empty(num_routers, rank, columns).uniform_(-bound, bound))

    def forward(self, q: Tensor) -> Tensor:
        q_RBQ = q.view(len(q), *self.weight.shape[:2]).transpose(0, 1)
        return torch.bmm(q_RBQ, self.weight).transpose(0, 1).reshape(len(q), -1)
