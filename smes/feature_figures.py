"""How raw features are distributed: how often there is a value, what it is on average, how often its id is unknown.

Trainer and scorer measure both what they read by the same code, so that the two can be compared: see
:func:`differences`. Instances of one user are not independent, nor are the items of one request. So sums are kept for
groups of users, and standard errors come of the spread between the groups (the linearised variance of a ratio of sums;
Cochran, *Sampling Techniques*, 3rd edition, section 6.3, with groups of users as clusters).

Letters: N instances, W id columns, F numeric columns, K features, G groups, S sums.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from smes.arrays import F32, F64, I64, Bool
from smes.hashing import splitmix64
from smes.schema import MISSING, Feature, Schema

HOUR_MS = 3_600_000

_GROUPS = 64
_FEWEST_GROUPS = 20
_SALT = np.int64(0x5EED_F164)
_LARGEST = {"none": 2.0**20, "log1p": 80 * math.log(2)}
"""Values beyond measure nothing (:data:`smes.model.numeric_moments.FAR`), and do not count for the mean."""

_ROWS, _FILLED, _VALUES, _SUM, _SQUARES = range(5)
"""Sums: instances; those with a value; ids, or numbers that count for the mean; of these, the unknown ids, or the sum
of the numbers after their transform; the sum of their squares.
"""


@dataclass(frozen=True, slots=True)
class Share:
    """A ratio of two sums with its standard error; both NaN where they are not known."""

    value: float
    error: float

    @classmethod
    def nothing(cls) -> "Share":
        """What is not known."""
        return cls(math.nan, math.nan)


@dataclass(frozen=True, slots=True)
class FeatureFigure:
    """One feature in some stretch of time.

    Attributes:
        fill: Share of the instances that have a value, 0 … 1.
        mean: Mean after the transform; of a numeric feature.
        deviation: Standard deviation after the transform; NaN for others.
        unknown: Share of the ids that have no row in the table, 0 … 1; of an id, bag or sequence feature.
    """

    fill: Share
    mean: Share
    deviation: float
    unknown: Share


class FeatureSums:
    """Sums of some instances, by group of users. Not thread-safe.

    Args:
        schema: The features.
    """

    def __init__(self, schema: Schema) -> None:
        self._schema = schema
        self._columns = FeatureColumns(schema)
        self._sums_GKS: F64 = np.zeros((_GROUPS, len(schema.features), 5))

    @property
    def rows(self) -> int:
        """Instances of the feature that has most."""
        return int(self._sums_GKS[:, :, _ROWS].sum(axis=0).max())

    def add(self, ids_NW: I64, numerics_NF: F32, known_NW: Bool | None) -> None:
        """Add instances.

        Args:
            ids_NW: int64 [N, W], the first column the user.
            numerics_NF: float32 [N, F], before the transform.
            known_NW: bool [N, W], which ids have a row; None: not known.
        """
        if len(ids_NW) == 0:
            return
        sums_NKS = self._columns.sums(ids_NW, numerics_NF, known_NW)
        group_N = (splitmix64(ids_NW[:, 0] ^ _SALT) % np.uint64(_GROUPS)).astype(np.int64)
        order = np.argsort(group_N, kind="stable")
        groups, starts = np.unique(group_N[order], return_index=True)
        self._sums_GKS[groups] += np.add.reduceat(sums_NKS[order], starts, axis=0)

    def add_request(self, ids_NW: I64, numerics_NF: F32, known_NW: Bool | None) -> None:
        """Add a user with N items: what is of the user and of the context counts once."""
        sums_NKS = self._columns.sums(ids_NW, numerics_NF, known_NW)
        sums_KS = np.where(self._columns.of_item_K[:, None], sums_NKS.sum(axis=0), sums_NKS[0])
        self._sums_GKS[int(splitmix64(ids_NW[:1, 0] ^ _SALT)[0]) % _GROUPS] += sums_KS

    def figures(self) -> dict[str, FeatureFigure]:
        """Feature → its figure."""
        return {f.name: self._figure(f, self._sums_GKS[:, k]) for k, f in enumerate(self._schema.features)}

    def _figure(self, feature: Feature, sums_GS: F64) -> FeatureFigure:
        rows_G, filled_G, values_G, sum_G, squares_G = sums_GS.T
        share, values = _ratio(sum_G, values_G), values_G.sum()
        if feature.kind != "numeric":
            return FeatureFigure(_ratio(filled_G, rows_G), Share.nothing(), math.nan, share)
        variance = squares_G.sum() / values - share.value**2 if values else math.nan
        return FeatureFigure(_ratio(filled_G, rows_G), share, math.sqrt(max(variance, 0.0)), Share.nothing())


class FeatureColumns:
    """Where the values of the features of a schema are.

    Args:
        schema: The features.

    Attributes:
        of_item_K: bool, which features are an item's.
    """

    def __init__(self, schema: Schema) -> None:
        names = [f.name for f in schema.features]
        self.of_item_K: Bool = np.array([f.source == "item" for f in schema.features], np.bool_)
        self._ids_K = [names.index(f.name) for f in schema.id_features]
        self._numerics_K = [names.index(f.name) for f in schema.numeric_features]
        self._first_columns = [schema.id_slices[f.name].start for f in schema.id_features]
        self._log1p_F = np.array([f.transform == "log1p" for f in schema.numeric_features], np.bool_)
        self._largest_F = np.array([_LARGEST[f.transform] for f in schema.numeric_features], np.float64)
        self._K = len(names)

    def filled(self, ids_NW: I64, numerics_NF: F32) -> Bool:
        """Which features have a value. A list has one if it has an id: they stand on its left. bool [N, K]."""
        filled_NK: Bool = np.empty((len(ids_NW), self._K), np.bool_)
        filled_NK[:, self._ids_K] = ids_NW[:, self._first_columns] != MISSING
        filled_NK[:, self._numerics_K] = ~np.isnan(numerics_NF)
        return filled_NK

    def sums(self, ids_NW: I64, numerics_NF: F32, known_NW: Bool | None) -> F64:
        """What each instance adds to each sum. float64 [N, K, S]."""
        sums_NKS: F64 = np.zeros((len(ids_NW), self._K, 5))
        sums_NKS[:, :, _ROWS] = 1
        sums_NKS[:, :, _FILLED] = self.filled(ids_NW, numerics_NF)
        if known_NW is not None:
            present_NW = ids_NW != MISSING
            sums_NKS[:, self._ids_K, _VALUES] = np.add.reduceat(present_NW, self._first_columns, axis=1, dtype="f8")
            unknown_NW = present_NW & ~known_NW
            sums_NKS[:, self._ids_K, _SUM] = np.add.reduceat(unknown_NW, self._first_columns, axis=1, dtype="f8")
        if self._numerics_K:
            x_NF = numerics_NF.astype(np.float64)
            x_NF = np.where(self._log1p_F, np.copysign(np.log1p(np.abs(x_NF)), x_NF), x_NF)
            counts_NF = np.abs(x_NF) <= self._largest_F  # not where it is NaN
            x_NF = np.where(counts_NF, x_NF, 0.0)
            sums_NKS[:, self._numerics_K, _VALUES] = counts_NF
            sums_NKS[:, self._numerics_K, _SUM] = x_NF
            sums_NKS[:, self._numerics_K, _SQUARES] = x_NF * x_NF
        return sums_NKS


class HourlySums:
    """Sums of the hour under way, and the figures of the hours before. Not thread-safe.

    Args:
        schema: The features.
        kept: How many hours are kept.

    Attributes:
        done: Hour since 1970 → (instances, feature → figure), oldest first.
    """

    def __init__(self, schema: Schema, kept: int) -> None:
        self._schema, self._kept = schema, kept
        self._hour: int | None = None
        self._sums = FeatureSums(schema)
        self.done: dict[int, tuple[int, dict[str, FeatureFigure]]] = {}

    def of(self, hour: int) -> FeatureSums | None:
        """The sums to add instances of an hour to, which ends the hours before; None for one that has ended."""
        if self._hour is not None and hour < self._hour:
            return None
        if self._hour is not None and hour > self._hour:
            if self._sums.rows:
                self.done[self._hour] = self._sums.rows, self._sums.figures()
            self._sums = FeatureSums(self._schema)
            while len(self.done) > self._kept:
                del self.done[next(iter(self.done))]
        self._hour = hour
        return self._sums


@dataclass(frozen=True, slots=True)
class Difference:
    """A figure of a feature that is another where the model serves than where it is trained.

    Attributes:
        feature: Its name.
        figure: ``fill``, ``mean`` or ``unknown``.
        served, trained: The two values.
        size: The distance: of shares as it is, of means in standard deviations of what was trained on; or NaN.
        errors: The distance in its standard errors, or NaN where it has none.
    """

    feature: str
    figure: str
    served: float
    trained: float
    size: float
    errors: float


def differences(served: dict[str, FeatureFigure], trained: dict[str, FeatureFigure]) -> Iterator[Difference]:
    """The figures that both sides know, with their distances."""
    pick: dict[str, Callable[[FeatureFigure], Share]] = {
        "fill": lambda figure: figure.fill,
        "mean": lambda figure: figure.mean,
        "unknown": lambda figure: figure.unknown,
    }
    for feature in served.keys() & trained.keys():
        for name, of in pick.items():
            here, there = of(served[feature]), of(trained[feature])
            if math.isnan(here.error + there.error):
                continue
            distance = abs(here.value - there.value)
            scale = trained[feature].deviation if name == "mean" else 1.0
            error = math.hypot(here.error, there.error)
            size = distance / scale if scale > 0 else (math.inf if distance else 0.0)
            errors = distance / error if error > 0 else (math.inf if distance else 0.0)
            yield Difference(feature, name, here.value, there.value, size, errors)


def plain_figures(hours: Mapping[int, tuple[int, dict[str, FeatureFigure]]], largest: int) -> dict[str, Any]:
    """The figures of hours as plain data, from which :func:`figures_of` reads them.

    Args:
        hours: As of :attr:`HourlySums.done`.
        largest: About how many characters of JSON they may take; older hours are left out first.

    Returns:
        ``hours``: a list, oldest first, of ``hour`` (since 1970), ``rows`` (instances) and ``figures``: feature →
        [fill, its error, mean, its error, deviation, unknown, its error]; null where not known. ``left_out``: how many
        hours did not fit.
    """
    kept: list[dict[str, Any]] = []
    length = 0
    for hour, (rows, figures) in sorted(hours.items(), reverse=True):
        plain = {name: _plain_figure(figure) for name, figure in figures.items()}
        length += sum(len(name) + 8 + 12 * len(numbers) for name, numbers in plain.items())
        if length > largest:
            break
        kept.insert(0, {"hour": hour, "rows": rows, "figures": plain})
    return {"hours": kept, "left_out": len(hours) - len(kept)}


def figures_of(data: object) -> dict[int, dict[str, FeatureFigure]]:
    """Hour → feature → figure of :func:`plain_figures`; nothing of None.

    Raises:
        ValueError: The data are something else.
    """
    if data is None:
        return {}
    try:
        hours: Any = data["hours"]  # type: ignore[index]  # what is no such object raises
        return {
            int(hour["hour"]): {str(name): _figure_of(numbers) for name, numbers in hour["figures"].items()}
            for hour in hours
        }
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"figures of features: {error!r}, expected hours with figures") from error


def _plain_figure(figure: FeatureFigure) -> list[float | None]:
    numbers = (
        *(figure.fill.value, figure.fill.error, figure.mean.value, figure.mean.error),
        *(figure.deviation, figure.unknown.value, figure.unknown.error),
    )
    return [float(f"{number:.5g}") if math.isfinite(number) else None for number in numbers]


def _figure_of(numbers: Any) -> FeatureFigure:
    fill, fill_error, mean, mean_error, deviation, unknown, unknown_error = (
        math.nan if number is None else float(number) for number in numbers
    )
    return FeatureFigure(Share(fill, fill_error), Share(mean, mean_error), deviation, Share(unknown, unknown_error))


def _ratio(above_G: F64, below_G: F64) -> Share:
    """The ratio of two sums over groups; without a value where there is nothing below, and without an error where
    there are few groups.
    """
    total, groups = below_G.sum(), int(np.count_nonzero(below_G))
    if not total:
        return Share.nothing()
    value = float(above_G.sum() / total)
    if groups < _FEWEST_GROUPS:
        return Share(value, math.nan)
    squares = float(((above_G - value * below_G) ** 2).sum())
    return Share(value, math.sqrt(squares * groups / (groups - 1)) / float(total))
