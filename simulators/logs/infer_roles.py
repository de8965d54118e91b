"""Which column of a log is which: user, item, time, request, outcomes. By names first, then by content.

What is decided without a name that says so is marked as unsure.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from simulators.logs import sql
from simulators.logs.infer_columns import Column, text_of, tokens_of
from simulators.logs.infer_tables import LogSample, Table
from smes.errors import LogError
from smes_io.log_spec import TimeUnit


def words(text: str) -> frozenset[str]:
    """The words of a text, and their plurals."""
    return frozenset(word + more for word in text.split() for more in ("", "s"))


USER = words(
    "user users uid userid customer customers member visitor viewer account client reader person people buyer shopper "
    "listener player subscriber guest cookie reviewer profile"
)
ITEM = words(
    "item items iid itemid video videos movie movies movieid film product products productid sku article song track ad "
    "news book isbn asin post doc document content creative photo pin recipe goods offer listing hotel business game "
    "app course job place poi clip show episode"
)
_ID = words("id ids key code hash uuid no nr number idx index")
_TIME = words("time timestamp ts date datetime shown at created event occurred logged when served impression")
_REQUEST = words("request req query slate page_view pageview impression_list reqid requestid session search")
_IMPRESSION = words("impression impressionid event eventid row rowid uuid log view")
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


@dataclass(frozen=True)
class Hints:
    """Columns that the operator names.

    Attributes:
        user, item, time: Columns of the log; None to find out.
        labels: Columns that are outcomes.
    """

    user: str | None = None
    item: str | None = None
    time: str | None = None
    labels: tuple[str, ...] = ()


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


@dataclass
class Roles:
    """The columns of a log by what they are.

    Attributes:
        user, item, time: Columns.
        unit: Of the time.
        request, impression: Columns, if there are such.
        labels: The outcomes.
        left_out: Column → why it is no feature.
        notes: Key of the schema file → what is unsure.
    """

    user: str
    item: str
    time: str
    unit: TimeUnit
    request: str | None = None
    impression: str | None = None
    labels: list[Label] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def used(self) -> set[str]:
        """Columns that have a role."""
        of_labels = {c for label in self.labels for c in (label.column, label.time_column) if c}
        return {c for c in (self.user, self.item, self.time, self.request, self.impression) if c} | of_labels


def looks_like_a_log(columns: Sequence[Column]) -> int:
    """How much a table looks like a log of impressions: 0 … 3 for a time, a user and an item."""
    has_time = any(c.time_unit is not None and c.distinct > 1 for c in columns) or any(
        c.is_number and {*c.tokens} & {"time", "timestamp", "ts"} for c in columns
    )
    named = [max((id_score(c, role) for c in columns), default=0) > 0 for role in (USER, ITEM)]
    unnamed = [c for c in columns if _id_like(c) and c.repeats > 1.2 and c.time_unit is None]
    unnamed = [c for c in unnamed if not id_score(c, USER) and not id_score(c, ITEM)]
    return has_time + min(sum(named) + len(unnamed), 2)


def id_score(column: Column, role: frozenset[str]) -> int:
    """How well a column's name says that it is the id of an entity: 0 (not) … 3."""
    tokens = {*column.tokens}
    if not tokens & role or not column.filled or column.is_list:
        return 0
    if column.is_number and not column.is_integer and not column.sql_type.startswith(("DOUBLE", "FLOAT")):
        return 0
    if not tokens - role - _ID:
        return 3
    return 2 if column.tokens[-1] in ("id", "uuid") else 0


def find_roles(sample: LogSample, table: Table, columns: Sequence[Column], hints: Hints) -> Roles:
    """Decide.

    Raises:
        LogError: No column can be the user, the item, the time or an outcome. The message lists the columns.
    """
    if table.rows < 2:
        raise LogError(f"{table.files[0]}: {table.rows} row, expected more to tell its columns apart")
    by_name = {c.name: c for c in columns}
    for hint in (hints.user, hints.item, hints.time, *hints.labels):
        if hint is not None and hint not in by_name:
            raise LogError(f"{table.files[0]}: no column {hint!r}; the columns are {_listed(columns)}")
    roles = Roles("", "", "", "s")
    _find_ids(table, columns, hints, roles)
    _find_time(table, columns, hints, roles)
    _find_request(sample, table, columns, roles)
    _find_labels(table, columns, hints, roles)
    for label in roles.labels:
        _find_label_time(sample, table, columns, roles, label)
    return roles


