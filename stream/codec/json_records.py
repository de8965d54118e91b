"""Impressions in their JSON form as records of the event log, one a record or those of a request together."""

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np

from smes.arrays import I32, I64
from smes.schema import Schema
from stream.codec.limits import max_rows
from stream.codec.record_headers import MAX_BYTES, headers
from stream.codec.requests import IMPRESSIONS, alone, together
from stream.log.event_log import OutRecord

Event = dict[str, Any]


def json_records(
    events: Sequence[Event], partition_N: I32, schema: Schema, *, by_request: bool
) -> tuple[list[OutRecord], I64]:
    """Records of N impressions, and which of them each is in, int64 [N].

    Args:
        events: Impressions in their JSON form. Those that share a record lose what they share.
        partition_N: The partition of each, int32 [N]; they keep their order there.
        schema: What they fit.
        by_request: Whether impressions of a request that follow each other in a partition share a record.
    """
    encode = msgspec.json.Encoder().encode
    head, most = headers("json", schema), max_rows(schema)
    records: list[OutRecord] = []
    record_N = np.zeros(len(events), np.int64)
    for rows in _runs(events, partition_N.tolist(), by_request=by_request):
        partition = int(partition_N[rows[0]])
        start = 0
        for value, count in _values([events[row] for row in rows], encode, most):
            record_N[rows[start : start + count]] = len(records)
            records.append(OutRecord(value, head, partition))
            start += count
    return records, record_N


def _runs(events: Sequence[Event], partitions: Sequence[int], *, by_request: bool) -> list[list[int]]:
    """The rows of each record, in the order of their first ones."""
    if not by_request:
        return [[row] for row in range(len(events))]
    runs: list[list[int]] = []
    last: dict[int, tuple[Any, int]] = {}  # partition → the request of its last row, and its run
    for row, (event, partition) in enumerate(zip(events, partitions, strict=True)):
        request = event.get("request_id")
        before, run = last.get(partition, (None, 0))
        if request is not None and request == before:
            runs[run].append(row)
        else:
            last[partition] = request, len(runs)
            runs.append([row])
    return runs


def _values(events: list[Event], encode: Any, most: int) -> Iterator[tuple[bytes, int]]:
    """Impressions of one request as values of records that a reader takes, and how many of them each holds."""
    if len(events) == 1:
        yield encode(events[0]), 1
        return
    request = together(events)
    waiting = [events]
    while waiting:
        shown = waiting.pop()
        # One by itself is no larger than it was.
        value = encode({**request, IMPRESSIONS: shown} if len(shown) > 1 else alone(request, shown[0]))
        if len(shown) > 1 and (len(value) > MAX_BYTES["json"] or len(shown) > most):
            half = len(shown) // 2
            waiting += [shown[half:], shown[:half]]
        else:
            yield value, len(shown)
