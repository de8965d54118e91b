"""The feature layer: embeddings, pooled bags and numerics of an instance, as one vector; and the linear part.

Letters: B instances, W id columns, F numeric features, N columns made of them (with indicators), D embedding width,
T tasks, I output width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smes.running_moments import RunningMoments
from smes.schema import Schema


@dataclass(frozen=True, slots=True)
class FeatureInputs:
    """An instance's features, its ids already looked up.

    Attributes:
        embedding_BWD: Embedding of every id; None where the ranker reads none.
        wide_BWT: The linear part's weight of every id for every task; None without linear part.
        pool_BW: :func:`smes.id_rows.pool_weights`; None for a schema without bags.
        numerics_BF: float32, NaN where missing.
    """

    embedding_BWD: Tensor | None
    wide_BWT: Tensor | None
    pool_BW: Tensor | None
    numerics_BF: Tensor


class FeatureLayer(nn.Module):
    """Concatenates what a ranker reads, and sums the linear part.

    A bag is the mean over its ids, in the embeddings and in the linear part alike: a long bag must not weigh more than
    a short one. A numeric feature is squashed as its schema says, standardised by its running mean and deviation,
    cut at ±8, and accompanied by an indicator of its absence (unless its schema spares that).

    Args:
        schema: The features.
        embedding_dim: D; 0 for a ranker that reads no embeddings.
        wide: Whether there is a linear part.
    """

    log1p_F: Tensor
    indicated_F: Tensor

    def __init__(self, schema: Schema, embedding_dim: int, *, wide: bool) -> None:
        super().__init__()
        self._parts = _parts(schema, embedding_dim)
        indicated = [i for i, f in enumerate(schema.numeric_features) if f.indicator]
        self.register_buffer("indicated_F", torch.tensor(indicated, dtype=torch.int64), persistent=False)
        num_columns = schema.num_numerics + len(indicated)
        self.output_dim = sum(p.output_dim for p in self._parts) + num_columns
        self.moments = RunningMoments(schema.num_numerics)
        log1p = [f.transform == "log1p" for f in schema.numeric_features]
        self.register_buffer("log1p_F", torch.tensor(log1p, dtype=torch.bool), persistent=False)
        self.wide_numerics = nn.Parameter(torch.zeros(num_columns, schema.num_tasks)) if wide else None

    def forward(self, inputs: FeatureInputs) -> tuple[Tensor, Tensor | None]:
        """(what the ranker reads, float32 [B, I]; the linear part's logits, float32 [B, T], None without it)."""
        numerics_BN = self._numerics(inputs.numerics_BF)
        pieces = [] if inputs.embedding_BWD is None else [p(inputs.embedding_BWD, inputs.pool_BW) for p in self._parts]
        x_BI = torch.cat([*pieces, numerics_BN], dim=1)
        if inputs.wide_BWT is None or self.wide_numerics is None:
            return x_BI, None
        wide_BWT = inputs.wide_BWT if inputs.pool_BW is None else inputs.wide_BWT * inputs.pool_BW.unsqueeze(2)
        return x_BI, wide_BWT.sum(dim=1) + numerics_BN @ self.wide_numerics

    def observe(self, numerics_BF: Tensor) -> None:
        """Let the running moments take in a batch; after it was scored."""
        present_BF = ~numerics_BF.isnan()
        self.moments.observe(self._squash(numerics_BF), present_BF)

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
    """A run of id features of one width, or one bag: columns → a piece of the layer's output."""

    columns: slice
    dim: int
    is_bag: bool

    @property
    def output_dim(self) -> int:
        return self.dim if self.is_bag else self.dim * (self.columns.stop - self.columns.start)

    def __call__(self, embedding_BWD: Tensor, pool_BW: Tensor | None) -> Tensor:
        x_BWD = embedding_BWD[:, self.columns, : self.dim]
        if not self.is_bag:
            return x_BWD.reshape(len(x_BWD), -1)
        assert pool_BW is not None, "a schema with bags has pool weights"
        return (x_BWD * pool_BW[:, self.columns].unsqueeze(2)).sum(dim=1)


def _parts(schema: Schema, embedding_dim: int) -> tuple[_Part, ...]:
    if embedding_dim == 0:
        return ()
    parts: list[_Part] = []
    for feature in schema.id_features:
        columns, dim = schema.id_slices[feature.name], feature.dim or embedding_dim
        if dim > embedding_dim:
            raise ValueError(f"feature {feature.name!r}: dim {dim}, expected at most embedding_dim {embedding_dim}")
        is_bag = feature.kind == "bag"
        last = parts[-1] if parts else None
        if last and not is_bag and not last.is_bag and last.dim == dim:
            parts[-1] = _Part(slice(last.columns.start, columns.stop), dim, False)
        else:
            parts.append(_Part(columns, dim, is_bag))
    return tuple(parts)
