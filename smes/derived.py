"""Derived features: what the model computes of an event's features and its time, as the schema declares it.

:mod:`smes.derive` computes them, in one place for training and serving.
"""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from annotated_types import Ge, Le, MaxLen

from smes.feature import ITEM_ID, USER_ID, Feature
from smes.ranges import PositiveInt, check_ranges
from smes.time_zones import check_time_zone

Derivation = Literal["bucket", "cross", "hash", "ratio", "hour_of_day", "day_of_week", "age"]


class _Rule(NamedTuple):
    """What a derivation takes and gives."""

    inputs: tuple[int, int]  # least and most
    kinds: tuple[str, ...]  # of the inputs
    gives: Literal["id", "numeric"]  # a bag instead of an id if an input is one
    options: tuple[str, ...]


_IDS, _NUMERIC = ("id", "bag"), ("numeric",)
_RULES: Mapping[str, _Rule] = {
    "bucket": _Rule((1, 1), _NUMERIC, "id", ("boundaries", "quantiles", "settle")),
    "cross": _Rule((2, 3), _IDS, "id", ("into",)),
    "hash": _Rule((1, 1), _IDS, "id", ("into",)),
    "ratio": _Rule((2, 2), _NUMERIC, "numeric", ()),
    "hour_of_day": _Rule((0, 0), (), "id", ("time_zone",)),
    "day_of_week": _Rule((0, 0), (), "id", ("time_zone",)),
    "age": _Rule((1, 1), _NUMERIC, "numeric", ()),
}
_OF_IDS, _OF_NUMERICS = ("vocabulary", "dim"), ("transform", "indicator")
_COUNTS = {0: "none", 1: "one feature", 2: "two features"}


@dataclass(frozen=True)
class Derived:
    """One feature that the model computes. It is missing where what it is computed of is missing.

    Attributes:
        name: Unique name, among features too.
        kind: ``bucket`` (id: how many boundaries a number has reached), ``cross`` (id: a hash of two or three ids),
            ``hash`` (id: one of ``into``), ``ratio`` (number: the first divided by the second; missing where that is
            0), ``hour_of_day`` (id: 0 … 23, of the event), ``day_of_week`` (id: 0 … 6 from Monday on, of the event) or
            ``age`` (number: days from a time in seconds since 1970 to the event). ``hash`` takes a bag, too, ``cross``
            at most one; they then give a bag.
        of: The features that it is computed of, derived ones included.
        boundaries: Of ``bucket``: ascending; a number that is equal to a boundary has reached it.
        quantiles: Of ``bucket``, instead of ``boundaries``: into how many buckets of equally many values of the stream
            so far.
        settle: Of ``bucket`` with ``quantiles``: after so many values the boundaries stay as they are.
        into: Of ``hash``, and if wanted of ``cross``: how many ids there are.
        time_zone: Of ``hour_of_day`` and ``day_of_week``: a name such as ``Europe/Berlin``.
        vocabulary, dim: As in :class:`smes.schema.Feature`, where it is an id.
        transform, indicator: As in :class:`smes.schema.Feature`, where it is a number.
        replaces: Whether the model does not read the features in ``of`` by themselves.

    Raises:
        ValueError: A value is out of range, or an attribute does not apply to the kind.
    """

    name: str
    kind: Derivation
    of: tuple[str, ...] = ()
    boundaries: Annotated[tuple[float, ...], MaxLen(1023)] = ()
    quantiles: Annotated[int, Ge(2), Le(1024)] | None = None
    settle: Annotated[int, Ge(1), Le(1_000_000_000)] = 100_000
    into: PositiveInt | None = None
    time_zone: str = "UTC"
    vocabulary: str | None = None
    dim: PositiveInt | None = None
    transform: Literal["none", "log1p"] = "none"
    indicator: bool = True
    replaces: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "boundaries", tuple(map(float, self.boundaries)))  # 1 and 1.0 are one schema
        if not self.name:
            raise ValueError("derived feature name: expected a non-empty string")
        check_ranges(self, where=self._where)
        rule = _RULES[self.kind]
        least, most = rule.inputs
        if not least <= len(self.of) <= most or len(set(self.of)) < len(self.of):
            expected = "two or three different features" if self.kind == "cross" else _COUNTS[most]
            raise ValueError(f"{self._where}: of {list(self.of)}, expected {expected} for {self.kind}")
        allowed = (*rule.options, *(_OF_IDS if rule.gives == "id" else _OF_NUMERICS), *(["replaces"] if most else []))
        for option in fields(self):
            value = getattr(self, option.name)
            if option.default is not NO_DEFAULT and option.name not in ("of", *allowed) and value != option.default:
                raise ValueError(f"{self._where}: {option.name} {value!r}, expected none for {self.kind}")
        self._check_values()

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Derived":
        """The inverse of :func:`dataclasses.asdict`, also from JSON.

        Raises:
            ValueError, TypeError: An entry is missing, unknown or out of range.
        """
        lists = {name: tuple(data[name]) for name in ("of", "boundaries") if name in data}
        return cls(**{**data, **lists})

    @property
    def reads_time(self) -> bool:
        """Whether it depends on the time of the event."""
        return self.kind in ("hour_of_day", "day_of_week", "age")

    @property
    def _where(self) -> str:
        return f"derived feature {self.name!r}"

    def _check_values(self) -> None:
        if self.kind == "hash" and self.into is None:
            raise ValueError(f"{self._where}: into None, expected how many ids there are")
        check_time_zone(self.time_zone, self._where)
        if self.kind != "bucket":
            return
        if bool(self.boundaries) == (self.quantiles is not None):
            raise ValueError(f"{self._where}: expected either boundaries or quantiles for bucket")
        as_read = np.array(self.boundaries, np.float64).astype(np.float32).tolist()  # numbers are float32 in events
        if not np.isfinite(as_read).all() or any(low >= high for low, high in pairwise(as_read)):
            raise ValueError(f"{self._where}: boundaries {list(self.boundaries)}, expected ascending float32 numbers")
        if self.quantiles is None and self.settle != type(self).settle:
            raise ValueError(f"{self._where}: settle {self.settle}, expected none for fixed boundaries")


