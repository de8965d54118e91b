"""What the columns of a table hold: figures of a sample, from which a schema is proposed."""

# ruff: noqa: S608 - names are quoted and texts escaped by the functions of sql.py.

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from simulators.logs import sql
from simulators.logs.infer_tables import LogSample, Table
from simulators.logs.ledger import DAY_MS, EARLIEST_MS
from smes_io.clock import wall_clock_ms
from smes_io.log_spec import NULL_WORDS, TimeUnit

DATE_FORMATS = ("%d-%b-%Y", "%d/%m/%Y", "%m/%d/%Y", "%d.%m.%Y", "%d %b %Y", "%b %d, %Y", "%Y%m%d", "%Y/%m/%d")
SEPARATORS = ("|", ";", ",", " ", "/")
_EXACT_ROWS = 300_000
_DATED_ROWS = 10_000
_PER_S: dict[TimeUnit, int] = {"s": 1, "ms": 1000, "us": 1_000_000}


@dataclass
class Column:
    """What a column of a sample holds. Shares are of the rows in which it has a value.

    Attributes:
        name, sql_type: Of the column.
        rows, filled, distinct: Rows of the sample, those with a value, and different values (about 2 % off).
        numbers, integers, flags: Shares of numbers, of integers, and of 0, 1, true and false.
        least, greatest, median: Of the numbers; None without any.
        comma_numbers: Share of numbers with a decimal comma.
        timestamps: Share of texts that are ISO 8601 times.
        date_format: How dates are written otherwise, as ``strptime`` takes it.
        bracketed: Share of texts in brackets: lists of JSON or Python.
        length: The mean length of the texts.
        separator: What separates ids within one text, if it seems to hold several.
        most_ids: How many ids a list or such a text holds at most.
        words: Texts in a column of numbers that are none, most frequent first.
        examples: The first and the last value by letters.
        ones: Share of flags that are 1 or true.
    """

    name: str
    sql_type: str
    rows: int
    filled: int
    distinct: int
    numbers: float = 0.0
    integers: float = 0.0
    flags: float = 0.0
    least: float | None = None
    greatest: float | None = None
    median: float | None = None
    comma_numbers: float = 0.0
    timestamps: float = 0.0
    date_format: str | None = None
    bracketed: float = 0.0
    length: float = 0.0
    separator: str | None = None
    most_ids: int = 1
    words: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()
    ones: float = 0.0
    tokens: tuple[str, ...] = field(default=())

    @property
    def is_number(self) -> bool:
        """Whether it holds numbers and nothing else."""
        return self.filled > 0 and self.numbers >= 0.999

    @property
    def is_integer(self) -> bool:
        """Whether it holds integers and nothing else."""
        return self.filled > 0 and self.integers >= 0.999

    @property
    def is_flag(self) -> bool:
        """Whether it holds 0 and 1, or true and false, both of them."""
        return self.filled > 0 and self.flags >= 0.999 and self.distinct > 1

    @property
    def never_repeats(self) -> bool:
        """Another value in each row, as a number of the row has it."""
        return self.filled >= 20 and self.distinct >= 0.98 * self.filled

    @property
    def is_list(self) -> bool:
        """Whether it holds several ids in one value."""
        return self.sql_type.endswith("]") or self.bracketed > 0.95 or self.separator is not None

    @property
    def time_unit(self) -> TimeUnit | None:
        """The unit in which its values are times from 1995 to now; None if they are none in any."""
        family = sql.family(self.sql_type)
        if family == "time" or (self.filled and self.timestamps >= 0.99):
            return "timestamp"
        if not self.is_number or self.least is None or self.greatest is None:
            return None
        for unit, per_s in _PER_S.items():
            low, high = EARLIEST_MS / 1000 * per_s, (wall_clock_ms() + DAY_MS) / 1000 * per_s
            if low <= self.least and self.greatest <= high:
                return unit
        return None

    @property
    def repeats(self) -> float:
        """Rows with a value for each different value."""
        return self.filled / max(self.distinct, 1)


def tokens_of(name: str) -> tuple[str, ...]:
    """The words of a name: ``isClick``, ``is_click`` and ``IsClick2`` hold ``is`` and ``click``."""
    split = re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", re.sub(r"([A-Z]+)([A-Z][a-z])", r"\1 \2", name))
    return tuple(word.lower() for word in re.findall(r"[A-Za-z]+", split))