def _find_ids(table: Table, columns: Sequence[Column], hints: Hints, roles: Roles) -> None:
    scored: list[tuple[str, str | None, frozenset[str]]] = [("user", hints.user, USER), ("item", hints.item, ITEM)]
    for role, hint, own in scored:
        best = max(columns, key=lambda c: id_score(c, own))
        if hint is not None:
            setattr(roles, role, hint)
        elif id_score(best, own) > 0:
            setattr(roles, role, best.name)
    others = [c for c in columns if _id_like(c) and c.name not in (roles.user, roles.item, hints.time, *hints.labels)]
    if hints.time is None:
        times = [c for c in others if c.time_unit is not None]
        enough = len(others) - len(times) >= 2 - bool(roles.user) - bool(roles.item)
        for column in times if enough else times[-1:]:  # ids of ten digits look like times, too
            others.remove(column)
    for role in ("user", "item"):
        if getattr(roles, role):
            continue
        wanted = 2 if role == "user" and not roles.item else 1
        ranked = sorted(others, key=lambda c: -c.distinct)[:wanted]
        if not ranked:
            raise LogError(
                f"{table.files[0]}: no column looks like the id of the {role}, expected one (--{role} names it); "
                f"the columns are {_listed(columns)}"
            )
        chosen = min(ranked, key=columns.index)
        others.remove(chosen)
        setattr(roles, role, chosen.name)
        roles.notes[f"{role}_id"] = "by its content alone: it repeats, and has many values"
    if roles.user == roles.item:
        raise LogError(f"{table.files[0]}: column {roles.user!r} as user and item, expected two (--user, --item)")


def _find_time(table: Table, columns: Sequence[Column], hints: Hints, roles: Roles) -> None:
    taken = (roles.user, roles.item, *hints.labels)

    def fit(column: Column) -> tuple[int, int, int]:
        tokens = {*column.tokens}
        outcome = bool(tokens & (BINARY | AMOUNT)) - bool(tokens & {"shown", "event", "impression", "served"})
        return (len(tokens & _TIME) - 2 * outcome, int(column.filled == column.rows), column.distinct)

    there = [c for c in columns if c.name not in taken and c.filled >= 0.98 * c.rows]
    found = [c for c in there if c.time_unit is not None and c.distinct > 1]
    if hints.time is not None:
        found = [c for c in columns if c.name == hints.time]
    if not found:
        found = [c for c in there if c.is_number and {*c.tokens} & _TIME and (c.least or 0) >= 0 and c.distinct > 1]
    if not found:
        dated = [c for c in there if c.date_format or c.timestamps > 0.5]
        more = f"; {dated[0].name} holds dates such as {dated[0].examples[0]!r}, which is no ISO 8601" if dated else ""
        raise LogError(
            f"{table.files[0]}: no column holds times from 1995 to now in s, ms, us or ISO 8601{more} "
            f"(--time names one); the columns are {_listed(columns)}"
        )
    best = max(found, key=fit)
    roles.time = best.name
    if best.time_unit is not None:
        roles.unit = best.time_unit
        if len(found) > 1 and not {*best.tokens} & _TIME:
            roles.notes["event_time"] = (
                f"other columns hold times, too: {', '.join(c.name for c in found if c is not best)}"
            )
        if best.timestamps > 0.99 and best.length <= 10:
            roles.notes["event_time"] = "days only: impressions of a day come in the order of the files"
        return
    greatest = best.greatest or 0.0
    units: dict[str, TimeUnit] = {"ms": "ms", "us": "us", "s": "s"}
    roles.unit = next((units[t] for t in best.tokens if t in units), "s" if greatest < 777_600 else "ms")
    roles.notes["time_unit"] = "the times seem to count from the log's own beginning, so that the unit is a guess"


def _find_request(sample: LogSample, table: Table, columns: Sequence[Column], roles: Roles) -> None:
    for column in columns:
        tokens = {*column.tokens}
        if column.name in roles.used or not column.filled or column.is_flag or not _id_like(column):
            continue
        named_id = bool(tokens & _ID) or len(tokens) == 1
        if named_id and tokens & _IMPRESSION and column.distinct == column.rows and column.filled == column.rows:
            if not table.sampled:
                roles.impression = roles.impression or column.name
            else:
                roles.left_out[column.name] = "may be the impression's unique id (impression_id); a sample cannot tell"
        elif named_id and tokens & _REQUEST and roles.request is None and column.distinct < column.rows:
            users = text_of(roles.user, table.columns[roles.user])
            request = text_of(column.name, column.sql_type)
            mixed, all_of = sample.rows(
                f"SELECT count(*) FILTER (u > 1), count(*) FROM (SELECT count(DISTINCT {users}) AS u "  # noqa: S608
                f"FROM {table.name} WHERE {request} IS NOT NULL GROUP BY {request})"
            )[0]
            if mixed <= 0.01 * all_of:
                roles.request = column.name
                if not tokens & words("request req query slate requestid reqid"):
                    roles.notes["request_id"] = "one user each, but is it the items that were shown together?"
            else:
                roles.left_out[column.name] = "no request: several users have the same"


