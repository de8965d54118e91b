"""The Arrow wire form: an IPC stream with many events a record, for throughput.

Impressions have the columns ``impression_id, user_id, item_id, event_time_ms`` (int64), and, where there are any,
``request_id`` (int64), one column ``features.NAME`` per feature (int64, list<int64>, float32), ``served_version``
(int64) and ``served_scores`` (fixed_size_list<float32>[T], tasks in schema order). Feedback has ``impression_id,
event_time_ms`` (int64), ``task`` (the task's name, dictionary-encoded or plain) and ``value`` (float32). Nulls mean
absent, as in JSON. Columns are told by name; others are kept out, and each counts once per row.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from smes.arrays import Bool
from smes.events import FeedbackBlock, ImpressionBlock, misaligned, scatter_bags
from smes.schema import ITEM_ID, USER_ID, Schema
from stream.codec import arrow_columns
from stream.codec.arrow_columns import RecordBatch, column_problem, read_batches
from stream.codec.validation import Code, Problem, bad_labels, bad_times, feedback_problem, impression_problem
from stream.dead_letters import DeadLetter
from stream.log.event_log import Record

FEATURE_PREFIX = "features."

_IMPRESSION_REQUIRED: dict[str, Code] = {
    "impression_id": "bad_id",
    USER_ID: "bad_id",
    ITEM_ID: "bad_id",
    "event_time_ms": "bad_time",
}
_FEEDBACK_REQUIRED: dict[str, Code] = {
    "impression_id": "bad_id",
    "event_time_ms": "bad_time",
    "task": "unknown_task",
    "value": "label_range",
}

# Least payload that a refused row may take in its letter, whatever else the record holds.
_MIN_ROW_PAYLOAD = 512

# Most characters of a text that a refused row's letter keeps: no good row holds more than the name of a task.
_MAX_TEXT = 1_000


@dataclass(frozen=True, slots=True)
class _Part:
    """One record batch: where it came from, its first row in the record, and its columns by name."""

    record: Record
    first_row: int
    num_rows: int
    num_columns: int
    columns: dict[str, Any]

    def events(self, rows: Iterable[int], to_event: Callable[[dict[str, Any]], object]) -> Iterator[object]:
        for row in rows:
            yield to_event({name: _plain(column[row]) for name, column in self.columns.items()})


def decode_impressions(
    records: Sequence[Record], schema: Schema, max_future_ms: int, dead: list[DeadLetter]
) -> tuple[ImpressionBlock, int]:
    """The good impressions in record order, and their number of unknown fields; letters for the rest go to ``dead``."""
    known = impression_columns(schema)
    parts = [part for record in records for part in _parts(record, known, _IMPRESSION_REQUIRED, dead)]
    block = ImpressionBlock.empty(schema, sum(part.num_rows for part in parts))
    bad = np.zeros(len(block), np.bool_)
    for part, rows in _placed(parts):
        _fill_impressions(part, block.take(rows), bad[rows], schema)
        _fill_origin(part.record, block, rows)
    bad |= bad_times(block.event_time_ms, block.arrival_ms, max_future_ms)

    def explain(event: object, arrival_ms: int) -> Problem | None:
        return impression_problem(event, schema, arrival_ms, max_future_ms)

    unknown = _bury(parts, bad, lambda columns: _impression_event(columns, schema), explain, dead)
    return block.take(~bad) if bad.any() else block, unknown


def decode_feedback(
    records: Sequence[Record], schema: Schema, max_future_ms: int, dead: list[DeadLetter]
) -> tuple[FeedbackBlock, int]:
    """The good feedback in record order, and its number of unknown fields; letters for the rest go to ``dead``."""
    known = tuple(_FEEDBACK_REQUIRED)
    parts = [part for record in records for part in _parts(record, known, _FEEDBACK_REQUIRED, dead)]
    block = FeedbackBlock.empty(sum(part.num_rows for part in parts))
    bad = np.zeros(len(block), np.bool_)
    for part, rows in _placed(parts):
        _fill_feedback(part, block.take(rows), bad[rows], schema)
        _fill_origin(part.record, block, rows)
    bad |= bad_times(block.event_time_ms, block.arrival_ms, max_future_ms)

    def explain(event: object, arrival_ms: int) -> Problem | None:
        return feedback_problem(event, schema, arrival_ms, max_future_ms)

    unknown = _bury(parts, bad, lambda columns: columns, explain, dead)
    return block.take(~bad) if bad.any() else block, unknown


def impression_columns(schema: Schema) -> tuple[str, ...]:
    """The names of all columns that an impression record may have."""
    features = (FEATURE_PREFIX + f.name for f in schema.features if f.name not in (USER_ID, ITEM_ID))
    return (*_IMPRESSION_REQUIRED, "request_id", *features, "served_version", "served_scores")


def _parts(record: Record, known: Sequence[str], required: dict[str, Code], dead: list[DeadLetter]) -> list[_Part]:
    """The record's batches with their known columns; a record that cannot be read at all goes to ``dead``."""
    batches = read_batches(record.value)
    if isinstance(batches, Problem):
        dead.append(DeadLetter.of_record(record, batches))
        return []
    parts: list[_Part] = []
    first_row = 0
    for batch in batches:
        position = {name: i for i, name in enumerate(batch.schema.names)}
        columns = {name: batch.column(position[name]) for name in known if name in position}
        problem = _structure_problem(columns, required)
        if problem:
            dead.append(DeadLetter.of_record(record, problem, events=_credible_rows(batches, record)))
            return []
        if batch.num_rows:
            parts.append(_Part(record, first_row, batch.num_rows, batch.num_columns, columns))
        first_row += batch.num_rows
    return parts


