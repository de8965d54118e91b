"""The Arrow wire form: an IPC stream with many events a record, for throughput.

Impressions have the columns ``impression_id, user_id, item_id, event_time_ms`` (int64), and, where there are any,
``request_id`` (int64), one column ``features.NAME`` per feature (int64, list<int64>, float32), ``served_version``
(int64), ``served_scores`` (fixed_size_list<float32>[T], tasks in schema order) and ``served_arm`` (the arm's name,
dictionary-encoded or plain). Feedback has ``impression_id, event_time_ms`` (int64), ``task`` (the task's name,
dictionary-encoded or plain) and ``value`` (float32). Nulls mean absent, as in JSON. Columns are found by name. Columns
of other names are kept out; each counts once per row.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from smes.arrays import Bool
from smes.events import FeedbackBlock, ImpressionBlock, misaligned, scatter_bags
from smes.schema import ITEM_ID, MISSING, USER_ID, Schema
from stream.codec import arrow_columns
from stream.codec.arrow_stream import Part, RequestColumns, placed, record_parts
from stream.codec.limits import max_rows
from stream.codec.request_rows import give
from stream.codec.requests import IMPRESSIONS, conflict, event_problem
from stream.codec.validation import Code, Problem, TimeBounds, bad_labels, feedback_problem
from stream.dead_letters import DeadLetter, row_payload_bytes
from stream.log.event_log import Record, TopicPartition

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

# Elements of lists that all letters of a batch show together, and the least that each list shows: a list of nulls
# takes no bytes on the wire, however long it is.
_LETTERS_ELEMENTS, _MIN_ELEMENTS = 100_000, 16


_Block = TypeVar("_Block", ImpressionBlock, FeedbackBlock)
_Decode = Callable[[Sequence[Record], Schema, TimeBounds, list[DeadLetter], Counter[TopicPartition]], _Block]


def _each_alone(decode: _Decode[_Block]) -> _Decode[_Block]:
    """Decode many records together, as one table; where Arrow refuses a column, one by one, to find the bad record.

    Every type that is known to be wrong is found before it is read. This is for those that are not known.
    """

    def decode_all(
        records: Sequence[Record],
        schema: Schema,
        bounds: TimeBounds,
        dead: list[DeadLetter],
        unknown: Counter[TopicPartition],
    ) -> _Block:
        letters: list[DeadLetter] = []
        fields: Counter[TopicPartition] = Counter()
        try:
            block = decode(records, schema, bounds, letters, fields)
        except pa.ArrowException as error:
            if len(records) > 1:
                blocks: list[_Block] = [decode_all([record], schema, bounds, dead, unknown) for record in records]
                return blocks[0].concat(blocks)
            problem = Problem("unparsable", f"expected columns that can be read: {str(error)[:200]}")
            rows = sum(part.num_rows for part in record_parts(records[0], (), {}, []))
            dead.append(DeadLetter.of_record(records[0], problem, events=max(1, rows)))
            return decode([], schema, bounds, dead, unknown)
        dead += letters
        unknown.update(fields)
        return block

    return decode_all


@_each_alone
def decode_impressions(
    records: Sequence[Record],
    schema: Schema,
    bounds: TimeBounds,
    dead: list[DeadLetter],
    unknown: Counter[TopicPartition],
) -> ImpressionBlock:
    """The good impressions in record order; ``dead`` gets letters for the others, ``unknown`` the unknown fields."""
    known, most = impression_columns(schema), max_rows(schema)
    parts = [
        part
        for record in records
        for part in record_parts(record, known, _IMPRESSION_REQUIRED, dead, most, shareable=known[1:])
    ]
    block = ImpressionBlock.empty(schema, sum(part.num_rows for part in parts))
    bad = np.zeros(len(block), np.bool_)
    conflicts: dict[int, str] = {}
    for part, rows in placed(parts):
        out = block.take(rows)
        fill_impressions(part.columns, out, bad[rows], schema)
        if part.requests is not None:
            found = _fill_shared(part.requests, out, bad[rows], schema)
            conflicts |= {rows.start + row: name for row, name in found.items()}
        _fill_origin(part.record, block, rows)
    for required in (block.impression_id, block.ids[:, 0], block.ids[:, 1]):
        _mark(bad, required == MISSING)  # also where an index is no null, but what it stands for is
    bad |= bounds.bad(block.event_time_ms, block.arrival_ms) | misaligned(block.ids, schema)

    def explain(event: object, arrival_ms: int) -> Problem | None:
        return event_problem(event, schema, arrival_ms, bounds)

    _count_unknown(parts, bad, unknown)
    dead += _dead_letters(
        parts, bad, lambda own, shared: _impression_event(own, shared, schema), explain, conflicts=conflicts
    )
    return block.take(~bad) if bad.any() else block


@_each_alone
def decode_feedback(
    records: Sequence[Record],
    schema: Schema,
    bounds: TimeBounds,
    dead: list[DeadLetter],
    unknown: Counter[TopicPartition],
) -> FeedbackBlock:
    """The good feedback in record order; ``dead`` gets letters for the rest, ``unknown`` the unknown fields."""
    known = tuple(_FEEDBACK_REQUIRED)
    parts = [part for record in records for part in record_parts(record, known, _FEEDBACK_REQUIRED, dead)]
    block = FeedbackBlock.empty(sum(part.num_rows for part in parts))
    bad = np.zeros(len(block), np.bool_)
    for part, rows in placed(parts):
        _fill_feedback(part, block.take(rows), bad[rows], schema)
        _fill_origin(part.record, block, rows)
    bad |= bounds.bad(block.event_time_ms, block.arrival_ms)

    def explain(event: object, arrival_ms: int) -> Problem | None:
        return feedback_problem(event, schema, arrival_ms, bounds)

    _count_unknown(parts, bad, unknown)
    dead += _dead_letters(parts, bad, lambda columns, _: columns, explain, conflicts={})
    return block.take(~bad) if bad.any() else block


def impression_columns(schema: Schema) -> tuple[str, ...]:
    """The names of all columns that an impression record may have, ``impression_id`` first."""
    features = (FEATURE_PREFIX + f.name for f in schema.features if f.name not in (USER_ID, ITEM_ID))
    return (*_IMPRESSION_REQUIRED, "request_id", *features, "served_version", "served_scores", "served_arm")


def _fill_origin(record: Record, block: ImpressionBlock | FeedbackBlock, rows: slice) -> None:
    block.partition[rows] = record.partition
    block.offset[rows] = record.offset
    block.arrival_ms[rows] = record.arrival_ms


def _fill_shared(requests: RequestColumns, out: ImpressionBlock, bad: Bool, schema: Schema) -> dict[int, str]:
    """Write what rows share with others into ``out``, and mark the rows whose request is bad.

    Returns:
        Row → the field of which its request has another value.
    """
    given = ImpressionBlock.empty(schema, requests.num_requests)
    bad_requests = np.zeros(len(given), np.bool_)
    fill_impressions(requests.columns, given, bad_requests, schema)
    if bad_requests.any():
        _mark(bad, bad_requests[requests.of_row] & (requests.of_row >= 0))
    conflicts = give(out, given, requests.of_row, schema)
    bad[list(conflicts)] = True
    return conflicts


def fill_impressions(columns: dict[str, Any], out: ImpressionBlock, bad: Bool, schema: Schema) -> None:
    """Write columns into ``out``, views of rows, and mark the bad rows in ``bad``. What is absent is ``MISSING``."""
    out.impression_id[:] = out.event_time_ms[:] = MISSING
    required = {"impression_id": out.impression_id, "event_time_ms": out.event_time_ms}
    ids = {**required, USER_ID: out.ids[:, 0], ITEM_ID: out.ids[:, 1]}
    for name, target in {**ids, "request_id": out.request_id, "served_version": out.served_version}.items():
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
    for i, feature in enumerate(schema.numeric_features):
        column = columns.get(FEATURE_PREFIX + feature.name)
        if column is not None:
            out.numerics[:, i], bad_rows = arrow_columns.floats(column)
            _mark(bad, bad_rows)
    if "served_scores" in columns:
        out.served_scores[:], bad_rows = arrow_columns.scores(columns["served_scores"], schema.num_tasks)
        _mark(bad, bad_rows)
    if "served_arm" in columns:
        out.served_arm[:], bad_rows = arrow_columns.arms(columns["served_arm"])
        _mark(bad, bad_rows)


def _fill_feedback(part: Part, out: FeedbackBlock, bad: Bool, schema: Schema) -> None:
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
    if required:  # also where an index is no null, but what it stands for is
        _mark(bad, target == MISSING)


def _mark(bad: Bool, rows: Bool | None) -> None:
    if rows is not None:
        np.logical_or(bad, rows, out=bad)


def _count_unknown(parts: Sequence[Part], bad: Bool, unknown: Counter[TopicPartition]) -> None:
    """Count the columns that are kept out, once for every good row."""
    for part, rows in placed(parts):
        fields = part.num_columns - len(part.columns) - (0 if part.requests is None else len(part.requests.columns))
        source = TopicPartition(part.record.topic, part.record.partition)
        if count := fields * int(part.num_rows - np.count_nonzero(bad[rows])):
            unknown[source] += count


def _dead_letters(
    parts: Sequence[Part],
    bad: Bool,
    to_event: Callable[[dict[str, Any], dict[str, Any] | None], object],
    explain: Callable[[object, int], Problem | None],
    *,
    conflicts: Mapping[int, str],
) -> list[DeadLetter]:
    """A letter for every bad row.

    Args:
        parts: Of all records.
        bad: Which rows are bad, of all parts.
        to_event: Makes an event in its JSON form of a row's cells, and of those that it shares with others.
        explain: Says what is wrong with the event.
        conflicts: Row → the field of which its request has another value.
    """
    letters: list[DeadLetter] = []
    for part, rows in placed(parts):
        bad_rows = np.flatnonzero(bad[rows])
        if not len(bad_rows):
            continue
        # A dictionary can repeat one long string in every row.
        payload_bytes = row_payload_bytes(part.record, len(bad_rows))
        width = len(part.columns) + (0 if part.requests is None else len(part.requests.columns))
        max_elements = max(_MIN_ELEMENTS, _LETTERS_ELEMENTS // (len(bad_rows) * width))
        for row in bad_rows.tolist():
            event = to_event(part.cells(row, max_elements), part.shared_cells(row, max_elements))
            problem = explain(event, part.record.arrival_ms)
            if problem is None and rows.start + row in conflicts:
                problem = conflict(conflicts[rows.start + row])
            problem = problem or Problem("unparsable", "expected an event as the schema describes it")
            text = json.dumps(event, default=repr)
            is_excerpt = len(text) > payload_bytes or _has_long_list(event, max_elements)
            payload = text[:payload_bytes].encode()
            letters.append(
                DeadLetter.of_row(part.record, part.first_row + row, problem, payload, is_excerpt=is_excerpt)
            )
    return letters


def _has_long_list(value: object, max_elements: int) -> bool:
    """Whether plain data has a list that may have been cut to ``max_elements``."""
    if isinstance(value, dict):
        return any(_has_long_list(each, max_elements) for each in value.values())
    return isinstance(value, list) and (
        len(value) >= max_elements or any(_has_long_list(each, max_elements) for each in value)
    )


def _impression_event(own: dict[str, Any], shared: dict[str, Any] | None, schema: Schema) -> dict[str, object]:
    """An impression's columns, and those that it shares with others, in the JSON wire form."""
    if shared is None:
        return {name: own.get(name) for name in _IMPRESSION_REQUIRED} | _event(own, schema)
    return {IMPRESSIONS: [_event(own, schema)], **_event(shared, schema)}


def _event(columns: dict[str, Any], schema: Schema) -> dict[str, object]:
    event: dict[str, object] = {name: columns[name] for name in _IMPRESSION_REQUIRED if name in columns}
    event["request_id"] = columns.get("request_id")
    event["features"] = {
        name.removeprefix(FEATURE_PREFIX): value for name, value in columns.items() if name.startswith(FEATURE_PREFIX)
    }
    scores = columns.get("served_scores")
    if isinstance(scores, list) and len(scores) == schema.num_tasks:
        scores = {task.name: _absent_if_nan(score) for task, score in zip(schema.tasks, scores, strict=True)}
    served = {"arm": columns.get("served_arm"), "version": columns.get("served_version"), "scores": scores}
    event["served"] = served
    for feature in schema.numeric_features:
        features: Any = event["features"]
        if feature.name in features:
            features[feature.name] = _absent_if_nan(features[feature.name])
    return event


def _absent_if_nan(value: Any) -> Any:
    return None if value != value else value
