"""Plan the SQL that reads a log or a feature table: check its columns, encode them, and say why a row is unusable."""

# ruff: noqa: S608 - names are quoted and texts escaped by the functions of sql.py; expressions are the operator's own.

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import duckdb

from simulators.logs import sql
from smes.errors import LogError
from smes.schema import Feature, Schema, Task
from smes_io.log_spec import FeatureSource, LogSpec, SideTable

_MOST_LISTED = 60


@dataclass(frozen=True)
class TablePlan:
    """How to read one table.

    Attributes:
        where: Its files, for error messages.
        rows: SELECT statement of the raw columns and of ``smes_row``, the row's number in the files. For the log also
            of ``event_time_ms`` and of ``smes_digest``, the hash of all columns.
        columns: The encoded columns, to be selected from ``rows``.
        features: The features among the columns.
        reason: For the log: an expression over ``rows`` that says why a row is unusable; null for a usable row.
        derived_impression_id: Whether the log has no column of impression ids.
        is_csv: Whether the files are CSV, so that lines may fail to parse.
    """

    where: str
    rows: str
    columns: str
    features: tuple[Feature, ...]
    reason: str = "NULL"
    derived_impression_id: bool = False
    is_csv: bool = False


class _Table:
    """The columns of some files and their types."""

    def __init__(self, connection: Any, files: Sequence[str], delimiter: str) -> None:
        self._connection = connection
        self.where = files[0] if len(files) == 1 else f"{files[0]} … {files[-1]}"
        self.is_csv = files[0].lower().endswith(".csv")
        self.scan = sql.scan_sql(files, delimiter)
        self.types = self._describe(f"SELECT * FROM {self.scan}", f"a table of {'CSV' if self.is_csv else 'Parquet'}")

    def column(self, name: str, key: str) -> str:
        """The quoted column.

        Raises:
            LogError: There is no such column. The message lists the columns of the files.
        """
        if name not in self.types:
            there = ", ".join(list(self.types)[:_MOST_LISTED])
            raise LogError(f"{self.where}: no column {name!r}, expected by {key}; the columns are {there}")
        return sql.quote(name)

    @property
    def sample(self) -> str:
        """A table expression with the same columns and types that opens no file."""
        nulls = ", ".join(f"CAST(NULL AS {sql_type}) AS {sql.quote(name)}" for name, sql_type in self.types.items())
        return f"(SELECT {nulls})"

    def type_of(self, expr: str, more: str, key: str) -> str:
        """The SQL type of an expression over the table's columns and the columns that ``more`` adds."""
        return next(
            iter(self._describe(f"SELECT {expr} AS value FROM (SELECT *{more} FROM {self.sample})", key).values())
        )

    def check(self, columns: str, more: str, key: str) -> None:
        """Bind expressions, so that a column of an unusable type is reported now and not while reading."""
        self._describe(f"SELECT {columns} FROM (SELECT *{more} FROM {self.sample})", key)

    def _describe(self, query: str, expected: str) -> dict[str, str]:
        try:
            return {str(r[0]): str(r[1]) for r in self._connection.execute(f"DESCRIBE {query}").fetchall()}
        except duckdb.Error as error:
            first = str(error).strip().splitlines()[0]
            raise LogError(f"{self.where}: expected {expected}, DuckDB says: {first}") from error


def plan_log(
    connection: Any, schema: Schema, spec: LogSpec, files: Sequence[str], features: Sequence[Feature]
) -> TablePlan:
    """Plan the log itself.

    Raises:
        LogError: A column is missing or of an unusable type.
    """
    table = _Table(connection, files, spec.delimiter)
    rows, more = _log_rows(table, spec)
    columns, reasons = _log_ids(table, spec)
    columns += [_feature(table, f, spec.features.get(f.name, FeatureSource()), more) for f in features]
    for task in schema.tasks:
        label_columns, reason = _label(table, task, spec)
        columns += label_columns
        reasons.append(reason)
    reason = f"COALESCE({', '.join(reasons)})"
    table.check(f"{', '.join(columns)}, {reason} AS reason", more, "readable columns")
    return TablePlan(
        table.where, rows, ", ".join(columns), tuple(features), reason, spec.impression_id is None, table.is_csv
    )


def plan_side_table(
    connection: Any, spec: LogSpec, side: SideTable, files: Sequence[str], features: Sequence[Feature]
) -> TablePlan:
    """Plan a feature table.

    Raises:
        LogError: A column is missing or of an unusable type.
    """
    table = _Table(connection, files, spec.delimiter)
    rows = f"SELECT *, row_number() OVER () - 1 AS smes_row FROM {table.scan}"
    columns = [f"{_id(table, side.key, 'key')} AS key"]
    columns += [_feature(table, f, spec.features.get(f.name, FeatureSource()), "") for f in features]
    return TablePlan(table.where, rows, ", ".join(columns), tuple(features), is_csv=table.is_csv)


