"""The feature layer: embeddings, pooled bags, attended sequences and numerics of an instance, as one vector; and the
linear part.

Letters: B instances, W id columns, L columns of a sequence, F numeric features, N columns made of them (with
indicators), D embedding width, T tasks, I output width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smes.model.ids import per_column
from smes.rankers.moments import RunningMoments
from smes.schema import Feature, Schema


@dataclass(frozen=True, slots=True)
class FeatureInputs:
    """An instance's features, its ids already looked up.

    Attributes:
        embedding_BWD: Embedding of every id; None where the ranker reads none.
        wide_BWT: The linear part's weight of every id for every task; None without linear part.
        pool_BW: :func:`smes.model.ids.pool_weights`; None for a schema without bags and sequences.
        numerics_BF: float32, NaN where missing.
    """

    embedding_BWD: Tensor | None
    wide_BWT: Tensor | None
    pool_BW: Tensor | None
    numerics_BF: Tensor


class FeatureLayer(nn.Module):
    """Concatenates what a ranker reads, and sums the linear part.

    A bag is the mean over its ids, in the embeddings and in the linear part alike: a long bag must not weigh more than
    a short one. So is a sequence, and one with a query is read under its attention besides
    (:class:`smes.model.features.TargetAttention`), each entry the sum of its own embedding and those of what accompanies it.
    In the linear part, which cannot compare, a queried sequence has no say: its weights are those of the items to
    score. What accompanies it has weights of its own there.

    A numeric feature is squashed as its schema says, standardised by its running mean and deviation, cut at ±8, and
    accompanied by an indicator of its absence (unless its schema spares that).

    Args:
        schema: The features.
        embedding_dim: D; 0 for a ranker that reads no embeddings.
        wide: Whether there is a linear part.
    """

    log1p_F: Tensor
    indicated_F: Tensor
    wide_W: Tensor

    def __init__(self, schema: Schema, embedding_dim: int, *, wide: bool) -> None:
        super().__init__()
        self._parts = _parts(schema, embedding_dim)
        self._sequences = _sequences(schema, embedding_dim)
        self.attention = nn.ModuleList(TargetAttention(s.dim, attention_dim=s.dim) for s in self._sequences)
        has_say = per_column(schema, (f.query is None for f in schema.id_features))
        self.register_buffer("wide_W", torch.tensor(has_say, dtype=torch.float32), persistent=False)
        indicated = [i for i, f in enumerate(schema.numeric_features) if f.indicator]
        self.register_buffer("indicated_F", torch.tensor(indicated, dtype=torch.int64), persistent=False)
        num_columns = schema.num_numerics + len(indicated)
        self.output_dim = num_columns + sum(p.output_dim for p in self._parts)
        self.output_dim += sum(s.output_dim for s in self._sequences)
        self.moments = RunningMoments(schema.num_numerics)
        log1p = [f.transform == "log1p" for f in schema.numeric_features]
        self.register_buffer("log1p_F", torch.tensor(log1p, dtype=torch.bool), persistent=False)
        self.wide_numerics = nn.Parameter(torch.zeros(num_columns, schema.num_tasks)) if wide else None

    def forward(self, inputs: FeatureInputs) -> tuple[Tensor, Tensor | None]:
        """(what the ranker reads, float32 [B, I]; the linear part's logits, float32 [B, T], None without it)."""
        numerics_BN = self._numerics(inputs.numerics_BF)
        x_BI = torch.cat([*self._embedded(inputs), numerics_BN], dim=1)
        if inputs.wide_BWT is None or self.wide_numerics is None:
            return x_BI, None
        if inputs.pool_BW is None:
            wide_BT = inputs.wide_BWT.sum(dim=1)
        else:
            wide_BT = torch.einsum("bwt,bw->bt", inputs.wide_BWT, inputs.pool_BW * self.wide_W)
        return x_BI, wide_BT + numerics_BN @ self.wide_numerics

    def observe(self, numerics_BF: Tensor) -> None:
        """Let the running moments take in a batch; after it was scored."""
        present_BF = ~numerics_BF.isnan()
        self.moments.observe(self._squash(numerics_BF), present_BF)

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
        missing_BF = numerics_BF.isnan()
        x_BF = self.moments.standardise(self._squash(numerics_BF), clip=8.0)
        return torch.cat(
            [x_BF.masked_fill(missing_BF, 0.0), missing_BF.index_select(1, self.indicated_F).float()], dim=1
        )

    def _squash(self, x_BF: Tensor) -> Tensor:
        x_BF = torch.nan_to_num(x_BF, nan=0.0, posinf=3e38, neginf=-3e38)
        return torch.where(self.log1p_F, x_BF.sign() * x_BF.abs().log1p(), x_BF)


@dataclass(frozen=True)
class _Part:
    """A run of id features of one width, or one bag or sequence: columns → a piece of the layer's output."""

    columns: slice
    dim: int
    is_list: bool

    @property
    def output_dim(self) -> int:
        return self.dim if self.is_list else self.dim * (self.columns.stop - self.columns.start)

    def __call__(self, embedding_BWD: Tensor, pool_BW: Tensor | None) -> Tensor:
        x_BWD = embedding_BWD[:, self.columns, : self.dim]
        if not self.is_list:
            return x_BWD.reshape(len(x_BWD), -1)
        assert pool_BW is not None, "a schema with bags or sequences has pool weights"
        return (x_BWD * pool_BW[:, self.columns].unsqueeze(2)).sum(dim=1)


@dataclass(frozen=True)
class _Sequence:
    """A queried sequence: where its target, its entries and what accompanies them lie among the columns."""

    dim: int
    target: int
    entries: tuple[slice, ...]

    @property
    def output_dim(self) -> int:
        return 2 * self.dim

    def __call__(self, embedding_BWD: Tensor, pool_BW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(target [B, D], entries [B, L, D], which are there: bool [B, L])."""
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


def _dim(feature: Feature, embedding_dim: int) -> int:
    dim = feature.dim or embedding_dim
    if dim > embedding_dim:
        raise ValueError(f"feature {feature.name!r}: dim {dim}, expected at most embedding_dim {embedding_dim}")
    return dim


# TODO(merge) was smes.history: Target attention over a sequence: which of the user's recent

_EPSILON = 1e-6


class TargetAttention(nn.Module):
    """The entries of a sequence, weighed by how well they answer the target.

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
        """Weighted mean of the entries, and its product with the target.

        Args:
            target_BD: Embedding of what is scored.
            entry_BLD: Embedding of each entry: of its item plus those of what accompanies it.
            present_BL: bool, which places hold an entry.

        Returns:
            float32 [B, 2·D]; zeros where there is no entry.
        """
        # Embeddings begin near zero and grow as they learn: compared by direction, they can tell early.
        query_BA = self.query(_unit(target_BD))
        # (W k)·q = k·(Wᵀ q): one product per instance instead of one per entry.
        asked_BD = query_BA @ self.key.weight
        score_BL = torch.einsum("bld,bd->bl", _unit(entry_BLD), asked_BD) * self._scale
        # A finite floor, not -inf: an empty sequence must not turn into NaN, nor its gradient.
        weight_BL = score_BL.masked_fill(~present_BL, -1e9).softmax(dim=1) * present_BL
        attended_BD = torch.einsum("bl,bld->bd", weight_BL, entry_BLD)
        return torch.cat([attended_BD, attended_BD * target_BD], dim=1)


def _unit(x_D: Tensor) -> Tensor:
    """Scaled to a mean square of 1; near zero it fades instead of dividing by nothing."""
    return x_D * (x_D.square().mean(dim=-1, keepdim=True) + _EPSILON).rsqrt()
