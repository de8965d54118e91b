"""The DuckDB database that sorts a log, removes its duplicates and joins it to its feature tables."""

# ruff: noqa: S608 - names are quoted and texts escaped by the functions of sql.py; expressions are the operator's own.

import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import duckdb

from simulators.logs import sql
from simulators.logs.counts import TableCounts, count_rows
from simulators.logs.files import LogFiles
from simulators.logs.ledger import DAY_MS, EARLIEST_MS, LogLedger, TableJoin, counts_from_zero
from simulators.logs.parts import TableFiles
from simulators.logs.table import TablePlan, outside_reason, plan_log, plan_side_table
from smes.errors import LogError
from smes.schema import Feature, Schema
from smes_io.clock import wall_clock_ms
from smes_io.log_spec import LogSpec

ENTITY_ROWS = 65_536


@dataclass(frozen=True)
class Prepared:
    """Counts from sorting a log.

    Attributes:
        total: Impressions within the limit.
        rows_read: Rows in the files.
        duplicates: Exact duplicates that were dropped, in the whole log.
        rejected: Reason → number of unusable rows, in the whole log.
        counts: What the files held.
        first_event_ms, last_event_ms: Over all rows with a time; None without any.
    """

    total: int
    rows_read: int
    duplicates: int
    rejected: Mapping[str, int]
    counts: TableCounts
    first_event_ms: int | None
    last_event_ms: int | None


