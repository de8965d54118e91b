"""HoME's feature gate: a private view of the input for every group of experts (arXiv 2408.05430).

Letters: B instances, C groups of experts, D width, L low-rank gates of a group, R rank of each.
"""

import torch
from torch import Tensor, nn

from smes.dense_experts import uniform


class FeatureGates(nn.Module):
    """``v ⊙ FeaGate_c(v)``, ``FeaGate(v) = Σ_l softmax(v G)_l · 2·sigmoid(v B_l A_l)``, rank ``R = D / L``.

    ``A_l`` starts at zero, so that every gate starts at 1 (our choice, as LoRA does).

    Args:
        num_groups: C.
        dim: D.
        num_gates: L; 0 for no feature gates.
    """

    def __init__(self, num_groups: int, dim: int, num_gates: int) -> None:
        super().__init__()
        self.num_gates = num_gates
        if num_gates:
            rank = max(dim // num_gates, 1)
            self.choice = nn.Parameter(uniform(num_groups, dim, num_gates))
            self.down = nn.Parameter(uniform(num_groups * num_gates, dim, rank))
            self.up = nn.Parameter(torch.zeros(num_groups * num_gates, rank, dim))

    def forward(self, v_CBD: Tensor) -> Tensor:
        if self.num_gates == 0:
            return v_CBD
        C, B, D = v_CBD.shape
        choice_CBL = torch.bmm(v_CBD, self.choice).float().softmax(dim=-1)
        each = v_CBD.repeat_interleave(self.num_gates, dim=0)
        low_rank = torch.bmm(torch.bmm(each, self.down), self.up).view(C, self.num_gates, B, D)
        gate_CBD = torch.einsum("cbl,clbd->cbd", choice_CBL.to(low_rank.dtype), 2 * low_rank.sigmoid())
        return v_CBD * gate_CBD
