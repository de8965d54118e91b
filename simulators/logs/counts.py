"""Count what the rows of a table held and why some are unusable, and find where the first of each kind stands."""

# ruff: noqa: S608 - names are quoted and texts escaped by the functions of sql.py; expressions are the operator's own.

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from simulators.logs import sql
from simulators.logs.ledger import ColumnCounts, FileRows, Rejection
from simulators.logs.table import FLAG_BITS, TablePlan, Watch, example
from smes.errors import LogError

_SHOWN = 80  # characters of an example
Query = Callable[[str], list[Any]]
Table = Literal["log", "user", "item"]


@dataclass(frozen=True)
class TableCounts:
    """What a table's files held.

    Attributes:
        rows: Rows in the files, including lines that are no rows.
        files: The same by file.
        rejections: Rows left out, most frequent reason first.
        columns: Labels and features.
    """

    rows: int
    files: tuple[FileRows, ...]
    rejections: tuple[Rejection, ...]
    columns: tuple[ColumnCounts, ...]


def count_rows(query: Query, plan: TablePlan, table: str, folder: str, kind: Table) -> TableCounts:
    """Count over a database table with the columns ``smes_row``, ``smes_reason`` and the flags of a plan.

    Args:
        query: Runs a query.
        plan: How the table was read.
        table: Its name.
        folder: What the files' names are relative to.
        kind: Which table it is.

    Raises:
        LogError: An id is a float that may stand for several integers, or DuckDB read other rows than there are.
    """
    good = query(f"SELECT count(*) FROM {table}")[0][0]
    if good != sum(plan.files.rows):
        raise LogError(f"{plan.files.where}: {good} rows were read, expected {sum(plan.files.rows)}")
    reasons = query(
        f"SELECT smes_reason, count(*), min(smes_row) FROM {table} WHERE smes_reason IS NOT NULL "
        "GROUP BY 1 ORDER BY 2 DESC, 1"
    )
    watched = _watched(query, plan, table)
    wanted = [(row, example("r", index)) for index, _, row in reasons]
    wanted += [(row, example("w", plan.watches.index(w))) for w, (_, row) in watched.items() if w.what != "no value"]
    examples = _examples(query, plan, wanted)

    def at(row: int, column: str) -> tuple[str, int, str | None]:
        file, line = plan.files.place(row)
        return os.path.relpath(file, folder), line, examples[row, column]

    _refuse_inexact(plan, watched, examples)
    rejections = []
    for index, rows, row in reasons:
        file, line, value = at(row, example("r", index))
        rejections.append(Rejection(plan.reasons[index], rows, file, line, value))
    rejections += _bad_lines(plan, folder)
    columns = []
    for watch in plan.watches:
        if watch.what == "no value":
            unreadable = Watch("unreadable", watch.kind, watch.name, watch.source)
            count, row = watched.get(unreadable, (0, None))
            place = (None, None, None) if row is None else at(row, example("w", plan.watches.index(unreadable)))
            columns.append(_column(watch, kind, good, watched.get(watch, (0, 0))[0], count, place))
    return TableCounts(
        good + sum(r.rows for r in rejections if r.reason.startswith(NO_ROW)),
        _files(query, plan, table, folder),
        tuple(sorted(rejections, key=lambda r: -r.rows)),
        tuple(columns),
    )


NO_ROW = "line is no row of the CSV file"


def _column(
    watch: Watch,
    kind: Table,
    rows: int,
    no_value: int,
    unreadable: int,
    place: tuple[str | None, int | None, str | None],
) -> ColumnCounts:
    assert watch.kind != "key"
    file, line, value = place
    return ColumnCounts(watch.kind, watch.name, watch.source, kind, rows, no_value, unreadable, value, file, line)


def _watched(query: Query, plan: TablePlan, table: str) -> dict[Watch, tuple[int, int]]:
    """Watch → in how many rows it was true, and the first of them; without those that were true in none."""
    found: dict[Watch, tuple[int, int]] = {}
    for index, flags in enumerate(map(sql.quote, plan.flags)):
        groups = query(f"SELECT {flags}, count(*), min(smes_row) FROM {table} WHERE {flags} <> 0 GROUP BY 1")
        for bits, rows, first in groups:
            for bit, watch in enumerate(plan.watches[index * FLAG_BITS : (index + 1) * FLAG_BITS]):
                if bits >> bit & 1:
                    before, row = found.get(watch, (0, first))
                    found[watch] = before + rows, min(row, first)
    return found


def _examples(query: Query, plan: TablePlan, wanted: list[tuple[int, str]]) -> dict[tuple[int, str], str | None]:
    """The texts in some rows and columns of examples, shortened. One more scan of the files, if there are any."""
    if not wanted:
        return {}
    columns = list(dict.fromkeys(column for _, column in wanted))
    rows = ", ".join(str(row) for row in {row for row, _ in wanted})
    found = query(
        f"SELECT smes_row, {', '.join(f'substr({sql.quote(column)}, 1, {_SHOWN})' for column in columns)} "
        f"FROM ({plan.select(columns)}) "
        f"WHERE smes_row IN ({rows})"
    )
    return {(row[0], column): value for row in found for column, value in zip(columns, row[1:], strict=True)}


def _refuse_inexact(
    plan: TablePlan, watched: dict[Watch, tuple[int, int]], examples: dict[tuple[int, str], str | None]
) -> None:
    for watch, (rows, row) in watched.items():
        if watch.what == "inexact":
            file, line = plan.files.place(row)
            value = examples[row, example("w", plan.watches.index(watch))]
            raise LogError(
                f"{file} row {line}: {watch.source} is {value} as a floating-point number, which may have been another "
                f"integer; expected ids as integers or text ({watch.name}; {rows:,} such rows)"
            )


def _bad_lines(plan: TablePlan, folder: str) -> list[Rejection]:
    """The lines that are no rows: the first of each reason over all files, and how many."""
    counts: dict[str, int] = {}
    first: dict[str, tuple[str, int, str]] = {}
    for text in plan.files.texts:
        for reason, count in text.scan.bad_lines.items():
            counts[reason] = counts.get(reason, 0) + count
        for bad in text.scan.bad:
            first.setdefault(bad.kind, (os.path.relpath(text.path, folder), bad.line, bad.text[:_SHOWN]))
    return [Rejection(f"{NO_ROW}: {reason}", count, *first[reason]) for reason, count in counts.items()]


def _files(query: Query, plan: TablePlan, table: str, folder: str) -> tuple[FileRows, ...]:
    """Rows of each file, and how many of them are unusable."""
    starts, start = [], 0
    for index, rows in enumerate(plan.files.rows):
        starts.append(f"({index}, {start}, {start + rows})")
        start += rows
    rejected = dict(
        query(
            f"SELECT file, count(*) FROM (SELECT smes_row FROM {table} WHERE smes_reason IS NOT NULL) "
            f"JOIN (VALUES {', '.join(starts)}) files (file, first, next) ON smes_row >= first AND smes_row < next "
            "GROUP BY 1"
        )
    )
    found = []
    for index, (file, rows) in enumerate(zip(plan.files.files, plan.files.rows, strict=True)):
        bad = sum(plan.files.texts[index].scan.bad_lines.values()) if plan.files.texts else 0
        found.append(FileRows(os.path.relpath(file, folder), rows + bad, rejected.get(index, 0) + bad))
    return tuple(found)
