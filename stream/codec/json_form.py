"""The JSON wire form: one event a record, for every producer.

Impression::

    {"impression_id": 1, "user_id": 7, "item_id": 9, "event_time_ms": 1700000000000, "request_id": 5,
     "features": {"tab": 1, "tags": [1, 2], "price": 1.5},
     "served": {"arm": "main", "version": 12, "scores": {"click": 0.1}}}

Feedback::

    {"impression_id": 1, "event_time_ms": 1700000000500, "task": "click", "value": 1}

``request_id``, ``features``, ``served`` and everything inside them may be absent or null. Typed structs, made from the
schema, accept exactly the good events: *strict* ones refuse unknown fields, *lenient* ones skip them. What they refuse
is looked at again, slowly, to count its unknown fields or to say what is wrong with it.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import chain, compress
from operator import attrgetter
from typing import Annotated, Any

import msgspec
import numpy as np

from smes.arm_names import PATTERN, arm_column
from smes.arrays import F32, I32, I64, Bool
from smes.events import FeedbackBlock, ImpressionBlock, misaligned, scatter_bags
from smes.schema import ITEM_ID, MISSING, USER_ID, Feature, Schema
from stream.codec.validation import (
    MAX_FLOAT,
    MAX_ID,
    MIN_ID,
    Problem,
    TimeBounds,
    bad_labels,
    feedback_problem,
    impression_problem,
    unknown_feedback_fields,
    unknown_impression_fields,
)
from stream.dead_letters import DeadLetter
from stream.log.event_log import Record, TopicPartition

_Id = Annotated[int, msgspec.Meta(ge=MIN_ID, le=MAX_ID)]
_Int64 = Annotated[int, msgspec.Meta(ge=MISSING, le=MAX_ID)]
_Arm = Annotated[str, msgspec.Meta(pattern=PATTERN)]
_Number = Annotated[float, msgspec.Meta(ge=-MAX_FLOAT, le=MAX_FLOAT)]
_TYPES: dict[str, Any] = {"id": _Id, "bag": list[_Id], "sequence": list[_Id], "numeric": _Number}
_ABSENT: dict[str, Any] = {"id": MISSING, "bag": None, "sequence": None, "numeric": float("nan")}


class _Feedback(msgspec.Struct, gc=False):
    impression_id: _Id
    event_time_ms: _Int64
    task: str
    value: float


class _StrictFeedback(_Feedback, gc=False, forbid_unknown_fields=True):
    pass


def _impression_struct(schema: Schema, *, strict: bool) -> type[msgspec.Struct]:
    """The struct of an impression; fields ``f0 …`` stand for the features, whose names need be no identifiers."""

    def struct(name: str, fields: list[tuple[str, Any, Any]], wire_names: Sequence[str] = ()) -> type[msgspec.Struct]:
        rename = {f"f{i}": wire_name for i, wire_name in enumerate(wire_names)} or None
        return msgspec.defstruct(name, fields, rename=rename, gc=False, forbid_unknown_fields=strict)

    features = declared_features(schema)
    scores = [(f"f{i}", _Number | None, _ABSENT["numeric"]) for i in range(schema.num_tasks)]
    columns = [(f"f{i}", _TYPES[f.kind] | None, _ABSENT[f.kind]) for i, f in enumerate(features)]
    scores_type = struct("Scores", scores, [t.name for t in schema.tasks])
    served: list[Any] = [
        ("version", _Id | None, MISSING),
        ("scores", scores_type | None, None),
        ("arm", _Arm | None, None),
    ]
    served_type = struct("Served", served)
    features_type = struct("Features", columns, [f.name for f in features])
    required: list[Any] = ["impression_id", USER_ID, ITEM_ID]
    optional = [("request_id", _Id | None, MISSING), ("features", features_type | None, None)]
    return msgspec.defstruct(
        "Impression",
        [
            *((name, _Id) for name in required),
            ("event_time_ms", _Int64),
            *optional,
            ("served", served_type | None, None),
        ],
        gc=False,
        forbid_unknown_fields=strict,
    )


def declared_features(schema: Schema) -> list[Feature]:
    """The features that an event carries in ``features``: all but the user's and the item's id."""
    return [f for f in schema.features if f.name not in (USER_ID, ITEM_ID)]


class Wire:
    """The decoders of one schema."""

    def __init__(self, schema: Schema) -> None:
        self.strict = msgspec.json.Decoder(_impression_struct(schema, strict=True))
        self.lenient = msgspec.json.Decoder(_impression_struct(schema, strict=False))
        self.count_unknown = unknown_impression_fields(schema)
        self.no_features = (*(_ABSENT[f.kind] for f in declared_features(schema)),)
        self.no_scores = (_ABSENT["numeric"],) * schema.num_tasks


wire_of = lru_cache(maxsize=16)(Wire)
strict_feedback = msgspec.json.Decoder(_StrictFeedback)
lenient_feedback = msgspec.json.Decoder(_Feedback)


# What decoding a record's bytes may raise: msgspec's own, plus strings that are no UTF-8 and nesting without end.
_REFUSED = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)

Explain = Callable[[object, Schema, int, TimeBounds], Problem | None]


def decode_impressions(
    records: Sequence[Record],
    schema: Schema,
    bounds: TimeBounds,
    dead: list[DeadLetter],
    unknown: Counter[TopicPartition],
) -> ImpressionBlock:
    """The good impressions in record order; ``dead`` gets letters for the others, ``unknown`` the unknown fields."""
    wire = wire_of(schema)
    events, kept, surplus = _decode_records(
        records,
        wire.strict.decode,
        wire.lenient.decode,
        wire.count_unknown,
        lambda record, error: _dead_letter(record, schema, bounds, impression_problem, dead, error),
    )
    block = _impression_columns(events, kept, schema, wire)
    bad = bounds.bad(block.event_time_ms, block.arrival_ms) | misaligned(block.ids, schema)
    if bad.any():
        for record in compress(kept, bad):
            _dead_letter(record, schema, bounds, impression_problem, dead)
        block = block.take(~bad)
    _count_unknown(surplus, bad, kept, unknown)
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
        lambda record, error: _dead_letter(record, schema, bounds, feedback_problem, dead, error),
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
            _dead_letter(record, schema, bounds, feedback_problem, dead)
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
        except _REFUSED:
            try:
                event = lenient(record.value)
                unknown = count_unknown(parse(record.value))
            except (*_REFUSED, ValueError) as error:
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


def parse(value: bytes) -> object:
    """A record's JSON as plain data.

    Raises:
        msgspec.MsgspecError, ValueError, RecursionError: It is no JSON, or nested too deeply.
    """
    try:
        return msgspec.json.decode(value)
    except msgspec.ValidationError:  # well-formed, but a number is beyond float64: let it be inf
        return json.loads(value, parse_int=_bounded_int)


def _bounded_int(digits: str) -> int | float:
    # Python refuses to convert integers of more than 4300 digits, for they take quadratic time.
    return int(digits) if len(digits) <= 4000 else float("inf")


def _dead_letter(
    record: Record,
    schema: Schema,
    bounds: TimeBounds,
    explain: Explain,
    dead: list[DeadLetter],
    error: Exception | None = None,
) -> None:
    """Write the letter of a record that was refused; ``error`` is what its decoder raised."""
    try:
        problem = explain(parse(record.value), schema, record.arrival_ms, bounds)
    except (*_REFUSED, ValueError) as not_json:
        problem = Problem("unparsable", f"expected a JSON object: {str(not_json)[:200]}")
    # Without a problem only the decoder knows: a repeated key, say, whose first value is bad and whose last is good.
    problem = problem or Problem("unparsable", f"expected an event as the schema describes it: {str(error)[:200]}")
    dead.append(DeadLetter.of_record(record, problem))


def _impression_columns(
    events: Sequence[msgspec.Struct], records: Sequence[Record], schema: Schema, wire: Wire
) -> ImpressionBlock:
    block = ImpressionBlock.empty(schema, len(events))
    if not events:
        return block
    columns = zip(*map(msgspec.structs.astuple, events), strict=True)
    impression_id, user_id, item_id, event_time_ms, request_id, features, served = columns
    block.impression_id[:] = impression_id
    block.ids[:, 0] = user_id
    block.ids[:, 1] = item_id
    block.event_time_ms[:] = event_time_ms
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