class LogStore:
    """A temporary database, removed by :meth:`close` or with this object.

    Args:
        memory_limit: Memory limit of DuckDB, such as ``1GB``.
        temp_dir: Where the database's folder is made. None: the system's.
        threads: Threads of DuckDB. None: all cores.

    Raises:
        LogError: DuckDB refuses the memory limit.
    """

    def __init__(self, memory_limit: str, temp_dir: str | Path | None, threads: int | None) -> None:
        folder = tempfile.mkdtemp(prefix="smes-log-", dir=temp_dir)
        self._folder = Path(folder)
        config: dict[str, Any] = {"memory_limit": memory_limit, "temp_directory": f"{folder}/spill"}
        if threads is not None:
            config["threads"] = threads
        try:
            self._connection = duckdb.connect(f"{folder}/log.duckdb", config=config)
        except duckdb.Error as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise LogError(f"DuckDB with memory_limit {memory_limit!r}: {_first_line(error)}") from error
        self._release = weakref.finalize(self, _release, self._connection, folder)
        self._connection.execute("SET TimeZone = 'UTC'; SET enable_progress_bar = false")
        # Statistics in Parquet files leave NaN out. With them the optimiser turns isnan(x) into false, and x >= 4 into
        # true, wherever they promise it.
        self._connection.execute("SET disabled_optimizers = 'statistics_propagation'")
        for name, function, result, nulls in (
            (sql.STABLE_ID_FUNCTION, sql.stable_id_function(), "BIGINT", "default"),
            (sql.LIST_FUNCTION, sql.list_function, "VARCHAR[]", "special"),
        ):
            self._connection.create_function(name, function, ["VARCHAR"], result, type="arrow", null_handling=nulls)
        self._spec: LogSpec
        self._files: LogFiles
        self._binary: list[str] = []
        self._plans: dict[str, TablePlan] = {}
        self._counts: dict[str, TableCounts] = {}
        self._limit: int | None = None
        self._prepared: Prepared | None = None

    def close(self) -> None:
        """Close the database and remove its folder. Idempotent."""
        self._release()

    def describe(
        self, schema: Schema, spec: LogSpec, files: LogFiles, tables: Mapping[str, str], limit: int | None
    ) -> None:
        """Plan how each table is read, and check all its columns. The log is read later, by :meth:`prepared`.

        Args:
            schema: Features and tasks.
            spec: Where the schema file says that they are found.
            files: The files of each table.
            tables: Feature name → ``log``, ``user`` or ``item``.
            limit: Keep only the first so many impressions in time order.

        Raises:
            LogError: A column is missing or has an unusable type.
        """
        connection, texts = self._connection, self._folder / "text"

        def features_of(table: str) -> list[Feature]:
            return [feature for feature in schema.features if tables.get(feature.name) == table]

        self._limit, self._spec, self._files = limit, spec, files
        self._binary = [task.name for task in schema.tasks if task.kind == "binary"]
        log = TableFiles(connection, files.log, spec.csv, spec.null_words, texts)
        self._plans = {"log": plan_log(connection, schema, spec, log, features_of("log"))}
        for entity, side, found in (
            ("user", spec.user_features, files.user),
            ("item", spec.item_features, files.item),
        ):
            if side is not None:
                csv = side.csv or spec.csv.of_another_table()
                table = TableFiles(connection, found, csv, spec.null_words, texts)
                self._plans[entity] = plan_side_table(connection, spec, side, table, features_of(entity), entity)

    def prepared(self) -> Prepared:
        """Sort the log on the first call; the counts."""
        assert self._plans, "describe comes first"
        if self._prepared is None:
            self._prepared = self._sort()
        return self._prepared

    def impressions(self, start: int, stop: int) -> Any:
        """Rows ``start`` to ``stop - 1`` in time order with all their features, as an Arrow table."""
        self.prepared()
        columns, joins = ["e.*"], []
        for entity in ("user", "item"):
            if entity in self._plans:
                self._load_side_table(entity)
                joins.append(f"LEFT JOIN {entity}_features ON {entity}_features.key = e.{sql.quote(entity)}")
                columns += [
                    f"{sql.fixed_sql(f, f'COALESCE({entity}_features.{name}, {sql.absent_sql(f)})')} AS {name}"
                    for f in self._plans[entity].features
                    for name in [sql.quote(f"feature {f.name}")]
                ]
        if self._plans["log"].derived_impression_id:
            columns.append("e.rowid AS impression_id")
        return self._query(
            f"SELECT {', '.join(columns)} FROM (SELECT *, rowid FROM impressions WHERE rowid >= {start} "
            f"AND rowid < {stop}) e {' '.join(joins)} ORDER BY e.rowid"
        )

    def entities(self, entity: str, features: Sequence[Feature]) -> Iterator[Any]:
        """Arrow tables with ``key`` and a column for each feature, one row for each user or item."""
        columns = {sql.quote(f"feature {f.name}"): f for f in features}
        if entity in self._plans:
            self._load_side_table(entity)
            table = f"{entity}_features"
        else:
            self.prepared()
            table, key = f"{entity}_latest", sql.quote(entity)
            self._execute(
                f"CREATE TABLE IF NOT EXISTS {table} AS SELECT {key} AS key, {', '.join(columns)} FROM impressions "
                f"WHERE rowid IN (SELECT max(rowid) FROM impressions GROUP BY {key})"
            )
        count = self._scalar(f"SELECT count(*) FROM {table}")
        values = ", ".join(f"{sql.fixed_sql(feature, column)} AS {column}" for column, feature in columns.items())
        for start in range(0, count, ENTITY_ROWS):
            rows = f"rowid >= {start} AND rowid < {start + ENTITY_ROWS}"
            yield self._query(f"SELECT key, {values} FROM {table} WHERE {rows}")

    def ledger(self) -> LogLedger:
        """What was read, what was left out and why, of the log and of its feature tables."""
        prepared, files = self.prepared(), self._files
        joins = [self._join(entity) for entity in ("user", "item") if entity in self._plans]
        columns = prepared.counts.columns
        for entity in ("user", "item"):
            columns += self._counts[entity].columns if entity in self._counts else ()
        rejected = sum(rejection.rows for rejection in prepared.counts.rejections)
        users, items, positives = self._impression_counts()
        return LogLedger(
            where=files.log[0] if len(files.log) == 1 else files.folder,
            files=prepared.counts.files,
            rows=prepared.rows_read,
            usable=prepared.rows_read - prepared.duplicates - rejected,
            used=prepared.total,
            users=users,
            items=items,
            duplicates=prepared.duplicates,
            outside=prepared.rejected.get(outside_reason(self._spec), 0),
            rejections=prepared.counts.rejections,
            columns=tuple(
                replace(column, positives=positives.get(column.name)) if column.kind == "label" else column
                for column in columns
            ),
            joins=tuple(joins),
            first_event_ms=prepared.first_event_ms,
            last_event_ms=prepared.last_event_ms,
            time_column=self._spec.event_time,
            time_unit=self._spec.time_unit,
        )

    def _impression_counts(self) -> tuple[int, int, dict[str, int]]:
        """Different users, different items, and positives by binary task, of the impressions within the limit."""
        counts = "".join(f", count(*) FILTER ({sql.quote(f'label {name}')} = 1)" for name in self._binary)
        users, items, *positives = self._rows(
            f"SELECT count(DISTINCT {sql.quote('user')}), count(DISTINCT {sql.quote('item')}){counts} FROM impressions"
        )[0]
        return users, items, dict(zip(self._binary, positives, strict=True))

    def _join(self, entity: str) -> TableJoin:
        """How a feature table fits the impressions within the limit."""
        self._load_side_table(entity)
        counts, key = self._counts[entity], sql.quote(entity)
        ids, matched, impressions, found = self._rows(
            f"SELECT count(*), count(key), COALESCE(sum(n), 0), COALESCE(sum(n) FILTER (key IS NOT NULL), 0) FROM "
            f"(SELECT {key} AS id, count(*) AS n FROM impressions GROUP BY 1) LEFT JOIN {entity}_features ON key = id"
        )[0]
        rejected = sum(rejection.rows for rejection in counts.rejections)
        different = self._scalar(f"SELECT count(*) FROM {entity}_features")
        return TableJoin(
            entity="user" if entity == "user" else "item",
            rows=counts.rows,
            repeated=counts.rows - rejected - different,
            rejections=counts.rejections,
            ids_in_log=ids,
            ids_matched=matched,
            impressions=int(impressions),
            impressions_missed=int(impressions - found),
        )

    def _load_side_table(self, entity: str) -> None:
        """Encode a feature table on the first call. If a key occurs twice, its last row counts."""
        if entity in self._counts:
            return
        plan, name = self._plans[entity], f"{entity}_features"
        lists = {f"feature {f.name}" for f in plan.features if f.is_list}
        columns = ", ".join(sql.any_length_sql(sql.quote(c)) if c in lists else sql.quote(c) for c in plan.columns)
        self._execute(f"CREATE TABLE {name}_read AS {plan.select([*plan.columns, 'smes_reason', *plan.flags])}")
        kind: Any = entity
        self._counts[entity] = count_rows(self._rows, plan, f"{name}_read", self._files.folder, kind)
        self._execute(
            f"CREATE TABLE {name} AS SELECT {columns} FROM {name}_read WHERE smes_reason IS NULL "
            "QUALIFY row_number() OVER (PARTITION BY key ORDER BY smes_row DESC) = 1"
        )
        self._execute(f"DROP TABLE {name}_read")

    def _sort(self) -> Prepared:
        """Scan the log twice: once for duplicates and unusable rows, and once to sort the remaining rows."""
        duplicates, counts, first, last = self._exclude()
        plan = self._plans["log"]
        columns = ", ".join(map(sql.quote, plan.columns))
        self._execute(
            f"CREATE TABLE impressions AS SELECT {columns} FROM ({plan.select(plan.columns)}) "
            "WHERE smes_row NOT IN (SELECT row FROM excluded) ORDER BY event_time_ms, smes_row"
            + ("" if self._limit is None else f" LIMIT {self._limit}")
        )
        self._execute("DROP TABLE excluded")
        rejected = {rejection.reason: rejection.rows for rejection in counts.rejections}
        total = self._scalar("SELECT count(*) FROM impressions")
        return Prepared(total, counts.rows, duplicates, rejected, counts, first, last)

    def _exclude(self) -> tuple[int, TableCounts, int | None, int | None]:
        """Write the numbers of duplicate and unusable rows into the table ``excluded``.

        Duplicates are rows with the same time and the same 64-bit hash of all columns. Even in a log of 300 million
        rows, the chance that two different rows are taken for equal is below 1e-9.

        Returns:
            Duplicates, what the files held, and the first and last time.
        """
        plan = self._plans["log"]
        states = plan.select(["event_time_ms", "smes_digest", "smes_reason", *plan.flags])
        self._execute(f"CREATE TABLE narrow AS {states}")
        first, last = self._rows("SELECT min(event_time_ms), max(event_time_ms) FROM narrow")[0]
        if not counts_from_zero(first, last):
            self._execute(
                f"UPDATE narrow SET smes_reason = {plan.reasons.index(outside_reason(self._spec))} WHERE smes_reason "
                f"IS NULL AND event_time_ms NOT BETWEEN {EARLIEST_MS} AND {wall_clock_ms() + DAY_MS}"
            )
        counts = count_rows(self._rows, plan, "narrow", self._files.folder, "log")
        self._execute(
            "CREATE TABLE excluded AS SELECT smes_row AS row, false AS duplicate FROM narrow "
            "WHERE smes_reason IS NOT NULL UNION ALL "
            "SELECT smes_row, true FROM narrow JOIN (SELECT event_time_ms, smes_digest, min(smes_row) AS kept "
            "FROM narrow WHERE smes_reason IS NULL GROUP BY ALL HAVING count(*) > 1) "
            "USING (event_time_ms, smes_digest) WHERE smes_reason IS NULL AND smes_row <> kept"
        )
        duplicates = self._scalar("SELECT count(*) FROM excluded WHERE duplicate")
        self._execute("DROP TABLE narrow")
        return duplicates, counts, first, last

    def _execute(self, query: str) -> None:
        with self._named():
            self._connection.execute(query)

    def _query(self, query: str) -> Any:
        with self._named():
            return self._connection.sql(query).to_arrow_table()

    def _rows(self, query: str) -> list[Any]:
        with self._named():
            rows: list[Any] = self._connection.execute(query).fetchall()
            return rows

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Turn DuckDB's errors into the log's."""
        try:
            yield
        except duckdb.Error as error:
            raise LogError(f"{self._plans['log'].files.where}: {_first_line(error)}") from error

    def _scalar(self, query: str) -> int:
        return int(self._rows(query)[0][0])


def _release(connection: Any, folder: str) -> None:
    connection.close()
    shutil.rmtree(folder, ignore_errors=True)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
