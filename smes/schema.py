"""The schema: which features an impression carries and which tasks are learned.

All processes share one schema. Its :attr:`Schema.hash` travels with event records, checkpoints and snapshots, so that
two parts with different schemas refuse each other instead of misreading columns.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le

from smes.derived import Derived, features_of, unread
from smes.feature import ITEM_ID, MISSING, USER_ID, Feature, check_sequences
from smes.ranges import EventSeconds, NonNegativeFloat, PositiveFloat, check_ranges

__all__ = ["ITEM_ID", "MISSING", "USER_ID", "Derived", "Feature", "History", "Schema", "Task"]


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
        derived: What the model computes of the features. Events, requests and the feature store know nothing of it.

    Raises:
        ValueError: A name occurs twice, there is no task, ``user_id`` or ``item_id`` has the wrong kind, or a sequence,
            the history or a derived feature does not fit the other features.
    """

    name: str
    tasks: tuple[Task, ...]
    features: tuple[Feature, ...] = field(default=())
    history: History | None = None
    derived: tuple[Derived, ...] = ()

    def __post_init__(self) -> None:
        names = [f.name for f in self.features] + [d.name for d in self.derived]
        if (name := _repeated(names)) is not None:
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
        assert self.inputs is not None, "derived features are checked by it"

    @cached_property
    def inputs(self) -> "Schema":
        """What the model reads: the features, and behind them the derived ones as features like any other.

        The schema itself if it derives nothing. Features that only derivations read are left out
        (:attr:`Derived.replaces`). It has the same tasks, and its ``inputs`` are itself.
        """
        if not self.derived:
            return self
        derived = features_of(self.derived, self.features)
        hidden = unread(self.derived, self.features, self.history_sequences)
        return Schema(
            self.name, self.tasks, tuple(f for f in (*self.features, *derived) if f.name not in hidden), self.history
        )

    @property
    def history_sequences(self) -> tuple[str, ...]:
        """The names of the two sequences that hold the history, if there is one."""
        return () if self.history is None else (self.history.items, self.history.outcomes)

    @property
    def derives_from_time(self) -> bool:
        """Whether a derived feature depends on the time of the event."""
        return any(d.reads_time for d in self.derived)

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

    @cached_property
    def has_lists(self) -> bool:
        """Whether there are bags or sequences."""
        return any(f.is_list for f in self.id_features)

    @cached_property
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
        } | ({"derived": [asdict(d) for d in self.derived]} if self.derived else {})

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
            derived=tuple(Derived.from_dict(d) for d in data.get("derived", ())),
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
