"""The ledger of a log: what was read, what was left out and why, and what no log that is to be trained on may hold.

The reader fills a :class:`LogLedger` while it sorts the log. :func:`check` then refuses a log whose ledger shows that
its schema file does not fit it, before anything is trained on it.
"""

from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from smes.errors import LogError

EARLIEST_MS = 788_918_400_000
"""1995-01-01 UTC. No log of a recommender is older; earlier times are times in another unit than was declared."""

DAY_MS = 86_400_000
COUNTED_FROM_ZERO_MS = 9 * DAY_MS
"""A log whose last time lies below this counts from its own beginning and has no dates. The smallest mistake in the
unit lies above: seconds since 1970 that are read as milliseconds begin at day 9.13 for the year 1995."""


@dataclass(frozen=True, slots=True)
class FileRows:
    """Rows of one file of the log: ``rows = used + duplicates + rejected``.

    Attributes:
        file: Its name, relative to the log's folder.
        rows: Its rows, including lines that could not be split into fields.
        rejected: How many of them are unusable.
    """

    file: str
    rows: int
    rejected: int


@dataclass(frozen=True, slots=True)
class Rejection:
    """Rows that were left out for one reason.

    Attributes:
        reason: What was expected, with the column.
        rows: How many.
        file: File of the first of them.
        line: Its number in the file: for CSV the line, counted from 1 with the header; for Parquet the row, from 1.
        value: What it held, shortened; None for a reason without one column.
    """

    reason: str
    rows: int
    file: str
    line: int
    value: str | None = None


@dataclass(frozen=True, slots=True)
class ColumnCounts:
    """What a label or a feature had in the rows of its table.

    Attributes:
        kind: ``label`` or ``feature``.
        name: Of the task or feature.
        source: The column or expression that it is read from.
        table: ``log``, ``user`` or ``item``.
        rows: Rows of the table that were looked at.
        no_value: Rows in which it was empty.
        unreadable: Rows in which it was there and not readable as what the schema says. Such a label rejects its row;
            such a feature counts as missing.
        example: The first unreadable value, shortened.
        file, line: Where that is, as in :class:`Rejection`.
        positives: For the label of a binary task: positive outcomes among the impressions within the limit.
    """

    kind: Literal["label", "feature"]
    name: str
    source: str
    table: Literal["log", "user", "item"]
    rows: int
    no_value: int
    unreadable: int
    example: str | None = None
    file: str | None = None
    line: int | None = None
    positives: int | None = None


@dataclass(frozen=True, slots=True)
class TableJoin:
    """How a feature table fits the log.

    Attributes:
        entity: ``user`` or ``item``.
        rows: Rows of the table, including rejected ones.
        repeated: Rows whose key came again later in the table; the last one counts.
        rejections: Its rows that were left out.
        ids_in_log: Different users or items in the log.
        ids_matched: How many of them have a row in the table.
        impressions: Impressions of the log.
        impressions_missed: How many of them found no row.
    """

    entity: Literal["user", "item"]
    rows: int
    repeated: int
    rejections: tuple[Rejection, ...]
    ids_in_log: int
    ids_matched: int
    impressions: int
    impressions_missed: int


@dataclass(frozen=True, slots=True)
class LogLedger:
    """Everything that was read of a log and what became of it. Counts are of the whole log, whatever the limit.

    Attributes:
        where: The log, for messages.
        files: Its files in reading order.
        rows: Rows in all files: ``usable + duplicates +`` the rows of ``rejections``.
        usable: Rows that can be trained on.
        used: The same, within the limit that was asked for.
        users, items: Different ones among the impressions within the limit.
        duplicates: Exact copies of other rows, dropped.
        outside: Rows with a time before 1995 or later than a day from now; they are among the rejections.
        rejections: Rows left out, most frequent reason first.
        columns: Labels and features.
        joins: The feature tables.
        first_event_ms, last_event_ms: Least and greatest event time of the rows with a time, also of rejected ones.
            None without any.
        time_column, time_unit: Where the times come from.
    """

    where: str
    files: tuple[FileRows, ...]
    rows: int
    usable: int
    used: int
    users: int
    items: int
    duplicates: int
    outside: int
    rejections: tuple[Rejection, ...]
    columns: tuple[ColumnCounts, ...]
    joins: tuple[TableJoin, ...]
    first_event_ms: int | None
    last_event_ms: int | None
    time_column: str
    time_unit: str

    @property
    def rejected(self) -> int:
        """Rows left out as unusable."""
        return sum(rejection.rows for rejection in self.rejections)

    @property
    def counts_from_zero(self) -> bool:
        """Whether the times count from the log's own beginning instead of 1970."""
        return counts_from_zero(self.first_event_ms, self.last_event_ms)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: the section ``log`` of a report."""
        return asdict(self) | {"rejected": self.rejected, "counts_from_zero": self.counts_from_zero}


def counts_from_zero(first_ms: int | None, last_ms: int | None) -> bool:
    """Whether times from ``first_ms`` to ``last_ms`` count from a log's own beginning instead of 1970."""
    return first_ms is not None and last_ms is not None and first_ms >= 0 and last_ms < COUNTED_FROM_ZERO_MS


