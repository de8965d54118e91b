"""Computes derived features (:mod:`smes.derived`): the one implementation, for training, serving and frozen copies.

Every value depends on its row, the time of the event and, for quantile buckets, the boundaries. So an instance gives
the same bits wherever it comes from. The values are computed by NumPy, for all rows at once.

Letters: N rows, W and F id and numeric columns of events, V and G those of the model, K quantile buckets, Q boundaries,
L columns of a feature.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smes.arrays import F32, I64
from smes.derived import Derived, in_order
from smes.events import DAY_S
from smes.hashing import splitmix64
from smes.schema import MISSING, Feature, Schema
from smes.time_zones import local_s

UNKNOWN = np.finfo(np.float32).max
"""Stands for a boundary of which nothing is known yet. Numbers are in no bucket then."""

_Column = NDArray[Any]
"""int64 or float32 [N, L]."""


@dataclass(frozen=True, slots=True)
class ModelInputs:
    """What the model reads of N instances.

    Attributes:
        ids: int64 [N, V], the columns of :attr:`smes.schema.Schema.inputs`.
        numerics: float32 [N, G], the same.
        bucketed: float32 [N, K], the numbers whose quantiles bound buckets; NaN where missing.
    """

    ids: I64
    numerics: F32
    bucketed: F32


class Derivations:
    """The derived features of a schema.

    Args:
        schema: The features and the derived ones.

    Attributes:
        quantiles: The quantile buckets, in the order of the schema.
        boundaries: Name of each of them → its boundaries within all Q.
    """

    def __init__(self, schema: Schema) -> None:
        self._schema, self._inputs, self._order = schema, schema.inputs, in_order(schema.derived)
        self.quantiles = tuple(d for d in schema.derived if d.quantiles is not None)
        self.boundaries = boundary_slices(schema)
        self._fixed = {d.name: np.array(d.boundaries, np.float32) for d in schema.derived if d.boundaries}

    def __call__(self, ids: I64, numerics: F32, now_ms: I64 | int | None, boundaries_Q: F32) -> ModelInputs:
        """Compute the derived features and put them beside the others.

        Args:
            ids: int64 [N, W], as events have them.
            numerics: float32 [N, F], as events have them.
            now_ms: Unix milliseconds of the events, one number or int64 [N]; None where nothing depends on it.
            boundaries_Q: float32, of all quantile buckets.

        Raises:
            ValueError: A derived feature depends on the time, and there is none.
        """
        if not self._order:
            return ModelInputs(ids, numerics, np.zeros((len(ids), 0), np.float32))
        columns: dict[str, _Column] = {f.name: ids[:, self._schema.id_slices[f.name]] for f in self._schema.id_features}
        for i, feature in enumerate(self._schema.numeric_features):
            columns[feature.name] = numerics[:, i : i + 1]
        time_ms = self._time_of(now_ms, len(ids))
        for derived in self._order:
            boundaries = boundaries_Q[self.boundaries.get(derived.name, slice(0, 0))]
            inputs = [columns[name] for name in derived.of]
            columns[derived.name] = self._compute(derived, inputs, time_ms, boundaries)
        bucketed = [columns[d.of[0]] for d in self.quantiles]
        return ModelInputs(
            ids=_beside(columns, self._inputs.id_features, np.int64, len(ids)),
            numerics=_beside(columns, self._inputs.numeric_features, np.float32, len(ids)),
            bucketed=np.concatenate(bucketed, axis=1) if bucketed else np.zeros((len(ids), 0), np.float32),
        )

    def _time_of(self, now_ms: I64 | int | None, rows: int) -> I64:
        if now_ms is not None:
            time_ms: I64 = np.broadcast_to(np.asarray(now_ms, np.int64), (rows,))
            return time_ms
        for derived in self._order:
            if derived.reads_time:
                raise ValueError(f"now_ms: None, expected the time of the event: derived feature {derived.name!r}")
        return np.zeros(rows, np.int64)

    def _compute(self, derived: Derived, inputs: list[_Column], time_ms: I64, boundaries: F32) -> _Column:
        if derived.kind == "bucket":
            return _bucket(inputs[0], self._fixed.get(derived.name, boundaries))
        if derived.kind in _OF_IDS:
            return _OF_IDS[derived.kind](inputs, derived.into)
        if derived.kind == "ratio":
            return _ratio(*inputs)
        if derived.kind == "age":
            return _age(inputs[0], time_ms)
        seconds = local_s(time_ms, derived.time_zone)[:, None]
        # 1 January 1970 was a Thursday, the fourth day of its week.
        return seconds // 3600 % 24 if derived.kind == "hour_of_day" else (seconds // 86_400 + 3) % 7


def boundary_slices(schema: Schema) -> Mapping[str, slice]:
    """Name of each quantile bucket → where its boundaries are within those of all."""
    slices, start = {}, 0
    for derived in schema.derived:
        if derived.quantiles is not None:
            slices[derived.name] = slice(start, start + derived.quantiles - 1)
            start += derived.quantiles - 1
    return slices


def count_boundaries(schema: Schema) -> int:
    """Q."""
    return max((s.stop for s in boundary_slices(schema).values()), default=0)


def _bucket(x_N1: F32, boundaries: F32) -> I64:
    """How many of the ascending boundaries each number has reached. int64 [N, 1]."""
    found = np.searchsorted(boundaries, x_N1, side="right").astype(np.int64)
    found[np.isnan(x_N1)] = MISSING
    if boundaries[0] == UNKNOWN:
        found[:] = MISSING
    return found


def _hash(inputs: list[_Column], into: int | None) -> I64:
    """Hash ids; several are one id together, and a bag is crossed entry by entry. int64 [N, L]."""
    shape = np.broadcast_shapes(*(column.shape for column in inputs))
    hashed = np.zeros(shape, np.uint64)
    missing = np.zeros(shape, np.bool_)
    for column in inputs:
        mixed = hashed ^ np.broadcast_to(column, shape).astype(np.uint64)
        hashed = splitmix64(mixed.view(np.int64).ravel()).reshape(shape)
        missing |= column == MISSING
    folded = hashed >> np.uint64(1) if into is None else hashed % np.uint64(into)
    result: I64 = folded.astype(np.int64)
    result[missing] = MISSING
    return result


_OF_IDS: Mapping[str, Callable[[list[_Column], int | None], I64]] = {"cross": _hash, "hash": _hash}


def _ratio(x_N1: F32, y_N1: F32) -> F32:
    with np.errstate(all="ignore"):
        quotient = (x_N1.astype(np.float64) / y_N1).astype(np.float32)
    return np.where(np.isfinite(quotient), quotient, np.float32(np.nan))


def _age(stored_s_N1: F32, time_ms: I64) -> F32:
    age: F32 = ((time_ms[:, None] / 1000 - stored_s_N1.astype(np.float64)) / DAY_S).astype(np.float32)
    return age


def _beside(columns: Mapping[str, _Column], features: tuple[Feature, ...], dtype: type, rows: int) -> NDArray[Any]:
    parts = [columns[f.name] for f in features]
    return np.concatenate(parts, axis=1, dtype=dtype) if parts else np.zeros((rows, 0), dtype)
