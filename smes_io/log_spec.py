"""How a log of impressions lies in files: the ``log:`` section of a schema file, as plain frozen dataclasses.

The schema says which features and tasks exist; this says in which file and column each one is found. Times and
delays are in the units their names carry; every column name is matched exactly.
"""

from dataclasses import dataclass, field
from typing import Literal

TimeUnit = Literal["s", "ms", "us", "timestamp"]


@dataclass(frozen=True)
class Delay:
    """How long after its impression a feedback arrives, where the log does not say: a lognormal draw.

    Attributes:
        median_s: Median of the delay in seconds, more than 0.
        sigma: Standard deviation of the delay's natural logarithm, ≥ 0; 0 makes the delay constant.
        at_least: A regression task whose value, in seconds, is a lower bound: nobody likes a video after having
            watched it for 30 s earlier than those 30 s.
    """

    median_s: float = 1.0
    sigma: float = 0.5
    at_least: str | None = None

    def __post_init__(self) -> None:
        if not self.median_s > 0:
            raise ValueError(f"delay median_s {self.median_s}, expected more than 0 seconds")
        if not self.sigma >= 0:
            raise ValueError(f"delay sigma {self.sigma}, expected at least 0")


@dataclass(frozen=True)
class LabelSource:
    """Where a task's outcome is found. In YAML a bare string stands for ``{column: …}``.

    Attributes:
        column: A column of the log. Binary: 0 or 1 (true and false are understood); regression: a number. Empty means
            "no outcome".
        threshold: Binary tasks: a value of at least this is a positive, anything below a negative.
        scale: Regression tasks: factor from the column's unit to the task's, such as 0.001 from ms to s.
        time_column: Column with the feedback's own time, in the log's ``time_unit``; no delay is drawn then.
        delay: The delay drawn for each feedback when there is no ``time_column``.
    """

    column: str
    threshold: float | None = None
    scale: float = 1.0
    time_column: str | None = None
    delay: Delay = field(default_factory=Delay)

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ValueError(f"label {self.column!r}: scale {self.scale}, expected more than 0")


@dataclass(frozen=True)
class FeatureSource:
    """Where a feature's value is found. In YAML a bare string stands for ``{column: …}``.

    A feature of source ``user`` (``item``) is read from the ``user_features`` (``item_features``) table where the log
    has one, every other feature from the log itself.

    Attributes:
        column: Column name; default: the feature's own name.
        expr: Instead of a column, a DuckDB SQL expression over the table's columns. Columns of CSV files are text
            there (cast with ``TRY_CAST(x AS DOUBLE)``); on the log ``event_time_ms`` (BIGINT) is at hand too. It runs
            with the rights of whoever runs the command: it is the operator's own file.
        separator: What separates the ids of a bag held in one text.
    """

    column: str | None = None
    expr: str | None = None
    separator: str = ","

    def __post_init__(self) -> None:
        if self.column is not None and self.expr is not None:
            raise ValueError(f"feature column {self.column!r} and expr {self.expr!r}: expected one of them")
        if not self.separator:
            raise ValueError("feature separator: expected a non-empty string")


@dataclass(frozen=True)
class SideTable:
    """A table of features that is joined to the log by a key; where a key occurs twice, its last row counts.

    Attributes:
        files: Glob patterns relative to the log's folder; CSV or Parquet by extension.
        key: The column to match with the log's user or item id.
    """

    files: tuple[str, ...]
    key: str


@dataclass(frozen=True)
class LogSpec:
    """Files and columns of a log of impressions.

    Attributes:
        user_id: Column of the user id; integers pass through, other text becomes :func:`smes.schema.stable_id`.
        item_id: Column of the item id, likewise.
        event_time: Column of the time the item was shown.
        labels: Task name → its outcome. Every task of the schema needs one.
        files: Glob patterns of the log's files when a folder is given, read in order of their names.
        time_unit: ``s``, ``ms`` or ``us`` since 1970 UTC, or ``timestamp`` (ISO 8601; UTC where it has no offset).
        impression_id: Column of a unique id; default: the row's number after sorting and removing duplicates.
        request_id: Column that the items shown together have in common; default: none.
        features: Feature name → where it is found; default: the column of the same name.
        user_features: The users' table, if any.
        item_features: The items' table, if any.
        delimiter: Between the fields of CSV files.
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
