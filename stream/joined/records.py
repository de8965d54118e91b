"""Joined examples on the wire: Arrow records of the topic ``examples``; ``docs/reference/wire.md`` describes them.

The columns of an impression are those of :mod:`stream.codec.arrow_form`. Letters: N rows, T tasks.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from smes.arrays import F32, I64, Bool
from smes.events import CLOSING, WHOLE, ExampleBlock, ImpressionBlock, misaligned
from smes.schema import ITEM_ID, MISSING, USER_ID, Schema
from smes.schema_change import SchemaChange
from stream.codec import arrow_columns, encoders
from stream.codec.arrow_form import fill_impressions, impression_columns
from stream.codec.arrow_stream import Part, placed, record_parts
from stream.codec.limits import max_rows
from stream.codec.record_headers import headers
from stream.codec.validation import EARLIEST_MS, Code, Problem, bad_labels
from stream.dead_letters import DeadLetter, row_payload_bytes
from stream.joined.turns import Turn, turn_of
from stream.log.event_log import OutRecord, Record, TopicPartition

LABEL, ARRIVAL, SHARE = "labels.", "feedback_arrival_ms.", "late_share."
"""Beginnings of the names of columns that end in the name of a task."""

_REQUIRED: dict[str, Code] = {
    "impression_id": "bad_id",
    USER_ID: "bad_id",
    ITEM_ID: "bad_id",
    "event_time_ms": "bad_time",
}
_OF_EXAMPLES = ("weight", "due_ms", "kind", "row")
_MOST_ELEMENTS = 64  # of a list that a letter shows


@dataclass(frozen=True, slots=True)
class ReadExamples:
    """What a record held.

    Attributes:
        examples: The good ones, in the order of the record.
        row: int64 [N], each one's place in its turn.
        turn: Of the record; None where it names none.
        dead: Letters of the rest.
        unknown_fields: Values in columns that are none of ours.
    """

    examples: ExampleBlock
    row: I64
    turn: Turn | None
    dead: list[DeadLetter]
    unknown_fields: int = 0


def encode_examples(examples: ExampleBlock, schema: Schema, turn: Turn | None, partition: int, row: I64) -> OutRecord:
    """One record of examples. Columns in which nothing but defaults would stand are left out.

    Args:
        examples: At most ``stream.codec.limits.max_rows`` rows.
        schema: Features and tasks.
        turn: Which moment of the join it is of.
        partition: Where the record goes.
        row: int64 [N], each example's place in its turn.
    """
    columns = encoders.as_columns(encoders.impression_fields(examples, schema), schema)
    columns["served_arm"] = columns["served_arm"].dictionary_encode()
    columns = {name: column for name, column in columns.items() if column.null_count < len(column) or name in _REQUIRED}
    labels = np.where(examples.label_mask, examples.labels, np.float32(np.nan))
    for t, task in enumerate(schema.tasks):
        columns[LABEL + task.name] = encoders.nullable(np.ascontiguousarray(labels[:, t]))
    for t, task in enumerate(schema.tasks):
        arrival_ms = np.ascontiguousarray(examples.feedback_arrival_ms[:, t])
        if (arrival_ms != MISSING).any():
            columns[ARRIVAL + task.name] = encoders.nullable(arrival_ms)
        share = np.ascontiguousarray(examples.late_share[:, t])
        if share.any():
            columns[SHARE + task.name] = pa.array(share)
    if (examples.weight != 1).any():
        columns["weight"] = pa.array(examples.weight)
    columns["due_ms"] = pa.array(examples.due_ms)
    if examples.kind.any():
        columns["kind"] = pa.array(examples.kind)
    columns["row"] = pa.array(row)
    head = headers("arrow", schema) + (() if turn is None else (turn.header(),))
    return OutRecord(encoders.ipc_stream(columns), head, partition)


def decode_examples(record: Record, schema: Schema, changes: Sequence[SchemaChange] = ()) -> ReadExamples:
    """The examples of a record. Bad input never raises: it becomes a letter.

    Args:
        record: Of the topic ``examples``.
        schema: What the examples must fit.
        changes: From old schemas, whose examples are accepted, to this one.
    """
    turn, problem = None, None
    try:
        turn = turn_of(record.headers)
    except ValueError as error:
        problem = Problem("unparsable", str(error)[:300], "turn")
    given = dict(record.headers)
    was = {change.was.hash.encode(): change for change in changes}.get(given.get("schema", b""))
    if given.get("codec") != b"arrow":
        problem = Problem("unknown_codec", f"header codec: expected arrow, got {_text(given.get('codec'))}")
    elif was is None and given.get("schema") != schema.hash.encode():
        expected = f"{schema.hash}, the hash of the schema"
        problem = Problem("schema_mismatch", f"header schema: expected {expected}, got {_text(given.get('schema'))}")
    nothing = ExampleBlock.empty(schema)
    if problem is not None:
        return ReadExamples(nothing, np.zeros(0, np.int64), turn, [DeadLetter.of_record(record, problem)])
    read = _decode(record, schema if was is None else was.was, turn)
    if was is None:
        return read
    return ReadExamples(was.examples(read.examples), read.row, turn, read.dead, read.unknown_fields)


def newest_time_ms(record: Record, schema: Schema, changes: Sequence[SchemaChange] = ()) -> int | None:
    """Newest event time of a record's good examples, Unix milliseconds; None if it has none."""
    examples = decode_examples(record, schema, changes).examples
    return int(examples.event_time_ms.max()) if len(examples) else None


