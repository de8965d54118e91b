"""Batches of checked events as records of the event log."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from smes.arrays import I32, I64
from smes.schema import Schema
from stream.codec import json_form
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


def records_of(events: Sequence[Encoded], schema: Schema, codec: Codec, partitions: int) -> tuple[list[OutRecord], I64]:
    """Records of N events of one topic, and which of them each event is in, int64 [N].

    Events keep their order within a partition. JSON makes a record of each event, Arrow one of those of a partition, or
    several, where one would be larger than a reader takes.
    """
    n = len(events)
    partition_N = partition_of(np.fromiter((each.impression_id for each in events), np.int64, n), partitions)
    if codec == "json":
        head = headers("json", schema)
        rows = zip(events, partition_N.tolist(), strict=True)
        return [OutRecord(each.value, head, partition) for each, partition in rows], np.arange(n)
    return _arrow(events, schema, partitions, partition_N)


def _arrow(events: Sequence[Encoded], schema: Schema, partitions: int, partition_N: I32) -> tuple[list[OutRecord], I64]:
    from stream.codec import arrow_form, encoders
    from stream.codec.arrow_stream import MAX_ROWS

    topic, head = events[0].topic, headers("arrow", schema)
    block, shown = _block(events, schema), topic == IMPRESSIONS
    most = arrow_form.max_rows(schema) if shown else MAX_ROWS
    encode: Any = encoders.arrow_impressions if shown else encoders.arrow_feedback
    records: list[OutRecord] = []
    record_N = np.zeros(len(events), np.int64)
    for partition in np.unique(partition_N).tolist():
        rows = np.flatnonzero(partition_N == partition)
        for start in range(0, len(rows), most):
            part = rows[start : start + most]
            record_N[part] = len(records)
            records.append(OutRecord(encode(block.take(part), schema), head, partition))
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
