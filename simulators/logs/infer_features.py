"""Which columns become features, of which kind and source, and which tables of users and items belong to a log."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Literal

import numpy as np

from simulators.logs import sql
from simulators.logs.infer_columns import Column, constant_within, share_in, tokens_of, values_of
from simulators.logs.infer_labels import BINARY, Label, is_outcome, words
from simulators.logs.infer_names import flag_names, slug
from simulators.logs.infer_roles import ITEM, USER, Roles, id_score
from simulators.logs.infer_tables import LogSample, Table
from simulators.logs.leaks import SUSPECT_AUC, alone, codes_of

Entity = Literal["user", "item"]
Source = Literal["user", "item", "context"]
_LEAK_ROWS = 40_000
_FEWEST_FLAGS = 5
_MOST_IDS = 64
_AMOUNTS = words(
    "num count counts cnt n price amount age ages duration days day_count hours seconds s ms size length len width "
    "height score avg mean total sum ratio rate share percent pct ctr views likes latitude longitude lat lon weight "
    "volume cost budget revenue year runtime popularity distance quantity stock followers"
)
_KINDS = words(
    "band bucket group range level class id code type category cat tab page device city country zip postal tag feat "
    "segment os brand"
)


@dataclass
class FeatureLine:
    """A feature that is proposed.

    Attributes:
        name: Unique.
        kind, source, transform, elapsed, max_length: As in the schema file.
        column, expr, separator: Where it is found; all None for the column of its name.
        note: What is unsure.
    """

    name: str
    kind: Literal["id", "bag", "numeric"] = "id"
    source: Source = "context"
    transform: bool = False
    elapsed: bool = False
    max_length: int = 8
    column: str | None = None
    expr: str | None = None
    separator: str | None = None
    note: str = ""


@dataclass
class Side:
    """A feature table that is joined.

    Attributes:
        entity: ``user`` or ``item``.
        table: Its files.
        key: Its column of ids.
        share: How many of the log's ids it has.
    """

    entity: Entity
    table: Table
    key: str
    share: float
    left_out: dict[str, str] = field(default_factory=dict)


def find_sides(
    sample: LogSample, log: Table, roles: Roles, tables: Sequence[tuple[Table, list[Column]]]
) -> tuple[list[Side], list[str]]:
    """The tables of users and items, and what else was found."""
    found: dict[Entity, tuple[float, Side]] = {}
    others: list[str] = []
    foreign = {name.casefold() for name in log.columns if name not in (roles.user, roles.item)}
    ours: dict[Entity, str] = {"user": roles.user, "item": roles.item}
    for table, columns in tables:
        for column, entity in product(columns, ours):
            if len(columns) < 2 or not _may_be_key(column):
                continue
            if column.name.casefold() in foreign and not table.made_up:
                continue  # a column of the log's that is neither
            fit = _fit(sample, log, ours[entity], entity, table, column)
            if fit is None:
                continue
            best = found.get(entity)
            if best is None or fit[0] > best[0]:
                found[entity] = fit
                passed_over = None if best is None else best[1]
            else:
                passed_over = None if best[1].table is table else fit[1]
            if passed_over is not None and passed_over.share > 0.9:
                others.append(f"{passed_over.table.files[0].name} ({entity}s too; one table each is read)")
    if len(found) == 2 and found["user"][1].table is found["item"][1].table:
        worse = min(found, key=lambda entity: found[entity][0])
        del found[worse]
    chosen = [side for _, side in found.values()]
    taken = [side.table.files[0].name for side in chosen]
    return chosen, [other for other in dict.fromkeys(others) if other.split(" (")[0] not in taken]


def _may_be_key(column: Column) -> bool:
    """Whether a column has a value of its own in nearly every row."""
    unique = column.filled >= 0.98 * column.rows and column.distinct >= 0.95 * column.rows
    return unique and column.rows >= 2 and not column.is_list


def _fit(
    sample: LogSample, log: Table, ours: str, entity: Entity, table: Table, column: Column
) -> tuple[float, Side] | None:
    """How well a table fits the ids in a column of the log by one of its columns, and the table; None: not at all.

    Where the ids of users and items are both 1 … n, names and counts decide.
    """
    share, ids, keys = share_in(sample, log, ours, table, column.name)
    if share < 0.3:
        return None
    own, other = (USER, ITEM) if entity == "user" else (ITEM, USER)
    words_of_files = {*_file_words(table)}
    named = 3 * bool(words_of_files & own) - 3 * bool(words_of_files & other)
    named += 3 * bool(id_score(column, own)) - 3 * bool(id_score(column, other))
    named += column.name.casefold() == ours.casefold()
    alike = min(ids, keys) / max(ids, keys)
    if named < 0 or (named == 0 and alike < 0.05):
        return None
    return share + alike + named - 2 * table.is_split, Side(entity, table, column.name, share)


def _file_words(table: Table) -> list[str]:
    return [word for file in table.files for word in tokens_of(file.name)]


def log_features(sample: LogSample, log: Table, columns: Sequence[Column], roles: Roles) -> list[FeatureLine]:
    """The features that the log itself holds."""
    free = [c for c in columns if c.name not in roles.used and c.name not in roles.left_out]
    lines = []
    names = [c.name for c in free if c.filled and sql.family(c.sql_type) != "other"]
    by_item = constant_within(sample, log, roles.item, names)
    by_user = constant_within(sample, log, roles.user, names)
    for column in free:
        of_item, of_user = by_item.get(column.name), by_user.get(column.name)
        fixed = max(of_item or 0.0, of_user or 0.0) >= 0.99
        if column.time_unit is not None and not fixed:
            roles.left_out[column.name] = "a time beside the impression's: of an outcome?"
            continue
        if column.date_format is not None and not fixed:
            roles.left_out[column.name] = (
                "a day: it says no more than the time of the impression, or it is an outcome's?"
            )
            continue
        if column.is_flag and not fixed:
            roles.left_out[column.name] = (
                "0 and 1, and no name that says which: an outcome (a task), or known before (a feature)?"
            )
            continue
        if column.never_repeats and not column.is_number and not column.is_list and not fixed:
            roles.left_out[column.name] = "another text in each row: the impression's own id (impression_id)?"
            continue
        line = feature_of(column, roles.left_out)
        if line is None:
            continue
        if (of_item or 0) >= 0.99 and (of_item or 0) >= (of_user or 0):
            line.source = "item"
        elif (of_user or 0) >= 0.99:
            line.source = "user"
        if line.elapsed and line.source == "context":
            roles.left_out[column.name] = "a time: of an outcome?"
            continue
        lines.append(line)
    return _without_leaks(sample, log, lines, roles)


def side_features(sample: LogSample, side: Side, columns: Sequence[Column]) -> list[FeatureLine]:
    """The features that a table of users or items holds."""
    lines: list[FeatureLine] = []
    for run in _flag_runs([c for c in columns if c.name != side.key]):
        if len(run) >= _FEWEST_FLAGS and sum(c.ones for c in run) < len(run) / 2:
            lines.append(_bag_of_flags(sample, side, run))
            continue
        for column in run:
            line = feature_of(column, side.left_out)
            if line is not None and {*column.tokens} & (BINARY - {"view"}) and is_outcome(column):
                side.left_out[column.name] = "counts outcomes: of the time before the log only, or of its future too?"
            elif line is not None:
                lines.append(line)
    return [replace(line, source=side.entity) for line in lines]


def feature_of(column: Column, left_out: dict[str, str]) -> FeatureLine | None:
    """The feature that a column makes; None, with the reason in ``left_out``, for one that makes none."""
    name, why = slug(column.name), None
    if column.sql_type == '"NULL"':
        why = "empty"
    elif sql.family(column.sql_type) == "other":
        why = f"{column.sql_type.split('(')[0]}: an expr may take it apart"
    elif not column.filled:
        why = "empty"
    elif column.distinct == 1 and column.filled == column.rows:
        why = "the same in all rows"
    if why is not None:
        left_out[column.name] = why
        return None
    quoted = sql.quote(column.name)
    if column.is_list:
        most = min(max(column.most_ids, 1), _MOST_IDS)
        mark = column.separator if column.separator not in (None, "|", ",") else None
        ordered = {*column.tokens} & words("history recent last sequence seq past previous hist")
        note = "if its order tells, newest first, it may be a sequence" if ordered else ""
        return FeatureLine(name, "bag", max_length=most, column=column.name, separator=mark, note=note)
    if column.comma_numbers > 0.5 and column.comma_numbers + column.integers > 0.98:
        expr = f"TRY_CAST(replace({quoted}, ',', '.') AS DOUBLE)"
        return FeatureLine(name, "numeric", expr=expr, note="numbers with a decimal comma")
    if (stored := _stored_time(column)) is not None:
        return FeatureLine(
            f"{name}_age_d", "numeric", elapsed=True, transform=True, expr=stored, note="days since then"
        )
    family = sql.family(column.sql_type)
    numeric = column.is_number or (column.numbers >= 0.5 and bool(column.words))
    many = not numeric and column.rows >= 20 and column.distinct > 0.9 * column.filled
    described = {*column.tokens} & words("title name url link description text body image path email")
    if column.length > 60 or (many and (column.length > 12 or described)):
        left_out[column.name] = "free text, nearly another in each row"
        return None
    if column.is_flag or not numeric:
        return FeatureLine(name, column=column.name)
    tokens = {*column.tokens}
    whole = column.is_integer or (family == "float" and column.integers > 0.99)
    if whole and (tokens & _KINDS or (not tokens & _AMOUNTS and column.distinct <= 200_000)):
        note = "" if tokens & _KINDS or column.distinct <= 50 else "integers: ids, or an amount (kind: numeric)?"
        return FeatureLine(name, column=column.name, note=note)
    low, high, median = column.least or 0.0, column.greatest or 0.0, column.median or 0.0
    skewed = low >= 0 and high > 20 * max(median, 0.5)
    return FeatureLine(name, "numeric", transform=skewed, column=column.name)


def _stored_time(column: Column) -> str | None:
    """A time as seconds since 1970, of a column that holds one."""
    quoted, unit = sql.quote(column.name), column.time_unit
    if unit == "timestamp":
        return f"epoch(TRY_CAST({quoted} AS TIMESTAMPTZ))"
    if column.date_format is not None and (not column.is_number or "date" in column.tokens or "dt" in column.tokens):
        return f"epoch(TRY_STRPTIME(CAST({quoted} AS VARCHAR), {sql.text(column.date_format)}))"
    timed = {*column.tokens} & {
        "time",
        "timestamp",
        "ts",
        "at",
        "date",
        "created",
        "published",
        "uploaded",
        "registered",
    }
    if unit is None or not timed:
        return None
    divisor = {"s": "", "ms": " / 1e3", "us": " / 1e6"}[unit]
    return f"TRY_CAST({quoted} AS DOUBLE){divisor}"


def _flag_runs(columns: Sequence[Column]) -> list[list[Column]]:
    """Columns in order; neighbours that hold nothing but 0 and 1 together."""
    runs: list[list[Column]] = []
    for column in columns:
        only = column.filled == column.rows and column.flags >= 0.999
        if only and runs and runs[-1][-1].flags >= 0.999 and runs[-1][-1].filled == column.rows:
            runs[-1].append(column)
        else:
            runs.append([column])
    return runs


def _bag_of_flags(sample: LogSample, side: Side, run: Sequence[Column]) -> FeatureLine:
    """One bag for columns of 0 and 1, each of which says whether a name applies."""
    files = [file.name for file in sample.folder.iterdir() if file.is_file() and file not in side.table.files]
    given = flag_names(sample.folder, sorted(files), [c.name for c in run])
    name, labels = given or (f"{slug(run[0].name)}_and_others", [c.name for c in run])
    if side.table.layout is None or side.table.layout.csv.names == ():
        labels = [c.name for c in run]
    ones = [f"{sql.quote(c.name)} = {_one(c)}" for c in run]
    cases = ", ".join(f"CASE WHEN {one} THEN {sql.text(label)} END" for one, label in zip(ones, labels, strict=True))
    sums = " + ".join(f"({one})::INT" for one in ones)
    most = sample.rows(f"SELECT max({sums}) FROM {side.table.name}")[0][0]  # noqa: S608
    note = f"{len(run)} columns of 0 and 1: the names of those that are 1"
    return FeatureLine(name, "bag", max_length=max(int(most or 1), 1), expr=f"[{cases}]", note=note)


def _one(column: Column) -> str:
    """What stands for yes in a column of flags, as an SQL literal."""
    if column.sql_type == "BOOLEAN":
        return "true"
    if sql.family(column.sql_type) != "text":
        return "1"
    return sql.text("1" if column.is_number else next(e for e in column.examples if e.lower() == "true"))


def _without_leaks(sample: LogSample, log: Table, lines: list[FeatureLine], roles: Roles) -> list[FeatureLine]:
    """Leave out features that alone tell a label as no feature does that is known before it."""
    labels = [label for label in roles.labels if label.kind == "binary"]
    columns = [line.column for line in lines if line.column and line.source == "context"]
    if not labels or not columns:
        return lines
    values = values_of(sample, log, [*columns, *dict.fromkeys(label.column for label in labels)], _LEAK_ROWS)
    suspects: dict[str, str] = {}
    for label in labels:
        truth_N = _labels(values[label.column], label)
        for name in columns:
            codes_N = codes_of(np.array([value if value is not None else "" for value in values[name]], str))
            found = alone(codes_N, truth_N)
            if found is not None and found >= SUSPECT_AUC:
                suspects[name] = f"alone it tells {label.task} with an AUC of {found:.3f}: an outcome?"
    roles.left_out |= suspects
    return [line for line in lines if line.column not in suspects or line.source != "context"]


def _labels(values: Sequence[str | None], label: Label) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    def one(value: str | None) -> float:
        if value is None:
            return 0.0
        number = {"true": 1.0, "false": 0.0}.get(value.lower())
        if number is None:
            try:
                number = float(value)
            except ValueError:
                return 0.0
        return float(number >= (label.threshold or 0.5))

    return np.array([one(value) for value in values], np.float64)
