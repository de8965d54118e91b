"""The JSON wire form: one event a record, for every producer.

Impression::

    {"impression_id": 1, "user_id": 7, "item_id": 9, "event_time_ms": 1700000000000, "request_id": 5,
     "features": {"tab": 1, "tags": [1, 2], "price": 1.5},
     "served": {"arm": "main", "version": 12, "scores": {"click": 0.1}}}

Feedback::

    {"impression_id": 1, "event_time_ms": 1700000000500, "task": "click", "value": 1}

``request_id``, ``features``, ``served`` and everything inside them may be absent or null. A record may hold several
impressions of a request (:mod:`stream.codec.requests`). Typed structs (:mod:`stream.codec.json_structs`) accept exactly
the good events. What the strict ones refuse is looked at again, slowly, to count its unknown fields or to say what is
wrong with it.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, compress
from operator import attrgetter
from typing import Any

import msgspec
import numpy as np

from smes.arm_names import arm_column
from smes.arrays import F32, I32, I64, Bool
from smes.events import FeedbackBlock, ImpressionBlock, misaligned, scatter_bags
from smes.schema import MISSING, Schema
from stream.codec.json_refused import REFUSED, parse, refuse
from stream.codec.json_requests import Reader
from stream.codec.json_structs import Wire, declared_features, lenient_feedback, strict_feedback, wire_of
from stream.codec.request_rows import give
from stream.codec.validation import (
    TimeBounds,
    bad_labels,
    feedback_problem,
    unknown_feedback_fields,
)
from stream.dead_letters import DeadLetter
from stream.log.event_log import Record, TopicPartition


def decode_impressions(
    records: Sequence[Record],
    schema: Schema,
    bounds: TimeBounds,
    dead: list[DeadLetter],
    unknown: Counter[TopicPartition],
) -> ImpressionBlock:
    """The good impressions in record order; ``dead`` gets letters for the others, ``unknown`` the unknown fields."""
    wire = wire_of(schema)
    reader = Reader(wire, schema, bounds, dead)
    read = reader.read(records)
    block = _impression_columns(list(map(msgspec.structs.astuple, read.events)), read.records, schema, wire)
    conflicts: dict[int, str] = {}
    if read.requests:
        given = [(0, *msgspec.structs.astuple(request.given)[:6]) for request in read.requests]
        of_given = _impression_columns(given, [read.records[r.start] for r in read.requests], schema, wire)
        conflicts = give(block, of_given, read.of_request(), schema)
    bad = bounds.bad(block.event_time_ms, block.arrival_ms) | misaligned(block.ids, schema)
    bad |= (block.ids[:, :2] == MISSING).any(axis=1)
    bad[list(conflicts)] = True
    if bad.any():
        reader.refuse_rows(bad, conflicts)
        block = block.take(~bad)
    _count_unknown(read.surplus, bad, read.records, unknown)
    return block


def decode_feedback(
    records: Sequence[Record],
    schema: Schema,
    bounds: TimeBounds,
    dead: list[DeadLetter],
    unknown: Counter[TopicPartition],
) -> FeedbackBlock:
    """The good feedback in record order; ``dead`` gets letters for the rest, ``unknown`` the unknown fields."""
    events, kept, surplus = _decode_records(
        records,
        strict_feedback.decode,
        lenient_feedback.decode,
        unknown_feedback_fields,
        lambda record, error: refuse(record, schema, bounds, feedback_problem, dead, error),
    )
    index, n = schema.task_index, len(events)
    value = np.fromiter(map(attrgetter("value"), events), np.float64, n)
    task = np.fromiter([index.get(event.task, -1) for event in events], np.int32, n)
    impression_id = np.fromiter(map(attrgetter("impression_id"), events), np.int64, n)
    event_time_ms = np.fromiter(map(attrgetter("event_time_ms"), events), np.int64, n)
    partition, offset, arrival_ms = _origin(kept)
    bad = (task < 0) | bad_labels(task, value, schema) | bounds.bad(event_time_ms, arrival_ms)
    with np.errstate(over="ignore"):  # a label beyond float32 is among the bad ones
        value_f32 = value.astype(np.float32)
    block = FeedbackBlock(impression_id, event_time_ms, task, value_f32, partition, offset, arrival_ms)
    if bad.any():
        for record in compress(kept, bad):
            refuse(record, schema, bounds, feedback_problem, dead)
        block = block.take(~bad)
    _count_unknown(surplus, bad, kept, unknown)
    return block


def _decode_records(
    records: Sequence[Record],
    strict: Callable[[bytes], Any],
    lenient: Callable[[bytes], Any],
    count_unknown: Callable[[object], int],
    refuse: Callable[[Record, Exception], None],
) -> tuple[list[Any], list[Record], dict[int, int]]:
    """Events, their records, and {row: number of unknown fields}; ``refuse`` gets what neither decoder accepts."""
    events: list[Any] = []
    kept: list[Record] = []
    surplus: dict[int, int] = {}
    for record in records:
        try:
            events.append(strict(record.value))
        except REFUSED:
            try:
                event = lenient(record.value)
                unknown = count_unknown(parse(record.value))
            except (*REFUSED, ValueError) as error:
                refuse(record, error)
                continue
            surplus[len(events)] = unknown
            events.append(event)
        kept.append(record)
    return events, kept, surplus


def _count_unknown(
    surplus: dict[int, int], bad: Bool, records: Sequence[Record], unknown: Counter[TopicPartition]
) -> None:
    """Add the unknown fields of the good rows to ``unknown``."""
    for row, fields in surplus.items():
        if fields and not bad[row]:
            unknown[TopicPartition(records[row].topic, records[row].partition)] += fields


def _impression_columns(
    events: Sequence[tuple[Any, ...]], records: Sequence[Record], schema: Schema, wire: Wire
) -> ImpressionBlock:
    """The impressions, or what requests share, with ``MISSING`` for a time that is absent."""
    block = ImpressionBlock.empty(schema, len(events))
    if not events:
        return block
    impression_id, user_id, item_id, event_time_ms, request_id, features, served = zip(*events, strict=True)
    block.impression_id[:] = impression_id
    block.ids[:, 0] = _ints(user_id)
    block.ids[:, 1] = _ints(item_id)
    block.event_time_ms[:] = _ints(event_time_ms)
    block.request_id[:] = _ints(request_id)
    block.partition[:], block.offset[:], block.arrival_ms[:] = _origin(records)
    _fill_features(block, _transposed(features, wire.no_features), schema)
    _fill_served(block, served, wire)
    return block


def _transposed(structs: Iterable[Any], absent: tuple[Any, ...]) -> list[list[Any]]:
    """One list per field of structs that may be None."""
    astuple = msgspec.structs.astuple
    flat = list(chain.from_iterable([absent if s is None else astuple(s) for s in structs]))
    return [flat[i :: len(absent)] for i in range(len(absent))]


def _fill_features(block: ImpressionBlock, columns: list[list[Any]], schema: Schema) -> None:
    numeric_column = {f.name: i for i, f in enumerate(schema.numeric_features)}
    for feature, values in zip(declared_features(schema), columns, strict=True):
        if feature.kind == "numeric":
            block.numerics[:, numeric_column[feature.name]] = _floats(values)
        elif feature.kind == "id":
            block.ids[:, schema.id_slices[feature.name].start] = _ints(values)
        else:
            bags = [bag or () for bag in values]
            lengths = np.fromiter(map(len, bags), np.int64, len(bags))
            elements = np.fromiter(chain.from_iterable(bags), np.int64, int(lengths.sum()))
            scatter_bags(block.ids[:, schema.id_slices[feature.name]], elements, np.cumsum(lengths) - lengths, lengths)


def _fill_served(block: ImpressionBlock, served: Sequence[Any], wire: Wire) -> None:
    rows = [row for row, value in enumerate(served) if value is not None]
    if rows:
        block.served_version[rows] = _ints([served[row].version for row in rows])
        for task, scores in enumerate(_transposed([served[row].scores for row in rows], wire.no_scores)):
            block.served_scores[rows, task] = _floats(scores)
        block.served_arm[rows] = arm_column([served[row].arm for row in rows])


def _ints(values: Sequence[int | None]) -> I64:
    try:
        return np.fromiter(values, np.int64, len(values))  # None raises TypeError
    except TypeError:
        return np.fromiter([MISSING if v is None else v for v in values], np.int64, len(values))


def _floats(values: Sequence[float | None]) -> F32:
    try:
        return np.fromiter(values, np.float32, len(values))  # None raises TypeError
    except TypeError:
        return np.fromiter([np.nan if v is None else v for v in values], np.float32, len(values))


def _origin(records: Sequence[Record]) -> tuple[I32, I64, I64]:
    n = len(records)
    return (
        np.fromiter([r.partition for r in records], np.int32, n),
        np.fromiter([r.offset for r in records], np.int64, n),
        np.fromiter([r.arrival_ms for r in records], np.int64, n),
    )
