"""The model around a ranker: feature layer, linear part, ranker, task heads, base rates.

Letters: B instances, T tasks.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smes.model.build import RANKERS
from smes.model.config import ModelConfig
from smes.model.features import FeatureInputs, FeatureLayer
from smes.model.heads import TaskHeads, TaskOutputs
from smes.rankers.ranker import RankerOutput, RoutedRanker
from smes.schema import Schema


@dataclass(frozen=True, slots=True)
class ModelOutput:
    """Result of one forward pass.

    Attributes:
        logits_BT: float32, with the tasks' base rates.
        ranker: The ranker's output.
        x_BI: The ranker's input.
    """

    logits_BT: Tensor
    ranker: RankerOutput
    x_BI: Tensor


class RankModel(nn.Module):
    """The dense part of the model: all weights but the rows of the id table.

    Args:
        schema: Features and tasks.
        config: Which ranker, its shape, and the layers around it.
    """

    def __init__(self, schema: Schema, config: ModelConfig) -> None:
        super().__init__()
        self.features = FeatureLayer(schema, config.table_dim, wide=config.wide)
        self.ranker = RANKERS[config.ranker](self.features.output_dim, schema, config)
        width = self.ranker.output_dim
        self.heads = TaskHeads(schema.num_tasks, width, config.head_dim) if width else None
        self.tasks = TaskOutputs(schema)

    def forward(self, inputs: FeatureInputs, autocast: AbstractContextManager[object] | None = None) -> ModelOutput:
        """Logits of B ≥ 1 instances. ``autocast`` sets the precision of the ranker and the heads only."""
        x_BI, wide_BT = self.features(inputs)
        with autocast or nullcontext():
            output = self.ranker(x_BI)
            heads_BT = self.heads(output.tasks_BTH) if self.heads is not None else None
        logits = [part.float() for part in (wide_BT, heads_BT) if part is not None]
        return ModelOutput(sum(logits, start=self.tasks.base_logits()), output, x_BI)

    def choices(self, inputs: FeatureInputs, autocast: AbstractContextManager[object] | None = None) -> Tensor | None:
        """The experts that each task chooses for B ≥ 1 instances. Changes nothing.

        Returns:
            int64 [B, T, K]; None for a ranker without experts.
        """
        if not isinstance(self.ranker, RoutedRanker):
            return None
        training = self.training
        self.eval()  # no part observes its input
        x_BI, _ = self.features(inputs)
        with autocast or nullcontext():
            choices_BTK = self.ranker.choices(x_BI)
        self.train(training)
        return choices_BTK


def build_model(schema: Schema, config: ModelConfig, seed: int) -> RankModel:
    """Build a model whose first weights depend on ``seed`` alone. Torch's global random state does not change."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return RankModel(schema, config)
