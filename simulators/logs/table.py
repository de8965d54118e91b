"""Plan the SQL that reads a log or a feature table: check its columns, encode them, and say why a row is unusable."""

# ruff: noqa: S608 - names are quoted and texts escaped by the functions of sql.py; expressions are the operator's own.

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from simulators.logs import sql
from simulators.logs.parts import Part, TableFiles, describe
from smes.errors import LogError
from smes.schema import Feature, Schema, Task
from smes_io.log_spec import FeatureSource, LogSpec, SideTable

FLAG_BITS = 60  # conditions a BIGINT column of flags holds
_OPTIONAL = "; {key}.optional: true reads such a file as one without values"


@dataclass(frozen=True)
class Watch:
    """Something to count in the rows of a table.

    Attributes:
        what: ``no value``, ``unreadable``, or ``inexact``: an id in a float so large that it may have been another.
        kind: What ``name`` is.
        name: A task, a feature, or a key of the ``log`` section.
        source: The column or expression that it is read from.
    """

    what: Literal["no value", "unreadable", "inexact"]
    kind: Literal["label", "feature", "key"]
    name: str
    source: str


@dataclass(frozen=True)
class TablePlan:
    """How to read one table.

    Attributes:
        files: Its files.
        rows: SELECT statement of ``smes_row``, the row's number in the files, of the encoded columns and, for the log,
            of ``event_time_ms`` and ``smes_digest``, a hash of all columns. ``smes_reason`` says why a row is unusable:
            a place in ``reasons``, or null. ``smes_flags 0 …`` hold a bit for each of ``watches``.
            ``smes_example r0 …`` and ``smes_example w0 …`` are the texts that a reason or a watch is about.
        columns: Names of the encoded columns.
        features: The features among them.
        reasons: Why rows are unusable.
        watches: What is counted.
        derived_impression_id: Whether the log has no column of impression ids.
    """

    files: TableFiles
    rows: str
    columns: tuple[str, ...]
    features: tuple[Feature, ...]
    reasons: tuple[str, ...]
    watches: tuple[Watch, ...]
    derived_impression_id: bool = False

    @property
    def flags(self) -> list[str]:
        """The quoted columns of flags."""
        return [_flags(i) for i in range((len(self.watches) + FLAG_BITS - 1) // FLAG_BITS)]


@dataclass
class _Encoded:
    """What is selected from one part: expressions over its columns.

    Attributes:
        columns: Name → encoded value.
        reasons: Reason → its condition and the text that it is about.
        watches: What is counted → its condition and the text that it is about.
    """

    columns: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, tuple[str, str]] = field(default_factory=dict)
    watches: dict[Watch, tuple[str, str]] = field(default_factory=dict)

    def watch(
        self,
        what: Literal["no value", "unreadable", "inexact"],
        kind: Literal["label", "feature", "key"],
        names: tuple[str, str],
        condition: str | None,
        expr: str = "NULL",
    ) -> None:
        """Count a condition over ``names``: the name and its source; None if it cannot be true."""
        self.watches[Watch(what, kind, *names)] = (condition or "false", f"CAST({expr} AS VARCHAR)")

    def select(self, source: str) -> str:
        """The SELECT statement."""
        named = [f"{expr} AS {sql.quote(name)}" for name, expr in self.columns.items()]
        cases = "".join(f" WHEN {condition} THEN {i}" for i, (condition, _) in enumerate(self.reasons.values()))
        named.append(f"CAST(CASE{cases} END AS SMALLINT) AS smes_reason")
        conditions = [condition for condition, _ in self.watches.values()]
        for start in range(0, len(conditions), FLAG_BITS):
            bits = [
                f"CASE WHEN {condition} THEN {1 << i}::BIGINT ELSE 0::BIGINT END"
                for i, condition in enumerate(conditions[start : start + FLAG_BITS])
                if condition != "false"
            ]
            named.append(f"CAST({' + '.join(bits) or '0'} AS BIGINT) AS {_flags(start // FLAG_BITS)}")
        for letter, shown in (("r", self.reasons), ("w", self.watches)):
            named += [f"{text} AS {example(letter, i)}" for i, (_, text) in enumerate(shown.values())]
        return f"SELECT {', '.join(named)} FROM {source}"


def outside_reason(spec: LogSpec) -> str:
    """Why a row with a time that cannot be is unusable."""
    return f"event_time ({spec.event_time}) is outside 2000 … a day from now"


def example(letter: str, index: int) -> str:
    """The quoted column of what a reason (``r``) or a watch (``w``) is about."""
    return sql.quote(f"smes_example {letter}{index}")


def _flags(index: int) -> str:
    return sql.quote(f"smes_flags {index}")


def plan_log(
    connection: Any, schema: Schema, spec: LogSpec, files: TableFiles, features: Sequence[Feature]
) -> TablePlan:
    """Plan the log itself.

    Raises:
        LogError: A column is missing or of an unusable type.
    """
    columns, parts = files.columns, []
    for part in files.parts:
        planner = _PartPlanner(connection, part, spec)
        more = planner.log_rows(columns)
        planner.log_ids()
        for feature in features:
            planner.feature(feature, more)
        for task in schema.tasks:
            planner.label(task)
        parts.append((planner.out, f"(SELECT *{more} FROM {part.scan})"))
        planner.check(more)
    return _plan(files, parts, features, derived_impression_id=spec.impression_id is None)


def plan_side_table(
    connection: Any, spec: LogSpec, side: SideTable, files: TableFiles, features: Sequence[Feature], entity: str
) -> TablePlan:
    """Plan a feature table.

    Raises:
        LogError: A column is missing or of an unusable type.
    """
    parts = []
    for part in files.parts:
        planner = _PartPlanner(connection, part, spec)
        planner.id("key", side.key, f"log.{entity}_features.key", required=f"key ({side.key}) is empty")
        for feature in features:
            planner.feature(feature, "")
        parts.append((planner.out, part.scan))
        planner.check("")
    return _plan(files, parts, features)


def _plan(
    files: TableFiles,
    parts: list[tuple[_Encoded, str]],
    features: Sequence[Feature],
    *,
    derived_impression_id: bool = False,
) -> TablePlan:
    first = parts[0][0]
    selects = [out.select(source) for out, source in parts]
    rows = f"SELECT *, row_number() OVER () - 1 AS smes_row FROM ({' UNION ALL '.join(selects)})"
    names = tuple(name for name in first.columns if name != "smes_digest")
    return TablePlan(
        files, rows, names, tuple(features), tuple(first.reasons), tuple(first.watches), derived_impression_id
    )


class _PartPlanner:
    """Plans one part of a table."""

    def __init__(self, connection: Any, part: Part, spec: LogSpec) -> None:
        self._connection, self._part, self._spec = connection, part, spec
        self.out = _Encoded()

    def log_rows(self, columns: dict[str, list[str]]) -> str:
        """Plan the time and the digest of the log's rows.

        Returns:
            The columns that are added to the files' own.
        """
        part, spec, columns_of = self._part, self._spec, self._part.types
        time = sql.time_sql(part.column(spec.event_time, "log.event_time"), spec.time_unit)
        # The encoded time replaces a column of its name.
        same = [name for name in columns_of if name.casefold() == "event_time_ms"]
        more = f"{f' EXCLUDE ({sql.quote(same[0])})' if same else ''}, {time} AS event_time_ms"
        self._bind("event_time_ms", more, f"log.event_time {spec.event_time!r} as a time in {spec.time_unit}")
        hashed = [_hashed(name, columns_of.get(name), types) for name, types in columns.items()]
        self.out.columns["event_time_ms"] = "event_time_ms"
        self.out.columns["smes_digest"] = "smes_digest"
        return f"{more}, hash({', '.join(hashed)}) AS smes_digest"

    def log_ids(self) -> None:
        """Plan the ids, and the reasons to reject a row without them."""
        spec = self._spec
        self.id("user", spec.user_id, "log.user_id", required=f"user_id ({spec.user_id}) is empty")
        self.id("item", spec.item_id, "log.item_id", required=f"item_id ({spec.item_id}) is empty")
        reason = f"event_time ({spec.event_time}) is no time in {spec.time_unit}"
        written = f"CAST({sql.quote(spec.event_time)} AS VARCHAR)"
        self.out.reasons[reason] = ("event_time_ms IS NULL", written)
        # Which times are outside is known when all have been seen; see LogStore.
        self.out.reasons[outside_reason(spec)] = ("false", written)
        if (column := spec.impression_id) is not None:
            self.id("impression_id", column, "log.impression_id", required=f"impression_id ({column}) is empty")
        if spec.request_id is None:
            self.out.columns["request_id"] = sql.MISSING_SQL
        else:
            self.id("request_id", spec.request_id, "log.request_id")

    def id(self, name: str, column: str, key: str, *, required: str | None = None) -> None:
        """Plan an id, and the reason to reject a row without one."""
        part = self._part
        expr, sql_type = part.column(column, key), part.types.get(column, "")
        self._refuse_type(f"column {column!r}", sql_type, sql_type, key)
        self.out.columns[name] = sql.id_sql(expr, sql_type, part.null_words)
        self.out.watch("inexact", "key", (key, column), sql.inexact_id_sql(expr, sql_type), expr)
        if required is not None:
            self.out.reasons[required] = (sql.no_value_sql(expr, sql_type, part.null_words), "NULL::VARCHAR")

    def feature(self, feature: Feature, more: str) -> None:
        """Plan a feature."""
        part, key, name = self._part, f"log.features.{feature.name}", f"feature {feature.name}"
        source = self._spec.features.get(feature.name, FeatureSource())
        column = source.column or feature.name
        named = (feature.name, source.expr or column)
        if source.expr is None and source.optional and column not in part.types:
            self.out.columns[name] = sql.absent_sql(feature)
            self.out.watch("no value", "feature", named, "true")
            self.out.watch("unreadable", "feature", named, None)
            self.out.watch("inexact", "feature", named, None)
            return
        if source.expr is not None:
            expr = f"({source.expr})"
            sql_type = self._type_of(expr, more, f"a value for {key} ({source.expr})")
        else:
            expr = part.column(column, key, _OPTIONAL.format(key=key))
            sql_type = part.types[column]
        self._feature_type(feature, named[1], sql_type, key)
        words = self._spec.null_words if feature.is_list else part.null_words  # in bags they are part of a field
        self.out.columns[name] = sql.feature_sql(feature, expr, sql_type, source.separator, words)
        self.out.watch("no value", "feature", named, sql.feature_no_value_sql(feature, expr, sql_type, words))
        self.out.watch("unreadable", "feature", named, sql.unreadable_sql(feature, expr, sql_type, words), expr)
        inexact = None if feature.kind == "numeric" else sql.inexact_id_sql(expr, sql_type)
        self.out.watch("inexact", "feature", named, inexact, expr)
        self._bind(self.out.columns[name], more, f"{key} readable as {feature.kind}, its type is {sql_type}")

    def label(self, task: Task) -> None:
        """Plan a task's outcome and its time, and the reason to reject a row for it."""
        part, source, key = self._part, self._spec.labels[task.name], f"log.labels.{task.name}"
        named = (task.name, source.column)
        value, usable, expected = _label_values(task, self._spec, "value")
        reason = f"{key} ({source.column}): expected {expected}"
        if source.optional and source.column not in part.types:
            self.out.columns[f"label {task.name}"] = sql.NAN_SQL
            self.out.watch("no value", "label", named, "true")
            self.out.watch("unreadable", "label", named, None)
            self.out.reasons[reason] = ("false", "NULL::VARCHAR")
        else:
            column = part.column(source.column, key, _OPTIONAL.format(key=key))
            sql_type = part.types[source.column]
            self._number_type(source.column, sql_type, key)
            value, usable, _ = _label_values(task, self._spec, sql.number_sql(column, sql_type))
            blank = sql.no_number_sql(column, sql_type, part.null_words)
            self.out.columns[f"label {task.name}"] = (
                f"CASE WHEN {blank} THEN {sql.NAN_SQL} ELSE CAST({value} AS FLOAT) END"
            )
            self.out.watch("no value", "label", named, blank)
            unusable = f"NOT {blank} AND NOT COALESCE({usable}, false)"
            self.out.watch("unreadable", "label", named, unusable, column)
            self.out.reasons[reason] = (unusable, f"CAST({column} AS VARCHAR)")
        if source.time_column is not None:
            self._label_time(task, source.time_column, optional=source.optional)

    def check(self, more: str) -> None:
        """Bind all expressions, so that a column of an unusable type is reported now and not while reading."""
        query = self.out.select(f"(SELECT *{more} FROM {self._part.sample})")
        describe(self._connection, f"DESCRIBE {query}", self._part.where, "readable columns")

    def _label_time(self, task: Task, name: str, *, optional: bool) -> None:
        part, key = self._part, f"log.labels.{task.name}.time_column"
        reason = f"{key} ({name}) is no time in {self._spec.time_unit}"
        if optional and name not in part.types:
            self.out.columns[f"time {task.name}"] = sql.MISSING_SQL
            self.out.reasons[reason] = ("false", "NULL::VARCHAR")
            return
        column = part.column(name, key)
        time, blank = (
            sql.time_sql(column, self._spec.time_unit),
            sql.no_value_sql(column, part.types[name], part.null_words),
        )
        self.out.columns[f"time {task.name}"] = f"COALESCE({time}, {sql.MISSING_SQL})"
        self.out.reasons[reason] = (f"NOT {blank} AND {time} IS NULL", f"CAST({column} AS VARCHAR)")

    def _feature_type(self, feature: Feature, source: str, sql_type: str, key: str) -> None:
        if feature.kind == "numeric":
            self._number_type(source, sql_type, key)
        elif feature.is_list and sql.family(sql_type) == "list":
            self._refuse_type(
                f"column {source!r}", sql.element_type(sql_type), sql_type, key, "lists of integers or text"
            )
        else:
            self._refuse_type(f"column {source!r}", sql_type, sql_type, key)

    def _number_type(self, source: str, sql_type: str, key: str) -> None:
        if sql.family(sql_type) in ("list", "time", "bytes", "other"):
            raise LogError(f"{self._part.where}: column {source!r} is {sql_type}, expected numbers or text ({key})")

    def _refuse_type(
        self, column: str, sql_type: str, whole: str, key: str, expected: str = "integers or text"
    ) -> None:
        if sql.family(sql_type) in ("list", "other"):
            raise LogError(f"{self._part.where}: {column} is {whole}, expected {expected} ({key})")

    def _type_of(self, expr: str, more: str, key: str) -> str:
        """The SQL type of an expression over the part's columns and those that ``more`` adds."""
        return next(iter(self._bind(f"{expr} AS value", more, key).values()))

    def _bind(self, columns: str, more: str, expected: str) -> dict[str, str]:
        query = f"DESCRIBE SELECT {columns} FROM (SELECT *{more} FROM {self._part.sample})"
        return describe(self._connection, query, self._part.where, expected)


def _label_values(task: Task, spec: LogSpec, number: str) -> tuple[str, str, str]:
    """A task's value made of a number, the condition of a usable one, and what is expected in words."""
    source = spec.labels[task.name]
    if task.kind == "regression":
        value = f"{number} * {source.scale!r}"
        expected = f"a number from 0 to {task.max_value:g} (after scale {source.scale:g})"
        return value, f"{value} BETWEEN 0 AND {task.max_value!r}", expected
    if source.threshold is not None:
        return f"CAST({number} >= {source.threshold!r} AS INTEGER)", f"{number} IS NOT NULL", "a number"
    return number, f"{number} IN (0, 1)", "0 or 1"


def _hashed(name: str, sql_type: str | None, types: list[str]) -> str:
    """What the digest of a row hashes of a column, the same for the same value in files of different types."""
    if sql_type is None:
        return "NULL"
    if len(types) == 1:
        return sql.quote(name)
    value = f"CAST({sql.quote(name)} AS VARCHAR)"
    return f"CASE WHEN ends_with({value}, '.0') THEN {value}[:-3] ELSE {value} END"