def look_at(sample: LogSample, table: Table) -> list[Column]:
    """Look at all columns of a table."""
    return [_looked_at(sample, table, name, sql_type) for name, sql_type in table.columns.items()]


def text_of(name: str, sql_type: str) -> str:
    """A column as text, integers in columns of doubles as integers; null where there is nothing."""
    words = ", ".join(map(sql.text, NULL_WORDS))
    value = f"CAST({sql.quote(name)} AS VARCHAR)"
    if sql.family(sql_type) == "float":
        value = f"CASE WHEN isnan({sql.quote(name)}) THEN NULL ELSE {value} END"
    return f"regexp_replace(CASE WHEN trim({value}) IN ({words}) THEN NULL ELSE {value} END, '^(-?\\d+)\\.0$', '\\1')"


def _looked_at(sample: LogSample, table: Table, name: str, sql_type: str) -> Column:
    value = text_of(name, sql_type)
    column = Column(name, sql_type, table.rows, 0, 0, tokens=tokens_of(name))
    if sql.family(sql_type) == "other":
        return column
    number, source = "TRY_CAST(v AS DOUBLE)", f"(SELECT {value} AS v FROM {table.name})"
    different = "count(DISTINCT v)" if table.rows <= _EXACT_ROWS else "approx_count_distinct(v)"
    flags = "lower(v) IN ('0', '1', 'true', 'false')"
    (row,) = sample.rows(
        f"SELECT count(v), count(*) FILTER (isfinite({number})), "
        f"count(*) FILTER (regexp_full_match(v, '[-+]?[0-9]+')), count(*) FILTER ({flags}), "
        f"min({number}), max({number}), approx_quantile({number}, 0.5), "
        "count(*) FILTER (regexp_full_match(v, '-?[0-9]+,[0-9]+')), "
        f"count(*) FILTER ({number} IS NULL AND TRY_CAST(v AS TIMESTAMPTZ) IS NOT NULL), "
        r"count(*) FILTER (regexp_full_match(v, '\s*\[.*\]\s*')), avg(length(v)), "
        f"count(*) FILTER (lower(v) IN ('1', 'true')), {different}, min(v), max(v) FROM {source}"
    )
    filled = int(row[0])
    if filled == 0:
        return column
    numbers, integers, flagged, least, greatest, median, commas, times, lists, length, ones, distinct = row[1:13]
    column.filled, column.distinct, column.length = filled, min(int(distinct), filled), float(length or 0)
    column.numbers, column.integers, column.flags = numbers / filled, integers / filled, flagged / filled
    column.comma_numbers, column.timestamps = commas / filled, times / filled
    column.bracketed, column.ones = lists / filled, ones / filled
    column.least, column.greatest, column.median = least, greatest, median
    column.examples = tuple(dict.fromkeys(str(value)[:40] for value in row[13:]))
    if 0.5 <= column.numbers < 0.999:
        column.words = tuple(
            r[0]
            for r in sample.rows(
                f"SELECT v FROM {source} WHERE v IS NOT NULL AND NOT COALESCE(isfinite({number}), false) "
                "GROUP BY v ORDER BY count(*) DESC, v LIMIT 3"
            )
        )
        others = ", ".join(map(sql.text, column.words))
        left = sample.rows(
            f"SELECT count(*) FROM {source} WHERE v IS NOT NULL AND v NOT IN ({others}) AND {number} IS NULL"
        )[0][0]
        if left or not all(re.fullmatch(r"[A-Za-z/.\\<>-]{1,8}|\?|-", word) for word in column.words):
            column.words = ()
        else:  # they will be declared as words for no value
            share, column.numbers = column.numbers, 1.0
            column.filled, column.distinct = round(share * column.filled), column.distinct - len(column.words)
            column.integers, column.flags = column.integers / share, column.flags / share
    if sql.family(sql_type) == "text":
        _dates(sample, column, source)
        _several(sample, column, source)
    elif sql_type.endswith("]"):
        lengths = f"SELECT max(len({sql.quote(name)})) FROM {table.name}"
        column.most_ids = int(sample.rows(lengths)[0][0] or 1)
    return column