def _decode(record: Record, schema: Schema, turn: Turn | None) -> ReadExamples:
    labels = [LABEL + task.name for task in schema.tasks]
    by_task = [prefix + task.name for prefix in (ARRIVAL, SHARE) for task in schema.tasks]
    known = (*impression_columns(schema), *labels, *by_task, *_OF_EXAMPLES)
    dead: list[DeadLetter] = []
    parts = record_parts(record, known, _REQUIRED, dead, max_rows(schema))
    rows_in_all = sum(part.num_rows for part in parts)
    if rows_in_all and not any(name in part.columns for part in parts for name in labels):
        problem = Problem("missing_field", f"{LABEL}TASK: expected a column for each task with labels", labels[0])
        dead.append(DeadLetter.of_record(record, problem, events=rows_in_all))
        parts, rows_in_all = [], 0
    shown = ImpressionBlock.empty(schema, rows_in_all)
    examples = ExampleBlock.empty(schema, rows_in_all)
    examples.label_mask[:] = False
    row = np.arange(rows_in_all)
    problems: list[tuple[Bool, Problem]] = []
    bad = np.zeros(rows_in_all, np.bool_)
    unknown = Counter[TopicPartition]()
    for part, rows in placed(parts):
        wrong = np.zeros(part.num_rows, np.bool_)
        fill_impressions(part.columns, shown.take(rows), wrong, schema)
        out = examples.take(rows)
        found = _fill(part, out, shown.event_time_ms[rows], row[rows], schema)
        unfit = wrong | misaligned(shown.ids[rows], schema) | (shown.impression_id[rows] == MISSING)
        unfit |= (shown.ids[rows, :2] == MISSING).any(axis=1)
        expected = Problem("bad_type", "expected ids, numbers and lists as in an impression of this schema")
        early = Problem("bad_time", f"event_time_ms: expected at least {EARLIEST_MS} (2000-01-01)", "event_time_ms")
        found = [(unfit, expected), (shown.event_time_ms[rows] < EARLIEST_MS, early), *found]
        for rows_bad, why in found:
            whole = np.zeros(rows_in_all, np.bool_)
            whole[rows] = rows_bad
            bad |= whole
            problems.append((whole, why))
        kept_out = part.num_columns - len(part.columns)
        unknown[TopicPartition(record.topic, record.partition)] += kept_out * int((~bad[rows]).sum())
    shared = {name: getattr(shown, name) for name in _SHARED}
    block = ExampleBlock(
        **{**examples.arrays(), **shared, "partition": np.full(rows_in_all, record.partition, np.int32)}
    )
    dead += _letters(parts, bad, problems)
    good = slice(None) if not bad.any() else ~bad
    return ReadExamples(block.take(good), row[good], turn, dead, unknown.total())


