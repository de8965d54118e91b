"""Shared bottom: one network for all tasks (Caruana, 1997). Letters: B instances, T tasks, I input width, H width."""

import torch
from torch import Tensor, nn

from smes.rankers.config import SharedBottomConfig
from smes.rankers.ranker import Encoder, ExpertLimits, RankerOutput
from smes.rankers.ranker_input import RankerInput
from smes.rankers.streams import SharedStreams


class SharedBottom(nn.Module):
    """``h_t = encoder(x)`` for every task: tasks differ in their heads only.

    Args:
        input_dim: I.
        num_tasks: T.
        config: Its shape.
    """

    share_TS: Tensor
    stream_T: Tensor
    expert_limits: ExpertLimits | None = None

    def __init__(self, input_dim: int, num_tasks: int, config: SharedBottomConfig) -> None:
        super().__init__()
        self.encoder = Encoder(input_dim, config.dims)
        self.output_dim = self.encoder.output_dim
        self.register_buffer("share_TS", torch.ones(num_tasks, 1), persistent=False)
        self.register_buffer("stream_T", torch.zeros(num_tasks, dtype=torch.int64), persistent=False)

    def forward(self, x_BI: RankerInput) -> RankerOutput:
        h_BH = self.encoder(x_BI)
        return RankerOutput(SharedStreams(h_BH.unsqueeze(1), self.share_TS, self.stream_T))
