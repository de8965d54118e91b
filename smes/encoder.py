"""The shared encoder that rankers start with. Letters: B instances, I input width, D output width."""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn


class Encoder(nn.Module):
    """``x ← SiLU(LayerNorm(Linear(x)))`` per layer; without layers, the identity. [B, I] → [B, D].

    Args:
        input_dim: I.
        dims: Width of each layer; the last is D.
    """

    def __init__(self, input_dim: int, dims: tuple[int, ...]) -> None:
        super().__init__()
        widths = [input_dim, *dims]
        self.output_dim = widths[-1]
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(d_in, d_out, bias=False), nn.LayerNorm(d_out)) for d_in, d_out in pairwise(widths)
        )

    def forward(self, x_BI: Tensor) -> Tensor:
        for layer in self.layers:
            x_BI = F.silu(layer(x_BI))
        return x_BI
