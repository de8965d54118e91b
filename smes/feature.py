"""A feature: one input of an impression, and what of it the model reads."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge, Le

from smes.ranges import PositiveInt, check_ranges

MISSING: int = int(np.iinfo(np.int64).min)
"""The null of every int64 column: an id feature without a value, an impression without a request, bag padding."""

USER_ID = "user_id"
ITEM_ID = "item_id"


@dataclass(frozen=True)
class Feature:
    """One input of the model.

    Attributes:
        name: Unique name. It is the key in an event's ``features``.
        kind: ``id`` (one int64), ``bag`` (up to ``max_length`` int64, order ignored), ``sequence`` (up to
            ``max_length`` int64, newest first) or ``numeric`` (one float).
        source: Where the scorer reads the value: ``user`` and ``item`` features from the feature store, ``context``
            features from the request.
        vocabulary: Features with the same vocabulary share embedding rows. The default is the feature's own name.
        dim: Embedding width, at most the model's ``embedding_dim``, which is the default. Unused for numeric features.
        max_length: How many ids of a bag or sequence are kept, from its beginning. Unused for the other kinds.
        transform: ``log1p`` replaces a numeric value x with ``sign(x)·log(1+|x|)``.
        indicator: Whether the model also gets a column that tells whether a numeric value is missing. Without it, a
            missing value looks like the mean. Not needed for a value that is never missing.
        query: Sequences only: an id feature. The model compares each entry of the sequence with that feature's value
            (target attention). Both have the same vocabulary and width.
        accompanies: Sequences only: a sequence with a query. This sequence describes its entries, place by place. Both
            have the same width and ``max_length`` and, in every event, the same number of ids.
        elapsed: Numeric user and item features only. The feature store holds a time in seconds since 1970; events
            carry, and the model reads, the days from that time to the impression or request. Example: an item's age.

    Raises:
        ValueError: A value is out of range, or an attribute does not apply to the kind.
    """

    name: str
    kind: Literal["id", "bag", "sequence", "numeric"] = "id"
    source: Literal["user", "item", "context"] = "context"
    vocabulary: str | None = None
    dim: PositiveInt | None = None
    max_length: Annotated[int, Ge(1), Le(1024)] = 8
    transform: Literal["none", "log1p"] = "none"
    indicator: bool = True
    query: str | None = None
    accompanies: str | None = None
    elapsed: bool = False

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("feature name: expected a non-empty string")
        check_ranges(self, where=f"feature {self.name!r}")
        if (self.kind == "sequence") != ((self.query is None) != (self.accompanies is None)):
            expected = "either query or accompanies for a sequence, neither for another kind"
            raise ValueError(
                f"feature {self.name!r}: kind {self.kind}, query {self.query}, accompanies {self.accompanies}, "
                f"expected {expected}"
            )
        if self.elapsed and (self.kind != "numeric" or self.source == "context"):
            raise ValueError(f"feature {self.name!r}: elapsed, expected only of numeric user and item features")

    @property
    def is_list(self) -> bool:
        """Whether a value holds several ids: a bag or a sequence."""
        return self.kind in ("bag", "sequence")

    @property
    def width(self) -> int:
        """How many columns of its matrix the feature takes: ``max_length`` for a bag or sequence, else 1."""
        return self.max_length if self.is_list else 1

    @property
    def vocabulary_name(self) -> str:
        """The vocabulary that the feature's ids belong to."""
        return self.vocabulary or self.name


def check_sequences(features: Mapping[str, Feature]) -> None:
    """Check that every sequence fits the feature that it queries or the sequence that it accompanies.

    Args:
        features: All features of a schema by name.

    Raises:
        ValueError: The message names the feature, the key and the value.
    """
    for feature in features.values():
        if feature.query is not None:
            key, name = "query", feature.query
            fits = name in features and _can_query(feature, features[name])
            expected = "an id feature of the same vocabulary and dim"
        elif feature.accompanies is not None:
            key, name = "accompanies", feature.accompanies
            fits = name in features and _can_accompany(feature, features[name])
            expected = "a sequence with a query and the same max_length, dim and source"
        else:
            continue
        if not fits:
            raise ValueError(f"feature {feature.name!r}: {key} {name!r}, expected {expected}")


def _can_query(sequence: Feature, target: Feature) -> bool:
    same_rows = (target.vocabulary_name, target.dim) == (sequence.vocabulary_name, sequence.dim)
    return target.kind == "id" and same_rows


def _can_accompany(companion: Feature, sequence: Feature) -> bool:
    same_shape = (companion.max_length, companion.dim, companion.source) == (
        sequence.max_length,
        sequence.dim,
        sequence.source,
    )
    return sequence.query is not None and same_shape
