"""Where a log of impressions keeps its values: the ``log:`` section of a schema file, as plain frozen dataclasses.

The schema says which features and tasks exist. This section says in which file and column each one is found. Times and
delays are in the units that their names carry. Column names are matched exactly.
"""

import codecs
from dataclasses import dataclass, field, replace
from typing import Literal

from smes.ranges import NonNegativeFloat, NonNegativeInt, PositiveFloat, Share, check_ranges

TimeUnit = Literal["s", "ms", "us", "timestamp"]
LOG_PATTERNS = ("*.parquet", *(f"*{name}{packed}" for name in (".csv", ".tsv") for packed in ("", ".gz", ".zst")))
NULL_WORDS = ("", "NULL", "null", r"\N")


@dataclass(frozen=True)
class CsvFormat:
    """How text files are split into fields. Nothing of this is guessed from the files.

    A row ends with LF, CR LF or CR, and with the end of the file. Empty lines are passed over. There are no comments: a
    line that begins with ``#`` is a row.

    Attributes:
        delimiter: What separates the fields, one to four ASCII characters. Default: a tab in files named ``.tsv``, a
            comma in all others.
        quote: The character around fields that hold delimiters or line ends. Empty: there are no quotes.
        escape: The character that takes the meaning from a quote inside quotes. The default is the quote itself: it is
            written twice.
        encoding: A name of the encoding that Python knows, such as ``latin-1`` or ``cp1252``.
        skip_lines: Lines to pass over before the header, or before the first row.
        names: Names of the columns of files without a header. Empty: the first line is the header.
    """

    delimiter: str | None = None
    quote: str = '"'
    escape: str = '"'
    encoding: str = "utf-8"
    skip_lines: NonNegativeInt = 0
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_ranges(self)
        delimiter = "," if self.delimiter is None else self.delimiter
        if not 1 <= len(delimiter) <= 4 or not delimiter.isascii() or set(delimiter) & set("\r\n"):
            raise ValueError(f"CsvFormat.delimiter: {delimiter!r}, expected one to four ASCII characters, no line end")
        for key, value in (("quote", self.quote), ("escape", self.escape)):
            if len(value) > 1 or not value.isascii() or (value in delimiter and value) or value in ("\r", "\n"):
                raise ValueError(f"CsvFormat.{key}: {value!r}, expected one ASCII character beside the delimiter's")
        try:
            codecs.lookup(self.encoding)
        except LookupError as error:
            raise ValueError(f"CsvFormat.encoding: {self.encoding!r}, expected an encoding, such as utf-8") from error
        folded = [name.casefold() for name in self.names]
        if twice := [name for name in self.names if folded.count(name.casefold()) > 1]:
            raise ValueError(f"CsvFormat.names: {twice}, expected names that differ in more than upper and lower case")

    def of_another_table(self) -> "CsvFormat":
        """The same way of writing, for a table with a header of its own."""
        return replace(self, skip_lines=0, names=())


