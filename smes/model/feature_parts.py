"""The pieces of what the ranker reads, and from which id columns each is computed.

Letters: B instances, W id columns, L columns of a sequence, D embedding width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from smes.schema import Feature, Schema


@dataclass(frozen=True)
class Part:
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
class Entries:
    """Selects the columns of a sequence's entries and of their companions."""

    dim: int
    columns: tuple[slice, ...]

    def __call__(self, embedding_BWD: Tensor, pool_BW: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (entries [B, L, D], which entries are present, bool [B, L])."""
        own, *others = (embedding_BWD[:, columns, : self.dim] for columns in self.columns)
        return sum(others, start=own), pool_BW[:, self.columns[0]] > 0


@dataclass(frozen=True)
class Target:
    """Selects the column of a target."""

    dim: int
    column: int

    def __call__(self, embedding_BWD: Tensor) -> Tensor:
        """[B, D]."""
        return embedding_BWD[:, self.column, : self.dim]


def parts_of(features: Sequence[Feature], columns: Mapping[str, slice], embedding_dim: int) -> tuple[Part, ...]:
    """The pieces of some id, bag and sequence features.

    Args:
        features: They stand in their columns one behind the other.
        columns: Of each of them, by name.
        embedding_dim: D; 0 for no embeddings.
    """
    if embedding_dim == 0:
        return ()
    parts: list[Part] = []
    for feature in features:
        own, dim = columns[feature.name], dim_of(feature, embedding_dim)
        last = parts[-1] if parts else None
        if last and not feature.is_list and not last.is_list and last.dim == dim:
            parts[-1] = Part(slice(last.columns.start, own.stop), dim, False)
        else:
            parts.append(Part(own, dim, feature.is_list))
    return tuple(parts)


def queried(schema: Schema, embedding_dim: int) -> tuple[Feature, ...]:
    """The sequences with target attention, in the order of their outputs."""
    return tuple(f for f in schema.id_features if f.query is not None) if embedding_dim else ()


def entries_of(feature: Feature, schema: Schema, columns: Mapping[str, slice], embedding_dim: int) -> Entries:
    """The entries of a sequence, which has these columns."""
    names = (feature.name, *(f.name for f in schema.companions[feature.name]))
    return Entries(dim_of(feature, embedding_dim), tuple(columns[name] for name in names))


def target_of(feature: Feature, columns: Mapping[str, slice], embedding_dim: int) -> Target:
    """The target of a sequence, which has this column."""
    assert feature.query is not None, "a sequence with a query"
    return Target(dim_of(feature, embedding_dim), columns[feature.query].start)


def dim_of(feature: Feature, embedding_dim: int) -> int:
    """How many columns of an embedding a feature reads.

    Raises:
        ValueError: More than there are.
    """
    dim = feature.dim or embedding_dim
    if dim > embedding_dim:
        raise ValueError(f"feature {feature.name!r}: dim {dim}, expected at most embedding_dim {embedding_dim}")
    return dim
