"""HoME: hierarchy of multi-gate experts (arXiv 2408.05430).

Letters: B instances, T tasks, G task groups, C groups of experts of a layer, M experts in each of them,
N = C·M experts of a layer, I input width, D and H input and output width of a layer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from smes.rankers.config import HomeConfig
from smes.rankers.dense_experts import DenseExperts, Gates, mix, uniform
from smes.rankers.ranker import Encoder, ExpertLimits, RankerOutput
from smes.rankers.ranker_input import RankerInput


class HoME(nn.Module):
    """Meta layer: a representation per task group and a shared one; task layer: a representation per task.

    Args:
        input_dim: I.
        group_T: The group of each task, numbered from 0.
        config: Its shape.
        num_groups: G; None: those that have a task.
    """

    expert_limits: ExpertLimits | None = None
    group_T: Tensor

    def __init__(
        self, input_dim: int, group_T: Sequence[int], config: HomeConfig, num_groups: int | None = None
    ) -> None:
        super().__init__()
        num_tasks, num_groups = len(group_T), num_groups or max(group_T) + 1
        self.encoder = Encoder(input_dim, config.encoder_dims)
        width = self.encoder.output_dim
        self.output_dim = H = config.expert_dims[-1]
        self.register_buffer("group_T", torch.tensor(group_T), persistent=False)
        # Streams of the meta layer: one per group, then the shared one. z_shared mixes all experts, z_g those of its
        # group and the shared ones.
        G = num_groups
        meta = [[own in (g, G) for own in range(G + 1)] for g in range(G)] + [[True] * (G + 1)]
        self.meta = HomeLayer(width, width, list(range(G + 1)), meta, config)
        # Experts of the task layer: each task's own, then each category's (both read z_g), then the global ones.
        reads = [*group_T, *range(G), G]
        task = [
            [own == t for own in range(num_tasks)] + [g == group_T[t] for g in range(G)] + [True]
            for t in range(num_tasks)
        ]
        self.task = HomeLayer(H, 2 * H, reads, task, config)

    def forward(self, x_BI: RankerInput) -> RankerOutput:
        v_BD = self.encoder(x_BI)
        z_GBH = self.meta(v_BD.unsqueeze(0).expand(len(self.meta.gates.weight), -1, -1), v_BD)
        own_TBH = z_GBH.index_select(0, self.group_T)
        gate_input = torch.cat([own_TBH, z_GBH[-1:].expand_as(own_TBH)], dim=2)
        return RankerOutput(self.task(z_GBH, gate_input).transpose(0, 1))


class HomeLayer(nn.Module):
    """C groups of M experts behind feature gates. Each output mixes the groups it may use, and adds its own experts.

    Output o's own experts are those of group o; self gates weight them. In the task layer the self gates read the
    gates' input. This is our choice: the paper leaves open what self gates and feature gates of this layer read.

    Args:
        input_dim: D, the width of the experts' input.
        gate_dim: Width of the input of gates and self gates.
        reads: For each group of experts, which input stream it reads.
        allowed: For each output, which groups of experts it mixes.
        config: Shape of experts and gates.
    """

    reads_C: Tensor

    def __init__(
        self, input_dim: int, gate_dim: int, reads: list[int], allowed: list[list[bool]], config: HomeConfig
    ) -> None:
        super().__init__()
        M, self.num_outputs = config.experts_per_group, len(allowed)
        self.experts_per_group = M
        self.register_buffer("reads_C", torch.tensor(reads), persistent=False)
        self.feature_gates = FeatureGates(len(reads), input_dim, config.feature_gates)
        self.experts = DenseExperts(len(reads) * M, input_dim, config.expert_dims, config.norm)
        masks = [[a for a in row for _ in range(M)] for row in allowed]
        self.gates = Gates(gate_dim, self.num_outputs, len(reads) * M, masks)
        self.self_gates = SelfGates(gate_dim, self.num_outputs, M) if config.self_gates else None

    def forward(self, streams: Tensor, gate_input: Tensor) -> Tensor:
        """Input streams [·, B, D] and the gates' input ([B, ·], or one per output) → outputs [O, B, H]."""
        x_CBD = self.feature_gates(streams.index_select(0, self.reads_C))
        y_NBH = self.experts(x_CBD.repeat_interleave(self.experts_per_group, dim=0))
        z_OBH = mix(self.gates(gate_input), y_NBH).transpose(0, 1)
        if self.self_gates is None:
            return z_OBH
        own_OMBH = y_NBH.unflatten(0, (-1, self.experts_per_group))[: self.num_outputs]
        weights_OBM = self.self_gates(gate_input)
        return z_OBH + torch.einsum("obm,ombh->obh", weights_OBM.to(own_OMBH.dtype), own_OMBH)


class SelfGates(Gates):
    """A gate per output over its M own experts: ``sigmoid`` for one expert, ``softmax`` for more. → [O, B, M]."""

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.shape[2] > 1:
            return super().forward(x)
        x = x.expand(len(self.weight), *x.shape[-2:])
        return torch.bmm(x, self.weight).float().sigmoid()


class FeatureGates(nn.Module):
    """A view of the input for each group of experts: ``v ⊙ FeaGate_c(v)``.

    ``FeaGate(v) = Σ_l softmax(v G)_l · 2·sigmoid(v B_l A_l)``, with maps of rank ``D / L``. ``A_l`` starts at zero, so
    that every gate starts at 1 (our choice, as in LoRA).

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
