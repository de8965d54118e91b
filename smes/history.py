"""Target attention over a sequence: which of the user's recent items matter for this item.

As in DIN (Zhou et al., 2018, arXiv 1706.06978) the item to score asks; the score of an entry is a scaled dot product of
learned maps (Vaswani et al., 2017, arXiv 1706.03762) instead of DIN's activation unit, and the weights are normalised:
our choice, for its cost on a CPU.

Letters: B instances, L places of the sequence, D embedding width, A width of the comparison.
"""

import torch
from torch import Tensor, nn

_EPSILON = 1e-6


class TargetAttention(nn.Module):
    """The entries of a sequence, weighed by how well they answer the target.

    Args:
        dim: D.
        attention_dim: A.
    """

    def __init__(self, dim: int, attention_dim: int) -> None:
        super().__init__()
        self.query = nn.Linear(dim, attention_dim)
        self.key = nn.Linear(dim, attention_dim, bias=False)
        self._scale = attention_dim**-0.5
        self.output_dim = 2 * dim

    def forward(self, target_BD: Tensor, entry_BLD: Tensor, present_BL: Tensor) -> Tensor:
        """Weighted mean of the entries, and its product with the target.

        Args:
            target_BD: Embedding of what is scored.
            entry_BLD: Embedding of each entry: of its item plus those of what accompanies it.
            present_BL: bool, which places hold an entry.

        Returns:
            float32 [B, 2·D]; zeros where there is no entry.
        """
        # Embeddings begin near zero and grow as they learn: compared by direction, they can tell early.
        query_BA = self.query(_unit(target_BD))
        # (W k)·q = k·(Wᵀ q): one product per instance instead of one per entry.
        asked_BD = query_BA @ self.key.weight
        score_BL = torch.einsum("bld,bd->bl", _unit(entry_BLD), asked_BD) * self._scale
        # A finite floor, not -inf: an empty sequence must not turn into NaN, nor its gradient.
        weight_BL = score_BL.masked_fill(~present_BL, -1e9).softmax(dim=1) * present_BL
        attended_BD = torch.einsum("bl,bld->bd", weight_BL, entry_BLD)
        return torch.cat([attended_BD, attended_BD * target_BD], dim=1)


def _unit(x_D: Tensor) -> Tensor:
    """Scaled to a mean square of 1; near zero it fades instead of dividing by nothing."""
    return x_D * (x_D.square().mean(dim=-1, keepdim=True) + _EPSILON).rsqrt()