def _dates(sample: LogSample, column: Column, source: str) -> None:
    if column.timestamps > 0.5 or (column.is_number and column.length != 8):
        return
    years = ", ".join(
        f"count(*) FILTER (year(TRY_STRPTIME(v, {sql.text(written)})) BETWEEN 1900 AND 2100)"
        for written in DATE_FORMATS
    )
    (counts,) = sample.rows(f"SELECT {years} FROM (SELECT v FROM {source} WHERE v IS NOT NULL LIMIT {_DATED_ROWS})")
    fit = [
        written
        for written, count in zip(DATE_FORMATS, counts, strict=True)
        if count >= 0.98 * min(column.filled, _DATED_ROWS)
    ]
    column.date_format = fit[0] if fit else None


def _several(sample: LogSample, column: Column, source: str) -> None:
    """Find out whether texts hold several ids each."""
    if column.bracketed > 0.95:
        column.most_ids = int(
            sample.rows(rf"SELECT max(length(v) - length(replace(v, ',', ''))) + 1 FROM {source}")[0][0]
        )
        return
    if column.numbers > 0.98 or column.timestamps > 0.5 or column.date_format or column.comma_numbers > 0.5:
        return
    values = f"(SELECT v FROM {source} WHERE v IS NOT NULL LIMIT 50000)"
    texts, spaced = sample.rows(f"SELECT count(DISTINCT v), avg((v LIKE '% %')::INT) FROM {values}")[0]
    for separator in SEPARATORS:
        split = f"(SELECT string_split(v, {sql.text(separator)}) AS l FROM {values})"
        several, most = sample.rows(f"SELECT avg((len(l) > 1)::INT), max(len(l)) FROM {split}")[0]
        parts = sample.rows(f"SELECT count(DISTINCT p) FROM (SELECT unnest(l) AS p FROM {split})")[0][0]
        wanted = 0.6 if separator in (" ", "/") or spaced > 0.1 else 0.02
        if (
            several >= wanted
            and parts <= (1.0 if separator in "|;" else 0.6) * texts
            and most <= 64
            and column.length < 200
        ):
            column.separator, column.most_ids = separator, int(most)
            return


def constant_within(sample: LogSample, table: Table, key: str, names: Sequence[str]) -> dict[str, float | None]:
    """Column → the share of rows whose user (or item) has one value in all its rows; None where few rows can tell.

    Only keys with several rows count. A row without a value is one of a value of its own.
    """
    if not names:
        return {}

    def value(name: str) -> str:
        return f"COALESCE({text_of(name, table.columns[name])}, '')"

    same = ", ".join(f"min({value(n)}) = max({value(n)}) AS {sql.quote(f's{i}')}" for i, n in enumerate(names))
    sums = ", ".join(f"sum(CASE WHEN {sql.quote(f's{i}')} THEN n ELSE 0 END)" for i in range(len(names)))
    key_text = text_of(key, table.columns[key])
    (row,) = sample.rows(
        f"SELECT sum(n), count(*), {sums} FROM (SELECT count(*) AS n, {same} FROM {table.name} "
        f"GROUP BY {key_text} HAVING count(*) > 1)"
    )
    total, groups, *sums_of = row
    if not total or groups < 5 or total < 20:
        return dict.fromkeys(names)
    return {name: float(kept) / float(total) for name, kept in zip(names, sums_of, strict=True)}


def share_in(sample: LogSample, table: Table, column: str, keys: Table, key: str) -> tuple[float, int, int]:
    """How many of a column's different values are keys of another table, as a share; and how many of each there are."""
    ours = f"SELECT DISTINCT {text_of(column, table.columns[column])} AS v FROM {table.name}"
    theirs = f"SELECT DISTINCT {text_of(key, keys.columns[key])} AS v FROM {keys.name}"
    (row,) = sample.rows(
        f"SELECT count(*) FILTER (v IN ({theirs})), count(v), (SELECT count(v) FROM ({theirs})) FROM ({ours})"
    )
    return row[0] / max(row[1], 1), int(row[1]), int(row[2])


def values_of(sample: LogSample, table: Table, names: Sequence[str], most_rows: int) -> dict[str, Any]:
    """Some rows of some columns from all over the sample: name → a list of texts, None where there is no value."""
    step = max(table.rows // most_rows, 1)
    listed = ", ".join(f"{text_of(n, table.columns[n])} AS {sql.quote(n)}" for n in names)
    found = sample.arrow(f"SELECT {listed} FROM {table.name} WHERE rowid % {step} = 0")
    return {name: found.column(name).to_pylist() for name in names}
