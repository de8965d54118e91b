"""The schema: which features an impression carries and which tasks are learned.

One schema is shared by every process. Its :attr:`Schema.hash` travels with event records, checkpoints and
snapshots, so that two parts that disagree refuse each other instead of misreading columns.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np

MISSING: int = int(np.iinfo(np.int64).min)
"""The null of every int64 column (an id feature without value, an impression without request, bag padding)."""

USER_ID = "user_id"
ITEM_ID = "item_id"


@dataclass(frozen=True)
class Feature:
    """One input of the model.

    Attributes:
        name: Unique name; the key in an event's ``features``.
        kind: ``id`` (one int64), ``bag`` (up to ``max_length`` int64, order ignored), ``sequence`` (up to
            ``max_length`` int64, newest first) or ``numeric`` (one float).
        source: Whose attribute it is: the scorer reads ``user`` and ``item`` features from the feature store and
            ``context`` features from the request.
        vocabulary: Features with the same vocabulary share embedding rows; default: the feature's own name.
        dim: Embedding width (all but numeric); at most the model's ``embedding_dim``, which is the default.
        max_length: Most ids kept of a bag or sequence, from its beginning on.
        query: Sequences only: the id feature under whose target attention this one is read; it shares that feature's
            vocabulary and width.
        accompanies: Sequences only: the queried sequence of which this one says something, place by place: it has the
            same width, the same ``max_length`` and, in every event, the same number of ids.
        transform: ``log1p`` squashes a non-negative numeric feature as ``sign(x)·log(1+|x|)``.
        indicator: Whether an indicator of its absence accompanies a numeric feature; without one, a missing value reads
            as the mean. Spare it where the value is always there.
        elapsed: Numeric user and item features only: what is stored of the entity is a time, in seconds since 1970;
            events carry, and the model reads, the days from then to the impression or request. Such as an item's age.
    """

    name: str
    kind: Literal["id", "bag", "sequence", "numeric"] = "id"
    source: Literal["user", "item", "context"] = "context"
    vocabulary: str | None = None
    dim: int | None = None
    max_length: int = 8
    transform: Literal["none", "log1p"] = "none"
    indicator: bool = True
    query: str | None = None
    accompanies: str | None = None
    elapsed: bool = False

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("feature name: expected a non-empty string")
        if self.is_list and not 1 <= self.max_length <= 1024:
            raise ValueError(f"feature {self.name!r}: max_length {self.max_length}, expected 1 … 1024")
        if self.dim is not None and self.dim < 1:
            raise ValueError(f"feature {self.name!r}: dim {self.dim}, expected at least 1")
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
        """Columns it takes in its matrix: ``max_length`` for a bag or sequence, else 1."""
        return self.max_length if self.is_list else 1

    @property
    def vocabulary_name(self) -> str:
        """The vocabulary that its ids belong to."""
        return self.vocabulary or self.name


@dataclass(frozen=True)
class Task:
    """One kind of feedback to predict.

    Attributes:
        name: Unique name; the ``task`` of a feedback event.
        kind: ``binary`` (value 0 or 1; no feedback within the window means 0) or ``regression`` (a non-negative
            value such as watch time; no feedback means no label).
        window_s: Attribution window in seconds of event time: feedback later than this after its impression is late.
        loss_weight: Factor of this task's loss, ≥ 0.
        max_value: Largest accepted value of a regression label, in ``unit``.
        unit: Name of the unit of a regression label, for people.
    """

    name: str
    kind: Literal["binary", "regression"] = "binary"
    window_s: float = 600.0
    loss_weight: float = 1.0
    max_value: float = 86_400.0
    unit: str = ""

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("task name: expected a non-empty string")
        if not self.window_s > 0:
            raise ValueError(f"task {self.name!r}: window_s {self.window_s}, expected more than 0 seconds")
        if self.loss_weight < 0:
            raise ValueError(f"task {self.name!r}: loss_weight {self.loss_weight}, expected at least 0")
        if not self.max_value > 0:
            raise ValueError(f"task {self.name!r}: max_value {self.max_value}, expected more than 0")

    @property
    def window_ms(self) -> int:
        return round(self.window_s * 1000)


@dataclass(frozen=True)
class History:
    """The user's last impressions and what came of them, as two sequences that whoever makes the events fills.

    Strictly from the past: an impression counts if it was shown, and an outcome if its feedback happened, before a
    *cutoff*. For the impressions of a request that is the request's time. For impressions without request it is the
    start of the *window* of event time they lie in, so that nothing that a user's own labels can move differs within
    one (user, window), the group that evaluation ranks within. Windows begin at 1970-01-01 UTC.

    Attributes:
        items: A sequence of item ids that queries ``item_id``.
        outcomes: The sequence that accompanies it: for each item the sum of 2^i over the tasks i, counted in the order
            of ``tasks``, whose positive feedback came before the cutoff; 0 for none.
        tasks: Binary tasks that the outcomes tell of; default: all of them, in the schema's order.
        window_s: Length of a window in seconds, > 0.
    """

    items: str
    outcomes: str
    tasks: tuple[str, ...] = ()
    window_s: float = 57_600.0

    def __post_init__(self) -> None:
        if not self.window_s >= 1e-3:
            raise ValueError(f"history: window_s {self.window_s}, expected at least a millisecond")

    @property
    def window_ms(self) -> int:
        return round(self.window_s * 1000)


@dataclass(frozen=True)
class Schema:
    """Features and tasks, in their column order.

    ``user_id`` and ``item_id`` are always the first two id features: they are added when not declared, and may be
    declared to set their ``dim`` or ``vocabulary``.

    Raises:
        ValueError: Duplicate names, no task, a reserved name with the wrong kind, or sequences that do not fit what
            they query or accompany.
    """

    name: str
    tasks: tuple[Task, ...]
    features: tuple[Feature, ...] = field(default=())
    history: History | None = None

    def __post_init__(self) -> None:
        declared = {f.name: f for f in self.features}
        if len(declared) != len(self.features):
            names = [f.name for f in self.features]
            raise ValueError(
                f"schema {self.name!r}: duplicate feature {next(n for n in names if names.count(n) > 1)!r}"
            )
        if not self.tasks:
            raise ValueError(f"schema {self.name!r}: expected at least one task")
        task_names = [t.name for t in self.tasks]
        if len(set(task_names)) != len(task_names):
            raise ValueError(f"schema {self.name!r}: duplicate task {_repeated(task_names)!r}")
        if len(self.tasks) > 62:
            raise ValueError(f"schema {self.name!r}: {len(self.tasks)} tasks, expected at most 62")
        head = (
            declared.pop(USER_ID, Feature(USER_ID, source="user")),
            declared.pop(ITEM_ID, Feature(ITEM_ID, source="item")),
        )
        for feature, source in zip(head, ("user", "item"), strict=True):
            if feature.kind != "id" or feature.source != source:
                raise ValueError(f"feature {feature.name!r}: expected kind id and source {source}")
        object.__setattr__(self, "features", (*head, *declared.values()))
        check_sequences(self)
        if self.history is not None:
            check_history(self, self.history)

    @cached_property
    def id_features(self) -> tuple[Feature, ...]:
        """All but the numeric features, in the order of their columns in ``ids``; ``user_id`` and ``item_id`` lead."""
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
        """Columns W of an ``ids`` matrix."""
        return sum(f.width for f in self.id_features)

    @property
    def num_numerics(self) -> int:
        """Columns F of a ``numerics`` matrix."""
        return len(self.numeric_features)

    @property
    def num_tasks(self) -> int:
        return len(self.tasks)

    @cached_property
    def task_index(self) -> dict[str, int]:
        return {t.name: i for i, t in enumerate(self.tasks)}

    @property
    def max_window_ms(self) -> int:
        return max(t.window_ms for t in self.tasks)

    @cached_property
    def companions(self) -> dict[str, tuple[Feature, ...]]:
        """Each queried sequence with the sequences that accompany it."""
        return {
            f.name: tuple(other for other in self.features if other.accompanies == f.name)
            for f in self.features
            if f.query is not None
        }

    @cached_property
    def history_tasks(self) -> tuple[int, ...]:
        """Index of each task that the history's outcomes tell of, by bit; empty for a schema without history."""
        if self.history is None:
            return ()
        names = self.history.tasks or tuple(t.name for t in self.tasks if t.kind == "binary")
        return tuple(self.task_index[name] for name in names)

    def to_dict(self) -> dict[str, Any]:
        """Plain data from which :meth:`from_dict` builds an equal schema."""
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


