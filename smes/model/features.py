"""The feature layer: from the features of an instance to the vector that the ranker reads, and the linear part.

Target attention follows DIN (Zhou et al., 2018, arXiv 1706.06978): the target item is compared with every entry of the
user's sequence. Instead of DIN's activation unit we use a scaled dot product of learned maps (Vaswani et al., 2017,
arXiv 1706.03762) and normalise the weights, because that costs less on a CPU.

Letters: B instances, W id columns, L columns of a sequence, F numeric features, N columns made from them (with
indicators), D embedding width, A width in which target and entries are compared, T tasks, I output width.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smes.model.ids import per_column
from smes.model.numeric_moments import CLIP, KNOWN_FROM, far_limits
from smes.rankers.ranker import RunningMoments
from smes.schema import Feature, Schema

_EPSILON = 1e-6


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
        self._parts = _parts(schema, embedding_dim)
        self._sequences = _sequences(schema, embedding_dim)
        self.attention = nn.ModuleList(TargetAttention(s.dim, attention_dim=s.dim) for s in self._sequences)
        in_linear_part = per_column(schema, (f.query is None for f in schema.id_features))
        self.register_buffer("wide_W", torch.tensor(in_linear_part, dtype=torch.float32), persistent=False)
        indicated = [i for i, f in enumerate(schema.numeric_features) if f.indicator]
        self.register_buffer("indicated_F", torch.tensor(indicated, dtype=torch.int64), persistent=False)
        num_columns = schema.num_numerics + len(indicated)
        self.output_dim = num_columns + sum(p.output_dim for p in self._parts)
        self.output_dim += sum(s.output_dim for s in self._sequences)
        self.moments = RunningMoments(schema.num_numerics)
        log1p = [f.transform == "log1p" for f in schema.numeric_features]
        self.register_buffer("log1p_F", torch.tensor(log1p, dtype=torch.bool), persistent=False)
        self.register_buffer("far_F2", torch.from_numpy(far_limits(schema)).float(), persistent=False)
        self.wide_numerics = nn.Parameter(torch.zeros(num_columns, schema.num_tasks)) if wide else None

    def forward(self, inputs: FeatureInputs) -> tuple[Tensor, Tensor | None]:
        """Returns (what the ranker reads, float32 [B, I]; logits of the linear part, float32 [B, T], or None)."""
        numerics_BN = self._numerics(inputs.numerics_BF)
        x_BI = torch.cat([*self._embedded(inputs), numerics_BN], dim=1)
        if inputs.wide_BWT is None or self.wide_numerics is None:
            return x_BI, None
        if inputs.pool_BW is None:
            wide_BT = inputs.wide_BWT.sum(dim=1)
        else:
            wide_BT = torch.einsum("bwt,bw->bt", inputs.wide_BWT, inputs.pool_BW * self.wide_W)
        return x_BI, wide_BT + numerics_BN @ self.wide_numerics

    def standardise_by(self, moments: Mapping[str, Tensor]) -> None:
        """Standardise by these ``count``, ``mean`` and ``variance`` from now on. float64 [F] each."""
        self.moments.count_C.copy_(moments["count"], non_blocking=True)
        self.moments.mean_C.copy_(moments["mean"], non_blocking=True)
        self.moments.variance_C.copy_(moments["variance"], non_blocking=True)

    def _embedded(self, inputs: FeatureInputs) -> list[Tensor]:
        embedding_BWD = inputs.embedding_BWD
        if embedding_BWD is None:
            return []
        pieces = [part(embedding_BWD, inputs.pool_BW) for part in self._parts]
        for sequence, attention in zip(self._sequences, self.attention, strict=True):
            assert inputs.pool_BW is not None, "a schema with sequences has pool weights"
            pieces.append(attention(*sequence(embedding_BWD, inputs.pool_BW)))
        return pieces

    def _numerics(self, numerics_BF: Tensor) -> Tensor:
        squashed_BF = self._squash(numerics_BF)
        z_BF = self.moments.standardise(squashed_BF, clip=math.inf)
        least_F, deviations_F = self.far_F2.unbind(1)
        far_BF = (squashed_BF.abs() > least_F) & (z_BF.abs() > deviations_F) & (self.moments.count_C >= KNOWN_FROM)
        missing_BF = numerics_BF.isnan() | far_BF
        x_BF = z_BF.clamp_(-CLIP, CLIP).masked_fill(missing_BF, 0.0)
        return torch.cat([x_BF, missing_BF.index_select(1, self.indicated_F).float()], dim=1)

    def _squash(self, x_BF: Tensor) -> Tensor:
        x_BF = torch.nan_to_num(x_BF, nan=0.0, posinf=3e38, neginf=-3e38)
        return torch.where(self.log1p_F, x_BF.sign() * x_BF.abs().log1p(), x_BF)


@dataclass(frozen=True)
class _Part:
    """Computes one piece of the output: from neighbouring id features of one width, or from one bag or sequence."""

    columns: slice
    dim: int
    is_list: bool

    @property
    def output_dim(self) -> int:
        return self.dim if self.is_list else self.dim * (self.columns.stop - self.columns.start)

    def __call__(self, embedding_BWD: Tensor, pool_BW: Tensor | None) -> Tensor:
        x_BWD = embedding_BWD[:, self.columns, : self.dim]
        if not self.is_list:
            return x_BWD.flatten(1)
        assert pool_BW is not None, "a schema with bags or sequences has pool weights"
        return (x_BWD * pool_BW[:, self.columns].unsqueeze(2)).sum(dim=1)


@dataclass(frozen=True)
class _Sequence:
    """Selects the input of target attention: the columns of the target, of the entries and of their companions."""

    dim: int
    target: int
    entries: tuple[slice, ...]

    @property
    def output_dim(self) -> int:
        return 2 * self.dim

    def __call__(self, embedding_BWD: Tensor, pool_BW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns (target [B, D], entries [B, L, D], which entries are present, bool [B, L])."""
        own, *others = (embedding_BWD[:, columns, : self.dim] for columns in self.entries)
        return embedding_BWD[:, self.target, : self.dim], sum(others, start=own), pool_BW[:, self.entries[0]] > 0


