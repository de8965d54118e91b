"""Where a log of impressions keeps its values: the ``log:`` section of a schema file, as plain frozen dataclasses.

The schema says which features and tasks exist. This section says in which file and column each one is found. Times and
delays are in the units that their names carry. Column names are matched exactly.
"""

from dataclasses import dataclass, field
from typing import Literal

from smes.ranges import NonNegativeFloat, PositiveFloat, check_ranges

TimeUnit = Literal["s", "ms", "us", "timestamp"]


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
        column: A column of the log: 0, 1, false or true for a binary task, a number for a regression task. An empty
            value means that there is no outcome.
        threshold: For binary tasks: a value of at least this is a positive, a smaller one a negative.
        scale: For regression tasks: the factor from the column's unit to the task's, such as 0.001 from ms to s.
        time_column: Column with the feedback's own time, in the log's ``time_unit``. No delay is drawn then.
        delay: The delay that is drawn for each feedback if there is no ``time_column``.
    """

    column: str
    threshold: float | None = None
    scale: PositiveFloat = 1.0
    time_column: str | None = None
    delay: Delay = field(default_factory=Delay)

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
        separator: What separates the ids of a bag that is stored as one text.
    """

    column: str | None = None
    expr: str | None = None
    separator: str = ","

    def __post_init__(self) -> None:
        if self.column is not None and self.expr is not None:
            raise ValueError(f"FeatureSource.expr: {self.expr!r} beside column {self.column!r}, expected one of them")
        if not self.separator:
            raise ValueError("FeatureSource.separator: '', expected a non-empty string")


@dataclass(frozen=True)
class SideTable:
    """A table of features that is joined to the log by a key. If a key occurs twice, its last row counts.

    Attributes:
        files: Glob patterns relative to the log's folder. The extension tells CSV from Parquet.
        key: The column that holds the user or item id.
    """

    files: tuple[str, ...]
    key: str


@dataclass(frozen=True)
class LogSpec:
    """Files and columns of a log of impressions.

    Attributes:
        user_id: Column of the user id. Integers are kept, other text becomes :func:`smes.hashing.stable_id` of it.
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
        delimiter: What separates the fields of CSV files.
    """

    user_id: str
    item_id: str
    event_time: str
    labels: dict[str, LabelSource]
    files: tuple[str, ...] = ("*.parquet", "*.csv")
    time_unit: TimeUnit = "ms"
    impression_id: str | None = None
    request_id: str | None = None
    features: dict[str, FeatureSource] = field(default_factory=dict)
    user_features: SideTable | None = None
    item_features: SideTable | None = None
    delimiter: str = ","

    def __post_init__(self) -> None:
        check_ranges(self)
