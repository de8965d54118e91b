"""The optimiser's configuration: AdamW for the dense weights, row-wise Adagrad for the id table."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from smes.embedding import AdagradConfig


@dataclass(frozen=True)
class OptimizerConfig:
    """How the weights learn.

    Attributes:
        learning_rate: Of the dense weights (AdamW, fused), > 0.
        weight_decay: Of the dense weights, decoupled, ≥ 0.
        betas: AdamW's decay rates.
        embedding_learning_rate: Of embedding rows (row-wise Adagrad), > 0.
        wide_learning_rate: Of the linear part's ids (Adagrad), > 0. Its numerics are dense weights as others: at an
            Adagrad rate they drown what the ranker learns (docs/quality.md).
        initial_accumulator: Start of Adagrad's accumulators; see :class:`smes.embedding.AdagradConfig`.
    """

    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    embedding_learning_rate: float = 0.005
    wide_learning_rate: float = 0.05
    initial_accumulator: float = 0.1

    def __post_init__(self) -> None:
        for name in ("learning_rate", "embedding_learning_rate", "wide_learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"optimizer.{name}: {getattr(self, name)}, expected more than 0")
        for name in ("weight_decay", "initial_accumulator"):
            if getattr(self, name) < 0:
                raise ValueError(f"optimizer.{name}: {getattr(self, name)}, expected at least 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas: {list(self.betas)}, expected two numbers from 0 to below 1")

    @property
    def embedding(self) -> AdagradConfig:
        """The rule for embedding rows."""
        return AdagradConfig(self.embedding_learning_rate, True, self.initial_accumulator)

    @property
    def wide(self) -> AdagradConfig:
        """The rule for the linear part's weights."""
        return AdagradConfig(self.wide_learning_rate, False, self.initial_accumulator)

    def dense(self, wide: Iterable[nn.Parameter], others: Iterable[nn.Parameter]) -> torch.optim.AdamW:
        """The optimiser of the dense weights; those of the linear part do not decay."""
        groups: list[dict[str, Any]] = [
            {"params": list(others)},
            {"params": list(wide), "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            [g for g in groups if g["params"]],
            lr=self.learning_rate,
            betas=self.betas,
            weight_decay=self.weight_decay,
            fused=True,
        )
