"""Executed floating-point operations and parameters of a ranker, per scored instance.

Counted while the serving model scores real instances, so that a sparse ranker is charged for the experts that its
routing really executes, for its routers, and for combining. A multiply-add is two operations. Counted: every product of
matrices in feature layer, ranker and heads, and the heads' last layer. Not counted: lookups of embeddings, norms and
activations, which are alike for all.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from smes.model.config import ModelConfig
from smes.model.rank_model import build_model
from smes.schema import Schema

_EXPERTS = "ranker.experts."


@dataclass(frozen=True, slots=True)
class Cost:
    """Per scored instance.

    Attributes:
        features: Operations of the feature layer and the linear part.
        ranker: Operations of the ranker.
        heads: Operations of the task heads.
        parameters: Dense weights; rows of the id table are not among them.
        active_parameters: Of these, without the experts that were not executed for the instance.
    """

    features: float
    ranker: float
    heads: float
    parameters: int
    active_parameters: float

    @property
    def flops(self) -> float:
        """All operations."""
        return self.features + self.ranker + self.heads


@dataclass(frozen=True, slots=True)
class MeanCost:
    """Of a ranker over its runs, per scored instance.

    Attributes:
        flops: All operations.
        ranker_flops: Those of the ranker.
        parameters, active_parameters: As in :class:`Cost`.
        active_experts: Experts executed per instance; None for a ranker that executes all it has.
    """

    flops: float
    ranker_flops: float
    parameters: int
    active_parameters: float
    active_experts: float | None

    @classmethod
    def of(cls, facts: Sequence[Mapping[str, Any]]) -> "MeanCost":
        """From what runs have written down: the fields of a :class:`Cost`, ``flops`` and ``active_experts``."""
        actives = [one["active_experts"] for one in facts if one["active_experts"] is not None]
        return cls(
            flops=fmean(one["flops"] for one in facts),
            ranker_flops=fmean(one["ranker"] for one in facts),
            parameters=facts[0]["parameters"],
            active_parameters=fmean(one["active_parameters"] for one in facts),
            active_experts=fmean(actives) if actives else None,
        )

    def flat(self) -> dict[str, float | int | None]:
        """By the names that the benchmarks' JSON has."""
        return {
            "flops": self.flops,
            "ranker_flops": self.ranker_flops,
            "params": self.parameters,
            "active_params": self.active_parameters,
            "active_experts": self.active_experts,
        }


class FlopTally:
    """Adds up what passes of a :class:`smes.model.serving.ServingModel` execute.

    Used as a context around each call of its ``score``, with a request for each instance: what instances of one request
    share is multiplied once, which is no property of a ranker::

        tally = FlopTally()
        with tally.counting(len(ids)):
            model.score(ids, numerics, requests=np.arange(len(ids)))
    """

    def __init__(self) -> None:
        self.instances = 0
        self.features = self.ranker = self.heads = 0.0

    def counting(self, instances: int) -> "_Pass":
        """A context for one call on so many instances."""
        return _Pass(self, instances)


class _Pass:
    def __init__(self, tally: FlopTally, instances: int) -> None:
        self._tally, self._instances = tally, instances
        self._mode = FlopCounterMode(display=False, custom_mapping=_COUNTED_HERE)

    def __enter__(self) -> None:
        self._mode.__enter__()  # type: ignore[no-untyped-call]  # torch ships no type for it

    def __exit__(self, *exception: Any) -> None:
        self._mode.__exit__(*exception)  # type: ignore[no-untyped-call]  # nor for this
        counts = {name: sum(by_op.values()) for name, by_op in self._mode.get_flop_counts().items()}
        tally = self._tally
        tally.instances += self._instances
        tally.features += counts.get("RankModel.features", 0)
        tally.ranker += counts.get("RankModel.ranker", 0)
        tally.heads += counts.get("RankModel.heads", 0)


def cost_of(schema: Schema, config: ModelConfig, tally: FlopTally, mean_active: float | None) -> Cost:
    """What a ranker costs per instance.

    Args:
        schema: Features and tasks.
        config: The model.
        tally: Of at least one pass.
        mean_active: Mean experts executed per instance; None for a ranker that executes all it has.
    """
    model = build_model(schema, config, seed=0)
    weights = dict(model.named_parameters())
    total = _size(weights.values())
    active = float(total)
    if mean_active is not None and model.ranker.expert_limits is not None:
        # Matrices stacked by expert; what all experts share is a single matrix.
        experts = [p for n, p in weights.items() if n.startswith(_EXPERTS) and p.dim() == 3]
        active -= _size(experts) * (1 - mean_active / model.ranker.expert_limits.num_experts)
    per_instance = 1 / tally.instances
    return Cost(
        features=tally.features * per_instance,
        ranker=tally.ranker * per_instance,
        heads=tally.heads * per_instance + _last_head_layer(weights),
        parameters=total,
        active_parameters=active,
    )


def _last_head_layer(weights: Mapping[str, Tensor]) -> float:
    # It is written as products and sums, which the counter, made for products of matrices, does not see.
    return 2.0 * weights["heads.out"].numel() if "heads.out" in weights else 0.0


def _size(weights: Iterable[Tensor]) -> int:
    return sum(math.prod(w.shape) for w in weights)


def _grouped_mm_flops(rows_shape: Any, weight_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    # On the CPU no row of a dispatch is unused.
    return int(2 * rows_shape[0] * weight_shape[-2] * weight_shape[-1])


def _weighted_sum_flops(rows_shape: Any, picked_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(2 * math.prod(picked_shape) * rows_shape[-1])


_COUNTED_HERE: dict[Any, Any] = {
    torch.ops.aten._grouped_mm: _grouped_mm_flops,
    torch.ops.aten._embedding_bag_forward_only: _weighted_sum_flops,  # the only ones are those that combine experts
    torch.ops.aten._embedding_bag: _weighted_sum_flops,
}
