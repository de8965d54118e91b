"""Batches of checked events as records of the event log."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np

from smes.arrays import I32, I64
from smes.schema import Schema
from stream.codec import json_form
from stream.codec.json_records import json_records
from stream.codec.limits import MAX_ROWS, max_rows
from stream.codec.record_headers import Codec, headers
from stream.codec.validation import TimeBounds
from stream.dead_letters import DeadLetter
from stream.log.event_log import OutRecord, Record
from stream.topics import IMPRESSIONS, partition_of

_ANY_TIME = TimeBounds(max_future_ms=2**62, now_ms=2**62)  # the event's own time was checked when it was taken


class Encoded(NamedTuple):
    """An event in its JSON form."""

    topic: str
    impression_id: int
    value: bytes


def records_of(
    events: Sequence[Encoded], schema: Schema, codec: Codec, partitions: int, *, by_request: bool = False
) -> tuple[list[OutRecord], I64]:
    """Records of N events of one topic, and which of them each event is in, int64 [N].

    Events keep their order within a partition. JSON makes a record of each event, Arrow one of those of a partition, or
    several, where one would be larger than a reader takes. ``by_request``: what impressions of a request that follow
    each other in a partition share is sent once; in JSON they are one record.
    """
    n = len(events)
    partition_N = partition_of(np.fromiter((each.impression_id for each in events), np.int64, n), partitions)
    by_request = by_request and events[0].topic == IMPRESSIONS
    if codec == "arrow":
        return _arrow(events, schema, partition_N, by_request=by_request)
    if by_request:
        plain = [msgspec.json.decode(each.value) for each in events]
        return json_records(plain, partition_N, schema, by_request=True)
    head = headers("json", schema)
    rows = zip(events, partition_N.tolist(), strict=True)
    return [OutRecord(each.value, head, partition) for each, partition in rows], np.arange(n)


def _arrow(
    events: Sequence[Encoded], schema: Schema, partition_N: I32, *, by_request: bool
) -> tuple[list[OutRecord], I64]:
    from stream.codec import encoders

    topic, head = events[0].topic, headers("arrow", schema)
    block, shown = _block(events, schema), topic == IMPRESSIONS
    most = max_rows(schema) if shown else MAX_ROWS
    records: list[OutRecord] = []
    record_N = np.zeros(len(events), np.int64)
    for partition in np.unique(partition_N).tolist():
        rows = np.flatnonzero(partition_N == partition)
        for start in range(0, len(rows), most):
            part = rows[start : start + most]
            record_N[part] = len(records)
            some = block.take(part)
            if shown:
                value = encoders.arrow_impressions(some, schema, by_request=by_request)
            else:
                value = encoders.arrow_feedback(some, schema)
            records.append(OutRecord(value, head, partition))
    return records, record_N


def _block(events: Sequence[Encoded], schema: Schema) -> Any:
    """The events as the reader's own decoder reads them."""
    topic = events[0].topic
    sources = [Record(topic, 0, 0, each.value, (), 0) for each in events]
    dead: list[DeadLetter] = []
    decode = json_form.decode_impressions if topic == IMPRESSIONS else json_form.decode_feedback
    block = decode(sources, schema, _ANY_TIME, dead, Counter())
    assert not dead, f"a checked event is good: {dead[0].reason}"
    return block
