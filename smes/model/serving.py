"""The serving model: the immutable weights of one version, and scoring with them.

The dense weights are the model's own. The rows of ids come from a :class:`RowReader`, so that versions may share a
table: the scorer's (:mod:`smes.model.serving_rows`), or the trainer's as it was at some moment.

Letters: N instances, W id columns, F numeric features, V and G id and numeric columns that the model reads, T tasks, E
experts, R rows, D embedding width, C columns of a group.
"""

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from smes.arrays import F32, I64, Bool, under
from smes.derive import Derivations, ModelInputs
from smes.id_map import ABSENT, IdMap
from smes.model.config import ModelConfig
from smes.model.features import FeatureInputs, RequestInputs
from smes.model.fitting import OnlyAsLargeAs, check_finite, check_types
from smes.model.ids import IdKeys, pool_weights
from smes.model.rank_model import RankModel
from smes.model.request_split import Side, Splits
from smes.rankers.ranker_input import RequestRows
from smes.schema import Schema

_CPU = torch.device("cpu")


class RowReader(Protocol):
    """Reads the rows of ids, those of one version; any number of threads may use it."""

    def read(self, ids_NW: I64, columns_W: I64 | None = None) -> dict[str, Tensor]:
        """The weights of every id, by column group.

        Args:
            ids_NW: int64, ``MISSING`` where missing. An id without a row of its own reads that of its vocabulary.
            columns_W: int64, which of the columns of :attr:`smes.schema.Schema.inputs` these are; None: all.

        Returns:
            ``embedding``: float32 [N, W, D], and ``wide``: float32 [N, W, T]; those that the model has
            (:func:`group_columns`).
        """
        ...


def group_columns(schema: Schema, model: ModelConfig) -> dict[str, int]:
    """The column groups of a model's id table, and how many columns each has."""
    groups = {"embedding": model.table_dim, "wide": schema.num_tasks if model.wide else 0}
    return {name: columns for name, columns in groups.items() if columns}


@dataclass(frozen=True, slots=True)
class Explained:
    """Scores, and what they are made of.

    Attributes:
        scores_NT: float32, as :meth:`ServingModel.score` gives them.
        experts_NTE: float32, how much each expert counts for each task
            (:meth:`smes.rankers.ranker.RoutedRanker.expert_weights`); None for a ranker without experts.
        ids_NV, numerics_NG: int64 and float32, what the model reads: the columns of
            :attr:`smes.schema.Schema.inputs`, derived features included.
    """

    scores_NT: F32
    experts_NTE: F32 | None
    ids_NV: I64
    numerics_NG: F32


