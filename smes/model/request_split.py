"""Which features the instances of a request share, and where both kinds stand in what the ranker reads.

Meta's *request-only optimisation* (arXiv 2508.05640): what all candidates of a request share is looked up, pooled,
attended, standardised and multiplied once per request.

Letters: W id columns, F numeric features, I columns that the ranker reads, N those of them made from numerics.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smes.arrays import I64, Bool
from smes.derive import ModelInputs
from smes.model.feature_parts import Entries, Part, Target, dim_of, entries_of, parts_of, queried, target_of
from smes.model.request_kernels import equal_in_requests
from smes.rankers.ranker_input import Kept
from smes.schema import MISSING, Feature, Schema

LEAST_SAVED = 2_500
"""Cells that are not read again, from which on a split pays in scoring."""

LEAST_SAVED_IN_TRAINING = 5_000
"""The same in training."""

_ENOUGH, _MOST_KNOWN, _MOST_FOUND = 0.75, 8, 64


@dataclass(frozen=True)
class Side:
    """What either requests or their items have.

    Attributes:
        features: The id features.
        id_columns_W: int64, their columns.
        numerics_F: int64, the numeric features.
        indicated_F: int64, which of these also tell whether they are missing.
        numerics_N: int64, the columns made from them, among the N.
        parts: The pieces made of ids, by the side's own columns.
        attention: Number of each sequence of which target and entries are here, with both.
        wide_W: float32, which id columns count for the linear part.
        columns: int64, the columns of I that it gives, in its own order.
    """

    features: tuple[Feature, ...]
    id_columns_W: I64
    numerics_F: I64
    indicated_F: Tensor
    numerics_N: Tensor
    parts: tuple[Part, ...]
    attention: tuple[tuple[int, Target, Entries], ...]
    wide_W: Tensor
    columns: Tensor


@dataclass(frozen=True)
class RequestSplit:
    """The features of requests and those of their items.

    Attributes:
        shared: bool [features], which id and numeric features belong to requests, in the schema's order.
        request, item: Both sides.
        across: Number of each sequence whose entries belong to requests and its target to items, with both.
        kept: For what depends on weights alone; None where weights change.
    """

    shared: Bool
    request: Side
    item: Side
    across: tuple[tuple[int, Target, Entries], ...]
    kept: Kept | None = field(default=None, compare=False)


def features_shared(schema: Schema, ids_W: Bool, numerics_F: Bool) -> Bool:
    """Which features are shared whose columns are equal; entries of a sequence and their companions only together.

    Args:
        schema: Its inputs have these columns.
        ids_W, numerics_F: Which columns are equal in all rows of each request.

    Returns:
        bool, one for each id feature and then each numeric one.
    """
    schema = schema.inputs
    shared = {f.name: bool(ids_W[schema.id_slices[f.name]].all()) for f in schema.id_features}
    for feature in queried(schema, 1):
        entries = [feature.name, *(f.name for f in schema.companions[feature.name])]
        if not all(shared[name] for name in entries):
            assert feature.query is not None, "a sequence with a query"
            shared |= dict.fromkeys([*entries, feature.query], False)
    return np.array([*(shared[f.name] for f in schema.id_features), *numerics_F], np.bool_)


def split_by(schema: Schema, embedding_dim: int, shared: Bool, *, weights_change: bool = False) -> RequestSplit:
    """The split in which these features belong to requests.

    Args:
        schema: Its inputs are the features.
        embedding_dim: Width of an embedding; 0 for a ranker that reads none.
        shared: From :func:`features_shared`.
        weights_change: Whether weights change while the split is used, so that nothing of them can be kept.
    """
    schema = schema.inputs
    count = len(schema.id_features)
    of_ids = dict(zip((f.name for f in schema.id_features), shared[:count], strict=True))
    request_columns, item_columns = (
        _renumbered([f for f in schema.id_features if of_ids[f.name] == own]) for own in (True, False)
    )
    sequences = list(enumerate(queried(schema, embedding_dim)))
    across = [(i, f) for i, f in sequences if of_ids[f.name] and not of_ids[f.query or ""]]
    return RequestSplit(
        shared,
        _side(schema, embedding_dim, shared, [(i, f) for i, f in sequences if of_ids[f.query or ""]], [], own=True),
        _side(schema, embedding_dim, shared, [(i, f) for i, f in sequences if not of_ids[f.name]], across, own=False),
        tuple(
            (
                i,
                target_of(f, item_columns, embedding_dim),
                entries_of(f, schema, request_columns, embedding_dim),
            )
            for i, f in across
        ),
        None if weights_change else {},
    )


def _side(
    schema: Schema,
    embedding_dim: int,
    shared: Bool,
    sequences: Sequence[tuple[int, Feature]],
    across: Sequence[tuple[int, Feature]],
    *,
    own: bool,
) -> Side:
    count = len(schema.id_features)
    features = [f for f, of_request in zip(schema.id_features, shared[:count], strict=True) if of_request == own]
    columns = _renumbered(features)
    numerics_F = np.flatnonzero(shared[count:] == own)
    indicators = [i for i, f in enumerate(schema.numeric_features) if f.indicator]
    indicated = [place for place, i in enumerate(numerics_F) if i in indicators]
    numerics_N = [*numerics_F, *(schema.num_numerics + indicators.index(numerics_F[place]) for place in indicated)]
    first, of_attention, num_before = _places(schema, embedding_dim)
    places = _places_of(features, first, embedding_dim)
    for i, feature in (*sequences, *across):
        places += range(of_attention[i], of_attention[i] + 2 * dim_of(feature, embedding_dim))
    places += (num_before + int(n) for n in numerics_N)
    id_columns = [c for f in features for c in range(schema.id_slices[f.name].start, schema.id_slices[f.name].stop)]
    return Side(
        features=tuple(features),
        id_columns_W=np.array(id_columns, np.int64),
        numerics_F=numerics_F,
        indicated_F=torch.tensor(indicated, dtype=torch.int64),
        numerics_N=torch.tensor([int(n) for n in numerics_N], dtype=torch.int64),
        parts=parts_of(features, columns, embedding_dim),
        attention=tuple(
            (i, target_of(f, columns, embedding_dim), entries_of(f, schema, columns, embedding_dim))
            for i, f in sequences
        ),
        wide_W=torch.tensor([f.query is None for f in features for _ in range(f.width)], dtype=torch.float32),
        columns=torch.tensor(places, dtype=torch.int64),
    )


def _renumbered(features: Sequence[Feature]) -> dict[str, slice]:
    """The columns of features that stand one behind the other."""
    columns, start = {}, 0
    for feature in features:
        columns[feature.name] = slice(start, start + feature.width)
        start += feature.width
    return columns


def _places(schema: Schema, embedding_dim: int) -> tuple[dict[str, int], list[int], int]:
    """First column of I of each id feature and of each sequence's attention; how many columns there are of both."""
    first, of_attention, at = {}, [], 0
    if embedding_dim:
        for feature in schema.id_features:
            first[feature.name] = at
            at += dim_of(feature, embedding_dim)
        for feature in queried(schema, embedding_dim):
            of_attention.append(at)
            at += 2 * dim_of(feature, embedding_dim)
    return first, of_attention, at


