"""Whatever bytes come, decoding never raises and loses nothing: every event is a row or in a letter."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from smes.events import FeedbackBlock, ImpressionBlock
from smes.schema import MISSING, Schema
from stream.codec.codec import Decoded, decode, encode_feedback, encode_impressions
from stream.log.event_log import Headers, Record

ARRIVAL_MS = 1_700_000_000_000
MakeRecord = Callable[..., Record]

TOPICS = st.sampled_from(["impressions", "feedback"])
NAMES = st.sampled_from(
    [
        "impression_id",
        "user_id",
        "item_id",
        "event_time_ms",
        "request_id",
        "features",
        "served",
        "task",
        "value",
        "tab",
        "tags",
        "price",
        "30day_retention",
        "version",
        "scores",
        "click",
        "rating",
        "odd",
    ]
)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(0, 3)
    | st.floats()
    | st.sampled_from(["click", "rating", "", "\ud800", MISSING, 2**63 - 1, 10**4200, ARRIVAL_MS])
)
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=6))
GOOD = {"impression_id": 1, "user_id": 1, "item_id": 1, "event_time_ms": ARRIVAL_MS, "task": "click", "value": 1}


def _accounted(decoded: Decoded, topic: str) -> int:
    if topic == "impressions":
        assert decoded.dead_feedback == len(decoded.feedback) == 0
        return len(decoded.impressions) + decoded.dead_impressions
    assert decoded.dead_impressions == len(decoded.impressions) == 0
    return len(decoded.feedback) + decoded.dead_feedback


def _json(value: object) -> bytes:
    return json.dumps(value).encode()  # also NaN and Infinity, which are no JSON: part of the test


@given(
    values=st.lists(st.binary(max_size=40), max_size=5),
    topic=TOPICS,
    headers=st.lists(st.tuples(st.sampled_from(["codec", "schema", "x"]), st.binary(max_size=5)), max_size=3),
)
@example(values=[b"\xff\xff\xff\xff\x00\x00\x00\x00"], topic="feedback", headers=[("codec", b"arrow")])
@example(values=[b"[" * 200_000, b'{"odd":' * 200_000, b"1" * 5001], topic="impressions", headers=[])
def test_arbitrary_bytes_under_arbitrary_headers(
    values: list[bytes],
    topic: str,
    headers: list[tuple[str, bytes]],
    wire_schema: Schema,
    as_record: MakeRecord,
    arrow_headers: Headers,
) -> None:
    for head in (tuple(headers), arrow_headers):
        decoded = decode([as_record(topic, v, i, head) for i, v in enumerate(values)], wire_schema)
        assert _accounted(decoded, topic) == len(values)


@given(events=st.lists(st.dictionaries(NAMES, VALUES, max_size=9) | VALUES, max_size=4), topic=TOPICS)
def test_arbitrary_json(events: list[Any], topic: str, wire_schema: Schema, as_record: MakeRecord) -> None:
    merged = [GOOD | event if isinstance(event, dict) else event for event in events]
    values = [_json(event) for event in events + merged]

    decoded = decode([as_record(topic, value, i) for i, value in enumerate(values)], wire_schema)

    assert _accounted(decoded, topic) == len(values)
    assert all(len(letter.reason) < 1_000 for letter in decoded.dead)


def _arrow_value(topic: str, schema: Schema) -> bytes:
    rows = 7
    if topic == "impressions":
        impressions = ImpressionBlock.empty(schema, rows)
        impressions.event_time_ms[:] = ARRIVAL_MS
        impressions.impression_id[:] = impressions.ids[:, 0] = impressions.ids[:, 1] = np.arange(rows)
        impressions.ids[::2, 2:5] = 3
        impressions.served_scores[::3] = 0.5
        [out] = encode_impressions(impressions, schema, "arrow", 1)
        return out.value
    feedback = FeedbackBlock.empty(rows)
    feedback.event_time_ms[:] = ARRIVAL_MS
    [out] = encode_feedback(feedback, schema, "arrow", 1)
    return out.value


@given(
    topic=TOPICS,
    patches=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=4)), min_size=1, max_size=4
    ),
)
def test_damaged_arrow_records(
    topic: str,
    patches: list[tuple[float, bytes]],
    wire_schema: Schema,
    as_record: MakeRecord,
    arrow_headers: Headers,
) -> None:
    value = bytearray(_arrow_value(topic, wire_schema))
    for where, patch in patches:
        start = int(where * (len(value) - 8 - len(patch)))  # leave the end marker, to get further than its check
        value[start : start + len(patch)] = patch
    decoded = decode([as_record(topic, bytes(value), 0, arrow_headers)], wire_schema)
    # A patch may change the claimed number of rows, or mark a record as one of no rows; whatever is read is accounted.
    rows = len(decoded.impressions) + len(decoded.feedback)

    assert _accounted(decoded, topic) == rows + sum(letter.events for letter in decoded.dead)
    assert all(letter.offset == 0 for letter in decoded.dead)
    if any(letter.row is None for letter in decoded.dead):
        assert rows == 0
        assert len(decoded.dead) == 1