def _repeated(names: list[str]) -> str:
    return next(name for name in names if names.count(name) > 1)


def check_sequences(schema: "Schema") -> None:
    """Refuse sequences that do not fit what they query or accompany.

    Raises:
        ValueError: Feature, key and value are named.
    """
    features = {f.name: f for f in schema.features}
    for feature in features.values():
        if feature.query is not None:
            partner, what = features.get(feature.query), "query"
            fits = partner is not None and partner.kind == "id" and _shared(partner, feature)
            expected = "an id feature of the same vocabulary and dim"
        elif feature.accompanies is not None:
            partner, what = features.get(feature.accompanies), "accompanies"
            fits = partner is not None and partner.query is not None and _alike(partner, feature)
            expected = "a sequence with a query and the same max_length, dim and source"
        else:
            continue
        if not fits:
            named = feature.query or feature.accompanies
            raise ValueError(f"feature {feature.name!r}: {what} {named!r}, expected {expected}")


def _shared(query: "Feature", sequence: "Feature") -> bool:
    return query.vocabulary_name == sequence.vocabulary_name and query.dim == sequence.dim


def _alike(sequence: "Feature", companion: "Feature") -> bool:
    told = (companion.max_length, companion.dim, companion.source)
    return (sequence.max_length, sequence.dim, sequence.source) == told


def check_history(schema: "Schema", history: "History") -> None:
    """Refuse a history that does not fit the schema's sequences and tasks.

    Raises:
        ValueError: Key and value are named.
    """
    features = {f.name: f for f in schema.features}
    items, outcomes = features.get(history.items), features.get(history.outcomes)
    if items is None or items.query != "item_id" or items.source != "context":
        raise ValueError(f"history.items: {history.items!r}, expected a context sequence with query item_id")
    if outcomes is None or outcomes.accompanies != items.name:
        raise ValueError(f"history.outcomes: {history.outcomes!r}, expected a sequence that accompanies {items.name}")
    binary = {t.name for t in schema.tasks if t.kind == "binary"}
    for name in history.tasks:
        if name not in binary:
            raise ValueError(f"history.tasks: {name!r}, expected binary tasks, of {', '.join(sorted(binary))}")
        if history.tasks.count(name) > 1:
            raise ValueError(f"history.tasks: duplicate task {name!r}")