def problems(ledger: LogLedger, *, max_rejected: float, now_ms: int) -> list[str]:
    """What makes a log unfit to be trained on, one line each; empty for a log that is fit.

    Args:
        ledger: Of the whole log.
        max_rejected: Largest share of its rows that may be unusable, or outside the time.
        now_ms: Unix milliseconds; later times than a day from now are refused.
    """
    if ledger.rows == 0:
        return [f"{ledger.where}: no rows, expected at least one impression"]
    found = _outside(ledger, max_rejected, now_ms) or _rejected(ledger, max_rejected)
    for column in ledger.columns:
        place = f"{ledger.where}: {column.kind} {column.name} ({column.source})"
        readable = column.rows - column.no_value - column.unreadable
        if column.kind == "label" and column.rows and column.no_value == column.rows:
            found.append(f"{place}: empty in all {column.rows:,} rows, expected outcomes")
        elif column.kind == "feature" and readable == 0 and column.unreadable > max_rejected * column.rows:
            found.append(
                f"{place}: {column.example!r} in {_at(column.file, column.line)}, and no readable value in all "
                f"{column.rows:,} rows, expected values as the schema says"
            )
    for join in ledger.joins:
        if join.ids_in_log and not join.ids_matched and ledger.used == ledger.usable:
            found.append(
                f"{ledger.where}: 0 of {join.ids_in_log:,} {join.entity}s are in the table "
                f"log.{join.entity}_features, expected keys that are {join.entity} ids of the log"
            )
    return found


def check(ledger: LogLedger, *, max_rejected: float, now_ms: int) -> None:
    """Refuse a log that is unfit to be trained on.

    Raises:
        LogError: One line with all :func:`problems`.
    """
    if found := problems(ledger, max_rejected=max_rejected, now_ms=now_ms):
        raise LogError("; ".join(found))


def _rejected(ledger: LogLedger, max_rejected: float) -> list[str]:
    if ledger.rejected <= max_rejected * ledger.rows:
        return []
    worst = ledger.rejections[0]
    held = "" if worst.value is None else f", which holds {worst.value!r}"
    return [
        f"{ledger.where}: {ledger.rejected:,} of {ledger.rows:,} rows are rejected, expected at most "
        f"{max_rejected:.2%} (log.max_rejected); {worst.rows:,} of them: {worst.reason}, the first in "
        f"{_at(worst.file, worst.line)}{held}"
    ]


def _outside(ledger: LogLedger, max_rejected: float, now_ms: int) -> list[str]:
    first, last = ledger.first_event_ms, ledger.last_event_ms
    if first is None or last is None or ledger.outside <= max_rejected * ledger.rows:
        return []
    return [
        f"{ledger.where}: {ledger.outside:,} of {ledger.rows:,} rows have a time outside 1995 … a day from now: "
        f"event_time ({ledger.time_column}) in {ledger.time_unit} runs from {utc(first)} to {utc(last)}, expected "
        f"another log.time_unit or column{unit_hint(first, ledger.time_unit, now_ms)}"
    ]


def unit_hint(event_time_ms: int, time_unit: str, now_ms: int) -> str:
    """Which unit would make a time plausible, as the end of a message; empty if none would.

    Args:
        event_time_ms: The time as it was read, Unix milliseconds.
        time_unit: The unit that it was read in.
        now_ms: Unix milliseconds.
    """
    per_s = {"s": 1, "ms": 1000, "us": 1_000_000}
    if time_unit not in per_s:
        return ""
    raw = event_time_ms * per_s[time_unit] / 1000
    for unit, factor in per_s.items():
        if unit != time_unit and EARLIEST_MS <= raw * 1000 / factor <= now_ms + DAY_MS:
            return f"; in {unit} it would be {utc(round(raw * 1000 / factor))}: set log.time_unit: {unit}"
    return ""


def utc(unix_ms: int) -> str:
    """A time for people, to the second."""
    try:
        return datetime.fromtimestamp(unix_ms / 1000, UTC).isoformat(sep=" ", timespec="seconds").removesuffix("+00:00")
    except (OverflowError, OSError, ValueError):
        return f"{unix_ms} ms since 1970"


def _at(file: str | None, line: int | None) -> str:
    return f"{file}:{line}"
