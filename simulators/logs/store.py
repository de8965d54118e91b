"""The DuckDB database that sorts a log, removes its duplicates and joins it to its feature tables."""

# ruff: noqa: S608 - names are quoted and texts escaped by the functions of sql.py; expressions are the operator's own.

import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb

from simulators.logs import sql
from simulators.logs.files import LogFiles
from simulators.logs.table import TablePlan, plan_log, plan_side_table
from smes.errors import LogError
from smes.schema import Feature, Schema
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
    """

    total: int
    rows_read: int
    duplicates: int
    rejected: Mapping[str, int]


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
        self._connection.create_function(
            sql.STABLE_ID_FUNCTION, sql.stable_id_function(), ["VARCHAR"], "BIGINT", type="arrow"
        )
        self._plans: dict[str, TablePlan] = {}
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
        connection = self._connection

        def features_of(table: str) -> list[Feature]:
            return [feature for feature in schema.features if tables.get(feature.name) == table]

        self._limit = limit
        self._plans = {"log": plan_log(connection, schema, spec, files.log, features_of("log"))}
        if (users := spec.user_features) is not None:
            self._plans["user"] = plan_side_table(connection, spec, users, files.user, features_of("user"))
        if (items := spec.item_features) is not None:
            self._plans["item"] = plan_side_table(connection, spec, items, files.item, features_of("item"))

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
                    f"COALESCE({entity}_features.{name}, {sql.absent_sql(f)}) AS {name}"
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
        if entity in self._plans:
            self._load_side_table(entity)
            table = f"{entity}_features"
        else:
            self.prepared()
            table, key = f"{entity}_latest", sql.quote(entity)
            names = ", ".join(sql.quote(f"feature {f.name}") for f in features)
            self._execute(
                f"CREATE TABLE IF NOT EXISTS {table} AS SELECT {key} AS key, {names} FROM impressions "
                f"WHERE rowid IN (SELECT max(rowid) FROM impressions GROUP BY {key})"
            )
        count = self._scalar(f"SELECT count(*) FROM {table}")
        for start in range(0, count, ENTITY_ROWS):
            yield self._query(f"SELECT * FROM {table} WHERE rowid >= {start} AND rowid < {start + ENTITY_ROWS}")

    def _load_side_table(self, entity: str) -> None:
        """Encode a feature table on the first call. If a key occurs twice, its last row counts."""
        plan = self._plans[entity]
        name = f"{entity}_features"
        if self._scalar(f"SELECT count(*) FROM duckdb_tables() WHERE table_name = {sql.text(name)}"):
            return
        self._execute(
            f"CREATE TABLE {name} AS SELECT * EXCLUDE (smes_row) FROM "
            f"(SELECT {plan.columns}, smes_row FROM ({plan.rows})) WHERE key <> {sql.MISSING_SQL} "
            "QUALIFY row_number() OVER (PARTITION BY key ORDER BY smes_row DESC) = 1"
        )

    def _sort(self) -> Prepared:
        """Scan the log twice: once for duplicates and unusable rows, and once to sort the remaining rows."""
        duplicates, parsed, rejected = self._exclude()
        plan = self._plans["log"]
        self._execute(
            f"CREATE TABLE impressions AS SELECT {plan.columns} FROM ({plan.rows}) "
            "WHERE smes_row NOT IN (SELECT row FROM excluded) ORDER BY event_time_ms, smes_row"
            + ("" if self._limit is None else f" LIMIT {self._limit}")
        )
        self._execute("DROP TABLE excluded")
        unparsed = self._unparsed()
        if unparsed:
            rejected["line is no row of the CSV file: wrong number of fields or quotes"] = unparsed
        total = self._scalar("SELECT count(*) FROM impressions")
        return Prepared(total, parsed + unparsed, duplicates, rejected)

    def _exclude(self) -> tuple[int, int, dict[str, int]]:
        """Write the numbers of duplicate and unusable rows into the table ``excluded``.

        Duplicates are rows with the same time and the same 64-bit hash of all columns. Even in a log of 300 million
        rows, the chance that two different rows are taken for equal is below 1e-9.

        Returns:
            Duplicates, rows that could be parsed, and reason → unusable rows.
        """
        plan = self._plans["log"]
        self._execute(
            f"CREATE TABLE narrow AS "
            "SELECT smes_row AS row, event_time_ms, smes_digest AS digest, smes_reason AS reason FROM "
            f"(SELECT *, {plan.reason} AS smes_reason FROM ({plan.rows}))"
        )
        self._execute(
            "CREATE TABLE excluded AS SELECT row, false AS duplicate FROM narrow WHERE reason IS NOT NULL UNION ALL "
            "SELECT row, true FROM narrow JOIN (SELECT event_time_ms, digest, min(row) AS kept FROM narrow "
            "WHERE reason IS NULL GROUP BY ALL HAVING count(*) > 1) USING (event_time_ms, digest) "
            "WHERE reason IS NULL AND row <> kept"
        )
        duplicates = self._scalar("SELECT count(*) FROM excluded WHERE duplicate")
        parsed = self._scalar("SELECT count(*) FROM narrow")
        rejected = {str(r): int(n) for r, n in self._rows("SELECT reason, count(*) FROM narrow GROUP BY 1 ORDER BY 1")}
        rejected.pop("None", None)
        self._execute("DROP TABLE narrow")
        return duplicates, parsed, rejected

    def _unparsed(self) -> int:
        """Number of lines of the log's CSV files that DuckDB could not split, from a scan that read all of them."""
        if not self._plans["log"].is_csv:
            return 0
        return self._scalar(
            "SELECT COALESCE(max(lines), 0) FROM (SELECT scan_id, count(DISTINCT (file_id, line)) AS lines "
            "FROM reject_errors GROUP BY scan_id)"
        )

    def _execute(self, query: str) -> None:
        try:
            self._connection.execute(query)
        except duckdb.Error as error:
            raise LogError(f"{self._plans['log'].where}: {_first_line(error)}") from error

    def _query(self, query: str) -> Any:
        try:
            return self._connection.sql(query).to_arrow_table()
        except duckdb.Error as error:
            raise LogError(f"{self._plans['log'].where}: {_first_line(error)}") from error

    def _rows(self, query: str) -> list[Any]:
        rows: list[Any] = self._connection.execute(query).fetchall()
        return rows

    def _scalar(self, query: str) -> int:
        return int(self._rows(query)[0][0])


def _release(connection: Any, folder: str) -> None:
    connection.close()
    shutil.rmtree(folder, ignore_errors=True)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
