"""From one schema to the next: what goes on, what is new, what goes, and what cannot be carried over.

Features and tasks are matched by name, renamed ones by the names that the new schema's file gives
(``renamed: {features: {new: old}, tasks: {new: old}}``). What goes on is carried over; what is new begins without
values; what is gone is left out.

Letters: N rows, W and F id and numeric columns, T tasks, each of the schema before or after.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from smes.arrays import F32, I64
from smes.events import ExampleBlock, FeedbackBlock, ImpressionBlock
from smes.schema import ITEM_ID, MISSING, USER_ID, Feature, Schema, Task

_A = TypeVar("_A", bound=np.generic)

NEW = -1
"""In a map of columns or tasks: the entry has none in the schema before."""


@dataclass(frozen=True)
class Renames:
    """New names of features and tasks → the names that they had.

    A name that the schema before has already is no new one: its entry is without effect. So the section may stay in the
    file after the change.

    Attributes:
        features: Feature by feature.
        tasks: Task by task.
    """

    features: Mapping[str, str] = field(default_factory=dict)
    tasks: Mapping[str, str] = field(default_factory=dict)

    def after(self, earlier: "Renames") -> "Renames":
        """Renames over two changes: these, and those of the change before."""
        return Renames(_chained(self.features, earlier.features), _chained(self.tasks, earlier.tasks))


class _Matched(NamedTuple):
    """Name in the new schema → its name in the one before; and what is wrong with the renames."""

    old_name: dict[str, str]
    problems: list[str]


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

    @cached_property
    def feature_names(self) -> dict[str, str]:
        """Features that go on: new name → old name, in the new order."""
        return self._features.old_name

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
        slices, columns = self.was.id_slices, []
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

    @cached_property
    def outcomes_vocabulary(self) -> str | None:
        """The old vocabulary whose ids :meth:`outcomes` changes; None where it changes none."""
        if self.outcome_bits is None or self.was.history is None:
            return None
        return self._was[self.was.history.outcomes].vocabulary_name

    @property
    def is_none(self) -> bool:
        """Whether both are the same schema."""
        return self.was.hash == self.now.hash

    @cached_property
    def carried(self) -> tuple[str, ...]:
        """What goes on, in words: ``feature 'price_usd' (was 'price')``."""
        return (
            *(_was_called("feature", new, old) for new, old in self.feature_names.items()),
            *(_was_called("task", new, old) for new, old in self.task_names.items()),
        )

    @cached_property
    def new(self) -> tuple[str, ...]:
        """What is new, in words."""
        return (
            *(f"feature {f.name!r} ({f.kind})" for f in self.now.features if f.name not in self.feature_names),
            *(f"task {t.name!r} ({t.kind})" for t in self.now.tasks if t.name not in self.task_names),
        )

    @cached_property
    def dropped(self) -> tuple[str, ...]:
        """What is no longer there, in words."""
        features, tasks = set(self.feature_names.values()), set(self.task_names.values())
        return (
            *(f"feature {f.name!r} ({f.kind})" for f in self.was.features if f.name not in features),
            *(f"task {t.name!r} ({t.kind})" for t in self.was.tasks if t.name not in tasks),
        )

    @cached_property
    def changed(self) -> tuple[str, ...]:
        """What goes on but differs, in words. Names do not count."""
        found = [f"{what}: {words}" for what, _, words in self._changes]
        for old in _repeated(self.vocabularies.values()):
            merged = [was for was, now in self.vocabularies.items() if now == old]
            found.append(f"vocabularies {', '.join(map(repr, merged))} become one, {old!r}")
        found += self._changes_of_history()
        if self.was.name != self.now.name:
            found.append(f"name {self.now.name!r}, was {self.was.name!r}")
        return tuple(found)

    @cached_property
    def problems(self) -> tuple[str, ...]:
        """What cannot be carried over, in words; empty if everything can."""
        found = [*self._features.problems, *self._tasks.problems]
        found += [f"{what}: {words}; {_ANOTHER_NAME}" for what, key, words in self._changes if key in _NOT_CARRIED]
        for old, news in self._vocabularies.items():
            if len(news) > 1:
                found.append(
                    f"vocabulary {old!r} is split into {', '.join(map(repr, news))}: a row cannot be in several; give "
                    "all but one of their features another name: then they begin anew"
                )
        for new in self.now.features:
            if new.accompanies in self.feature_names and new.name not in self.feature_names:
                found.append(
                    f"new feature {new.name!r} accompanies {new.accompanies!r}, whose entries would change: expected a "
                    "sequence that is new, too"
                )
        return tuple(found)

    def describe(self) -> list[str]:
        """All of it as lines: what is new, gone and changed, and what cannot be carried over."""
        return [
            *(f"new: {what}" for what in self.new),
            *(f"renamed: {_was_called('feature', *names)}" for names in self.feature_names.items() if _differ(names)),
            *(f"renamed: {_was_called('task', *names)}" for names in self.task_names.items() if _differ(names)),
            *(f"dropped: {what}" for what in self.dropped),
            *(f"changed: {what}" for what in self.changed),
            *(f"cannot be carried over: {what}" for what in self.problems),
        ]

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

    def impressions(self, block: ImpressionBlock) -> ImpressionBlock:
        """The impressions under the new schema: new features are missing, scores of dropped tasks are left out."""
        columns = block.arrays()
        columns |= self._impression_columns(columns)
        return ImpressionBlock(**columns)

    def feedback(self, block: FeedbackBlock) -> FeedbackBlock:
        """The feedback under the new schema, without that of dropped tasks."""
        task = self.task_numbers(block.task)
        kept = task != NEW
        columns = block.arrays() | {"task": task.astype(np.int32)}
        converted = FeedbackBlock(**columns)
        return converted if kept.all() else converted.take(kept)

    def examples(self, block: ExampleBlock) -> ExampleBlock:
        """The examples under the new schema. They have no labels of new tasks: the mask is false there."""
        columns = block.arrays()
        columns |= self._impression_columns(columns)
        for name, fill in _BY_TASK.items():
            columns[name] = self.by_task(columns[name], fill)
        return ExampleBlock(**columns)

    def _impression_columns(self, columns: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        return {
            "ids": self.ids(columns["ids"]),
            "numerics": self.numeric_values(columns["numerics"]),
            "served_scores": self.by_task(columns["served_scores"], np.nan),
        }

    @cached_property
    def _was(self) -> dict[str, Feature]:
        return {f.name: f for f in self.was.features}

    @cached_property
    def _features(self) -> _Matched:
        fixed = [
            f"renamed.features.{n}: always has this name" for n in (USER_ID, ITEM_ID) if n in self.renamed.features
        ]
        matched = _match("features", self.was.features, self.now.features, self.renamed.features)
        return _Matched(matched.old_name, [*fixed, *matched.problems])

    @cached_property
    def _tasks(self) -> _Matched:
        return _match("tasks", self.was.tasks, self.now.tasks, self.renamed.tasks)

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
    def _changes(self) -> list[tuple[str, str, str]]:
        """(which feature or task, which of its attributes, in words) of what goes on but differs."""
        found = []
        for new in self.now.features:
            if (old := self.feature_names.get(new.name)) is not None:
                found += _differences("feature", self._was[old], new, self._under_new_name)
        tasks = {t.name: t for t in self.was.tasks}
        for task in self.now.tasks:
            if (old := self.task_names.get(task.name)) is not None:
                found += _differences("task", tasks[old], task, lambda key, value: value)
        return found

    def _under_new_name(self, key: str, value: Any) -> Any:
        """An old feature's attribute as the new schema would say it: names of features and of vocabularies."""
        if key in ("query", "accompanies"):
            return next((new for new, old in self.feature_names.items() if old == value), value)
        return value

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

