"""In what two schemas differ, in words: the features and tasks by name, not hashes alone."""

import json
from collections.abc import Sequence
from dataclasses import fields

from smes.schema import Derived, Feature, History, Schema, Task

_Entries = Sequence[Feature] | Sequence[Derived] | Sequence[Task]
_MOST = 8  # differences that are named; the others are counted


def describe_difference(was: Schema, now: Schema) -> str:
    r"""The differences, most telling first; empty if there are none.

    >>> was = Schema("shop", tasks=(Task("click"),), features=(Feature("tab"), Feature("price", "numeric")))
    >>> now = Schema("shop", tasks=(Task("click", window_s=60),), features=(Feature("tab", "bag"), Feature("size")))
    >>> print(describe_difference(was, now).replace("; ", "\n"))
    new feature 'size'
    no feature 'price' any more
    feature 'tab': kind bag, was id
    task 'click': window_s 60, was 600.0
    """
    found = [
        *_named("feature", was.features, now.features),
        *_named("derived feature", was.derived, now.derived),
        *_named("task", was.tasks, now.tasks),
        *_history(was.history, now.history),
    ]
    if was.name != now.name:
        found.append(f"name {now.name!r}, was {was.name!r}")
    more = f" and {len(found) - _MOST} more" if len(found) > _MOST else ""
    return "; ".join(found[:_MOST]) + more


def describe_difference_from(was: str | None, now: Schema) -> str:
    """As :func:`describe_difference`, from the JSON of :meth:`smes.schema.Schema.to_dict`, which nobody has checked.

    Empty, too, where that is no schema.
    """
    try:
        return describe_difference(Schema.from_dict(json.loads(was or "")), now)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return ""


def _named(kind: str, was: _Entries, now: _Entries) -> list[str]:
    """Entries that came, went and changed, or that are in another order: columns go by it."""
    before, after = {entry.name: entry for entry in was}, {entry.name: entry for entry in now}
    found = [f"new {kind} {name!r}" for name in after if name not in before]
    found += [f"no {kind} {name!r} any more" for name in before if name not in after]
    for name, entry in after.items():
        if name in before and (changes := _changes(before[name], entry)):
            found.append(f"{kind} {name!r}: {changes}")
    both = [name for name in after if name in before]
    if both != [name for name in before if name in after]:
        found.append(f"{kind}s in another order: {', '.join(both)}")
    return found


def _history(was: History | None, now: History | None) -> list[str]:
    if was is None or now is None:
        return [] if was is now else [f"history {'added' if was is None else 'removed'}"]
    changes = _changes(was, now)
    return [f"history: {changes}"] if changes else []


def _changes(was: object, now: object) -> str:
    names = [f.name for f in fields(now)]  # type: ignore[arg-type]  # only dataclasses are given
    pairs = [(name, getattr(was, name, None), getattr(now, name)) for name in names]
    return ", ".join(f"{name} {after}, was {before}" for name, before, after in pairs if before != after)
