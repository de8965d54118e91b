"""The schema: which features an impression carries and which tasks are learned.

All processes share one schema. Its :attr:`Schema.hash` travels with event records, checkpoints and snapshots, so that
two parts with different schemas refuse each other instead of misreading columns.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge, Le

from smes.ranges import EventSeconds, NonNegativeFloat, PositiveFloat, PositiveInt, check_ranges

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


__all__ = ["ITEM_ID", "MISSING", "USER_ID", "Feature", "History", "Schema", "Task"]


@dataclass(frozen=True)
class Task:
    """One kind of feedback to predict.

    Attributes:
        name: Unique name. It is the ``task`` of a feedback event.
        kind: ``binary`` (value 0 or 1; no feedback within the window means 0) or ``regression`` (a non-negative
            value such as watch time; no feedback means no label).
        window_s: Attribution window in seconds of event time. Feedback that happens later than this after its
            impression is late.
        loss_weight: Factor of this task's loss.
        max_value: Largest accepted value of a regression label, in ``unit``.
        unit: Name of the unit of a regression label, for people.

    Raises:
        ValueError: A value is out of range.
    """

    name: str
    kind: Literal["binary", "regression"] = "binary"
    window_s: EventSeconds = 600.0
    loss_weight: NonNegativeFloat = 1.0
    max_value: PositiveFloat = 86_400.0
    unit: str = ""

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("task name: expected a non-empty string")
        check_ranges(self, where=f"task {self.name!r}")

    @property
    def window_ms(self) -> int:
        """The attribution window in milliseconds."""
        return round(self.window_s * 1000)


@dataclass(frozen=True)
class History:
    """The user's last impressions and their outcomes, as two sequences. Whoever makes the events fills them.

    A history holds only the past. It contains the impressions that were shown before a *cutoff*, with the feedback
    that happened before the same cutoff. For an impression that belongs to a request, the cutoff is the time of the
    request. For an impression without a request, it is the start of the *window* of event time that the impression
    lies in. So all impressions of one (user, window) have the same history. Evaluation ranks within that group, and
    nothing that the user's own labels can change may differ within it. Windows are counted from 1970-01-01 UTC.

    Attributes:
        items: A sequence of item ids that queries ``item_id``.
        outcomes: The sequence that accompanies it. An entry is the sum of 2^i over all tasks i that had positive
            feedback to that item before the cutoff, where i counts the tasks in the order of ``tasks``; 0 for none.
        tasks: The binary tasks that the outcomes cover. The default is all of them, in the schema's order.
        window_s: Length of a window in seconds.

    Raises:
        ValueError: A value is out of range.
    """

    items: str
    outcomes: str
    tasks: tuple[str, ...] = ()
    window_s: Annotated[float, Ge(1e-3), Le(1_000_000_000)] = 57_600.0

    def __post_init__(self) -> None:
        check_ranges(self, where="history")

    @property
    def window_ms(self) -> int:
        """The length of a window in milliseconds."""
        return round(self.window_s * 1000)


@dataclass(frozen=True)
class Schema:
    """Features and tasks, in their column order.

    ``user_id`` and ``item_id`` are always the first two id features. They are added when they are not declared. Declare
    them to set their ``dim`` or ``vocabulary``.

    Attributes:
        name: Name of the schema.
        tasks: 1 to 62 tasks with distinct names.
        features: Features with distinct names.
        history: Which sequences hold the user's last impressions; None for no history.

    Raises:
        ValueError: A name occurs twice, there is no task, ``user_id`` or ``item_id`` has the wrong kind, or a sequence
            or the history does not fit the other features.
    """

    name: str
    tasks: tuple[Task, ...]
    features: tuple[Feature, ...] = field(default=())
    history: History | None = None

    def __post_init__(self) -> None:
        if (name := _repeated([f.name for f in self.features])) is not None:
            raise ValueError(f"schema {self.name!r}: duplicate feature {name!r}")
        if not self.tasks:
            raise ValueError(f"schema {self.name!r}: expected at least one task")
        if (name := _repeated([t.name for t in self.tasks])) is not None:
            raise ValueError(f"schema {self.name!r}: duplicate task {name!r}")
        if len(self.tasks) > 62:
            raise ValueError(f"schema {self.name!r}: {len(self.tasks)} tasks, expected at most 62")
        by_name = {f.name: f for f in self.features}
        head = (
            by_name.pop(USER_ID, Feature(USER_ID, source="user")),
            by_name.pop(ITEM_ID, Feature(ITEM_ID, source="item")),
        )
        for feature, source in zip(head, ("user", "item"), strict=True):
            if feature.kind != "id" or feature.source != source:
                raise ValueError(f"feature {feature.name!r}: expected kind id and source {source}")
        object.__setattr__(self, "features", (*head, *by_name.values()))
        features = {f.name: f for f in self.features}
        check_sequences(features)
        if self.history is not None:
            _check_history(self.history, features, self.tasks)

    @cached_property
    def id_features(self) -> tuple[Feature, ...]:
        """Id, bag and sequence features in the order of their columns in ``ids``, beginning with user and item id."""
        return tuple(f for f in self.features if f.kind != "numeric")

    @cached_property
    def numeric_features(self) -> tuple[Feature, ...]:
        """Numeric features in the order of their columns in ``numerics``."""
        return tuple(f for f in self.features if f.kind == "numeric")

    @cached_property
    def id_slices(self) -> dict[str, slice]:
        """The columns of each id, bag or sequence feature in an ``ids`` matrix."""
        slices, start = {}, 0
        for feature in self.id_features:
            slices[feature.name] = slice(start, start + feature.width)
            start += feature.width
        return slices

    @property
    def id_width(self) -> int:
        """W, the number of columns of an ``ids`` matrix."""
        return sum(f.width for f in self.id_features)

    @property
    def num_numerics(self) -> int:
        """F, the number of columns of a ``numerics`` matrix."""
        return len(self.numeric_features)

    @property
    def num_tasks(self) -> int:
        """T."""
        return len(self.tasks)

    @cached_property
    def task_index(self) -> dict[str, int]:
        """Task name → its place in ``tasks``."""
        return {t.name: i for i, t in enumerate(self.tasks)}

    @property
    def max_window_ms(self) -> int:
        """The longest attribution window in milliseconds."""
        return max(t.window_ms for t in self.tasks)

    @cached_property
    def companions(self) -> dict[str, tuple[Feature, ...]]:
        """Name of each sequence with a query → the sequences that accompany it."""
        return {
            f.name: tuple(other for other in self.features if other.accompanies == f.name)
            for f in self.features
            if f.query is not None
        }

    @cached_property
    def history_tasks(self) -> tuple[int, ...]:
        """Which task each bit of a history's outcomes stands for, as indices; empty for a schema without history."""
        if self.history is None:
            return ()
        names = self.history.tasks or tuple(t.name for t in self.tasks if t.kind == "binary")
        return tuple(self.task_index[name] for name in names)

    def to_dict(self) -> dict[str, Any]:
        """Plain data (JSON) from which :meth:`from_dict` builds an equal schema."""
        return {
            "name": self.name,
            "features": [asdict(f) for f in self.features],
            "tasks": [asdict(t) for t in self.tasks],
            "history": None if self.history is None else asdict(self.history),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Schema":
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError, TypeError: An entry is missing, unknown or out of range.
        """
        return cls(
            name=data["name"],
            features=tuple(Feature(**f) for f in data.get("features", ())),
            tasks=tuple(Task(**t) for t in data["tasks"]),
            history=_history(data.get("history")),
        )

    @cached_property
    def hash(self) -> str:
        """16 hex digits of the SHA-256 of the canonical JSON of :meth:`to_dict`."""
        canonical = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _history(data: dict[str, Any] | None) -> History | None:
    return None if data is None else History(**{**data, "tasks": tuple(data.get("tasks", ()))})


def _repeated(names: list[str]) -> str | None:
    """The first name that occurs twice, or None."""
    return next((name for name in names if names.count(name) > 1), None)


def _check_history(history: History, features: dict[str, Feature], tasks: tuple[Task, ...]) -> None:
    """Check that a history names sequences that fit each other, and binary tasks."""
    items, outcomes = features.get(history.items), features.get(history.outcomes)
    if items is None or items.query != ITEM_ID or items.source != "context":
        raise ValueError(f"history.items: {history.items!r}, expected a context sequence with query item_id")
    if outcomes is None or outcomes.accompanies != items.name:
        raise ValueError(f"history.outcomes: {history.outcomes!r}, expected a sequence that accompanies {items.name}")
    binary = {t.name for t in tasks if t.kind == "binary"}
    for name in history.tasks:
        if name not in binary:
            raise ValueError(f"history.tasks: {name!r}, expected binary tasks, of {', '.join(sorted(binary))}")
        if history.tasks.count(name) > 1:
            raise ValueError(f"history.tasks: duplicate task {name!r}")