def _structure_problem(columns: dict[str, Any], required: dict[str, Code]) -> Problem | None:
    """What makes every row of a batch bad: a required column that is absent or of the wrong type, or damage."""
    for name, code in required.items():
        column = columns.get(name)
        if column is None or pa.types.is_null(column.type):
            came = "no such column" if column is None else "a column of nulls"
            return Problem("missing_field", f"{name}: expected a column, came {came}", name)
        expected, good = _expected_type(name, column.type)
        if not good:
            return Problem(code, f"{name}: expected {expected} column, came {column.type!s:.60}", name)
    for name, column in columns.items():
        problem = column_problem(column, name)
        if problem:
            return problem
    return None


def _expected_type(name: str, kind: Any) -> tuple[str, bool]:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if name == "task":
        return "a string", pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if name == "value":
        return "a float32", pa.types.is_floating(kind) or pa.types.is_integer(kind)
    return "an int64", pa.types.is_integer(kind)


def _credible_rows(batches: Sequence[RecordBatch], record: Record) -> int:
    """How many events a refused record stands for: its rows, or 1 where it claims more rows than it has bits."""
    rows = sum(batch.num_rows for batch in batches)
    return rows if 0 < rows <= 8 * len(record.value) else 1


def _placed(parts: Sequence[_Part]) -> Iterator[tuple[_Part, slice]]:
    """Each part with its rows in the block of all parts."""
    start = 0
    for part in parts:
        yield part, slice(start, start + part.num_rows)
        start += part.num_rows


def _fill_origin(record: Record, block: ImpressionBlock | FeedbackBlock, rows: slice) -> None:
    block.partition[rows] = record.partition
    block.offset[rows] = record.offset
    block.arrival_ms[rows] = record.arrival_ms


def _fill_impressions(part: _Part, out: ImpressionBlock, bad: Bool, schema: Schema) -> None:
    """Write the part's columns into ``out``, views of its rows, and mark its bad rows in ``bad``."""
    columns = part.columns
    required = {"impression_id": out.impression_id, "event_time_ms": out.event_time_ms}
    for name, target in {**required, USER_ID: out.ids[:, 0], ITEM_ID: out.ids[:, 1]}.items():
        _fill_ids(columns[name], target, bad, required=True)
    for name, target in {"request_id": out.request_id, "served_version": out.served_version}.items():
        if name in columns:
            _fill_ids(columns[name], target, bad)
    for feature in schema.id_features[2:]:
        column = columns.get(FEATURE_PREFIX + feature.name)
        if column is None:
            continue
        if feature.kind == "id":
            _fill_ids(column, out.ids[:, schema.id_slices[feature.name].start], bad)
        else:
            bag = arrow_columns.bags(column)
            scatter_bags(out.ids[:, schema.id_slices[feature.name]], bag.values, bag.starts, bag.lengths)
            _mark(bad, bag.bad)
    _mark(bad, misaligned(out.ids, schema))
    for i, feature in enumerate(schema.numeric_features):
        column = columns.get(FEATURE_PREFIX + feature.name)
        if column is not None:
            out.numerics[:, i], bad_rows = arrow_columns.floats(column)
            _mark(bad, bad_rows)
    if "served_scores" in columns:
        out.served_scores[:], bad_rows = arrow_columns.scores(columns["served_scores"], schema.num_tasks)
        _mark(bad, bad_rows)