def _places_of(features: Sequence[Feature], first: dict[str, int], embedding_dim: int) -> list[int]:
    if not embedding_dim:
        return []
    return [first[f.name] + c for f in features for c in range(dim_of(f, embedding_dim))]


def first_of_requests(request_N: I64, user_N: I64) -> I64:
    """The first of every run of rows of one request, or of one user where the log has no requests. int64 [R].

    Args:
        request_N: int64, ``MISSING`` where there is none; N ≥ 1.
        user_N: int64.
    """
    begins_N = np.ones(len(request_N), np.bool_)
    begins_N[1:] = (request_N[1:] != request_N[:-1]) | ((request_N[1:] == MISSING) & (user_N[1:] != user_N[:-1]))
    return np.flatnonzero(begins_N)


class Splits:
    """Finds the split of a call, and keeps the last ones, with what depends on weights alone. Threads may share it.

    Args:
        schema: Its inputs are the features.
        embedding_dim: Width of an embedding; 0 for a ranker that reads none.
        training: Whether weights change, and a batch must not depend on those before it.
        least_saved: How many cells a split must spare to pay: shared columns times the rows that need not read them.

    Attributes:
        schema: As given.
    """

    def __init__(
        self, schema: Schema, embedding_dim: int, *, training: bool = False, least_saved: int = LEAST_SAVED
    ) -> None:
        self.schema, self._training, self._least_saved = schema, training, max(1, least_saved)
        self._schema, self._embedding_dim = schema.inputs, embedding_dim
        self._columns = np.array(
            [f.width for f in self._schema.id_features] + [1] * self._schema.num_numerics, np.int64
        )
        self._known: tuple[RequestSplit, ...] = ()
        self._found: dict[bytes, RequestSplit] = {}

    def of(self, read: ModelInputs, starts_R: I64) -> RequestSplit | None:
        """The split of these rows; None where it does not pay.

        Args:
            read: What the model reads of the rows of a call.
            starts_R: int64, the first row of each request.
        """
        spared = len(read.ids) - len(starts_R)
        if spared * int(self._columns.sum()) < self._least_saved:
            return None
        numerics: Any = np.ascontiguousarray(read.numerics, np.float32).view(np.int32)
        ids_W, numerics_F = equal_in_requests(read.ids, starts_R), equal_in_requests(numerics, starts_R)
        key = ids_W.tobytes() + numerics_F.tobytes()
        split = self._found.get(key)
        if split is None:
            split = self._of_columns(ids_W, numerics_F)
            found = self._found  # threads may share it: each puts into the one that it has looked into
            if len(found) >= _MOST_FOUND:
                found = self._found = {}
            found[key] = split
        return split if spared * int(self._columns[split.shared].sum()) >= self._least_saved else None

    def _of_columns(self, ids_W: Bool, numerics_F: Bool) -> RequestSplit:
        shared = features_shared(self._schema, ids_W, numerics_F)
        columns = int(self._columns[shared].sum())
        if self._training:
            return split_by(self._schema, self._embedding_dim, shared, weights_change=True)
        # Features that happen to be equal in one call must not make a split of their own for it.
        for split in self._known:
            if not (split.shared & ~shared).any() and self._columns[split.shared].sum() >= _ENOUGH * columns:
                return split
        if len(self._known) == _MOST_KNOWN:  # one is forgotten, and what was found of it
            self._found = {}
        split = split_by(self._schema, self._embedding_dim, shared)
        self._known = (split, *self._known[: _MOST_KNOWN - 1])
        return split
