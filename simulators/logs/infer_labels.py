"""Which columns of a log are outcomes, and which tasks they make. By names first, then by content."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from simulators.logs.infer_columns import Column


def words(text: str) -> frozenset[str]:
    """The words of a text, and their plurals."""
    return frozenset(word + more for word in text.split() for more in ("", "s"))


ID_WORDS = words("id ids key code hash uuid no nr number idx index")
BINARY = words(
    "click clicked clicks clk like liked likes follow followed comment commented forward forwarded share shared hate "
    "dislike dislikes view viewed views watched play played purchase purchased buy bought order ordered convert "
    "converted conversion cart basket favorite favourite fav save saved bookmark bookmarked subscribe subscribed "
    "install installed open opened read enter skip skipped complete completed finish finished label target reward "
    "outcome booked booking reply replied retweet upvote downvote engagement response satisfied returned added"
)
AMOUNT = words(
    "rating ratings rate rated stars score scores grade watch watched dwell stay spent listened listening revenue gmv "
    "sales label target reward played play"
)
_RATING = words("rating ratings rate rated stars score scores grade label target")
_BEFORE = words("duration length size price count num cnt avg mean total position rank")


@dataclass
class Label:
    """An outcome.

    Attributes:
        task: Its name.
        column: Where it is found.
        kind: Of its task.
        threshold, scale, max_value, unit, time_column: As in the schema file.
        window_s: The window that is proposed.
        note: What is unsure of it; empty for nothing.
    """

    task: str
    column: str
    kind: Literal["binary", "regression"] = "binary"
    threshold: float | None = None
    scale: float | None = None
    max_value: float | None = None
    unit: str = ""
    time_column: str | None = None
    window_s: float = 60.0
    note: str = ""


def is_outcome(column: Column) -> bool:
    """Whether a column of a log is an outcome, by its name and content."""
    tokens = {*column.tokens}
    if not column.is_number and not column.is_flag:
        return False
    if (column.least or 0) < 0 or column.time_unit is not None or column.distinct < 2 or tokens & ID_WORDS:
        return False
    if column.is_flag:
        return bool(tokens & (BINARY | AMOUNT)) and not tokens & _BEFORE
    return bool(tokens & (AMOUNT | BINARY)) and not tokens & (_BEFORE - {"duration", "total"})


def labels_of(column: Column) -> list[Label]:
    """The tasks that a column of outcomes makes; none of a column that cannot be one."""
    task = task_name(column.name)
    if column.is_flag:
        return [Label(task, column.name)]
    if not (column.is_number or column.flags >= 0.999) or (column.least or 0) < 0 or column.greatest is None:
        return []
    if column.distinct == 1 and column.greatest in (0, 1):
        return [Label(task, column.name, note="one value in all rows that were looked at")]
    tokens = {*column.tokens}
    if column.distinct <= 11 and (tokens & _RATING or not tokens & (BINARY | AMOUNT)) and (column.least or 0) >= 0:
        value = _threshold(column)
        high = Label(f"{task}_high", column.name, threshold=value, note=f"from {value:g} on counts as a positive")
        return [high, Label(task, column.name, "regression", max_value=column.greatest)]
    if column.is_integer and tokens & BINARY and not tokens & AMOUNT and column.distinct < 100:
        return [Label(task, column.name, threshold=1, note="a count: one or more is a positive")]
    unit, scale = (
        ("s", 0.001) if "ms" in tokens else ("s", None) if tokens & words("s sec secs seconds") else ("", None)
    )
    limit = column.greatest * (scale or 1)
    label = Label(task, column.name, "regression", scale=scale, unit=unit, max_value=86_400.0)
    if limit > 86_400:
        label.max_value = nice_above(limit)
    label.note = "" if unit else "its unit is not known"
    return [label]


def task_name(column: str) -> str:
    """A task's name from its column's."""
    tokens = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", column)
    parts = [part for part in re.split(r"\W+|_+", tokens.lower()) if part]
    while len(parts) > 1 and parts[0] in ("is", "has", "did", "n", "num"):
        parts.pop(0)
    while len(parts) > 1 and parts[-1] in ("ms", "s", "sec", "flag", "label"):
        parts.pop()
    return "_".join(parts) or column


def nice_above(value: float) -> float:
    """The least of 1, 2, 5, 10, … that is not below a value."""
    step = 1e-3
    while True:
        for factor in (1, 2, 5):
            if step * factor >= value:
                return round(step * factor, 3)
        step *= 10


def _threshold(column: Column) -> float:
    """From where on a rating is a good one: of 1 … 5 it is 4."""
    low, high = column.least or 0.0, column.greatest or 1.0
    value = low + 0.75 * (high - low)
    return float(round(value)) if column.is_integer else round(2 * value) / 2


def noted(label: Label, why: str) -> Label:
    label.note = f"{why}; {label.note}" if label.note else why
    return label


def _small_range(column: Column) -> bool:
    return column.is_integer and 2 <= column.distinct <= 11 and (column.least or 0) >= 0


LAST_RESORTS: tuple[tuple[str, Callable[[Column], bool]], ...] = (
    ("by its content alone: 0 and 1", lambda column: column.is_flag),
    ("by its content alone: a few small numbers", _small_range),
)
