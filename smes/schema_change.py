"""From one schema to the next: what goes on, what is new, what goes, and what cannot be carried over.

Features and tasks are matched by name, renamed ones by the names that the new schema's file gives
(``renamed: {features: {new: old}, tasks: {new: old}}``). What goes on is carried over; what is new begins without
values; what is gone is left out.

Events, requests and the join hold the columns of ``schema.features``. The model reads those of ``schema.inputs``, to
which derived features belong: :attr:`SchemaChange.inputs` is the change of these.

Letters: N rows, W and F id and numeric columns, T tasks, each of the schema before or after.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from smes.arrays import F32, I64, U64
from smes.events import DROPPED, ExampleBlock, FeedbackBlock, ImpressionBlock
from smes.schema import ITEM_ID, MISSING, USER_ID, Feature, Schema
from smes.schema_matching import Difference, Matched, Renames, differences, in_words, match, repeated

__all__ = ["NEW", "Renames", "SchemaChange"]

NEW = -1
"""In a map of columns or tasks: the entry has none in the schema before."""

_A = TypeVar("_A", bound=np.generic)


@dataclass(frozen=True)
class SchemaChange:
    """The step from the schema ``was`` to the schema ``now``.

    All maps go from the new schema to the one before: entry i says where the new column or task i was, :data:`NEW` if
    it was nowhere.

    Attributes:
        was: The schema before.
        now: The schema after.
        renamed: Which names of ``now`` stand for other names of ``was``.
    """

    was: Schema
    now: Schema
    renamed: Renames = field(default_factory=Renames)

    # ---- maps

    @cached_property
    def inputs(self) -> "SchemaChange":
        """The change of what the model reads: :attr:`smes.schema.Schema.inputs`."""
        if self.was.inputs is self.was and self.now.inputs is self.now:
            return self
        return SchemaChange(self.was.inputs, self.now.inputs, self.renamed)

    @cached_property
    def feature_names(self) -> dict[str, str]:
        """Features that go on: new name → old name, in the new order. Without derived ones."""
        return self._features.old_name

    @property
    def derived_names(self) -> dict[str, str]:
        """Derived features that go on: new name → old name, in the new order."""
        return self._derived.old_name

    @cached_property
    def task_names(self) -> dict[str, str]:
        """Tasks that go on: new name → old name, in the new order."""
        return self._tasks.old_name

    @cached_property
    def tasks(self) -> I64:
        """int64 [T now], which old task each new one was."""
        old = [self.task_names.get(t.name) for t in self.now.tasks]
        return _indices(NEW if name is None else self.was.task_index[name] for name in old)

    @cached_property
    def id_columns(self) -> I64:
        """int64 [W now], which old column of ``ids`` each new one was. A wider bag's further columns are new."""
        slices = self.was.id_slices
        columns: list[int] = []
        for feature in self.now.id_features:
            old = slices.get(self.feature_names.get(feature.name, ""), slice(0, 0))
            kept = range(old.start, old.stop)
            columns += [kept[i] if i < len(kept) else NEW for i in range(feature.width)]
        return _indices(columns)

    @cached_property
    def numerics(self) -> I64:
        """int64 [F now], which old column of ``numerics`` each new one was."""
        place = {f.name: i for i, f in enumerate(self.was.numeric_features)}
        return _indices(place.get(self.feature_names.get(f.name, ""), NEW) for f in self.now.numeric_features)

    @cached_property
    def vocabularies(self) -> dict[str, str]:
        """Old vocabulary → the new one that its ids belong to; without those that no feature reads any more.

        Several old vocabularies may become one.
        """
        return {old: news[0] for old, news in self._vocabularies.items()}

    @cached_property
    def outcome_bits(self) -> tuple[int, ...] | None:
        """For each bit of the old history's outcomes the bit that it is now, :data:`NEW` if its task went.

        None where outcomes mean what they meant, or where either schema has no history.
        """
        if not self.was.history_tasks or not self.now.history_tasks:
            return None
        new_bit = {int(self.tasks[task]): bit for bit, task in enumerate(self.now.history_tasks)}
        bits = tuple(new_bit.get(task, NEW) for task in self.was.history_tasks)
        return None if bits == tuple(range(len(bits))) else bits

    @property
    def outcomes_vocabulary(self) -> str | None:
        """The old vocabulary whose ids :meth:`outcomes` changes; None where it changes none."""
        if self.outcome_bits is None or self.was.history is None:
            return None
        return self._was[self.was.history.outcomes].vocabulary_name

    @property
    def is_none(self) -> bool:
        """Whether both are the same schema."""
        return self.was.hash == self.now.hash

    # ---- in words

    @cached_property
    def carried(self) -> tuple[str, ...]:
        """What goes on, in words: ``feature 'price_usd' (was 'price')``."""
        return (
            *(in_words("feature", new, old) for new, old in self.feature_names.items()),
            *(in_words("derived feature", new, old) for new, old in self.derived_names.items()),
            *(in_words("task", new, old) for new, old in self.task_names.items()),
        )

    @cached_property
    def new(self) -> tuple[str, ...]:
        """What is new, in words."""
        return (
            *(f"feature {f.name!r} ({f.kind})" for f in self.now.features if f.name not in self.feature_names),
            *(f"derived feature {d.name!r} ({d.kind})" for d in self.now.derived if d.name not in self.derived_names),
            *(f"task {t.name!r} ({t.kind})" for t in self.now.tasks if t.name not in self.task_names),
        )

    @cached_property
    def dropped(self) -> tuple[str, ...]:
        """What is no longer there, in words."""
        features, tasks = set(self.feature_names.values()), set(self.task_names.values())
        derived = set(self.derived_names.values())
        return (
            *(f"feature {f.name!r} ({f.kind})" for f in self.was.features if f.name not in features),
            *(f"derived feature {d.name!r} ({d.kind})" for d in self.was.derived if d.name not in derived),
            *(f"task {t.name!r} ({t.kind})" for t in self.was.tasks if t.name not in tasks),
        )

    @cached_property
    def changed(self) -> tuple[str, ...]:
        """What goes on but differs, in words. Names do not count."""
        found = [f"{each.what}: {each.words}" for each in self._changes]
        for now in repeated(self.vocabularies.values()):
            merged = [old for old, new in self.vocabularies.items() if new == now]
            found.append(f"vocabularies {', '.join(map(repr, merged))} become one, {now!r}")
        found += self._changes_of_history()
        read, read_before = ({f.name for f in schema.inputs.features} for schema in (self.now, self.was))
        for new, old in self.feature_names.items():
            if (new in read) != (old in read_before):
                only = "too, not only what replaced it" if new in read else "no longer: it reads what replaces it"
                found.append(f"feature {new!r}: the model reads it {only}")
        if self.was.name != self.now.name:
            found.append(f"name {self.now.name!r}, was {self.was.name!r}")
        return tuple(found)

    @cached_property
    def problems(self) -> tuple[str, ...]:
        """What cannot be carried over, in words; empty if a whole checkpoint can be."""
        found = [*self.problems_of_events]
        found += _another_name(each for each in self._changes if each.key in _NOT_CARRIED)
        found += self._derived.problems
        for old, news in self.inputs._vocabularies.items():
            if len(news) > 1:
                found.append(
                    f"vocabulary {old!r} is split into {', '.join(map(repr, news))}: a row cannot be in several; give "
                    "all but one of their features another name: then they begin anew"
                )
        names = self.inputs.feature_names
        for new in self.inputs.now.features:
            if new.accompanies in names and new.name not in names:
                found.append(
                    f"new feature {new.name!r} accompanies {new.accompanies!r}, whose entries would change: expected a "
                    "sequence that is new, too"
                )
        return tuple(dict.fromkeys(found))

    @cached_property
    def problems_of_events(self) -> tuple[str, ...]:
        """What of :attr:`problems` keeps events of the old schema from being read as events of the new one."""
        changes = [each for each in self._changes if each.key in _NOT_READ and not each.what.startswith("derived")]
        return (*self._features.problems, *self._tasks.problems, *_another_name(changes))

    def describe(self) -> list[str]:
        """All of it as lines: what is new, gone and changed, and what cannot be carried over."""
        return [
            *(f"new: {what}" for what in self.new),
            *(f"renamed: {what}" for what in self.carried if what.endswith(")")),
            *(f"dropped: {what}" for what in self.dropped),
            *(f"changed: {what}" for what in self.changed),
            *(f"cannot be carried over: {what}" for what in self.problems),
        ]

    # ---- arrays and blocks

    def by_task(self, array: NDArray[_A], fill: object, axis: int = -1) -> NDArray[_A]:
        """Array with an axis of the old tasks → one with an axis of the new ones, ``fill`` for new tasks."""
        return _taken(array, self.tasks, fill, axis)

    def ids(self, ids_NW: I64) -> I64:
        """int64 [N, W was] → [N, W now], ``MISSING`` in new columns."""
        converted = _taken(ids_NW, self.id_columns, MISSING, 1)
        if self.outcome_bits is not None and self.now.history is not None:
            columns = self.now.id_slices[self.now.history.outcomes]
            converted[:, columns] = self.outcomes(converted[:, columns])
        return converted

    def numeric_values(self, numerics_NF: F32) -> F32:
        """float32 [N, F was] → [N, F now], NaN in new columns."""
        return _taken(numerics_NF, self.numerics, np.nan, 1)

    def outcomes(self, values: I64) -> I64:
        """Outcomes of a history (sums of 2^bit) under the new bits; bits of dropped tasks are left out. Any shape."""
        if self.outcome_bits is None:
            return values
        converted = np.zeros_like(values)
        for old, new in enumerate(self.outcome_bits):
            if new != NEW:
                converted |= ((values >> old) & 1) << new
        return np.where(values == MISSING, np.int64(MISSING), converted)

    def task_numbers(self, task_N: NDArray[np.signedinteger[Any]]) -> I64:
        """Numbers of old tasks → those of the new ones, :data:`NEW` for dropped tasks. Any shape."""
        now = np.full(self.was.num_tasks + 1, NEW, np.int64)
        known = self.tasks != NEW
        now[self.tasks[known]] = np.flatnonzero(known)
        numbers: I64 = now[task_N]
        return numbers

    def task_bits(self, bits: U64, *, new: bool = False) -> U64:
        """Sets of old tasks, bit t for task t → sets of new ones; ``new``: whether new tasks are in them. Any shape."""
        converted = np.zeros_like(bits)
        for now, was in enumerate(self.tasks.tolist()):
            bit = np.uint64(1) << np.uint64(now)
            is_in = np.full(bits.shape, new) if was == NEW else (bits >> np.uint64(was)) & np.uint64(1) == 1
            converted |= np.where(is_in, bit, np.uint64(0))
        return converted

    def impressions(self, block: ImpressionBlock) -> ImpressionBlock:
        """The impressions under the new schema: new features are missing, scores of dropped tasks are left out.

        They have no labels of new tasks: who made them knew nothing of these.
        """
        columns = block.arrays()
        columns |= self._impression_columns(columns)
        columns["no_label"] = self.task_bits(block.no_label, new=True)
        return ImpressionBlock(**columns)

    def feedback(self, block: FeedbackBlock) -> FeedbackBlock:
        """The feedback under the new schema; that of dropped tasks has the task :data:`smes.events.DROPPED`."""
        task = np.where((numbers := self.task_numbers(block.task)) == NEW, DROPPED, numbers)
        return FeedbackBlock(**(block.arrays() | {"task": task.astype(np.int32)}))

    def examples(self, block: ExampleBlock) -> ExampleBlock:
        """The examples under the new schema. They have no labels of new tasks: the mask is false there."""
        columns = block.arrays()
        columns |= self._impression_columns(columns)
        for name, fill in _BY_TASK.items():
            columns[name] = self.by_task(columns[name], fill)
        return ExampleBlock(**columns)

    def count_dropped_values(self, block: ImpressionBlock) -> I64:
        """How many values of each impression the new schema has no place for. int64 [N].

        Counted are the values of dropped features, a bag as one, and the served scores of dropped tasks.
        """
        kept = set(self.feature_names.values())
        count = np.zeros(len(block), np.int64)
        for feature in self.was.id_features:
            if feature.name not in kept:
                count += (block.ids[:, self.was.id_slices[feature.name]] != MISSING).any(axis=1)
        for i, feature in enumerate(self.was.numeric_features):
            if feature.name not in kept:
                count += ~np.isnan(block.numerics[:, i])
        dropped = self.task_numbers(np.arange(self.was.num_tasks)) == NEW
        count += (~np.isnan(block.served_scores[:, dropped])).sum(axis=1)
        return count

    def _impression_columns(self, columns: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        return {
            "ids": self.ids(columns["ids"]),
            "numerics": self.numeric_values(columns["numerics"]),
            "served_scores": self.by_task(columns["served_scores"], np.nan),
        }

    # ---- how they fit

    @cached_property
    def _was(self) -> dict[str, Feature]:
        return {f.name: f for f in self.was.features}

    @cached_property
    def _features(self) -> Matched:
        own = [name for name in (USER_ID, ITEM_ID) if name in self.renamed.features]
        fixed = [f"renamed.features.{name}: always has this name" for name in own]
        derived = {d.name for d in self.now.derived}
        renamed = {new: old for new, old in self.renamed.features.items() if new not in derived}
        matched = match("features", self.was.features, self.now.features, renamed)
        return Matched(matched.old_name, [*fixed, *matched.problems])

    @cached_property
    def _derived(self) -> Matched:
        derived = {d.name for d in self.now.derived}
        renamed = {new: old for new, old in self.renamed.features.items() if new in derived}
        matched = match("features", self.was.derived, self.now.derived, renamed)
        features = {f.name for f in self.was.features}
        other = [f"feature {d.name!r}: derived now; {_ANOTHER_NAME}" for d in self.now.derived if d.name in features]
        was_derived = {d.name for d in self.was.derived}
        other += [
            f"feature {f.name!r}: not derived any more; {_ANOTHER_NAME}"
            for f in self.now.features
            if f.name in was_derived
        ]
        return Matched(matched.old_name, [*matched.problems, *other])

    @cached_property
    def _tasks(self) -> Matched:
        return match("tasks", self.was.tasks, self.now.tasks, self.renamed.tasks)

    @cached_property
    def _vocabularies(self) -> dict[str, list[str]]:
        """Old vocabulary → the new ones of the features that were in it."""
        found: dict[str, list[str]] = {}
        for feature in self.now.id_features:
            old = self._was.get(self.feature_names.get(feature.name, ""))
            if old is not None and old.kind != "numeric":
                news = found.setdefault(old.vocabulary_name, [])
                if feature.vocabulary_name not in news:
                    news.append(feature.vocabulary_name)
        for name in dict.fromkeys(f.vocabulary_name for f in self.was.id_features):
            if name not in found and any(f.vocabulary_name == name for f in self.now.id_features):
                found[name] = [name]
        return found

    @cached_property
    def _changes(self) -> list[Difference]:
        """What goes on but differs."""
        found = []
        pairs: list[tuple[str, Any, Any, Mapping[str, str]]] = [
            ("feature", self.was.features, self.now.features, self.feature_names),
            ("derived feature", self.was.derived, self.now.derived, self.derived_names),
            ("task", self.was.tasks, self.now.tasks, self.task_names),
        ]
        for kind, was, now, names in pairs:
            before = {entry.name: entry for entry in was}
            for entry in now:
                if entry.name in names:
                    found += differences(kind, before[names[entry.name]], entry, self._as_now)
        return found

    def _as_now(self, key: str, value: Any) -> Any:
        """An attribute from before as the new schema says it: with the new names of features."""
        new_name = {old: new for new, old in {**self.feature_names, **self.derived_names}.items()}
        if key in ("query", "accompanies"):
            return new_name.get(value, value)
        return tuple(new_name.get(name, name) for name in value) if key == "of" else value

    def _changes_of_history(self) -> list[str]:
        was, now = self.was.history, self.now.history
        if was is None or now is None:
            return [] if was is now else [f"history {'added' if was is None else 'removed'}"]
        found = []
        if was.window_s != now.window_s:
            found.append(f"history: window_s {now.window_s}, was {was.window_s}")
        if self.outcome_bits is not None:
            names = ", ".join(self.now.tasks[t].name for t in self.now.history_tasks)
            found.append(f"history: outcomes are of the tasks {names} now; what they were is converted")
        elif len(was_tasks := self.was.history_tasks) < len(self.now.history_tasks):
            names = ", ".join(self.now.tasks[t].name for t in self.now.history_tasks[len(was_tasks) :])
            found.append(f"history: outcomes are of the tasks {names}, too")
        return found


_BY_TASK: dict[str, object] = {
    "labels": 0.0,
    "label_mask": False,
    "feedback_arrival_ms": MISSING,
    "late_share": 0.0,
}
"""What an example has of a task for which it was not labelled."""

_NOT_READ = ("kind", "elapsed")
"""Attributes whose change gives values in events another meaning."""

_NOT_CARRIED = (
    *_NOT_READ, "dim", "transform", "query", "accompanies",
    "of", "boundaries", "quantiles", "into", "time_zone",
)  # fmt: skip
"""Attributes whose change gives weights another meaning."""

_ANOTHER_NAME = "give it another name: then the old one goes and the new one begins anew"


def _another_name(changes: Iterable[Difference]) -> list[str]:
    return [f"{each.what}: {each.words}; {_ANOTHER_NAME}" for each in changes]


def _indices(values: Iterable[int]) -> I64:
    return np.fromiter(values, np.int64)


def _taken(array: NDArray[_A], where: I64, fill: object, axis: int) -> NDArray[_A]:
    """Columns of an axis in another order; ``fill`` where there was none."""
    axis %= array.ndim
    if array.shape[axis] == 0:
        shape = (*array.shape[:axis], len(where), *array.shape[axis + 1 :])
        return np.full(shape, fill, array.dtype)
    taken = np.take(array, np.maximum(where, 0), axis=axis)
    taken[(slice(None),) * axis + (where == NEW,)] = fill
    return taken
