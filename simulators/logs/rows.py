"""Read rows that are only to be scored: in the order of the files, each of them, without labels.

Everything else is as in :mod:`simulators.logs.reader`: a row's features are those that training would have read of it.
"""

# ruff: noqa: S608 - names are quoted and texts escaped by the functions of sql.py; expressions are the operator's own.

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from simulators.logs import sql
from simulators.logs.counts import count_rows
from simulators.logs.files import LogFiles, find_files
from simulators.logs.reader import LogReader
from simulators.logs.store import LogStore, Prepared
from smes.arrays import Bool
from smes.events import ImpressionBlock, fill_elapsed
from smes.schema import Schema
from smes_io.log_spec import LabelSource, LogSpec
from smes_io.schema_file import SchemaFile

_NO_LABEL = LabelSource("(none: rows that are only scored)", optional=True)
_WRITTEN = "written "  # before the names of columns as they are in the files


@dataclass(frozen=True, slots=True)
class RowBlock:
    """Rows in the order of the files. N is rows.

    Attributes:
        impressions: N rows; those that are not usable hold nothing.
        usable: bool [N], false for a row without user, item or time.
        names: An Arrow table of N rows: the columns that tell rows apart (ids and time), as they are in the files.
    """

    impressions: ImpressionBlock
    usable: Bool
    names: Any


def open_rows(path: str | Path, schema_file: SchemaFile, *, memory_limit: str = "1GB") -> "RowReader":
    """Open rows to be scored; arguments and errors as :func:`simulators.logs.reader.open_log`."""
    if schema_file.log is None:
        raise ValueError(f"schema {schema_file.name!r}: expected a log section that describes the files")
    unlabelled = replace(schema_file.log, labels={task.name: _NO_LABEL for task in schema_file.schema.tasks})
    files = find_files(Path(path), schema_file.log)
    return RowReader(files, replace(schema_file, log=unlabelled), None, _RowStore(memory_limit, None, None))


class RowReader(LogReader):
    """Opened rows, to be used as a context manager. Made by :func:`open_rows`."""

    def row_blocks(self, rows_per_block: int = 8192) -> Iterator[RowBlock]:
        """Yield all rows in the order of the files."""
        for start in range(0, self.total, rows_per_block):
            table = self._store.impressions(start, start + rows_per_block)
            impressions = self._impressions(table)
            fill_elapsed(impressions.numerics, self.schema, impressions.event_time_ms)
            names = [name for name in table.column_names if name.startswith(_WRITTEN)]
            written = table.select(names).rename_columns([name.removeprefix(_WRITTEN) for name in names])
            usable = np.asarray(table.column("usable").to_numpy(zero_copy_only=False), np.bool_)
            yield RowBlock(impressions, usable, written)


class _RowStore(LogStore):
    """A database whose table of impressions holds every row."""

    def describe(
        self, schema: Schema, spec: LogSpec, files: LogFiles, tables: Mapping[str, str], limit: int | None
    ) -> None:
        super().describe(schema, spec, files, tables, limit)
        plan = self._plans["log"]
        named = (spec.impression_id, spec.request_id, spec.user_id, spec.item_id, spec.event_time)
        written = {f"{_WRITTEN}{name}": sql.quote(name) for name in named if name is not None}
        for part in plan.parts:
            part.columns |= written
        self._plans["log"] = replace(plan, columns=(*plan.columns, *written))

    def _sort(self) -> Prepared:
        plan = self._plans["log"]
        columns = ", ".join(map(sql.quote, plan.columns))
        self._execute(f"CREATE TABLE narrow AS {plan.select(['event_time_ms', 'smes_reason', *plan.flags])}")
        first, last = self._rows("SELECT min(event_time_ms), max(event_time_ms) FROM narrow")[0]
        counts = count_rows(self._rows, plan, "narrow", self._files.folder, "log")
        self._execute("DROP TABLE narrow")
        self._execute(
            f"CREATE TABLE impressions AS SELECT {columns}, smes_reason IS NULL AS usable "
            f"FROM ({plan.select([*plan.columns, 'smes_reason'])}) ORDER BY smes_row"
        )
        self._execute("UPDATE impressions SET event_time_ms = 0 WHERE event_time_ms IS NULL")
        total = self._scalar("SELECT count(*) FROM impressions")
        rejected = {rejection.reason: rejection.rows for rejection in counts.rejections}
        return Prepared(total, counts.rows, 0, rejected, counts, first, last)
