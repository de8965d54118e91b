"""MMoE: multi-gate mixture of experts (Ma et al., KDD 2018). Letters: B instances, T tasks, I input width."""

from dataclasses import dataclass

from torch import Tensor, nn

from smes.dense_experts import DenseExperts, Gates, check_counts, check_dims, mix
from smes.encoder import Encoder
from smes.ranker import ExpertLimits, RankerOutput


@dataclass(frozen=True)
class MmoeConfig:
    """Shape of the MMoE ranker. By default the encoder and the experts of SMES's default, all of them executed.

    Attributes:
        num_experts: Experts, all shared by all tasks.
        encoder_dims: Widths of an encoder before experts and gates; none in the paper.
        expert_dims: Widths of an expert's layers.
    """

    num_experts: int = 16
    encoder_dims: tuple[int, ...] = (128,)
    expert_dims: tuple[int, ...] = (64,)

    def __post_init__(self) -> None:
        check_counts("mmoe", self, num_experts=1)
        check_dims("mmoe", self, optional=("encoder_dims",), needed=("expert_dims",))


class MMoE(nn.Module):
    """``h_t = Σ_e softmax(W_t x)_e f_e(x)``: every expert runs for every instance, a gate per task mixes them.

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

    def forward(self, x_BI: Tensor) -> RankerOutput:
        h_BD = self.encoder(x_BI)
        return RankerOutput(tasks_BTH=mix(self.gates(h_BD), self.experts(h_BD)))
