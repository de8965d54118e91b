"""The codec seam: event blocks to wire records and back, whichever of the two wire forms a record has.

A record's headers say how to read it:

======== ===========================================================================================================
codec    ``json`` (an event, or those of a request; also where the header is absent), ``arrow`` (a stream of events)
schema   ``Schema.hash`` of the producer; must match when present, and must be present for Arrow
======== ===========================================================================================================

The schema matches, too, if it is one of the *old schemas* that were declared for a change-over. Such events are decoded
by the schema that they were made with, and then converted (:mod:`smes.schema_change`).

The topic says which kind of event it holds. The wire forms are described in :mod:`stream.codec.json_form` and
:mod:`stream.codec.arrow_form`, what a good event is in :mod:`stream.codec.validation`. Impressions and feedback are
both keyed by impression id, so that a join sees both sides of a key in partitions of the same number.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from smes.arrays import I64
from smes.events import FeedbackBlock, ImpressionBlock
from smes.schema import Schema
from smes.schema_change import SchemaChange
from smes_io.clock import wall_clock_ms
from stream.codec import arrow_form, encoders, json_form
from stream.codec.json_records import json_records
from stream.codec.limits import MAX_ROWS, max_rows
from stream.codec.record_headers import MAX_BYTES, Codec, headers
from stream.codec.validation import Problem, TimeBounds, quoted
from stream.dead_letters import DeadLetter
from stream.log.event_log import Headers, OutRecord, Record, TopicPartition
from stream.topics import FEEDBACK, IMPRESSIONS, partition_of

__all__ = ["MAX_BYTES", "Codec", "Decoded", "decode", "encode_feedback", "encode_impressions", "headers"]

_CODECS: dict[bytes, Codec] = {b"json": "json", b"arrow": "arrow"}


@dataclass(frozen=True, slots=True)
class Decoded:
    """What a run of records held.

    Attributes:
        impressions: The good impressions, in record order.
        feedback: The good feedback, in record order. That of old schemas for tasks that there are no more is in it.
        dead: A letter for everything else.
        unknown_by_source: How many fields of the good events the schema does not know; they were kept out. Of an event
            of an old schema, those that it does not know, and values that the present one has no place for.
    """

    impressions: ImpressionBlock
    feedback: FeedbackBlock
    dead: list[DeadLetter]
    unknown_by_source: Counter[TopicPartition]

    @property
    def unknown_fields(self) -> int:
        """Unknown fields from all sources."""
        return self.unknown_by_source.total()

    @property
    def dead_by_source(self) -> Counter[TopicPartition]:
        """How many events the letters stand for (an Arrow record whose rows cannot be counted is one event)."""
        events: Counter[TopicPartition] = Counter()
        for letter in self.dead:
            events[TopicPartition(letter.topic, letter.partition)] += letter.events
        return events

    @property
    def dead_impressions(self) -> int:
        """Impressions that the letters stand for."""
        return sum(letter.events for letter in self.dead if letter.topic == IMPRESSIONS)

    @property
    def dead_feedback(self) -> int:
        """Feedback events that the letters stand for."""
        return sum(letter.events for letter in self.dead if letter.topic == FEEDBACK)


def decode(
    records: Sequence[Record],
    schema: Schema,
    *,
    changes: Sequence[SchemaChange] = (),
    max_future_ms: int = 300_000,
    now_ms: int | None = None,
) -> Decoded:
    """Decode records of the topics ``impressions`` and ``feedback``. Bad input never raises: it becomes a letter.

    Args:
        records: As read from the log, the topics in any mixture.
        schema: What the events must fit.
        changes: From old schemas, whose events are accepted, to this one.
        max_future_ms: How far an event's time may lie after the later of its record's arrival and ``now_ms``.
        now_ms: The reader's clock, Unix milliseconds; None asks the wall clock. No event's time lies more than a day
            after it.

    Raises:
        ValueError: A record is from another topic.
    """
    bounds = TimeBounds(max_future_ms, wall_clock_ms() if now_ms is None else now_ms)
    dead: list[DeadLetter] = []
    runs = _runs(records, schema, {change.was.hash.encode(): change for change in changes}, dead)
    impressions, feedback = [ImpressionBlock.empty(schema)], [FeedbackBlock.empty()]
    unknown: Counter[TopicPartition] = Counter()
    for (codec, change), run in runs[IMPRESSIONS]:
        decode_impressions = json_form.decode_impressions if codec == "json" else arrow_form.decode_impressions
        if change is None:
            impressions.append(decode_impressions(run, schema, bounds, dead, unknown))
        else:
            shown = decode_impressions(run, change.was, bounds, dead, unknown)
            surplus = change.count_dropped_values(shown)
            for partition in np.unique(shown.partition[surplus > 0]).tolist():
                unknown[TopicPartition(IMPRESSIONS, partition)] += int(surplus[shown.partition == partition].sum())
            impressions.append(change.impressions(shown))
    for (codec, change), run in runs[FEEDBACK]:
        decode_feedback = json_form.decode_feedback if codec == "json" else arrow_form.decode_feedback
        if change is None:
            feedback.append(decode_feedback(run, schema, bounds, dead, unknown))
        else:
            feedback.append(change.feedback(decode_feedback(run, change.was, bounds, dead, unknown)))
    return Decoded(
        impressions=ImpressionBlock.concat(impressions[1:] or impressions),
        feedback=FeedbackBlock.concat(feedback[1:] or feedback),
        dead=dead,
        unknown_by_source=unknown,
    )


def encode_impressions(
    block: ImpressionBlock, schema: Schema, codec: Codec, partitions: int, *, by_request: bool = False
) -> list[OutRecord]:
    """Records that :func:`decode` turns back into ``block``, each row in the partition of its impression id.

    Rows keep their order within a partition. Arrow makes one record per partition that has rows, so the caller's
    block size is the record size (or several, where one would be larger than :func:`decode` takes); JSON one record
    per row. ``partition``, ``offset`` and ``arrival_ms`` are not sent.

    Args:
        block: The rows.
        schema: Features and tasks.
        codec: The wire form.
        partitions: Of the topic.
        by_request: Whether what is the same in neighbouring rows of a request, and of a partition, is sent once. In
            JSON such rows are one record.

    Raises:
        ValueError: A numeric feature or a score is infinite.
    """
    encoders.require_finite("numerics", block.numerics)
    encoders.require_finite("served_scores", block.served_scores)
    if codec == "json":
        events = encoders.json_impressions(block, schema)
        partition_N = partition_of(block.impression_id, partitions)
        return json_records(list(events), partition_N, schema, by_request=by_request)[0]
    return _arrow_records(
        block.impression_id,
        lambda rows: encoders.arrow_impressions(block.take(rows), schema, by_request=by_request),
        schema,
        partitions,
        max_rows(schema),
    )


def encode_feedback(block: FeedbackBlock, schema: Schema, codec: Codec, partitions: int) -> list[OutRecord]:
    """Like :func:`encode_impressions`, for feedback.

    Raises:
        ValueError: A value is infinite.
    """
    encoders.require_finite("value", block.value)
    if codec == "json":
        return _json_records(block.impression_id, encoders.json_feedback(block, schema), schema, partitions)
    return _arrow_records(
        block.impression_id,
        lambda rows: encoders.arrow_feedback(block.take(rows), schema),
        schema,
        partitions,
        MAX_ROWS,
    )


def _json_records(keys: I64, values: Iterable[bytes], schema: Schema, partitions: int) -> list[OutRecord]:
    head = headers("json", schema)
    routed = zip(values, partition_of(keys, partitions).tolist(), strict=True)
    return [OutRecord(value, head, partition) for value, partition in routed]


def _arrow_records(
    keys: I64, encode_rows: Callable[[I64], bytes], schema: Schema, partitions: int, max_rows: int
) -> list[OutRecord]:
    head = headers("arrow", schema)
    routed = partition_of(keys, partitions)
    out: list[OutRecord] = []
    for partition in np.unique(routed).tolist():
        rows = np.flatnonzero(routed == partition)
        parts = [rows[start : start + max_rows] for start in range(0, len(rows), max_rows)]
        out += [OutRecord(encode_rows(part), head, partition) for part in parts]
    return out


_Form = tuple[Codec, SchemaChange | None]
"""How a record is read, and what it has to be converted by."""


def _runs(
    records: Sequence[Record], schema: Schema, changes: Mapping[bytes, SchemaChange], dead: list[DeadLetter]
) -> dict[str, list[tuple[_Form, list[Record]]]]:
    """Per topic, runs of records of one form; records whose headers are refused go to ``dead``."""
    runs: dict[str, list[tuple[_Form, list[Record]]]] = {IMPRESSIONS: [], FEEDBACK: []}
    verdicts: dict[Headers, _Form | Problem] = {}  # few distinct headers, many records
    for record in records:
        verdict = verdicts.get(record.headers)
        if verdict is None:
            verdict = verdicts[record.headers] = _form_of(record.headers, schema, changes)
        if record.topic not in runs:
            raise ValueError(f"topic {record.topic!r}: expected {IMPRESSIONS!r} or {FEEDBACK!r}")
        if not isinstance(verdict, Problem) and len(record.value) > MAX_BYTES[verdict[0]]:
            codec = verdict[0]
            size = f"{len(record.value)} bytes, expected at most {MAX_BYTES[codec]} with codec {codec!r}"
            verdict = Problem("too_large", f"record: {size}")
        if isinstance(verdict, Problem):
            dead.append(DeadLetter.of_record(record, verdict))
            continue
        topic_runs = runs[record.topic]
        if not topic_runs or topic_runs[-1][0] != verdict:
            topic_runs.append((verdict, []))
        topic_runs[-1][1].append(record)
    return runs


def _form_of(record_headers: Headers, schema: Schema, changes: Mapping[bytes, SchemaChange]) -> _Form | Problem:
    by_name = dict(record_headers)
    name = by_name.get("codec", b"json")
    codec = _CODECS.get(name)
    if codec is None:
        return Problem("unknown_codec", f"header codec: expected 'json' or 'arrow', got {quoted(name)}", "codec")
    expected, got = schema.hash, by_name.get("schema")
    if got is None and codec == "arrow":
        reason = f"header schema: expected {expected} (schema {schema.name!r}), got none with codec 'arrow'"
        return Problem("schema_mismatch", reason, "schema")
    if got is None or got == expected.encode():
        return codec, None
    change = changes.get(got)
    if change is None:
        quoted_hash = got[:64].decode("ascii", "backslashreplace")
        reason = (
            f"header schema: expected {expected} (schema {schema.name!r}), got {quoted_hash}; a header holds only the "
            "hash: compare the producer's schema file to see which features or tasks differ; events of an earlier "
            "schema are read if stream.old_schemas names its file"
        )
        return Problem("schema_mismatch", reason, "schema")
    return codec, change
