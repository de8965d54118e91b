"""Representations of tasks that share most of what they read.

Letters: B instances, T tasks, S streams, H width of a representation.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SharedStreams:
    """The representation of task t, ``common + Σ_s share_ts stream_s``, before it is laid out for each task.

    Attributes:
        streams_BSH: What a ranker gives, such as the output of each router's experts.
        share_TS: float32; each row sums to 1.
        stream_T: int64, the one stream that each task reads; None if a task may read several.
        common_BH: Added to every stream; None for nothing.
        one_each: Whether task t reads stream t, for every t.
    """

    streams_BSH: Tensor
    share_TS: Tensor
    stream_T: Tensor | None = None
    common_BH: Tensor | None = None
    one_each: bool = False

    def for_tasks(self) -> Tensor:
        """[B, T, H]."""
        if self.one_each:
            tasks_BTH = self.streams_BSH
        elif self.stream_T is None:
            tasks_BTH = torch.matmul(self.share_TS.to(self.streams_BSH.dtype), self.streams_BSH)
        else:
            tasks_BTH = self.streams_BSH.index_select(1, self.stream_T)
        return tasks_BTH if self.common_BH is None else tasks_BTH + self.common_BH.unsqueeze(1)
