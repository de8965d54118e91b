"""Read a log of impressions in event-time order, out of core, as blocks of event columns.

Published logs are often ordered by user, and may be larger than memory. DuckDB sorts the log, removes exact duplicates
and joins the feature tables within a memory limit, with spill files in a temporary folder. Blocks are then streamed
from that folder. Every row is counted: ``rows_read = duplicates + rejected + rows within the limit + rows beyond it``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from simulators.logs.files import LogFiles, find_files
from simulators.logs.ledger import LogLedger, check
from simulators.logs.store import LogStore
from smes.arrays import F32, I64
from smes.errors import LogError
from smes.events import ImpressionBlock, fill_elapsed, misaligned
from smes.schema import ITEM_ID, MISSING, USER_ID, Feature, Schema
from smes_io.clock import wall_clock_ms
from smes_io.schema_file import SchemaFile, feature_columns

Entity = Literal["user", "item"]
ENTITIES: tuple[Entity, ...] = ("user", "item")
_CHUNK_ROWS = 65_536
_CHUNK_BYTES = 32 * 2**20


@dataclass(frozen=True, slots=True)
class LogBlock:
    """Impressions in event-time order, with their outcomes. N is rows, T is tasks.

    Attributes:
        impressions: N rows. The features of the schema's history are still empty.
        outcomes: float32 [N, T], the label in the task's unit; NaN where the log has none.
        outcome_time_ms: int64 [N, T], the time of the outcome; ``MISSING`` where the log has none. None if the log has
            no time column for any task.
    """

    impressions: ImpressionBlock
    outcomes: F32
    outcome_time_ms: I64 | None

    def __len__(self) -> int:
        return len(self.impressions)


@dataclass(frozen=True, slots=True)
class EntityBlock:
    """Feature values of users or items, encoded as impressions carry them.

    Attributes:
        entity: ``user`` or ``item``.
        ids: int64 [N], unique over all blocks of the entity.
        columns: Feature name → int64 [N] (id), int64 [N, max_length] (bag, sequence) or float32 [N] (numeric).
    """

    entity: Entity
    ids: I64
    columns: dict[str, NDArray[Any]]


def open_log(
    path: str | Path,
    schema_file: SchemaFile,
    *,
    limit: int | None = None,
    memory_limit: str = "1GB",
    temp_dir: str | Path | None = None,
    threads: int | None = None,
    max_rejected: float | None = None,
) -> "LogReader":
    """Open a log: a folder with the files that the schema file describes, or a single CSV or Parquet file.

    Columns and types are checked here. The log is sorted at the first request for a block or a count.

    Args:
        path: The folder, or the log file itself. Feature tables are looked for relative to the folder.
        schema_file: A schema file with a ``log`` section.
        limit: Read only the first so many impressions in time order.
        memory_limit: Memory limit of DuckDB, such as ``1GB``.
        temp_dir: Where a folder for the sorted log is made, and removed on close. Default: the system's.
        threads: Threads of DuckDB. Default: all cores.
        max_rejected: Largest share of unusable rows. Default: the schema file's ``log.max_rejected``.

    Raises:
        LogError: A file or column is missing, or a column has an unusable type. The message says what was expected.
        ValueError: The schema file has no ``log`` section, or ``limit`` is negative.
    """
    if schema_file.log is None:
        raise ValueError(f"schema {schema_file.name!r}: expected a log section that describes the files")
    if limit is not None and limit < 0:
        raise ValueError(f"limit: {limit}, expected at least 0")
    files = find_files(Path(path), schema_file.log)
    return LogReader(files, schema_file, limit, LogStore(memory_limit, temp_dir, threads), max_rejected)


class LogReader:
    """An opened log, to be used as a context manager. Made by :func:`open_log`."""

    def __init__(
        self,
        files: LogFiles,
        schema_file: SchemaFile,
        limit: int | None,
        store: LogStore,
        max_rejected: float | None = None,
    ) -> None:
        assert schema_file.log is not None
        self.max_rejected = schema_file.log.max_rejected if max_rejected is None else max_rejected
        self._checked = False
        self.schema: Schema = schema_file.schema
        self.spec = schema_file.log
        self._tables = feature_columns(self.schema, self.spec)
        self._store = store
        try:
            store.describe(self.schema, self.spec, files, self._tables, limit)
        except BaseException:
            store.close()
            raise

    @property
    def total(self) -> int:
        """Number of impressions that :meth:`blocks` yields."""
        return self._store.prepared().total

    @property
    def rows_read(self) -> int:
        """Rows in the log's files, including those that could not be parsed."""
        return self._store.prepared().rows_read

    @property
    def duplicates(self) -> int:
        """Dropped exact duplicates of other rows, counted over the whole log."""
        return self._store.prepared().duplicates

    @property
    def rejected(self) -> dict[str, int]:
        """Reason → number of unusable rows in the whole log. They are in no block."""
        return dict(self._store.prepared().rejected)

    @property
    def ledger(self) -> LogLedger:
        """What was read, what was left out and why. Loads the feature tables too."""
        return self._store.ledger()

    def check(self) -> None:
        """Refuse a log that is unfit to be trained on, as :func:`simulators.logs.ledger.check`. Done once.

        Raises:
            LogError: It is empty, too many of its rows are unusable, or a column has nothing that can be read.
        """
        if not self._checked:
            check(self.ledger, max_rejected=self.max_rejected, now_ms=wall_clock_ms())
            self._checked = True

    def blocks(self, rows_per_block: int = 8192) -> Iterator[LogBlock]:
        """Yield all impressions in event-time order. Rows of the same time keep their order in the files.

        Raises:
            ValueError: ``rows_per_block`` is below 1.
            LogError: As :meth:`check`, which comes first.
        """
        if rows_per_block < 1:
            raise ValueError(f"rows_per_block: {rows_per_block}, expected at least 1")
        self.check()
        affordable = min(_CHUNK_ROWS, _CHUNK_BYTES // row_bytes(self.schema))
        chunk_rows = max(affordable // rows_per_block, 1) * rows_per_block
        for start in range(0, self.total, chunk_rows):
            chunk = self._block(self._store.impressions(start, start + chunk_rows))
            for row in range(0, len(chunk), rows_per_block):
                yield _rows(chunk, slice(row, row + rows_per_block))

    def entity_blocks(self, entity: Entity) -> Iterator[EntityBlock]:
        """Yield the feature values of every user or item.

        They come from the feature table if the log has one, else from the entity's latest impression in the log.

        Raises:
            LogError: A file cannot be read.
        """
        features = [f for f in self.schema.features if f.source == entity and f.name not in (USER_ID, ITEM_ID)]
        if not features:
            return
        for table in self._store.entities(entity, features):
            yield EntityBlock(entity, _column(table, "key"), {f.name: feature_array(table, f) for f in features})

    def close(self) -> None:
        """Remove the temporary files. Idempotent."""
        self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _block(self, table: Any) -> LogBlock:
        impressions = self._impressions(table)
        fill_elapsed(impressions.numerics, self.schema, impressions.event_time_ms)
        outcomes = np.empty((len(impressions), self.schema.num_tasks), np.float32)
        times = None
        for column, task in enumerate(self.schema.tasks):
            outcomes[:, column] = _column(table, f"label {task.name}")
            if self.spec.labels[task.name].time_column is not None:
                times = np.full(outcomes.shape, MISSING, np.int64) if times is None else times
                times[:, column] = _column(table, f"time {task.name}")
        return LogBlock(impressions, outcomes, times)

    def _impressions(self, table: Any) -> ImpressionBlock:
        n, slices = table.num_rows, self.schema.id_slices
        impressions = ImpressionBlock.empty(self.schema, n)
        impressions.impression_id[:] = _column(table, "impression_id")
        impressions.request_id[:] = _column(table, "request_id")
        impressions.event_time_ms[:] = _column(table, "event_time_ms")
        impressions.ids[:, slices[USER_ID].start] = _column(table, "user")
        impressions.ids[:, slices[ITEM_ID].start] = _column(table, "item")
        for feature in self.schema.id_features[2:]:
            if feature.name in self._tables:
                impressions.ids[:, slices[feature.name]] = feature_array(table, feature).reshape(n, feature.width)
        for column, feature in enumerate(self.schema.numeric_features):
            impressions.numerics[:, column] = feature_array(table, feature)
        bad = misaligned(impressions.ids, self.schema)
        if bad.any():
            raise LogError(
                f"impression {impressions.impression_id[bad][0]}: sequences of different lengths, expected as many ids "
                "in each as in the sequence it accompanies"
            )
        return impressions


def row_bytes(schema: Schema) -> int:
    """Bytes of an impression with its outcomes in memory."""
    return 8 * (schema.id_width + 4) + 4 * (schema.num_numerics + schema.num_tasks)


def feature_array(table: Any, feature: Feature) -> NDArray[Any]:
    """A feature's column of an Arrow table: int64 [N], int64 [N, max_length] or float32 [N]."""
    values = _column(table, f"feature {feature.name}")
    return values.reshape(-1, feature.max_length) if feature.is_list else values


def _column(table: Any, name: str) -> NDArray[Any]:
    chunked = table.column(name).combine_chunks()
    if hasattr(chunked, "flatten") and str(chunked.type).startswith("fixed_size_list"):
        chunked = chunked.flatten()
    values: NDArray[Any] = chunked.to_numpy(zero_copy_only=False)
    return values


def _rows(block: LogBlock, rows: slice) -> LogBlock:
    times = None if block.outcome_time_ms is None else block.outcome_time_ms[rows]
    return LogBlock(block.impressions.take(rows), block.outcomes[rows], times)