_NOT_CARRIED = ("kind", "dim", "transform", "query", "accompanies", "elapsed")
"""Attributes whose change gives old weights or values another meaning."""

_ANOTHER_NAME = "give it another name: then the old one goes and the new one begins anew"


def _match(
    section: str,
    was: Sequence[Feature] | Sequence[Task],
    now: Sequence[Feature] | Sequence[Task],
    renamed: Mapping[str, str],
) -> _Matched:
    before, after = {entry.name for entry in was}, {entry.name for entry in now}
    old_name: dict[str, str] = {}
    problems: list[str] = []
    for new, old in renamed.items():
        where = f"renamed.{section}.{new}: {old!r}"
        if new not in after:
            problems.append(f"{where}, but the new schema has no {new!r}")
        elif new in before:
            if old in before and old not in after:
                problems.append(f"{where}, but the old schema has {new!r}, too; expected one of the two to be gone")
        elif old not in before:
            problems.append(f"{where}, expected one of the old schema's: {', '.join(sorted(before))}")
        elif old in after:
            problems.append(f"{where}, but the new schema has {old!r}, too: it cannot be both")
    for entry in now:
        if entry.name in before:
            old_name[entry.name] = entry.name
        elif (old := renamed.get(entry.name, entry.name)) in before and old not in after:
            old_name[entry.name] = old
    for old in _repeated(old_name.values()):
        news = [new for new, of in old_name.items() if of == old]
        problems.append(f"renamed.{section}: {old!r} is the old name of {', '.join(news)}, expected one of them")
    return _Matched(old_name, problems)


def _differences(
    kind: str, was: Feature | Task, now: Feature | Task, under_new_name: Callable[[str, Any], Any]
) -> list[tuple[str, str, str]]:
    found = []
    for each in fields(now):
        if each.name in ("name", "vocabulary"):  # vocabularies are looked at as a whole
            continue
        before, after = under_new_name(each.name, getattr(was, each.name)), getattr(now, each.name)
        if before != after and _applies(each.name, was, now):
            words = f"{each.name} {after}, was {before}"
            if each.name == "max_length" and after < before:
                words += ": ids beyond the first are left out"
            found.append((f"{kind} {now.name!r}", each.name, words))
    return found


def _applies(key: str, was: Feature | Task, now: Feature | Task) -> bool:
    """Whether the attribute means anything for the entry's kind."""
    if isinstance(was, Task) or isinstance(now, Task):
        return key not in ("max_value", "unit") or now.kind == "regression"
    kinds = {"dim": ("id", "bag", "sequence"), "max_length": ("bag", "sequence")}
    return now.kind in kinds.get(key, (now.kind,))


def _was_called(kind: str, new: str, old: str) -> str:
    return f"{kind} {new!r}" if new == old else f"{kind} {new!r} (was {old!r})"


def _differ(names: tuple[str, str]) -> bool:
    return names[0] != names[1]


def _chained(later: Mapping[str, str], earlier: Mapping[str, str]) -> dict[str, str]:
    return {**earlier, **{new: earlier.get(old, old) for new, old in later.items()}}


def _indices(values: Iterable[int]) -> I64:
    return np.fromiter(values, np.int64)


def _repeated(names: Iterable[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def _taken(array: NDArray[_A], where: I64, fill: object, axis: int) -> NDArray[_A]:
    """Columns of an axis in another order; ``fill`` where there was none."""
    axis %= array.ndim
    if array.shape[axis] == 0:
        shape = (*array.shape[:axis], len(where), *array.shape[axis + 1 :])
        return np.full(shape, fill, array.dtype)
    taken = np.take(array, np.maximum(where, 0), axis=axis)
    taken[(slice(None),) * axis + (where == NEW,)] = fill
    return taken
