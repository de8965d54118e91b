"""The DuckDB database in which a log is sorted, cleared of duplicates, and joined to its feature tables."""

# ruff: noqa: S608 - names are quoted and texts escaped by log_sql; expressions are the operator's own.

import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    """What sorting a log found.

    Attributes:
        total: Impressions within the limit.
        rows_read: Rows in the files.
        duplicates: Exact duplicates dropped, over the whole log.
        rejected: Reason → unusable rows, over the whole log.
    """

    total: int
    rows_read: int
    duplicates: int
    rejected: Mapping[str, int]


class LogStore:
    """Owns a temporary database; nothing outlives :meth:`close`, or this object."""

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
        self._prepare: Callable[[], Prepared] | None = None
        self._prepared: Prepared | None = None
        self._plans: dict[str, TablePlan] = {}

    def close(self) -> None:
        """Close the database and remove its folder; idempotent."""
        self._release()

    def describe(
        self, schema: Schema, spec: LogSpec, files: LogFiles, tables: Mapping[str, str], limit: int | None
    ) -> None:
        """Check every column that will be read; the reading itself is left to :meth:`prepared`.

        Raises:
            LogError: A column is missing or of an unusable type.
        """
        features = {
            name: [f for f in schema.features if tables.get(f.name) == name] for name in ("log", "user", "item")
        }
        log = plan_log(self._connection, schema, spec, files.log, features["log"])
        self._plans = {"log": log}
        if spec.user_features is not None:
            self._plans["user"] = plan_side_table(
                self._connection, spec, spec.user_features, files.user, features["user"]
            )
        if spec.item_features is not None:
            self._plans["item"] = plan_side_table(
                self._connection, spec, spec.item_features, files.item, features["item"]
            )
        self._prepare = lambda: self._sort(limit)

    def prepared(self) -> Prepared:
        """Sort the log, once."""
        if self._prepared is None:
            assert self._prepare is not None, "describe comes first"
            self._prepared = self._prepare()
        return self._prepared

    def impressions(self, start: int, stop: int) -> Any:
        """Rows ``start … stop - 1`` in time order with all their features, as an Arrow table."""
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
        """``key`` and one column a feature, in Arrow tables."""
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
        """Encode a feature table, once; where a key occurs twice, its last row counts."""
        plan = self._plans[entity]
        name = f"{entity}_features"
        if self._scalar(f"SELECT count(*) FROM duckdb_tables() WHERE table_name = {sql.text(name)}"):
            return
        self._execute(
            f"CREATE TABLE {name} AS SELECT * EXCLUDE (smes_row) FROM "
            f"(SELECT {plan.columns}, smes_row FROM ({plan.rows})) WHERE key <> {sql.MISSING_SQL} "
            "QUALIFY row_number() OVER (PARTITION BY key ORDER BY smes_row DESC) = 1"
        )

    def _sort(self, limit: int | None) -> Prepared:
        """Two scans: a narrow one that finds duplicates and unusable rows, and one that sorts what is left.

        Duplicates are rows with the same time and the same 64-bit hash over all columns: even in a log of 300 million
        rows the chance that one pair of different rows is taken for equal is below 1e-9.
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
        unparsed = self._unparsed()
        if unparsed:
            rejected["line is no row of the CSV file: wrong number of fields or quotes"] = unparsed
        self._execute(
            f"CREATE TABLE impressions AS SELECT {plan.columns} FROM ({plan.rows}) "
            "WHERE smes_row NOT IN (SELECT row FROM excluded) ORDER BY event_time_ms, smes_row"
            + ("" if limit is None else f" LIMIT {limit}")
        )
        self._execute("DROP TABLE narrow; DROP TABLE excluded")
        total = self._scalar("SELECT count(*) FROM impressions")
        return Prepared(total, parsed + unparsed, duplicates, rejected)

    def _unparsed(self) -> int:
        """Lines of the log's CSV files that DuckDB could not split, of the first scan that read them all."""
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