def _parts(schema: Schema, embedding_dim: int) -> tuple[_Part, ...]:
    if embedding_dim == 0:
        return ()
    parts: list[_Part] = []
    for feature in schema.id_features:
        columns, dim = schema.id_slices[feature.name], _dim(feature, embedding_dim)
        last = parts[-1] if parts else None
        if last and not feature.is_list and not last.is_list and last.dim == dim:
            parts[-1] = _Part(slice(last.columns.start, columns.stop), dim, False)
        else:
            parts.append(_Part(columns, dim, feature.is_list))
    return tuple(parts)


def _sequences(schema: Schema, embedding_dim: int) -> tuple[_Sequence, ...]:
    if embedding_dim == 0:
        return ()
    sequences = []
    for feature in schema.id_features:
        if feature.query is not None:
            names = (feature.name, *(f.name for f in schema.companions[feature.name]))
            target = schema.id_slices[feature.query].start
            entries = tuple(schema.id_slices[name] for name in names)
            sequences.append(_Sequence(_dim(feature, embedding_dim), target, entries))
    return tuple(sequences)


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
                width = _dim(feature, embedding_dim) * (2 if part == "attention" else 1)
                columns += [(feature.name, part, i) for i in range(width)]
    return columns + numeric_columns(schema)


def numeric_columns(schema: Schema) -> list[tuple[str, str, int]]:
    """The same of the N columns made from numeric features, which come last."""
    numerics = schema.numeric_features
    return [(f.name, "value", 0) for f in numerics] + [(f.name, "missing", 0) for f in numerics if f.indicator]


def _dim(feature: Feature, embedding_dim: int) -> int:
    dim = feature.dim or embedding_dim
    if dim > embedding_dim:
        raise ValueError(f"feature {feature.name!r}: dim {dim}, expected at most embedding_dim {embedding_dim}")
    return dim


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
        # Embeddings start near zero and grow as they learn. Scaled to unit size, even young ones can be compared.
        query_BA = self.query(_unit(target_BD))
        # (W k)·q = k·(Wᵀ q): one matrix product per instance instead of one per entry.
        query_BD = query_BA @ self.key.weight
        score_BL = torch.einsum("bld,bd->bl", _unit(entry_BLD), query_BD) * self._scale
        # -1e9 instead of -inf: with -inf, an empty sequence and its gradient would be NaN.
        weight_BL = score_BL.masked_fill(~present_BL, -1e9).softmax(dim=1) * present_BL
        attended_BD = torch.einsum("bl,bld->bd", weight_BL, entry_BLD)
        return torch.cat([attended_BD, attended_BD * target_BD], dim=1)


def _unit(x_D: Tensor) -> Tensor:
    """Scale to a mean square of 1. A vector near zero stays near zero."""
    return x_D * (x_D.square().mean(dim=-1, keepdim=True) + _EPSILON).rsqrt()
