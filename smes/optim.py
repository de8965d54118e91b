"""The optimiser of the dense weights: AdamW. (That of the id table is in :mod:`smes.embedding`.)"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from smes.optimizer_config import OptimizerConfig


def dense_optimizer(
    config: OptimizerConfig, wide: Iterable[nn.Parameter], others: Iterable[nn.Parameter]
) -> torch.optim.AdamW:
    """AdamW over the dense weights; those of the linear part do not decay."""
    groups: list[dict[str, Any]] = [
        {"params": list(others)},
        {"params": list(wide), "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=True,
    )
