"""Shared bottom: one network for all tasks (Caruana, 1997). Letters: B instances, T tasks, I input width, H width."""

from torch import Tensor, nn

from smes.rankers.config import SharedBottomConfig
from smes.rankers.ranker import Encoder, ExpertLimits, RankerOutput
from smes.rankers.ranker_input import RankerInput


class SharedBottom(nn.Module):
    """``h_t = encoder(x)`` for every task: tasks differ in their heads only.

    Args:
        input_dim: I.
        num_tasks: T.
        config: Its shape.
    """

    expert_limits: ExpertLimits | None = None

    def __init__(self, input_dim: int, num_tasks: int, config: SharedBottomConfig) -> None:
        super().__init__()
        self.num_tasks = num_tasks
        self.encoder = Encoder(input_dim, config.dims)
        self.output_dim = self.encoder.output_dim

    def forward(self, x_BI: RankerInput) -> RankerOutput:
        h_BH = self.encoder(x_BI)
        return RankerOutput(tasks_BTH=h_BH.unsqueeze(1).expand(-1, self.num_tasks, -1))