def _fill_feedback(part: _Part, out: FeedbackBlock, bad: Bool, schema: Schema) -> None:
    columns = part.columns
    _fill_ids(columns["impression_id"], out.impression_id, bad, required=True)
    _fill_ids(columns["event_time_ms"], out.event_time_ms, bad, required=True)
    out.task[:] = arrow_columns.task_indices(columns["task"], schema.task_index)
    value, bad_values = arrow_columns.floats(columns["value"])
    out.value[:] = value
    _mark(bad, bad_values)
    _mark(bad, (out.task < 0) | bad_labels(out.task, value, schema))


def _fill_ids(column: Any, target: Any, bad: Bool, *, required: bool = False) -> None:
    target[:], bad_rows = arrow_columns.ids(column)
    _mark(bad, bad_rows)
    if required and column.null_count:
        _mark(bad, column.is_null().to_numpy(zero_copy_only=False))


def _mark(bad: Bool, rows: Bool | None) -> None:
    if rows is not None:
        np.logical_or(bad, rows, out=bad)


def _bury(
    parts: Sequence[_Part],
    bad: Bool,
    to_event: Callable[[dict[str, Any]], object],
    explain: Callable[[object, int], Problem | None],
    dead: list[DeadLetter],
) -> int:
    """Write a letter for every bad row; the number of unknown fields in the good ones."""
    unknown = 0
    for part, rows in _placed(parts):
        bad_rows = np.flatnonzero(bad[rows])
        unknown += (part.num_columns - len(part.columns)) * (part.num_rows - len(bad_rows))
        if not len(bad_rows):
            continue
        # A dictionary can repeat one long string in every row: all letters of a record together take at most a few
        # times its size.
        payload_bytes = max(_MIN_ROW_PAYLOAD, 4 * len(part.record.value) // len(bad_rows))
        for row, event in zip(bad_rows.tolist(), part.events(bad_rows.tolist(), to_event), strict=True):
            problem = explain(event, part.record.arrival_ms)
            problem = problem or Problem("unparsable", "expected an event as the schema describes it")
            payload = json.dumps(event, default=repr)[:payload_bytes].encode()
            dead.append(DeadLetter.of_row(part.record, part.first_row + row, problem, payload))
    return unknown


def _impression_event(columns: dict[str, Any], schema: Schema) -> dict[str, object]:
    """An impression's columns in the JSON wire form."""
    event: dict[str, object] = {name: columns[name] for name in _IMPRESSION_REQUIRED}
    event["request_id"] = columns.get("request_id")
    event["features"] = {
        name.removeprefix(FEATURE_PREFIX): value for name, value in columns.items() if name.startswith(FEATURE_PREFIX)
    }
    scores = columns.get("served_scores")
    if isinstance(scores, list) and len(scores) == schema.num_tasks:
        scores = {task.name: _absent_if_nan(score) for task, score in zip(schema.tasks, scores, strict=True)}
    event["served"] = {"version": columns.get("served_version"), "scores": scores}
    for feature in schema.numeric_features:
        features: Any = event["features"]
        if feature.name in features:
            features[feature.name] = _absent_if_nan(features[feature.name])
    return event


def _absent_if_nan(value: Any) -> Any:
    return None if value != value else value


def _plain(scalar: Any) -> Any:
    """A cell as plain data, long text cut; a type that has no plain form as text."""
    try:
        value = scalar.as_py()
    except (pa.ArrowException, ValueError, OverflowError, TypeError):
        return f"<{scalar.type!s:.60}>"
    return value[:_MAX_TEXT] if isinstance(value, str | bytes) else value
