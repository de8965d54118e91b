"""MMoE: multi-gate mixture of experts (Ma et al., KDD 2018). Letters: B instances, T tasks, I input width."""

from torch import nn

from smes.rankers.config import MmoeConfig
from smes.rankers.dense_experts import DenseExperts, Gates, mix
from smes.rankers.ranker import Encoder, ExpertLimits, RankerOutput
from smes.rankers.ranker_input import RankerInput


class MMoE(nn.Module):
    """``h_t = Σ_e softmax(W_t x)_e f_e(x)``: every expert runs for every instance, and a gate per task mixes them.

    Args:
        input_dim: I.
        num_tasks: T.
        config: Its shape.
    """

    expert_limits: ExpertLimits | None = None

    def __init__(self, input_dim: int, num_tasks: int, config: MmoeConfig) -> None:
        super().__init__()
        self.encoder = Encoder(input_dim, config.encoder_dims)
        width = self.encoder.output_dim
        self.experts = DenseExperts(config.num_experts, width, config.expert_dims)
        self.gates = Gates(width, num_tasks, config.num_experts)
        self.output_dim = self.experts.output_dim

    def forward(self, x_BI: RankerInput) -> RankerOutput:
        h_BD = self.encoder(x_BI)
        return RankerOutput(mix(self.gates(h_BD), self.experts(h_BD)))
