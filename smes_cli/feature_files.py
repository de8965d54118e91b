"""Rows of features from a JSON Lines or Parquet file, in blocks of bounded size."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from feature_store.entity_layout import Entity, own_features
from feature_store.entity_values import columns_of, entity_ids
from smes.schema import Schema

_ROWS = 5000
_MOST_LINE_BYTES = 1024 * 1024


@dataclass(frozen=True)
class FeatureFile:
    """Which columns of a file are what.

    Attributes:
        path: A ``.parquet`` file, or JSON Lines: an object in each line.
        id_column: Holds the ids.
        time_column: Holds the times from which the rows hold, Unix milliseconds; null: as for rows without one.
        skip_unknown: Whether columns that are no features are passed over. Otherwise they are an error.
    """

    path: Path
    id_column: str
    time_column: str = "time_ms"
    skip_unknown: bool = False

    def blocks(self) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """The rows in blocks: number of the first one, from 1, and the rows by column name.

        Raises:
            ValueError: The file is neither, or a line is no object; the message names file and line.
        """
        rows = self._parquet_rows() if self.path.suffix == ".parquet" else self._json_rows()
        first = 1
        for block in rows:
            yield first, block
            first += len(block)

    def rows(self) -> int | None:
        """How many rows there are; None where only reading tells."""
        if self.path.suffix != ".parquet":
            return None
        with self._open_parquet() as file:
            return int(file.metadata.num_rows)

    def _open_parquet(self) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return pq.ParquetFile(self.path)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{self.path}: {error}, expected a Parquet file") from None

    def _parquet_rows(self) -> Iterator[list[dict[str, Any]]]:
        with self._open_parquet() as file:
            for batch in file.iter_batches(_ROWS):
                yield batch.to_pylist()

    def _json_rows(self) -> Iterator[list[dict[str, Any]]]:
        block: list[dict[str, Any]] = []
        with self.path.open("rb") as file:
            n = 0
            while line := file.readline(_MOST_LINE_BYTES + 1):
                n += 1
                if len(line) > _MOST_LINE_BYTES:
                    raise ValueError(f"{self.path} line {n}: expected at most {_MOST_LINE_BYTES} bytes")
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{self.path} line {n}: no JSON ({error}), expected an object a line") from None
                if not isinstance(row, dict):
                    raise ValueError(f"{self.path} line {n}: {row!r:.60}, expected an object")
                block.append(row)
                if len(block) == _ROWS:
                    yield block
                    block = []
        if block:
            yield block


def put_file(
    file: FeatureFile,
    schema: Schema,
    entity: Entity,
    put_many: Callable[..., int],
    time_ms: int,
    advance: Callable[[int], object],
) -> tuple[int, int]:
    """Put every row of a file.

    Args:
        file: The file.
        schema: The features.
        entity: Whose they are.
        put_many: As :meth:`feature_store.entities.EntityStore.put_many`.
        time_ms: For rows without a time.
        advance: Told how many rows are put.

    Returns:
        Rows read, and how many of them were dropped because newer ones are kept.

    Raises:
        ValueError: A row has no id, an unknown column, or a wrong value; the message names file and row, and how many
            rows were put before.
    """
    import numpy as np

    known = {f.name for f in own_features(schema, entity)}
    if file.time_column in known:
        raise ValueError(f"--time-column {file.time_column}: a feature of that name, expected another column")
    done = dropped = 0
    for first, rows in file.blocks():
        try:
            ids = entity_ids(rows_of(rows, file.id_column), file.id_column)
            times = [row.pop(file.time_column, None) for row in rows]
            values = [{k: v for k, v in row.items() if k != file.id_column} for row in rows]
            if file.skip_unknown:
                values = [{k: v for k, v in row.items() if k in known} for row in values]
            columns = columns_of(schema, entity, values)
            times_ms = np.array([time_ms if at is None else _whole(at, file.time_column) for at in times], np.int64)
            dropped += put_many(entity, ids, columns, times_ms)
        except ValueError as error:
            raise ValueError(
                f"{file.path}, {_in_file(str(error), first, len(rows))} ({done:,} rows before were put; "
                f"with --time {time_ms} to put them again makes no further version)"
            ) from None
        done += len(rows)
        advance(done)
    return done, dropped


def _in_file(reason: str, first: int, rows: int) -> str:
    """A reason with its row counted as in the file, from 1, rather than in the block, from 0."""
    in_block, told = (0, reason) if rows == 1 else (None, reason)
    if named := re.match(r"row (\d+): ", reason):
        in_block, told = int(named[1]), reason[named.end() :]
    if in_block is None:
        return f"rows {first:,} … {first + rows - 1:,}: {told}"
    return f"row {first + in_block:,}: {told}"


def rows_of(rows: list[dict[str, Any]], name: str) -> list[Any]:
    """One column of rows.

    Raises:
        ValueError: A row does not have it.
    """
    for n, row in enumerate(rows):
        if row.get(name) is None:
            raise ValueError(f"row {n}: {name}: missing, expected an id")
    return [row[name] for row in rows]


def _whole(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}: {value!r:.60}, expected Unix milliseconds")
    return value