_SHARED = tuple(name for name in ExampleBlock.__dataclass_fields__ if name in ImpressionBlock.__dataclass_fields__)


def _fill(part: Part, out: ExampleBlock, event_time_ms: I64, row: I64, schema: Schema) -> list[tuple[Bool, Problem]]:
    """Write what an example has beside its impression into ``out`` and ``row``, views; the bad rows, and why."""
    columns, found = part.columns, list[tuple[Bool, Problem]]()

    def integers(name: str, default: I64 | int) -> I64:
        if name not in columns:
            return np.full(part.num_rows, default, np.int64)
        values, wrong = arrow_columns.ids(columns[name])
        if wrong is not None:
            found.append((wrong, Problem("bad_type", f"{name}: expected an integer", name)))
        return np.where(values == MISSING, default, values)

    def numbers(name: str, default: float, low: float, high: float) -> F32:
        if name not in columns:
            return np.full(part.num_rows, default, np.float32)
        values, wrong = arrow_columns.floats(columns[name])
        values = np.where(np.isnan(values), default, values).astype(np.float32)
        outside = (values < low) | (values > high) | (False if wrong is None else wrong)
        found.append((outside, Problem("bad_number", f"{name}: expected a number from {low:g} to {high:g}", name)))
        return values

    for t, task in enumerate(schema.tasks):
        if (name := LABEL + task.name) in columns:
            labels, wrong = arrow_columns.floats(columns[name])
            there = ~np.isnan(labels)
            outside = there & bad_labels(np.full(part.num_rows, t, np.int32), np.where(there, labels, 0), schema)
            outside |= False if wrong is None else wrong
            expected = "0 or 1" if task.kind == "binary" else f"0 … {task.max_value:g}"
            found.append((outside, Problem("label_range", f"{name}: expected {expected}", name)))
            out.label_mask[:, t], out.labels[:, t] = there, np.where(there, labels, 0)
        out.feedback_arrival_ms[:, t] = integers(ARRIVAL + task.name, MISSING)
        out.late_share[:, t] = numbers(SHARE + task.name, 0.0, 0.0, 1.0)
    out.weight[:] = numbers("weight", 1.0, 0.0, 1e9)
    out.due_ms[:] = integers("due_ms", event_time_ms + schema.max_window_ms)
    kind = integers("kind", WHOLE)
    strange = (kind < WHOLE) | (kind > CLOSING)
    found.append((strange, Problem("bad_number", f"kind: expected {WHOLE} … {CLOSING}", "kind")))
    out.kind[:] = np.where(strange, WHOLE, kind)
    row[:] = integers("row", row)
    return found


def _letters(parts: Sequence[Part], bad: Bool, problems: Sequence[tuple[Bool, Problem]]) -> list[DeadLetter]:
    """A letter for every bad row: the first problem that it has."""
    letters = []
    for part, rows in placed(parts):
        for row in np.flatnonzero(bad[rows]).tolist():
            problem = next(why for which, why in problems if which[rows.start + row])
            text = json.dumps(part.cells(row, _MOST_ELEMENTS), default=repr)
            most = row_payload_bytes(part.record, int(bad[rows].sum()))
            payload, is_cut = text[:most].encode(), len(text) > most
            letters.append(DeadLetter.of_row(part.record, part.first_row + row, problem, payload, is_excerpt=is_cut))
    return letters


def _text(value: bytes | None) -> str:
    return "none" if value is None else ascii(value.decode("latin-1"))[:80]
