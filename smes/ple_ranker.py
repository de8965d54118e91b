"""PLE: progressive layered extraction (Tang et al., RecSys 2020).

Letters: B instances, T tasks, N experts of a level, G = T + 1 streams (one per task, the shared one last), I input
width, D and H input and output width of a level.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smes.dense_experts import DenseExperts, Gates, check_counts, check_dims, mix
from smes.encoder import Encoder
from smes.ranker import ExpertLimits, RankerOutput


@dataclass(frozen=True)
class PleConfig:
    """Shape of the PLE ranker. By default, with eight tasks, about the weights of SMES's default.

    Attributes:
        num_levels: Extraction levels; 1 is the paper's CGC.
        num_shared: Experts of a level that all tasks use.
        num_specific: Experts of a level that each task has for itself.
        encoder_dims: Widths of an encoder before the first level; none in the paper.
        expert_dims: Widths of an expert's layers.
    """

    num_levels: int = 2
    num_shared: int = 4
    num_specific: int = 1
    encoder_dims: tuple[int, ...] = (128,)
    expert_dims: tuple[int, ...] = (64,)

    def __post_init__(self) -> None:
        check_counts("ple", self, num_levels=1, num_shared=1, num_specific=1)
        check_dims("ple", self, optional=("encoder_dims",), needed=("expert_dims",))


class PLE(nn.Module):
    """Levels of task-specific and shared experts; each level's outputs are the next one's inputs, stream by stream.

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

    def forward(self, x_BI: Tensor) -> RankerOutput:
        h_BD = self.encoder(x_BI)
        streams_GBD = h_BD.expand(self._num_streams, *h_BD.shape)
        for level in self.levels:
            streams_GBD = level(streams_GBD)
        return RankerOutput(tasks_BTH=streams_GBD.transpose(0, 1))


class _Level(nn.Module):
    """A task's gate mixes its own and the shared experts, the shared gate all; the last level needs no shared gate."""

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
        self.gates = Gates(input_dim, len(allowed), len(stream_N), allowed)

    def forward(self, x_GBD: Tensor) -> Tensor:
        y_NBH = self.experts(x_GBD.index_select(0, self.stream_N))
        return mix(self.gates(x_GBD[: len(self.gates.weight)]), y_NBH).transpose(0, 1)
