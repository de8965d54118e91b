"""Which features and tasks of two schemas are the same, and in what these differ."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from smes.derived import Derived
from smes.feature import Feature
from smes.schema import Schema, Task

Entry = Feature | Task | Derived


class Names(NamedTuple):
    """The names of a schema's features, derived ones included, and of its tasks."""

    features: set[str]
    tasks: set[str]

    @classmethod
    def of(cls, schema: Schema) -> "Names":
        """Those of one schema."""
        features = {*(f.name for f in schema.features), *(d.name for d in schema.derived)}
        return cls(features, {task.name for task in schema.tasks})


@dataclass(frozen=True)
class Renames:
    """New names of features and tasks → the names that they had.

    A name that the schema before has already is no new one: its entry is without effect. So the section may stay in the
    file after the change.

    Attributes:
        features: Feature by feature, derived ones among them.
        tasks: Task by task.
    """

    features: Mapping[str, str] = field(default_factory=dict)
    tasks: Mapping[str, str] = field(default_factory=dict)

    def over(self, earlier: Sequence["Renames"], was: Schema) -> "Renames":
        """These, with old names of several changes ago.

        Args:
            earlier: The renames of schemas between ``was`` and the present one.
            was: The schema whose names are wanted.
        """
        names = Names.of(was)
        return Renames(
            _followed(self.features, [renames.features for renames in earlier], names.features),
            _followed(self.tasks, [renames.tasks for renames in earlier], names.tasks),
        )

    def between(self, was: Schema, now: Schema) -> "Renames":
        """Those of them whose names are in these schemas."""
        of_was, of_now = Names.of(was), Names.of(now)
        return Renames(
            {new: old for new, old in self.features.items() if new in of_now.features and old in of_was.features},
            {new: old for new, old in self.tasks.items() if new in of_now.tasks and old in of_was.tasks},
        )


class Matched(NamedTuple):
    """Which entries of two schemas are the same.

    Attributes:
        old_name: New name → old name, in the new order, of what is in both.
        problems: What is wrong with the renames.
    """

    old_name: dict[str, str]
    problems: list[str]


class Difference(NamedTuple):
    """An attribute of something in both schemas that differs: of what, which one, and in words."""

    what: str
    key: str
    words: str


def match(section: str, was: Sequence[Entry], now: Sequence[Entry], renamed: Mapping[str, str]) -> Matched:
    """Match entries by name, renamed ones by the old name.

    Args:
        section: ``features`` or ``tasks``.
        was, now: The entries before and after.
        renamed: New name → old name.
    """
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
    for old in repeated(old_name.values()):
        news = [new for new, of in old_name.items() if of == old]
        problems.append(f"renamed.{section}: {old!r} is the old name of {', '.join(news)}, expected one of them")
    return Matched(old_name, problems)


def differences(kind: str, was: Entry, now: Entry, as_now: Callable[[str, Any], Any]) -> list[Difference]:
    """The attributes that differ, without names and vocabularies.

    Args:
        kind: What it is, in words.
        was, now: Before and after.
        as_now: Gives an attribute from before as the new schema says it: (attribute, value) → value.
    """
    found = []
    for each in fields(now):
        if each.name in ("name", "vocabulary"):  # vocabularies are looked at as a whole
            continue
        before, after = as_now(each.name, getattr(was, each.name, None)), getattr(now, each.name)
        if before != after and _applies(each.name, now):
            words = f"{each.name} {after}, was {before}"
            if each.name == "max_length" and after < before:
                words += ": ids beyond the first are left out"
            found.append(Difference(f"{kind} {now.name!r}", each.name, words))
    return found


def in_words(kind: str, new: str, old: str) -> str:
    """``feature 'price_usd' (was 'price')``."""
    return f"{kind} {new!r}" if new == old else f"{kind} {new!r} (was {old!r})"


def repeated(names: Iterable[str]) -> list[str]:
    """The names that occur more than once."""
    return [name for name, count in Counter(names).items() if count > 1]


def _applies(key: str, now: Entry) -> bool:
    """Whether the attribute means anything for the entry's kind."""
    if isinstance(now, Task):
        return key not in ("max_value", "unit") or now.kind == "regression"
    kinds = {"dim": ("id", "bag", "sequence"), "max_length": ("bag", "sequence")}
    return not isinstance(now, Feature) or now.kind in kinds.get(key, (now.kind,))


def _followed(renamed: Mapping[str, str], earlier: Sequence[Mapping[str, str]], known: set[str]) -> dict[str, str]:
    """Each new name with the first of its old names, one behind the other, that is known; else with the last change's.

    A name that only an earlier change has given is in it, too, for its feature may have kept the name since.
    """
    steps = {**{new: old for each in reversed(earlier) for new, old in each.items()}, **renamed}
    found = dict(renamed)
    for new in steps:
        name, passed = new, {new}
        while name not in known and steps.get(name, new) not in passed:
            name = steps[name]
            passed.add(name)
        if name in known and name != new:
            found[new] = name
    return found
