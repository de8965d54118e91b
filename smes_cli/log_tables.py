"""The ledger of a log as compact tables."""

from collections.abc import Iterator

from rich.table import Table

from simulators.logs.ledger import ColumnCounts, LogLedger, Rejection, utc
from smes_cli.console import console, number

_MOST_FILES = 12
_MOST_LETTERS = 80  # of an expression


def print_ledger(ledger: LogLedger, *, every_column: bool = False) -> None:
    """Print a log's ledger: what was read, what was left out and why, and what each column had.

    Args:
        ledger: Of the log.
        every_column: Whether features with a value in every row have a line each; they are one line together otherwise.
    """
    console.print(_head(ledger), highlight=False)
    columns = sorted(ledger.columns, key=lambda column: column.kind != "label")
    shown = [c for c in columns if every_column or c.kind == "label" or c.no_value or c.unreadable]
    for table in _tables(ledger, shown):
        console.print(table)
    if rest := len(ledger.columns) - len(shown):
        console.print(f"{rest:,} {'other features have' if rest > 1 else 'other feature has'} a value in every row")


def _head(ledger: LogLedger) -> str:
    kept = f"{number(ledger.usable)} impressions in {number(ledger.rows)} rows"
    if ledger.used != ledger.usable:
        kept += f", {number(ledger.used)} of them within the limit"
    first, last = ledger.first_event_ms, ledger.last_event_ms
    times = "no event times" if first is None or last is None else f"event times {utc(first)} … {utc(last)} UTC"
    if ledger.counts_from_zero:
        times += " (the times count from the log's own beginning)"
    left_out = f"{number(ledger.duplicates)} exact duplicates dropped, {number(ledger.rejected)} rejected"
    ids = f"{number(ledger.users)} users, {number(ledger.items)} items"
    return f"log {ledger.where}: {kept}; {left_out}\n{ids}; {times}"


def _tables(ledger: LogLedger, shown: list[ColumnCounts]) -> Iterator[Table]:
    if len(ledger.files) > 1:
        files = plain_table("file", "rows", "rejected")
        for file in ledger.files[:_MOST_FILES]:
            files.add_row(file.file, number(file.rows), number(file.rejected))
        if rest := ledger.files[_MOST_FILES:]:
            rows, rejected = sum(file.rows for file in rest), sum(file.rejected for file in rest)
            files.add_row(f"and {len(rest):,} more files", number(rows), number(rejected))
        yield files
    if ledger.rejections:
        yield _rejections("rows rejected", ledger.rejections)
    yield _columns(shown)
    joins = plain_table(
        "feature table", "rows", "keys repeated", "ids in the log", "of them found", "impressions missed"
    )
    for join in ledger.joins:
        counts = map(number, (join.rows, join.repeated, join.ids_in_log, join.ids_matched, join.impressions_missed))
        joins.add_row(f"{join.entity}s", *counts)
    if ledger.joins:
        yield joins
    for join in ledger.joins:
        if join.rejections:
            yield _rejections(f"rows of the table of {join.entity}s rejected", join.rejections)


def _columns(shown: list[ColumnCounts]) -> Table:
    bad = any(column.unreadable for column in shown)
    where = (">first unreadable", ">at") if bad else ()
    table = plain_table("label or feature", "rows", "positives", "no value", "unreadable", *where, ">read from")
    for column in shown:
        of = "" if column.table == "log" else f" ({column.table}s)"
        positives = "" if column.positives is None else number(column.positives)
        counts = (number(column.rows), positives, number(column.no_value), number(column.unreadable))
        at = "" if column.file is None else f"{column.file}:{column.line}"
        example = (column.example or "", at) if bad else ()
        source = column.source if len(column.source) <= _MOST_LETTERS else f"{column.source[:_MOST_LETTERS]}…"
        table.add_row(f"{column.kind} {column.name}{of}", *counts, *example, source)
    return table


def _rejections(title: str, rejections: tuple[Rejection, ...]) -> Table:
    table = plain_table(title, "rows", ">first at", ">value")
    for rejection in rejections:
        at = f"{rejection.file}:{rejection.line}"
        table.add_row(rejection.reason, number(rejection.rows), at, rejection.value or "")
    return table


def plain_table(first: str, *others: str) -> Table:
    """A table without lines; a title that begins with ``>`` is of a column of texts, the others of numbers."""
    table = Table(box=None, title_justify="left", pad_edge=False)
    table.add_column(first, overflow="fold")
    for title in others:
        table.add_column(title.removeprefix(">"), justify="left" if title[0] == ">" else "right", overflow="fold")
    return table