class ServingModel:
    """Scores instances. The weights never change, so any number of threads may use one instance.

    Args:
        schema: The schema that the weights were trained with.
        model: The configuration that they were trained with.
        dense: What :meth:`smes.model.learner.Learner.dense_serving_state` returned: tensors named ``dense.*``. Others
            are left alone.
        rows: Reads the rows of ids.
        device: Where to score.

    Attributes:
        schema, config: As given.

    Raises:
        ValueError: A tensor is missing, unknown, of another shape or type, or not finite. Nothing larger than the
            tensors was allocated.
    """

    def __init__(
        self,
        schema: Schema,
        model: ModelConfig,
        dense: Mapping[str, Tensor],
        rows: RowReader,
        *,
        device: torch.device = _CPU,
    ) -> None:
        self.schema, self.config = schema, model
        self._device = device
        self._rows = rows
        own = under("dense.", dense)
        try:
            with OnlyAsLargeAs(own):
                self._model = RankModel(schema, model, own)
            check_types(self._model.state_dict(), own)
            self._model.load_state_dict(own)
            for name, tensor in own.items():
                check_finite(f"dense.{name}", tensor)
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"serving tensors: of another schema or model configuration: {error}") from error
        self._model.to(device).eval().requires_grad_(False)
        self._derive = Derivations(schema)
        self._splits = Splits(schema, model.table_dim)
        self._boundaries_Q: F32 = np.zeros(0, np.float32)
        if self._derive.quantiles:
            self._boundaries_Q = own["boundaries_Q"].cpu().numpy()

    @classmethod
    def from_state(
        cls, schema: Schema, model: ModelConfig, state: Mapping[str, Tensor], *, device: torch.device = _CPU
    ) -> "ServingModel":
        """The model of a :meth:`smes.model.learner.Learner.serving_state`, with all rows in memory.

        Raises:
            ValueError: As the constructor, for the rows too.
        """
        return cls(schema, model, state, TensorRows(schema, model, state, device=device), device=device)

    def reading(self, rows: RowReader) -> "ServingModel":
        """A model of the same dense weights, which are not copied, that reads the rows of ids elsewhere."""
        other = copy(self)
        other._rows = rows
        return other

    def score(self, ids: I64, numerics: F32, now_ms: I64 | int | None = None, *, requests: I64 | None = None) -> F32:
        """Score N instances: probabilities for binary tasks, values in the label's unit for regression tasks.

        What all instances of a request have in common is looked up and computed once per request, where that pays. It
        is found by comparing; the scores are the same to rounding.

        Args:
            ids: int64 [N, W], ``MISSING`` where missing. An id that was never trained on counts as missing.
            numerics: float32 [N, F], NaN where missing.
            now_ms: When they are shown, Unix milliseconds: one number or int64 [N]. It may be left out where
                :attr:`smes.schema.Schema.derives_from_time` is false.
            requests: int64 [R], the first instance of each request, from 0 up; None: all are of one.

        Returns:
            float32 [N, T].

        Raises:
            ValueError: The matrices do not have the schema's columns, a derived feature needs the time, or ``requests``
                are no rising numbers from 0 to N - 1.
        """
        self._check(ids, numerics)
        if len(ids) == 0:
            return np.zeros((0, self.schema.num_tasks), np.float32)
        starts_R = _starts(requests, len(ids))
        with torch.inference_mode():
            read = self._derive(ids, numerics, now_ms, self._boundaries_Q)
            inputs = self._request_inputs(read, starts_R) or self._inputs(read)
            scores: F32 = self._model.scores(self._model(inputs), inputs).cpu().numpy()
        return scores

    def explain(self, ids: I64, numerics: F32, now_ms: I64 | int | None = None) -> "Explained":
        """Score N instances as :meth:`score` does, and say what the scores are made of; arguments as there."""
        self._check(ids, numerics)
        read = self._derive(ids, numerics, now_ms, self._boundaries_Q)
        scores_NT, weights_NTE = self.score(ids, numerics, now_ms), None
        if len(ids):
            with torch.inference_mode():
                weights = self._model.expert_weights(self.inputs(ids, numerics, now_ms))
            weights_NTE = None if weights is None else weights.cpu().numpy()
        return Explained(scores_NT, weights_NTE, read.ids, read.numerics)

    @property
    def dense(self) -> RankModel:
        """The dense part: from the inputs that :meth:`inputs` reads to scores. Its weights must not change."""
        return self._model

    def inputs(self, ids: I64, numerics: F32, now_ms: I64 | int | None = None) -> FeatureInputs:
        """What the dense part reads of N ≥ 1 instances; arguments as of :meth:`score`."""
        return self._inputs(self.derived(ids, numerics, now_ms))

    def derived(self, ids: I64, numerics: F32, now_ms: I64 | int | None = None) -> ModelInputs:
        """The ids and numbers that the model reads, derived features included; arguments as of :meth:`score`."""
        return self._derive(ids, numerics, now_ms, self._boundaries_Q)

    def score_derived(self, read: ModelInputs) -> F32:
        """Score what :meth:`derived` gave for N ≥ 1 instances, each by itself. float32 [N, T]."""
        with torch.inference_mode():
            inputs = self._inputs(read)
            scores: F32 = self._model.scores(self._model(inputs), inputs).cpu().numpy()
        return scores

    def _inputs(self, read: ModelInputs) -> FeatureInputs:
        return self._read(read.ids, read.numerics)

    def _request_inputs(self, read: ModelInputs, starts_R: I64) -> RequestInputs | None:
        """What the dense part reads once per request and once per item; None where that does not pay."""
        if self._device.type != "cpu" or self._model.before is not None:
            return None
        split = self._splits.of(read, starts_R)
        if split is None:
            return None
        return RequestInputs(
            self._read(read.ids[starts_R], read.numerics[starts_R], split.request),
            self._read(read.ids, read.numerics, split.item),
            split,
            RequestRows(torch.from_numpy(starts_R), len(read.ids)),
        )

    def _read(self, ids: I64, numerics: F32, side: Side | None = None) -> FeatureInputs:
        """Inputs of all columns, or of those of a side."""
        columns_W, features = None, None
        if side is not None:
            columns_W, features = side.id_columns_W, side.features
            # Unlike indexing, take gives rows one behind the other: compiled loops know no others.
            ids, numerics = ids.take(columns_W, axis=1), numerics.take(side.numerics_F, axis=1)
        rows, pool_NW = self._rows.read(ids, columns_W), pool_weights(self.schema, ids, features)
        return FeatureInputs(
            embedding_BWD=self._sent(rows.get("embedding")),
            wide_BWT=self._sent(rows.get("wide")),
            pool_BW=None if pool_NW is None else torch.from_numpy(pool_NW).to(self._device),
            numerics_BF=torch.tensor(numerics, dtype=torch.float32, device=self._device),
        )

    def _sent(self, rows: Tensor | None) -> Tensor | None:
        return None if rows is None else rows.to(self._device)

    def _check(self, ids: I64, numerics: F32) -> None:
        for name, matrix, width in (
            ("ids", ids, self.schema.id_width),
            ("numerics", numerics, self.schema.num_numerics),
        ):
            if matrix.shape != (len(ids), width):
                raise ValueError(f"{name}: shape {list(matrix.shape)}, expected [{len(ids)}, {width}]")