def spelled_out(entry: Any) -> Any:
    """An entry of a schema file's ``derive``, with one name in ``of`` for a list of names."""
    return {**entry, "of": [entry["of"]]} if isinstance(entry, Mapping) and isinstance(entry.get("of"), str) else entry


def in_order(derived: Sequence[Derived]) -> tuple[Derived, ...]:
    """The derivations in an order in which each comes after those that it is computed of.

    Raises:
        ValueError: Some depend on each other; the message names them.
    """
    by_name = {d.name: d for d in derived}
    done: dict[str, Derived] = {}
    path: list[str] = []

    def visit(name: str) -> None:
        if name in done or name not in by_name:
            return
        if name in path:
            circle = " → ".join([*path[path.index(name) :], name])
            raise ValueError(f"derived feature {name!r}: of itself ({circle}), expected no circle")
        path.append(name)
        for other in by_name[name].of:
            visit(other)
        path.pop()
        done[name] = by_name[name]

    for name in by_name:
        visit(name)
    return tuple(done.values())


def features_of(derived: Sequence[Derived], features: Sequence[Feature]) -> tuple[Feature, ...]:
    """The derived features as features, in the order of ``derived``.

    Args:
        derived: With distinct names.
        features: The features of the events.

    Raises:
        ValueError: One is computed of an unknown feature, of one of the wrong kind, or of itself.
    """
    known = {f.name: f for f in features}
    for each in in_order(derived):
        known[each.name] = _feature(each, known)
    return tuple(known[each.name] for each in derived)


def _feature(derived: Derived, known: Mapping[str, Feature]) -> Feature:
    rule, where = _RULES[derived.kind], f"derived feature {derived.name!r}"
    inputs = []
    for name in derived.of:
        if name not in known:
            raise ValueError(f"{where}: of {name!r}, expected a feature, one of {', '.join(known)}")
        feature = known[name]
        if feature.kind not in rule.kinds:
            raise ValueError(
                f"{where}: of {name!r}, of kind {feature.kind}, expected kind {' or '.join(rule.kinds)} "
                f"for {derived.kind}"
            )
        if derived.kind == "age" and feature.elapsed:
            raise ValueError(f"{where}: of {name!r}, which is elapsed: an age already, expected a time")
        inputs.append(feature)
    if rule.gives == "numeric":
        return Feature(derived.name, "numeric", transform=derived.transform, indicator=derived.indicator)
    bags = [feature for feature in inputs if feature.kind == "bag"]
    if len(bags) > 1:
        raise ValueError(f"{where}: of {', '.join(repr(f.name) for f in bags)}, expected at most one bag")
    return Feature(
        derived.name,
        "bag" if bags else "id",
        vocabulary=derived.vocabulary,
        dim=derived.dim,
        max_length=bags[0].max_length if bags else 8,
    )


def unread(derived: Sequence[Derived], features: Sequence[Feature], history: Sequence[str]) -> frozenset[str]:
    """The features that only derivations read.

    Args:
        derived: Those of a schema.
        features: Its features.
        history: The names of those that hold its history.

    Raises:
        ValueError: Something else needs one of them.
    """
    needed = {USER_ID, ITEM_ID, *history, *(f.query for f in features), *(f.accompanies for f in features)}
    hidden = {name: d.name for d in derived if d.replaces for name in d.of}
    for name, by in hidden.items():
        if name in needed:
            raise ValueError(f"derived feature {by!r}: replaces {name!r}, which the model needs")
    return frozenset(hidden)
