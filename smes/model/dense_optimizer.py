"""The optimiser of the dense weights: AdamW, fused."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from smes.arrays import prefixed, under
from smes.model.config import OptimizerConfig
from smes.model.rank_model import RankModel


class DenseOptimizer:
    """AdamW for all dense weights of a model. Those of the linear part do not decay.

    Args:
        model: Whose weights.
        config: Their learning rate, decay and moments.
    """

    def __init__(self, model: RankModel, config: OptimizerConfig) -> None:
        learned = {n: p for n, p in model.named_parameters() if p.requires_grad}
        wide = {n: p for n, p in learned.items() if n == "features.wide_numerics"}
        others = {n: p for n, p in learned.items() if n not in wide}
        groups: list[dict[str, Any]] = [
            {"params": [*others.values()]},
            {"params": [*wide.values()], "weight_decay": 0.0},
        ]
        self._names = [*others, *wide]  # in the order in which AdamW's state numbers the weights
        self._adamw = torch.optim.AdamW(
            [g for g in groups if g["params"]],
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def gradients(self) -> list[Tensor]:
        """Of the weights that have one, after ``backward``."""
        groups = self._adamw.param_groups
        return [p.grad for group in groups for p in group["params"] if p.grad is not None]

    def step(self, taken: Tensor | None) -> None:
        """Take a step.

        Args:
            taken: bool scalar. If it is false, nothing changes. None: it is true.
        """
        # As torch.amp.GradScaler tells a fused optimiser that its step is not to be taken.
        self._adamw.grad_scale = None  # type: ignore[attr-defined]
        self._adamw.found_inf = None if taken is None else (~taken).float()  # type: ignore[attr-defined]
        self._adamw.step()

    @property
    def moments(self) -> list[Tensor]:
        """All tensors that it keeps of the weights. Not copies."""
        return [tensor for moments in self._adamw.state.values() for tensor in moments.values()]

    def clear(self) -> None:
        """Forget the gradients."""
        self._adamw.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """The moments by weight, ``NAME.exp_avg`` and so on. Not copies."""
        state: dict[str, Tensor] = {}
        for index, moments in self._adamw.state_dict()["state"].items():
            state |= prefixed(f"{self._names[index]}.", moments)
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`state`. Weights that are not in it begin anew."""
        moments = {index: under(f"{name}.", state) for index, name in enumerate(self._names) if f"{name}.step" in state}
        self._adamw.load_state_dict({"state": moments, "param_groups": self._adamw.state_dict()["param_groups"]})