def _starts(requests: I64 | None, instances: int) -> I64:
    if requests is None:
        return np.zeros(1, np.int64)
    starts_R: I64 = np.ascontiguousarray(requests, np.int64)
    if not len(starts_R) or starts_R[0] != 0 or starts_R[-1] >= instances or (np.diff(starts_R) <= 0).any():
        raise ValueError(f"requests: expected rising numbers from 0 to at most {instances - 1}, found {starts_R}")
    return starts_R


class TensorRows:
    """Rows in tensors that never change: a :class:`RowReader` for tests, notebooks and small tables.

    Args:
        schema: The schema that the weights were trained with.
        model: The configuration that they were trained with.
        state: A :meth:`smes.model.learner.Learner.serving_state`: ``table.keys`` and ``table.<group>``. Tensors that
            are on ``device`` already are not copied.
        device: Where the rows are read.

    Raises:
        ValueError: A tensor is missing, of another shape or type, or not finite.
    """

    def __init__(
        self, schema: Schema, model: ModelConfig, state: Mapping[str, Tensor], *, device: torch.device = _CPU
    ) -> None:
        try:
            keys = _keys(state["table.keys"])
            self._keys = required_keys(schema, state, len(keys))
            self._map = IdMap.from_keys(keys)
            check_required(self._keys, self._map.find(self._keys.required) != ABSENT)
            self._weights = {
                name: _checked(f"table.{name}", state[f"table.{name}"], (len(keys), columns)).to(device)
                for name, columns in group_columns(schema, model).items()
            }
        except KeyError as error:
            raise ValueError(f"serving tensors: of another schema or model configuration: {error}") from error
        self._device = device

    def read(self, ids_NW: I64, columns_W: I64 | None = None) -> dict[str, Tensor]:
        """As :meth:`RowReader.read`, on the device."""
        keys = self._keys.own(ids_NW, columns_W)
        found = self._map.find(keys)
        absent = np.flatnonzero(found == ABSENT)
        if len(absent):
            found[absent] = self._map.find(self._keys.shared(keys[absent], absent, columns_W))
        rows_NW = torch.from_numpy(found).view(*ids_NW.shape).to(self._device)
        return {name: F.embedding(rows_NW, weights) for name, weights in self._weights.items()}


def required_keys(schema: Schema, dense: Mapping[str, Tensor], rows: int) -> IdKeys:
    """The keys of ids in a table of so many rows, with as many shared rows as the dense weights say.

    Raises:
        ValueError: The weights say it in another form, or more shared rows than there are rows.
    """
    shared = dense.get("dense.shared_rows_V")
    if shared is None:
        return IdKeys(schema)
    vocabularies = len({f.vocabulary_name for f in schema.inputs.id_features})
    if shared.dtype != torch.int64 or shared.shape != (vocabularies,):
        raise ValueError(
            f"tensor dense.shared_rows_V: {shared.dtype} {list(shared.shape)}, expected torch.int64 [{vocabularies}]"
        )
    counts: list[int] = shared.tolist()
    if min(counts, default=0) < 0 or sum(counts) > rows:
        raise ValueError(f"tensor dense.shared_rows_V: {counts}, expected 0 or more each, and at most {rows} in all")
    return IdKeys(schema, counts)


def check_required(keys: IdKeys, present: Bool) -> None:
    """Check that a table has the rows that every table has.

    Raises:
        ValueError: Some are not present.
    """
    if not present.all():
        raise ValueError(
            f"keys of an id table: {int((~present).sum())} of the {len(present)} default and shared rows of its "
            f"vocabularies are missing"
        )


def _checked(name: str, weights: Tensor, shape: tuple[int, int]) -> Tensor:
    if weights.shape != shape:
        raise ValueError(f"tensor {name}: shape {list(weights.shape)}, expected {list(shape)}")
    if weights.dtype != torch.float32:
        raise ValueError(f"tensor {name}: {weights.dtype}, expected {torch.float32}")
    check_finite(name, weights)
    return weights


def _keys(tensor: Tensor) -> I64:
    if tensor.dtype != torch.int64 or tensor.dim() != 1:
        raise ValueError(f"tensor table.keys: {tensor.dtype} {list(tensor.shape)}, expected torch.int64 [R]")
    keys: I64 = tensor.cpu().numpy()
    return keys