def _log_rows(table: _Table, spec: LogSpec) -> tuple[str, str]:
    """The SELECT statement of the log's raw rows, and the columns that it adds to the files' own."""
    time = sql.time_sql(table.column(spec.event_time, "log.event_time"), spec.time_unit)
    # The encoded time replaces a column of its name.
    more = f"{' EXCLUDE (event_time_ms)' if 'event_time_ms' in table.types else ''}, {time} AS event_time_ms"
    table.check("event_time_ms", more, f"log.event_time {spec.event_time!r} as a time in {spec.time_unit}")
    digest = f"hash({', '.join(map(sql.quote, table.types))}) AS smes_digest"
    return f"SELECT *{more}, {digest}, row_number() OVER () - 1 AS smes_row FROM {table.scan}", more


def _log_ids(table: _Table, spec: LogSpec) -> tuple[list[str], list[str]]:
    """The columns of ids and time, and the reasons to reject a row without them."""
    user = _id(table, spec.user_id, "log.user_id")
    item = _id(table, spec.item_id, "log.item_id")
    columns = [f"{user} AS user", f"{item} AS item", "event_time_ms"]
    reasons = [
        _reason(f"{user} = {sql.MISSING_SQL}", f"user_id ({spec.user_id}) is empty"),
        _reason(f"{item} = {sql.MISSING_SQL}", f"item_id ({spec.item_id}) is empty"),
        _reason("event_time_ms IS NULL", f"event_time ({spec.event_time}) is no time in {spec.time_unit}"),
    ]
    if spec.impression_id is not None:
        impression = _id(table, spec.impression_id, "log.impression_id")
        columns.append(f"{impression} AS impression_id")
        reasons.append(_reason(f"{impression} = {sql.MISSING_SQL}", f"impression_id ({spec.impression_id}) is empty"))
    request = sql.MISSING_SQL if spec.request_id is None else _id(table, spec.request_id, "log.request_id")
    return [*columns, f"{request} AS request_id"], reasons


def _id(table: _Table, name: str, key: str) -> str:
    return sql.id_sql(table.column(name, key), table.types[name])


def _feature(table: _Table, feature: Feature, source: FeatureSource, more: str) -> str:
    key = f"log.features.{feature.name}"
    if source.expr is not None:
        expr = f"({source.expr})"
        sql_type = table.type_of(expr, more, f"a value for {key} ({source.expr})")
    else:
        name = source.column or feature.name
        expr = table.column(name, key)
        sql_type = table.types[name]
    encoded = f"{sql.feature_sql(feature, expr, sql_type, source.separator)} AS {sql.quote(f'feature {feature.name}')}"
    table.check(encoded, more, f"{key} readable as {feature.kind}, its type is {sql_type}")
    return encoded


def _label(table: _Table, task: Task, spec: LogSpec) -> tuple[list[str], str]:
    """The columns of a task's outcome and of its time, and the reason to reject a row for it."""
    source, key = spec.labels[task.name], f"log.labels.{task.name}"
    column = table.column(source.column, key)
    sql_type = table.types[source.column]
    number = sql.number_sql(column, sql_type)
    blank = sql.is_blank_sql(column, sql_type)
    if task.kind == "regression":
        value = f"{number} * {source.scale!r}"
        usable = f"{value} BETWEEN 0 AND {task.max_value!r}"
        expected = f"a number from 0 to {task.max_value:g} (after scale {source.scale:g})"
    elif source.threshold is not None:
        value, usable = f"CAST({number} >= {source.threshold!r} AS INTEGER)", f"{number} IS NOT NULL"
        expected = "a number"
    else:
        value, usable, expected = number, f"{number} IN (0, 1)", "0 or 1"
    reason = _reason(f"NOT {blank} AND NOT COALESCE({usable}, false)", f"{key} ({source.column}): expected {expected}")
    name = sql.quote(f"label {task.name}")
    columns = [f"CASE WHEN {blank} THEN {sql.NAN_SQL} ELSE CAST({value} AS FLOAT) END AS {name}"]
    if source.time_column is not None:
        time = sql.time_sql(table.column(source.time_column, f"{key}.time_column"), spec.time_unit)
        columns.append(f"COALESCE({time}, {sql.MISSING_SQL}) AS {sql.quote(f'time {task.name}')}")
    return columns, reason


def _reason(condition: str, reason: str) -> str:
    return f"CASE WHEN {condition} THEN {sql.text(reason)} END"
