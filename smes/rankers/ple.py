"""PLE: progressive layered extraction (Tang et al., RecSys 2020).

Letters: B instances, T tasks, N experts of a level, G = T + 1 streams (one per task, the shared one last), I input
width, D and H input and output width of a level.
"""

import torch
from torch import Tensor, nn

from smes.rankers.config import PleConfig
from smes.rankers.dense_experts import DenseExperts, Gates, mix
from smes.rankers.ranker import Encoder, ExpertLimits, RankerOutput
from smes.rankers.ranker_input import RankerInput


class PLE(nn.Module):
    """Levels of task-specific and shared experts. Each stream of a level is the same stream's input of the next level.

    Args:
        input_dim: I.
        num_tasks: T.
        config: Its shape.
    """

    expert_limits: ExpertLimits | None = None

    def __init__(self, input_dim: int, num_tasks: int, config: PleConfig) -> None:
        super().__init__()
        self.encoder = Encoder(input_dim, config.encoder_dims)
        self.output_dim = config.expert_dims[-1]
        width, levels = self.encoder.output_dim, []
        for level in range(config.num_levels):
            levels.append(_Level(width, num_tasks, config, last=level == config.num_levels - 1))
            width = self.output_dim
        self.levels = nn.ModuleList(levels)
        self._num_streams = num_tasks + 1

    def forward(self, x_BI: RankerInput) -> RankerOutput:
        h_BD = self.encoder(x_BI)
        streams_GBD = h_BD.expand(self._num_streams, *h_BD.shape)
        for level in self.levels:
            streams_GBD = level(streams_GBD)
        return RankerOutput(streams_GBD.transpose(0, 1))


class _Level(nn.Module):
    """One level: a task's gate mixes the task's own and the shared experts, the shared gate mixes all experts.

    The last level has no shared gate.
    """

    stream_N: Tensor

    def __init__(self, input_dim: int, num_tasks: int, config: PleConfig, *, last: bool) -> None:
        super().__init__()
        # Experts in the order: task 0's, task 1's, …, shared.
        stream_N = [t for t in range(num_tasks) for _ in range(config.num_specific)] + [num_tasks] * config.num_shared
        allowed = [[stream in (t, num_tasks) for stream in stream_N] for t in range(num_tasks)]
        if not last:
            allowed.append([True] * len(stream_N))
        self.register_buffer("stream_N", torch.tensor(stream_N), persistent=False)
        self.experts = DenseExperts(len(stream_N), input_dim, config.expert_dims)
        # A task that a schema change brings has experts that the shared stream does not read: weights say so.
        self.gates = Gates(input_dim, len(allowed), len(stream_N), allowed, stored=not last)

    def forward(self, x_GBD: Tensor) -> Tensor:
        y_NBH = self.experts(x_GBD.index_select(0, self.stream_N))
        return mix(self.gates(x_GBD[: len(self.gates.weight)]), y_NBH).transpose(0, 1)
