"""Which column of a log is which: user, item, time, request, outcomes. By names first, then by content.

What is decided without a name that says so is marked as unsure.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from simulators.logs import sql
from simulators.logs.infer_columns import Column, text_of, tokens_of
from simulators.logs.infer_labels import (
    AMOUNT,
    BINARY,
    ID_WORDS,
    LAST_RESORTS,
    Label,
    is_outcome,
    labels_of,
    nice_above,
    noted,
    words,
)
from simulators.logs.infer_tables import LogSample, Table
from smes.errors import LogError
from smes_io.log_spec import TimeUnit

USER = words(
    "user users uid userid customer customers member visitor viewer account client reader person people buyer shopper "
    "listener player subscriber guest cookie reviewer profile"
)
ITEM = words(
    "item items iid itemid video videos movie movies movieid film product products productid sku article song track ad "
    "news book isbn asin post doc document content creative photo pin recipe goods offer listing hotel business game "
    "app course job place poi clip show episode"
)
_TIME = words("time timestamp ts date datetime shown at created event occurred logged when served impression")
_REQUEST = words("request req query slate page_view pageview impression_list reqid requestid session search")
_IMPRESSION = words("impression impressionid event eventid row rowid uuid log view")
_FILLED = 0.98


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
class Roles:
    """The columns of a log by what they are.

    Attributes:
        user, item, time: Columns.
        unit: Of the time.
        request, impression: Columns, if there are such.
        labels: The outcomes.
        max_rejected: The share of rows that may be unusable, if more than usual are without user or item.
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
    max_rejected: float | None = None
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
    """How well a column's name says that it is the id of an entity: 0 (not) … 4."""
    tokens = {*column.tokens}
    if not tokens & role or not column.filled or column.is_list:
        return 0
    if column.is_number and not column.is_integer and not column.sql_type.startswith(("DOUBLE", "FLOAT")):
        return 0
    full = 2 * (column.filled >= _FILLED * column.rows)
    if not tokens - role - ID_WORDS:
        return 2 + full
    return 1 + full if column.tokens[-1] in ("id", "uuid") else 0


def find_roles(sample: LogSample, table: Table, columns: Sequence[Column], hints: Hints) -> Roles:
    """Decide.

    Raises:
        LogError: No column can be the user, the item, the time or an outcome. The message lists the columns.
        ValueError: A hint names no column, or one that cannot be what it says.
    """
    if table.rows < 2:
        raise LogError(f"{table.files[0]}: {table.rows} row, expected more to tell its columns apart")
    by_name = {c.name: c for c in columns}
    for hint in (hints.user, hints.item, hints.time, *hints.labels):
        if hint is not None and hint not in by_name:
            raise ValueError(f"{table.files[0]}: no column {hint!r}; the columns are {_listed(columns)}")
    roles = Roles("", "", "", "s")
    _find_ids(table, columns, hints, roles)
    _find_time(table, columns, hints, roles)
    _find_empty(by_name, roles)
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
    others = [
        c
        for c in columns
        if _id_like(c)
        and c.filled >= _FILLED * c.rows
        and c.name not in (roles.user, roles.item, hints.time, *hints.labels)
    ]
    if hints.time is None:
        times = [c for c in others if c.time_unit is not None]
        enough = len(others) - len(times) >= 2 - bool(roles.user) - bool(roles.item)
        for column in times if enough else times[-1:]:  # ids of ten digits look like times, too
            others.remove(column)
    for role in ("user", "item"):
        if getattr(roles, role):
            continue
        wanted = 2 if role == "user" and not roles.item else 1
        ranked = sorted(others, key=lambda c: (c.never_repeats, -c.distinct))[:wanted]
        if not ranked:
            raise LogError(
                f"{table.files[0]}: no column looks like the id of the {role}, expected one (--{role} names it); "
                f"the columns are {_listed(columns)}"
            )
        chosen = min(ranked, key=columns.index)
        others.remove(chosen)
        setattr(roles, role, chosen.name)
        why = "though another one in each row" if chosen.never_repeats else "it repeats, and has many values"
        roles.notes[f"{role}_id"] = f"by its content alone: {why}"
    if roles.user == roles.item:
        raise ValueError(f"{table.files[0]}: column {roles.user!r} as user and item, expected two (--user, --item)")


def _find_empty(columns: dict[str, Column], roles: Roles) -> None:
    """Rows without user or item are rejected; the schema file has to say so where they are many."""
    rows = max(columns[roles.user].rows, 1)
    empty = sum(1 - columns[name].filled / rows for name in (roles.user, roles.item))
    if empty > 0.005:
        roles.max_rejected = min(round(1.2 * empty + 0.01, 2), 1.0)
        roles.notes["max_rejected"] = f"up to {empty:.1%} of the rows have no user or no item, and are left out"


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
        named_id = bool(tokens & ID_WORDS) or len(tokens) == 1
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
            raise ValueError(f"{table.files[0]}: column {min(missing)!r} as an outcome, expected one of numbers from 0")
        return
    for column in free:
        if is_outcome(column):
            roles.labels += labels_of(column)
    for why, fits in LAST_RESORTS if not roles.labels else ():
        for column in free:
            if not roles.labels and fits(column):
                roles.labels += [noted(label, why) for label in labels_of(column)]
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


def _id_like(column: Column) -> bool:
    if not column.filled or column.is_list or column.is_flag or column.distinct < 3:
        return False
    return column.is_integer or not column.is_number or column.sql_type in ("DOUBLE", "FLOAT")


def _listed(columns: Sequence[Column]) -> str:
    return ", ".join(c.name for c in columns[:60])
