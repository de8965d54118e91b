"""The serving model: the immutable weights of one version, and scoring with them.

Letters: N instances, W id columns, F numeric features, T tasks.
"""

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from smes.arrays import F32, I64, under
from smes.model.config import ModelConfig
from smes.model.features import FeatureInputs
from smes.model.fitting import OnlyAsLargeAs, check_finite, check_types
from smes.model.ids import IdRows, pool_weights
from smes.model.rank_model import RankModel
from smes.schema import Schema

_CPU = torch.device("cpu")


class ServingModel:
    """Scores instances. The weights never change, so any number of threads may use one instance.

    Args:
        schema: The schema that the weights were trained with.
        model: The configuration that they were trained with.
        tensors: What :meth:`smes.model.learner.Learner.serving_state` returned. Tables that are on ``device`` already
            are not copied.
        device: Where to score.

    Raises:
        ValueError: A tensor is missing, unknown, of another shape or type, or not finite. Nothing larger than the
            tensors was allocated.
    """

    def __init__(
        self, schema: Schema, model: ModelConfig, tensors: Mapping[str, Tensor], *, device: torch.device = _CPU
    ) -> None:
        self.schema = schema
        self._device = device
        try:
            self._rows = IdRows(schema, _keys(tensors["table.keys"]))
            self._embedding = self._table(tensors, "embedding", model.embedding_dim) if model.table_dim else None
            self._wide = self._table(tensors, "wide", schema.num_tasks) if model.wide else None
            dense = under("dense.", tensors)
            with OnlyAsLargeAs(dense):
                self._model = RankModel(schema, model)
            check_types(self._model.state_dict(), dense)
            self._model.load_state_dict(dense)
            for name, tensor in dense.items():
                check_finite(f"dense.{name}", tensor)
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"serving tensors: of another schema or model configuration: {error}") from error
        self._model.to(device).eval().requires_grad_(False)

    @property
    def num_rows(self) -> int:
        """Number of rows of the id table."""
        return len(self._rows)

    def score(self, ids: I64, numerics: F32) -> F32:
        """Score N instances: probabilities for binary tasks, values in the label's unit for regression tasks.

        Args:
            ids: int64 [N, W], ``MISSING`` where missing. An id that was never trained on counts as missing.
            numerics: float32 [N, F], NaN where missing.

        Returns:
            float32 [N, T].

        Raises:
            ValueError: The matrices do not have the schema's columns.
        """
        self._check(ids, numerics)
        if len(ids) == 0:
            return np.zeros((0, self.schema.num_tasks), np.float32)
        rows_NW = torch.from_numpy(self._rows.find(ids)).to(self._device)
        pool_NW = pool_weights(self.schema, ids)
        with torch.inference_mode():
            inputs = FeatureInputs(
                embedding_BWD=None if self._embedding is None else F.embedding(rows_NW, self._embedding),
                wide_BWT=None if self._wide is None else F.embedding(rows_NW, self._wide),
                pool_BW=None if pool_NW is None else torch.from_numpy(pool_NW).to(self._device),
                numerics_BF=torch.tensor(numerics, dtype=torch.float32, device=self._device),
            )
            scores: F32 = self._model.tasks.scores(self._model(inputs).logits_BT).cpu().numpy()
        return scores

    def _check(self, ids: I64, numerics: F32) -> None:
        for name, matrix, width in (
            ("ids", ids, self.schema.id_width),
            ("numerics", numerics, self.schema.num_numerics),
        ):
            if matrix.shape != (len(ids), width):
                raise ValueError(f"{name}: shape {list(matrix.shape)}, expected [{len(ids)}, {width}]")

    def _table(self, tensors: Mapping[str, Tensor], name: str, columns: int) -> Tensor:
        weights = tensors[f"table.{name}"]
        if weights.shape != (len(self._rows), columns):
            raise ValueError(f"table of shape {list(weights.shape)}, expected [{len(self._rows)}, {columns}]")
        if weights.dtype != torch.float32:
            raise ValueError(f"tensor table.{name}: {weights.dtype}, expected {torch.float32}")
        check_finite(f"table.{name}", weights)
        return weights.to(self._device)


def _keys(tensor: Tensor) -> I64:
    if tensor.dtype != torch.int64 or tensor.dim() != 1:
        raise ValueError(f"tensor table.keys: {tensor.dtype} {list(tensor.shape)}, expected torch.int64 [R]")
    keys: I64 = tensor.cpu().numpy()
    return keys