def _find_labels(table: Table, columns: Sequence[Column], hints: Hints, roles: Roles) -> None:
    free = [c for c in columns if c.name not in roles.used and c.name not in roles.left_out and c.filled]
    if hints.labels:
        for column in free:
            if column.name in hints.labels:
                roles.labels += labels_of(column)
        missing = {*hints.labels} - {label.column for label in roles.labels}
        if missing:
            raise LogError(f"{table.files[0]}: column {min(missing)!r} as an outcome: expected numbers from 0")
        return
    for column in free:
        if is_outcome(column):
            roles.labels += labels_of(column)
    for why, fits in _LAST_RESORTS if not roles.labels else ():
        for column in free:
            if not roles.labels and fits(column):
                roles.labels += [_noted(label, why) for label in labels_of(column)]
    if not roles.labels:
        texts = [c.name for c in free if {*c.tokens} & words("event type action behavior behaviour")]
        more = (
            f"; {texts[0]} may say what happened, but a log has a row for each shown item, a column for each outcome"
            if texts
            else ""
        )
        for column in free:
            if {*column.tokens} & BINARY and not column.is_number and not texts:
                more = f"; {column.name} holds {', '.join(column.examples)}, expected 0 and 1"
        raise LogError(
            f"{table.files[0]}: no column looks like an outcome: 0 and 1, or numbers such as a rating or a watch time "
            f"(--label names one){more}; the columns are {_listed(columns)}"
        )


def is_outcome(column: Column) -> bool:
    """Whether a column of a log is an outcome, by its name and content."""
    tokens = {*column.tokens}
    if not column.is_number and not column.is_flag:
        return False
    if (column.least or 0) < 0 or column.time_unit is not None or column.distinct < 2 or tokens & _ID:
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


def _find_label_time(sample: LogSample, table: Table, columns: Sequence[Column], roles: Roles, label: Label) -> None:
    """Find the column that says when an outcome happened, and how long after the impression that is."""
    stems = {token[:4] for token in tokens_of(label.column) if token not in ("is", "has")}
    for column in columns:
        if column.name in roles.used or column.time_unit != roles.unit or not column.filled:
            continue
        if not stems & {token[:4] for token in column.tokens}:
            continue
        shown = sql.time_sql(sql.quote(roles.time), roles.unit)
        happened = sql.time_sql(sql.quote(column.name), roles.unit)
        after, late, count = sample.rows(
            f"SELECT count(*) FILTER (d >= 0), quantile_cont(d, 0.99) FILTER (d >= 0), count(d) FROM "  # noqa: S608
            f"(SELECT {happened} - {shown} AS d FROM {table.name})"
        )[0]
        if count and after >= 0.95 * count:
            label.time_column = column.name
            label.window_s = max(nice_above(float(late) / 1000), 1.0)
            return


def _threshold(column: Column) -> float:
    """From where on a rating is a good one: of 1 … 5 it is 4."""
    low, high = column.least or 0.0, column.greatest or 1.0
    value = low + 0.75 * (high - low)
    return float(round(value)) if column.is_integer else round(2 * value) / 2


def _noted(label: Label, why: str) -> Label:
    label.note = f"{why}; {label.note}" if label.note else why
    return label


def _small_range(column: Column) -> bool:
    return column.is_integer and 2 <= column.distinct <= 11 and (column.least or 0) >= 0


_LAST_RESORTS: tuple[tuple[str, Callable[[Column], bool]], ...] = (
    ("by its content alone: 0 and 1", lambda column: column.is_flag),
    ("by its content alone: a few small numbers", _small_range),
)


def _id_like(column: Column) -> bool:
    if not column.filled or column.is_list or column.is_flag or column.distinct < 3:
        return False
    return column.is_integer or not column.is_number or column.sql_type in ("DOUBLE", "FLOAT")


def _listed(columns: Sequence[Column]) -> str:
    return ", ".join(c.name for c in columns[:60])
