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
        parts: For each part of them what can be selected.
        columns: Names of the encoded columns.
        features: The features among them.
        reasons: Why rows are unusable.
        watches: What is counted.
        derived_impression_id: Whether the log has no column of impression ids.
    """

    files: TableFiles
    parts: tuple["Encoded", ...]
    columns: tuple[str, ...]
    features: tuple[Feature, ...]
    reasons: tuple[str, ...]
    watches: tuple[Watch, ...]
    derived_impression_id: bool = False

    @property
    def flags(self) -> list[str]:
        """The names of the columns of flags."""
        return [_flags(i) for i in range((len(self.watches) + FLAG_BITS - 1) // FLAG_BITS)]

    def select(self, names: Sequence[str]) -> str:
        """SELECT statement of all rows in the files' order: ``smes_row``, the row's number in the files, and by name:

        * the encoded columns;
        * ``smes_digest`` (log): a hash of all columns of the files;
        * ``smes_reason``: why the row is unusable, a place in ``reasons``; or null;
        * ``smes_flags 0 …``: a bit for each of ``watches``;
        * ``smes_example r0 …`` and ``smes_example w0 …``: the text that a reason or a watch is about.
        """
        rows = " UNION ALL ".join(part.select(names) for part in self.parts)
        return f"SELECT *, row_number() OVER () - 1 AS smes_row FROM ({rows})"


@dataclass
class Encoded:
    """What can be selected from one part: expressions over its columns.

    Attributes:
        scan: A table expression over the part.
        more: What is added to its columns, as the rest of a list of columns.
        inner: Values that several expressions use, by their names there.
        columns: Name → encoded value.
        reasons: Reason → its condition and the text that it is about.
        watches: What is counted → its condition and the text that it is about.
    """

    scan: str
    more: str = ""
    inner: dict[str, str] = field(default_factory=dict)
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

    def once(self, name: str, expr: str) -> str:
        """Compute a value once for all expressions over it; what they call it."""
        self.inner[name] = expr
        return sql.quote(name)

    def select(self, names: Sequence[str] | None, scan: str | None = None) -> str:
        """The SELECT statement of some columns, or of all; over another table expression of the same columns."""
        found = self._outputs()
        chosen = found if names is None else {name: found[name] for name in names}
        listed = ", ".join(f"{expr} AS {sql.quote(name)}" for name, expr in chosen.items())
        inner = "".join(f", {expr} AS {sql.quote(name)}" for name, expr in self.inner.items())
        return f"SELECT {listed} FROM (SELECT *{inner} FROM (SELECT *{self.more} FROM {scan or self.scan}))"

    def _outputs(self) -> dict[str, str]:
        cases = "".join(f" WHEN {condition} THEN {i}" for i, (condition, _) in enumerate(self.reasons.values()))
        found = {**self.columns, "smes_reason": f"CAST(CASE{cases} END AS SMALLINT)"}
        conditions = [condition for condition, _ in self.watches.values()]
        for start in range(0, len(conditions), FLAG_BITS):
            bits = [
                f"CASE WHEN {condition} THEN {1 << i}::BIGINT ELSE 0::BIGINT END"
                for i, condition in enumerate(conditions[start : start + FLAG_BITS])
                if condition != "false"
            ]
            found[_flags(start // FLAG_BITS)] = f"CAST({' + '.join(bits) or '0'} AS BIGINT)"
        for letter, shown in (("r", self.reasons), ("w", self.watches)):
            found |= {example(letter, i): text for i, (_, text) in enumerate(shown.values())}
        return found


def outside_reason(spec: LogSpec) -> str:
    """Why a row with a time that cannot be is unusable."""
    return f"event_time ({spec.event_time}) is outside 1995 … a day from now"


def example(letter: str, index: int) -> str:
    """The column of what a reason (``r``) or a watch (``w``) is about."""
    return f"smes_example {letter}{index}"


def _flags(index: int) -> str:
    return f"smes_flags {index}"


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
        planner.log_rows(columns)
        planner.log_ids()
        for feature in features:
            planner.feature(feature)
        for task in schema.tasks:
            planner.label(task)
        parts.append(planner.checked())
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
            planner.feature(feature)
        parts.append(planner.checked())
    return _plan(files, parts, features)


def _plan(
    files: TableFiles,
    parts: list[Encoded],
    features: Sequence[Feature],
    *,
    derived_impression_id: bool = False,
) -> TablePlan:
    first = parts[0]
    names = tuple(name for name in first.columns if name != "smes_digest")
    return TablePlan(
        files,
        tuple(parts),
        names,
        tuple(features),
        tuple(first.reasons),
        tuple(first.watches),
        derived_impression_id,
    )


class _PartPlanner:
    """Plans one part of a table."""

    def __init__(self, connection: Any, part: Part, spec: LogSpec) -> None:
        self._connection, self._part, self._spec = connection, part, spec
        self.out = Encoded(part.scan)

    def log_rows(self, columns: dict[str, list[str]]) -> None:
        """Plan the time and the digest of the log's rows."""
        part, spec, columns_of = self._part, self._spec, self._part.types
        time = sql.time_sql(part.column(spec.event_time, "log.event_time"), spec.time_unit)
        # The encoded time replaces a column of its name.
        same = [name for name in columns_of if name.casefold() == "event_time_ms"]
        self.out.more = f"{f' EXCLUDE ({sql.quote(same[0])})' if same else ''}, {time} AS event_time_ms"
        self._bind("event_time_ms", f"log.event_time {spec.event_time!r} as a time in {spec.time_unit}")
        hashed = [_hashed(name, columns_of.get(name), types) for name, types in columns.items()]
        self.out.columns["event_time_ms"] = "event_time_ms"
        self.out.columns["smes_digest"] = "smes_digest"
        self.out.more += f", hash({', '.join(hashed)}) AS smes_digest"

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

    def feature(self, feature: Feature) -> None:
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
            sql_type = self._type_of(expr, f"a value for {key} ({source.expr})")
        else:
            expr = part.column(column, key, _OPTIONAL.format(key=key))
            sql_type = part.types[column]
        self._feature_type(feature, named[1], sql_type, key)
        inexact = None
        if feature.kind == "numeric":
            number, absent = self._number(feature.name, expr, sql_type, "FLOAT")
            self.out.columns[name] = sql.finite_sql(number)
            unreadable: str | None = f"(NOT {absent} AND NOT COALESCE(isfinite({number}), false))"
        else:
            words = self._spec.null_words if feature.is_list else part.null_words  # in bags they are part of a field
            self.out.columns[name] = sql.feature_sql(feature, expr, sql_type, source.separator, words)
            absent = sql.feature_no_value_sql(feature, expr, sql_type, words)
            unreadable = sql.unreadable_sql(feature, expr, sql_type)
            inexact = sql.inexact_id_sql(expr, sql_type)
        self.out.watch("no value", "feature", named, absent)
        self.out.watch("unreadable", "feature", named, unreadable, expr)
        self.out.watch("inexact", "feature", named, inexact, expr)

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
            number, blank = self._number(task.name, column, sql_type, "DOUBLE")
            value, usable, _ = _label_values(task, self._spec, number)
            self.out.columns[f"label {task.name}"] = (
                f"CASE WHEN {blank} THEN {sql.NAN_SQL} ELSE CAST({value} AS FLOAT) END"
            )
            self.out.watch("no value", "label", named, blank)
            unusable = f"NOT {blank} AND NOT COALESCE({usable}, false)"
            self.out.watch("unreadable", "label", named, unusable, column)
            self.out.reasons[reason] = (unusable, f"CAST({column} AS VARCHAR)")
        if source.time_column is not None:
            self._label_time(task, source.time_column, optional=source.optional)

    def checked(self) -> Encoded:
        """The plan, all its expressions bound, so that an unusable column is reported now and not while reading."""
        query = f"DESCRIBE {self.out.select(None, self._part.sample)}"
        describe(self._connection, query, self._part.where, "readable columns")
        return self.out

    def _number(self, name: str, expr: str, sql_type: str, target: str) -> tuple[str, str]:
        """A column as a number, null where there is none, and the condition that nothing is there."""
        words = self._part.null_words
        number = self.out.once(f"smes_{target} {name}", sql.number_sql(expr, sql_type, target, words))
        return number, self.out.once(f"smes_absent {target} {name}", sql.no_number_sql(expr, sql_type, number, words))

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

    def _type_of(self, expr: str, key: str) -> str:
        """The SQL type of an expression over the part's columns and those added to them."""
        return next(iter(self._bind(f"{expr} AS value", key).values()))

    def _bind(self, columns: str, expected: str) -> dict[str, str]:
        query = f"DESCRIBE SELECT {columns} FROM (SELECT *{self.out.more} FROM {self._part.sample})"
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
