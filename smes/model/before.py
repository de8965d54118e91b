"""The model of the schema before: right after a change of the schema it still scores the tasks that both schemas have.

Weights of new inputs are zero after a change, so they add exactly nothing. Yet a wider matrix product may add up in
another order, and its last bits differ. So that no score changes by the change itself, a carried-over state holds the
weights of the model before as well. They score until the first training step, which changes all scores anyway, and are
dropped then. They read the same table rows.

Letters: B instances, W and F id and numeric columns, P tasks that both schemas have.
"""

import copy
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smes.arrays import under
from smes.model.config import ModelConfig
from smes.model.features import FeatureInputs
from smes.model.fitting import check_types, fitting_config
from smes.schema import Schema

if TYPE_CHECKING:
    from smes.model.rank_model import RankModel

COLUMNS = ("id_columns_W", "numerics_F", "tasks_T")
_MOST_BYTES = 1 << 24


class Before(nn.Module):
    """A model of the schema before, behind the columns of the schema now.

    Args:
        model: The model, of the schema before.
        columns: For each id column, numeric feature and task of the schema before the one that it is now, -1 for those
            that went: int64 tensors by the names :data:`COLUMNS`.
        description: Its schema and configuration as JSON in bytes, uint8.
        pools: Whether its schema has bags or sequences.
    """

    id_columns_W: Tensor
    numerics_F: Tensor
    tasks_T: Tensor
    was_P: Tensor
    now_P: Tensor

    def __init__(self, model: "RankModel", columns: Mapping[str, Tensor], description: Tensor, *, pools: bool) -> None:
        super().__init__()
        for name in COLUMNS:
            self.register_buffer(name, columns[name])
        self.register_buffer("description", description)
        self.model = model.requires_grad_(False)
        self._pools = pools
        was_P = (columns["tasks_T"] >= 0).nonzero().squeeze(1)
        self.register_buffer("was_P", was_P, persistent=False)
        self.register_buffer("now_P", columns["tasks_T"][was_P], persistent=False)

    @torch.no_grad()
    def put_scores(
        self, scores_BT: Tensor, inputs: FeatureInputs, autocast: AbstractContextManager[object] | None = None
    ) -> Tensor:
        """The scores with those of the model before in place of the model's own, for the tasks that it has."""
        # In training a forward pass changes moments; the model before does not change.
        model = copy.deepcopy(self.model) if self.training else self.model
        old = self._old(inputs)
        old_BT = model.scores(model(old, autocast), old, autocast)
        return scores_BT.index_copy(1, self.now_P, old_BT.index_select(1, self.was_P))

    def put_expert_weights(self, weights_BTE: Tensor, inputs: FeatureInputs) -> Tensor:
        """The weights of experts, likewise: the experts are those that the model before has."""
        old_BTE = self.model.expert_weights(self._old(inputs))
        if old_BTE is None:
            return weights_BTE
        E = max(old_BTE.shape[2], weights_BTE.shape[2])
        old_BTE, weights_BTE = (F.pad(one, (0, E - one.shape[2])) for one in (old_BTE, weights_BTE))
        return weights_BTE.index_copy(1, self.now_P, old_BTE.index_select(1, self.was_P))

    def _old(self, inputs: FeatureInputs) -> FeatureInputs:
        """What the model before reads."""
        return FeatureInputs(
            embedding_BWD=None if inputs.embedding_BWD is None else _some(inputs.embedding_BWD, self.id_columns_W, 0.0),
            wide_BWT=self._wide(inputs.wide_BWT),
            pool_BW=self._pool(inputs),
            numerics_BF=_some(inputs.numerics_BF, self.numerics_F, float("nan")),
        )

    def _pool(self, inputs: FeatureInputs) -> Tensor | None:
        """As :func:`smes.model.ids.pool_weights`: a schema without bags and sequences has none."""
        if not self._pools:
            return None
        pool_BW = inputs.pool_BW
        if pool_BW is None:
            pool_BW = inputs.numerics_BF.new_ones(len(inputs.numerics_BF), int(self.id_columns_W.max()) + 1)
        return _some(pool_BW, self.id_columns_W, 0.0)

    def _wide(self, wide_BWT: Tensor | None) -> Tensor | None:
        if wide_BWT is None:
            return None
        return _some(_some(wide_BWT, self.id_columns_W, 0.0), self.tasks_T, 0.0, dim=2)


def before_of(dense: Mapping[str, Tensor], schema: Schema) -> Before | None:
    """The model before, in the dense weights of a model; None if there is none in them.

    Args:
        dense: ``before.*``, as they were read.
        schema: What the model reads now.

    Raises:
        ValueError, KeyError, RuntimeError: They do not fit together.
    """
    from smes.model.rank_model import RankModel  # models hold models

    if not dense:
        return None
    described = _described(dense["description"])
    was = Schema.from_dict(described["schema"])
    own = under("model.", dense)
    model = RankModel(was, ModelConfig.from_dict(fitting_config(described["model"], own)), own)
    check_types(model.state_dict(), own)
    model.load_state_dict(own)
    lengths, limits = (
        dict(zip(COLUMNS, (s.id_width, s.num_numerics, s.num_tasks), strict=True)) for s in (was.inputs, schema.inputs)
    )
    for name, length in lengths.items():
        column = dense[name]
        if column.dtype != torch.int64 or column.shape != (length,):
            raise ValueError(f"tensor before.{name}: {column.dtype} {list(column.shape)}, expected int64 [{length}]")
        if length and (int(column.min()) < -1 or int(column.max()) >= limits[name]):
            raise ValueError(f"tensor before.{name}: expected numbers from -1 to {limits[name] - 1}")
    pools = any(f.is_list for f in was.inputs.id_features)
    return Before(model, {name: dense[name] for name in COLUMNS}, dense["description"], pools=pools)


def described(schema: Schema, config: ModelConfig) -> Tensor:
    """The description of a :class:`Before`: uint8 [bytes]."""
    text = json.dumps({"schema": schema.to_dict(), "model": config.to_dict()}, sort_keys=True)
    return torch.from_numpy(np.frombuffer(text.encode(), np.uint8).copy())


def _described(description: Tensor) -> dict[str, Any]:
    if description.dtype != torch.uint8 or description.dim() != 1 or len(description) > _MOST_BYTES:
        raise ValueError(
            f"tensor before.description: {description.dtype} {list(description.shape)}, expected uint8 [N]"
        )
    try:
        data = json.loads(description.cpu().numpy().tobytes())
        return {"schema": data["schema"], "model": data["model"]}
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"tensor before.description: no JSON of a schema and a configuration: {error}") from error


def _some(x: Tensor, index: Tensor, fill: float, dim: int = 1) -> Tensor:
    """The slices at these places, and ``fill`` where the place is -1."""
    if not len(index):
        return x.new_zeros(*x.shape[:dim], 0, *x.shape[dim + 1 :])
    if x.shape[dim] == 0:
        return x.new_full((*x.shape[:dim], len(index), *x.shape[dim + 1 :]), fill)
    taken = x.index_select(dim, index.clamp(min=0))
    shape = [-1 if d == dim else 1 for d in range(x.dim())]
    return taken.masked_fill((index < 0).view(shape), fill)