@dataclass(frozen=True)
class Delay:
    """The time from an impression to its feedback, drawn from a lognormal distribution where the log has no times.

    Attributes:
        median_s: Median of the delay in seconds.
        sigma: Standard deviation of the delay's natural logarithm. 0 makes the delay constant.
        at_least: A regression task whose value, in seconds, is a lower bound of the delay: a user who watches a video
            for 30 s and then forwards it does so after those 30 s.
    """

    median_s: PositiveFloat = 1.0
    sigma: NonNegativeFloat = 0.5
    at_least: str | None = None

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class LabelSource:
    """Where a task's outcome is found. In YAML a bare string stands for ``{column: …}``.

    Attributes:
        column: A column of the log: 0, 1, false or true for a binary task, a number for a regression task. A null, a
            word of ``log.null_words`` and NaN mean that there is no outcome.
        threshold: For binary tasks: a value of at least this is a positive, a smaller one a negative.
        scale: For regression tasks: the factor from the column's unit to the task's, such as 0.001 from ms to s.
        time_column: Column with the feedback's own time, in the log's ``time_unit``. No delay is drawn then.
        delay: The delay that is drawn for each feedback if there is no ``time_column``.
        optional: Whether files without the column are read as files without outcomes. They are refused otherwise.
    """

    column: str
    threshold: float | None = None
    scale: PositiveFloat = 1.0
    time_column: str | None = None
    delay: Delay = field(default_factory=Delay)
    optional: bool = False

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class FeatureSource:
    """Where a feature's value is found. In YAML a bare string stands for ``{column: …}``.

    A feature of source ``user`` (``item``) is read from the ``user_features`` (``item_features``) table if the log has
    one. Every other feature is read from the log itself.

    Attributes:
        column: Column name. Default: the feature's own name.
        expr: A DuckDB SQL expression over the table's columns, instead of a column. Columns of CSV files are text
            (cast them with ``TRY_CAST(x AS DOUBLE)``). Expressions over the log may also use ``event_time_ms``
            (BIGINT). The expression runs with the rights of the user who runs the command, like the command itself.
        separator: What separates the ids of a bag or sequence that is stored as one text. Default: a comma or ``|``.
            Spaces around each id are dropped. A text in brackets, such as ``[27, 9]`` or ``["a", "b"]``, is a list of
            JSON or Python whatever the separator.
        optional: Whether files without the column are read as files without values. They are refused otherwise.
    """

    column: str | None = None
    expr: str | None = None
    separator: str | None = None
    optional: bool = False

    def __post_init__(self) -> None:
        if self.column is not None and self.expr is not None:
            raise ValueError(f"FeatureSource.expr: {self.expr!r} beside column {self.column!r}, expected one of them")
        if self.separator == "":
            raise ValueError("FeatureSource.separator: '', expected a non-empty string")


@dataclass(frozen=True)
class SideTable:
    """A table of features that is joined to the log by a key. If a key occurs twice, its last row counts.

    Attributes:
        files: Glob patterns relative to the log's folder. The extension tells CSV from Parquet.
        key: The column that holds the user or item id.
        csv: How its text files are written. Default: as the log's, with a header.
    """

    files: tuple[str, ...]
    key: str
    csv: CsvFormat | None = None


@dataclass(frozen=True)
class LogSpec:
    """Files and columns of a log of impressions.

    Attributes:
        user_id: Column of the user id, which becomes :func:`smes.hashing.encode_id` of what is there.
        item_id: Column of the item id, likewise.
        event_time: Column of the time at which the item was shown.
        labels: Task name → where its outcome is found. Every task of the schema needs one.
        files: Glob patterns of the log's files if a folder is given. Files are read in the order of their names.
        time_unit: ``s``, ``ms`` or ``us`` since 1970 UTC, or ``timestamp`` (ISO 8601, UTC unless it has an offset).
        impression_id: Column of a unique id. Default: the row's number after sorting and removing duplicates.
        request_id: Column of an id that is the same for all items shown together. Default: none.
        features: Feature name → where it is found. Default: the column of the same name.
        user_features: The users' table, if any.
        item_features: The items' table, if any.
        csv: How the text files are written.
        null_words: The texts that mean that there is no value: in ids, labels and features, and in bags. They are
            compared as they stand. The empty text always does.
        max_rejected: Largest share of the log's rows that may be unusable; a log with more is refused.
    """

    user_id: str
    item_id: str
    event_time: str
    labels: dict[str, LabelSource]
    files: tuple[str, ...] = LOG_PATTERNS
    time_unit: TimeUnit = "ms"
    impression_id: str | None = None
    request_id: str | None = None
    features: dict[str, FeatureSource] = field(default_factory=dict)
    user_features: SideTable | None = None
    item_features: SideTable | None = None
    csv: CsvFormat = field(default_factory=CsvFormat)
    null_words: tuple[str, ...] = NULL_WORDS
    max_rejected: Share = 0.01

    def __post_init__(self) -> None:
        check_ranges(self)
