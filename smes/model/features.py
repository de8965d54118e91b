"""The feature layer: from the features of an instance to the vector that the ranker reads, and the linear part.

Target attention follows DIN (Zhou et al., 2018, arXiv 1706.06978): the target item is compared with every entry of the
user's sequence. Instead of DIN's activation unit we use a scaled dot product of learned maps (Vaswani et al., 2017,
arXiv 1706.03762) and normalise the weights, because that costs less on a CPU.

Letters: B instances, R requests, W id columns, L columns of a sequence, F numeric features, N columns made from them
(with indicators), D embedding width, A width in which target and entries are compared, T tasks, I output width.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smes.model.feature_parts import Entries, Part, Target, dim_of, entries_of, parts_of, queried, target_of
from smes.model.ids import per_column
from smes.model.numeric_moments import CLIP, KNOWN_FROM, far_limits
from smes.model.request_split import RequestSplit, Side
from smes.rankers.ranker import RunningMoments
from smes.rankers.ranker_input import RankerInput, RequestRows, SplitInput, keep
from smes.schema import Schema

_EPSILON = 1e-6
_ABSENT = -1e9  # instead of -inf: with -inf, an empty sequence and its gradient would be NaN


@dataclass(frozen=True, slots=True)
class FeatureInputs:
    """Features of instances, with the table rows of their ids already read.

    Attributes:
        embedding_BWD: Embedding of every id; None for a ranker that reads no embeddings.
        wide_BWT: Weight of every id for every task in the linear part; None without a linear part.
        pool_BW: :func:`smes.model.ids.pool_weights`; None for a schema without bags and sequences.
        numerics_BF: float32, NaN where missing.
    """

    embedding_BWD: Tensor | None
    wide_BWT: Tensor | None
    pool_BW: Tensor | None
    numerics_BF: Tensor

    def of_nothing(self) -> "FeatureInputs":
        """In place of no instance one without features."""
        embedding_BWD, wide_BWT, pool_BW = (_with_zeros(x) for x in (self.embedding_BWD, self.wide_BWT, self.pool_BW))
        numerics_BF = self.numerics_BF.new_full((1, self.numerics_BF.shape[1]), math.nan)
        return FeatureInputs(embedding_BWD, wide_BWT, pool_BW, numerics_BF)


@dataclass(frozen=True, slots=True)
class RequestInputs:
    """Features of instances that belong to requests, each feature of a request once.

    Attributes:
        request, item: Features of R requests, and of their B instances.
        split: Which feature is where.
        rows: Which instances each request has.
    """

    request: FeatureInputs
    item: FeatureInputs
    split: RequestSplit
    rows: RequestRows


class FeatureLayer(nn.Module):
    """Concatenates what the ranker reads, and computes the linear part.

    - Id: its embedding.
    - Bag: the mean of its ids' embeddings, so that a long bag does not count more than a short one.
    - Sequence: the same mean. A sequence with a query also gives the output of :class:`TargetAttention`. There, the
      embedding of an entry is the sum of its own embedding and those of the sequences that accompany it.
    - Numeric feature: transformed as the schema says, standardised by its running mean and deviation
      (:class:`smes.model.numeric_moments.NumericMoments`) and clipped at ±8; then 1 where the value is missing, else 0
      (unless the schema turns this indicator off). A value that nothing measures
      (:data:`smes.model.numeric_moments.FAR`, as 10³⁰) is missing.

    The linear part sums one weight per id and task (for bags and sequences the mean) and a weighted sum of the numeric
    columns. Sequences with a query are left out of it: their ids would read the weights that the same items have as
    targets, and a sum cannot compare them with the target.

    Args:
        schema: Its inputs are the features.
        embedding_dim: D; 0 for a ranker that reads no embeddings.
        wide: Whether there is a linear part.

    Raises:
        ValueError: A feature's ``dim`` is more than ``embedding_dim``.
    """

    log1p_F: Tensor
    far_F2: Tensor
    indicated_F: Tensor
    wide_W: Tensor

    def __init__(self, schema: Schema, embedding_dim: int, *, wide: bool) -> None:
        super().__init__()
        schema = schema.inputs
        self._parts = parts_of(schema.id_features, schema.id_slices, embedding_dim)
        self._sequences = tuple(
            (i, target_of(f, schema.id_slices, embedding_dim), entries_of(f, schema, schema.id_slices, embedding_dim))
            for i, f in enumerate(queried(schema, embedding_dim))
        )
        dims = [entries.dim for _, _, entries in self._sequences]
        self.attention = nn.ModuleList(TargetAttention(dim, attention_dim=dim) for dim in dims)
        in_linear_part = per_column(schema, (f.query is None for f in schema.id_features))
        self.register_buffer("wide_W", torch.tensor(in_linear_part, dtype=torch.float32), persistent=False)
        indicated = [i for i, f in enumerate(schema.numeric_features) if f.indicator]
        self.register_buffer("indicated_F", torch.tensor(indicated, dtype=torch.int64), persistent=False)
        num_columns = schema.num_numerics + len(indicated)
        self.output_dim = num_columns + sum(p.output_dim for p in self._parts)
        self.output_dim += sum(2 * dim for dim in dims)
        self.moments = RunningMoments(schema.num_numerics)
        log1p = [f.transform == "log1p" for f in schema.numeric_features]
        self.register_buffer("log1p_F", torch.tensor(log1p, dtype=torch.bool), persistent=False)
        self.register_buffer("far_F2", torch.from_numpy(far_limits(schema)).float(), persistent=False)
        self.wide_numerics = nn.Parameter(torch.zeros(num_columns, schema.num_tasks)) if wide else None

    def forward(self, inputs: FeatureInputs | RequestInputs) -> tuple[RankerInput, Tensor | None]:
        """Returns (what the ranker reads, float32 [B, I]; logits of the linear part, float32 [B, T], or None)."""
        if isinstance(inputs, RequestInputs):
            return self._of_requests(inputs)
        numerics_BN = self._numerics(inputs.numerics_BF, self._columns())
        embedded = [
            *_pooled(inputs, self._parts),
            *(self._attended(i, target, entries, inputs) for i, target, entries in self._sequences),
        ]
        x_BI = torch.cat([*embedded, numerics_BN], dim=1)
        if inputs.wide_BWT is None or self.wide_numerics is None:
            return x_BI, None
        return x_BI, _wide_of_ids(inputs, self.wide_W) + numerics_BN @ self.wide_numerics

    def _of_requests(self, inputs: RequestInputs) -> tuple[SplitInput, Tensor | None]:
        split, rows = inputs.split, inputs.rows
        request_RN = self._numerics(inputs.request.numerics_BF, self._columns(split.request, split))
        item_BN = self._numerics(inputs.item.numerics_BF, self._columns(split.item, split))
        x = SplitInput(
            _joined([*self._embedded(inputs.request, split.request), request_RN]),
            _joined([*self._embedded(inputs.item, split.item), *self._attended_across(inputs), item_BN]),
            split.request.columns,
            split.item.columns,
            rows,
            split.kept,
        )
        if inputs.request.wide_BWT is None or self.wide_numerics is None:
            return x, None
        return x, self._wide(inputs.item, item_BN, split.item, split) + rows.spread(
            self._wide(inputs.request, request_RN, split.request, split)
        )

    def standardise_by(self, moments: Mapping[str, Tensor]) -> None:
        """Standardise by these ``count``, ``mean`` and ``variance`` from now on. float64 [F] each."""
        self.moments.count_C.copy_(moments["count"], non_blocking=True)
        self.moments.mean_C.copy_(moments["mean"], non_blocking=True)
        self.moments.variance_C.copy_(moments["variance"], non_blocking=True)

    def _embedded(self, inputs: FeatureInputs, side: Side) -> list[Tensor]:
        attended = [self._attended(i, target, entries, inputs) for i, target, entries in side.attention]
        return [*_pooled(inputs, side.parts), *attended]

    def _attended(self, number: int, target: Target, entries: Entries, inputs: FeatureInputs) -> Tensor:
        assert inputs.embedding_BWD is not None, "sequences with a query are for a model with embeddings"
        assert inputs.pool_BW is not None, "a schema with sequences has pool weights"
        read = entries(inputs.embedding_BWD, inputs.pool_BW)
        attended: Tensor = self.attention[number](target(inputs.embedding_BWD), *read)
        return attended

    def _attended_across(self, inputs: RequestInputs) -> list[Tensor]:
        """Attention of items to the sequences of their requests."""
        attended = []
        for i, target, entries in inputs.split.across:
            of_request, of_item, attention = inputs.request, inputs.item, self.attention[i]
            assert of_request.embedding_BWD is not None, "sequences with a query are for a model with embeddings"
            assert of_request.pool_BW is not None, "a schema with sequences has pool weights"
            assert of_item.embedding_BWD is not None, "the target is an id of the item"
            read = entries(of_request.embedding_BWD, of_request.pool_BW)
            assert isinstance(attention, TargetAttention), "the list has nothing else"
            attended.append(attention.of_requests(target(of_item.embedding_BWD), *read, inputs.rows))
        return attended

    def _wide(self, inputs: FeatureInputs, numerics_BN: Tensor, side: Side, split: RequestSplit) -> Tensor:
        """What a side adds to the linear part. [B, T]."""
        wide_BT, weight_NT = _wide_of_ids(inputs, side.wide_W), self.wide_numerics
        if weight_NT is None or not len(side.numerics_N):
            return wide_BT
        of_side_NT: Tensor = keep(split.kept, side, "wide", lambda: weight_NT.index_select(0, side.numerics_N))
        return wide_BT + numerics_BN @ of_side_NT

    def _columns(self, side: Side | None = None, split: RequestSplit | None = None) -> "_NumericColumns":
        """What is known of the numeric features, those of a side only."""
        if side is None or split is None:
            scale_F, shift_F = self.moments.affine()
            known_F = self.moments.count_C >= KNOWN_FROM
            return _NumericColumns(self.log1p_F, self.far_F2, self.indicated_F, scale_F, shift_F, known_F)

        def of_side() -> _NumericColumns:
            all_, index_F = self._columns(), torch.from_numpy(side.numerics_F)
            log1p_F, far_F2, scale_F, shift_F, known_F = (
                column.index_select(0, index_F)
                for column in (all_.log1p_F, all_.far_F2, all_.scale_F, all_.shift_F, all_.known_F)
            )
            return _NumericColumns(log1p_F, far_F2, side.indicated_F, scale_F, shift_F, known_F)

        columns: _NumericColumns = keep(split.kept, side, "numerics", of_side)
        return columns

    def _numerics(self, numerics_BF: Tensor, columns: "_NumericColumns") -> Tensor:
        if not numerics_BF.shape[1]:
            return numerics_BF
        squashed_BF = _squash(numerics_BF, columns.log1p_F)
        z_BF = torch.addcmul(columns.shift_F, squashed_BF.double(), columns.scale_F).float()
        least_F, deviations_F = columns.far_F2.unbind(1)
        far_BF = (squashed_BF.abs() > least_F) & (z_BF.abs() > deviations_F) & columns.known_F
        missing_BF = numerics_BF.isnan() | far_BF
        x_BF = z_BF.clamp_(-CLIP, CLIP).masked_fill(missing_BF, 0.0)
        return torch.cat([x_BF, missing_BF.index_select(1, columns.indicated_F).float()], dim=1)


def _with_zeros(x: Tensor | None) -> Tensor | None:
    """With a row of zeros behind; gradients of the others stay connected."""
    return None if x is None else torch.cat([x, x.new_zeros(1, *x.shape[1:])])


@dataclass(frozen=True, slots=True)
class _NumericColumns:
    """What transforms and standardises numeric features; see :class:`FeatureLayer`."""

    log1p_F: Tensor
    far_F2: Tensor
    indicated_F: Tensor
    scale_F: Tensor
    shift_F: Tensor
    known_F: Tensor


def _squash(x_BF: Tensor, log1p_F: Tensor) -> Tensor:
    x_BF = torch.nan_to_num(x_BF, nan=0.0, posinf=3e38, neginf=-3e38)
    return torch.where(log1p_F, x_BF.sign() * x_BF.abs().log1p(), x_BF)


def _pooled(inputs: FeatureInputs, parts: Sequence[Part]) -> list[Tensor]:
    embedding_BWD = inputs.embedding_BWD
    return [] if embedding_BWD is None else [part(embedding_BWD, inputs.pool_BW) for part in parts]


def _joined(pieces: Sequence[Tensor]) -> Tensor:
    """Beside each other; a piece alone is not copied."""
    some = [piece for piece in pieces if piece.shape[1]]
    return some[0] if len(some) == 1 else torch.cat([*some] or [pieces[-1]], dim=1)


def _wide_of_ids(inputs: FeatureInputs, wide_W: Tensor) -> Tensor:
    assert inputs.wide_BWT is not None, "there is a linear part"
    if inputs.pool_BW is None:
        return inputs.wide_BWT.sum(dim=1)
    return torch.einsum("bwt,bw->bt", inputs.wide_BWT, inputs.pool_BW * wide_W)


def input_columns(schema: Schema, embedding_dim: int) -> list[tuple[str, str, int]]:
    """What each of the I columns of the output is: (feature, which part of it, place in that part).

    Args:
        schema: What the model reads (:attr:`smes.schema.Schema.inputs`).
        embedding_dim: D.
    """
    columns = []
    if embedding_dim:
        for part, features in (
            ("embedding", schema.id_features),
            ("attention", [f for f in schema.id_features if f.query is not None]),
        ):
            for feature in features:
                width = dim_of(feature, embedding_dim) * (2 if part == "attention" else 1)
                columns += [(feature.name, part, i) for i in range(width)]
    return columns + numeric_columns(schema)


def numeric_columns(schema: Schema) -> list[tuple[str, str, int]]:
    """The same of the N columns made from numeric features, which come last."""
    numerics = schema.numeric_features
    return [(f.name, "value", 0) for f in numerics] + [(f.name, "missing", 0) for f in numerics if f.indicator]


class TargetAttention(nn.Module):
    """The mean of a sequence's entries, weighted by how well each matches the target.

    Args:
        dim: D.
        attention_dim: A.
    """

    def __init__(self, dim: int, attention_dim: int) -> None:
        super().__init__()
        self.query = nn.Linear(dim, attention_dim)
        self.key = nn.Linear(dim, attention_dim, bias=False)
        self._scale = attention_dim**-0.5
        self.output_dim = 2 * dim

    def forward(self, target_BD: Tensor, entry_BLD: Tensor, present_BL: Tensor) -> Tensor:
        """Compute the weighted mean, and its element-wise product with the target.

        Args:
            target_BD: Embedding of the item to score.
            entry_BLD: Embedding of each entry.
            present_BL: bool, which places hold an entry.

        Returns:
            float32 [B, 2·D]; zeros for an empty sequence.
        """
        score_BL = torch.einsum("bld,bd->bl", _unit(entry_BLD), self._query(target_BD)) * self._scale
        weight_BL = score_BL.masked_fill(~present_BL, _ABSENT).softmax(dim=1) * present_BL
        attended_BD = torch.einsum("bl,bld->bd", weight_BL, entry_BLD)
        return torch.cat([attended_BD, attended_BD * target_BD], dim=1)

    def of_requests(self, target_BD: Tensor, entry_RLD: Tensor, present_RL: Tensor, rows: RequestRows) -> Tensor:
        """The same where all instances of a request have its entries; these are read once. [B, 2·D]."""
        # Absent places get a weight of 0 by their scores, and in an empty sequence, where all have one, entries of 0.
        absent_RL = torch.zeros_like(present_RL, dtype=entry_RLD.dtype).masked_fill_(~present_RL, _ABSENT)
        query_BD = self._query(target_BD) * self._scale
        weight_BL = rows.product(query_BD, _unit(entry_RLD).transpose(1, 2), absent_RL).softmax(dim=1)
        attended_BD = rows.product(weight_BL, entry_RLD * present_RL.unsqueeze(2))
        return torch.cat([attended_BD, attended_BD * target_BD], dim=1)

    def _query(self, target_BD: Tensor) -> Tensor:
        # Embeddings start near zero and grow as they learn. Scaled to unit size, even young ones can be compared.
        query_BA: Tensor = self.query(_unit(target_BD))
        # (W k)·q = k·(Wᵀ q): one matrix product per instance instead of one per entry.
        return query_BA @ self.key.weight


def _unit(x_D: Tensor) -> Tensor:
    """Scale to a mean square of 1. A vector near zero stays near zero."""
    return x_D * (x_D.square().mean(dim=-1, keepdim=True) + _EPSILON).rsqrt()
