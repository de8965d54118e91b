"""The JSON wire form: what good events decode to, and what each kind of bad event is refused for."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from smes.arm_names import names_of
from smes.schema import MISSING, Schema
from stream.codec.codec import encode_feedback, encode_impressions
from stream.log.event_log import Record
from tests.stream.wire import decode

ARRIVAL_MS = 1_700_000_000_000
MakeRecord = Callable[..., Record]

IMPRESSION: dict[str, Any] = {
    "impression_id": 1,
    "request_id": 5,
    "user_id": 7,
    "item_id": 9,
    "event_time_ms": ARRIVAL_MS - 10,
    "features": {"tab": 4, "tags": [11, 12], "30day_retention": -3, "price": 1.5, "age": 30},
    "served": {"arm": "b-2", "version": 12, "scores": {"like": 0.25, "click": 0.5}},
}
FEEDBACK: dict[str, Any] = {"impression_id": 1, "event_time_ms": ARRIVAL_MS, "task": "rating", "value": 3.5}

NAN = float("nan")


def _with(event: dict[str, Any], path: str, value: Any) -> bytes:
    """The event with one dotted field set, as JSON."""
    changed = json.loads(json.dumps(event))
    *parents, last = path.split(".")
    at = changed
    for parent in parents:
        at = at[parent]
    at[last] = value
    return json.dumps(changed).encode()


def _without(event: dict[str, Any], name: str) -> bytes:
    return json.dumps({key: value for key, value in event.items() if key != name}).encode()


def test_a_full_impression_becomes_one_row(wire_schema: Schema, as_record: MakeRecord) -> None:
    record = as_record("impressions", json.dumps(IMPRESSION).encode(), offset=41, partition=3)
    decoded = decode([record], wire_schema)
    block = decoded.impressions

    assert decoded.dead == []
    assert decoded.unknown_fields == 0
    assert len(decoded.feedback) == 0
    assert block.impression_id.tolist() == [1]
    assert block.request_id.tolist() == [5]
    assert block.event_time_ms.tolist() == [ARRIVAL_MS - 10]
    assert block.ids.tolist() == [[7, 9, 4, 11, 12, MISSING, -3]]
    assert block.numerics.tolist() == [[1.5, 30.0]]
    assert block.served_version.tolist() == [12]
    assert names_of(block.served_arm) == ["b-2"]
    np.testing.assert_array_equal(block.served_scores, np.array([[0.5, 0.25, NAN]], np.float32))
    assert (block.partition.tolist(), block.offset.tolist(), block.arrival_ms.tolist()) == ([3], [41], [ARRIVAL_MS])


@pytest.mark.parametrize(
    "optional",
    [
        {},
        {"request_id": None, "features": None, "served": None},
        {"features": {}, "served": {}},
        {"features": dict.fromkeys(IMPRESSION["features"]), "served": {"version": None, "scores": None}},
        {"features": {"tags": []}, "served": {"scores": {"click": None}}},
    ],
)
def test_what_is_optional_may_be_absent_null_or_empty(
    optional: dict[str, Any], wire_schema: Schema, as_record: MakeRecord
) -> None:
    required = {name: IMPRESSION[name] for name in ("impression_id", "user_id", "item_id", "event_time_ms")}
    full = as_record("impressions", json.dumps(IMPRESSION).encode())
    bare = as_record("impressions", json.dumps(required | optional).encode())
    block = decode([full, bare, full], wire_schema).impressions

    assert block.ids[1].tolist() == [7, 9, MISSING, MISSING, MISSING, MISSING, MISSING]
    assert np.isnan(block.numerics[1]).all()
    assert np.isnan(block.served_scores[1]).all()
    assert block.request_id.tolist() == [5, MISSING, 5]
    assert block.served_version.tolist() == [12, MISSING, 12]
    assert names_of(block.served_arm) == ["b-2", None, "b-2"]
    assert block.ids[0].tolist() == block.ids[2].tolist() == [7, 9, 4, 11, 12, MISSING, -3]


def test_a_long_bag_is_cut_not_refused(wire_schema: Schema, as_record: MakeRecord) -> None:
    decoded = decode([as_record("impressions", _with(IMPRESSION, "features.tags", [5, 4, 3, 2, 1]))], wire_schema)

    assert decoded.impressions.ids[0, 3:6].tolist() == [5, 4, 3]
    assert decoded.dead == []


@pytest.mark.parametrize(
    ("value", "code", "field", "words"),
    [
        (b"", "unparsable", None, "expected a JSON object"),
        (b"{", "unparsable", None, "expected a JSON object"),
        (b"[1]", "unparsable", None, "got an array"),
        (b"7", "unparsable", None, "got a number"),
        (b'{"impression_id": "\xff"}', "unparsable", None, "expected a JSON object"),
        (b'{"impression_id":' * 5000, "unparsable", None, "expected a JSON object"),
        (_without(IMPRESSION, "impression_id"), "missing_field", "impression_id", "got nothing"),
        (_without(IMPRESSION, "event_time_ms"), "missing_field", "event_time_ms", "Unix milliseconds"),
        (_with(IMPRESSION, "user_id", None), "missing_field", "user_id", "expected an integer, got null"),
        (_with(IMPRESSION, "item_id", "9"), "bad_id", "item_id", "expected an integer, got '9'"),
        (_with(IMPRESSION, "item_id", 1.5), "bad_id", "item_id", "got 1.5"),
        (_with(IMPRESSION, "item_id", 1.0), "bad_id", "item_id", "got 1.0"),
        (_with(IMPRESSION, "item_id", True), "bad_id", "item_id", "got True"),
        (_with(IMPRESSION, "user_id", 2**63), "bad_id", "user_id", "9223372036854775808"),
        (_with(IMPRESSION, "user_id", -(2**63)), "bad_id", "user_id", "null sentinel"),
        (_with(IMPRESSION, "user_id", 10**400), "bad_id", "user_id", "9223372036854775807"),
        (_with(IMPRESSION, "request_id", "x"), "bad_id", "request_id", "got 'x'"),
        (_with(IMPRESSION, "features", [1]), "bad_type", "features", "expected an object"),
        (_with(IMPRESSION, "features.tab", 1.5), "bad_id", "features.tab", "got 1.5"),
        (_with(IMPRESSION, "features.30day_retention", "+"), "bad_id", "features.30day_retention", "got '+'"),
        (_with(IMPRESSION, "features.tags", 3), "bad_type", "features.tags", "array of integers"),
        (_with(IMPRESSION, "features.tags", [1, None]), "bad_id", "features.tags", "position 1, got null"),
        (_with(IMPRESSION, "features.tags", [1, 2, 3, "x"]), "bad_id", "features.tags", "got 'x'"),
        (_with(IMPRESSION, "features.tags", [MISSING]), "bad_id", "features.tags", "null sentinel"),
        (_with(IMPRESSION, "features.price", 1e39), "bad_number", "features.price", "got 1e+39"),
        (_with(IMPRESSION, "features.price", True), "bad_number", "features.price", "got True"),
        (
            json.dumps(IMPRESSION).replace("1.5", "1e999").encode(),
            "bad_number",
            "features.price",
            "finite number (float32), got inf",
        ),
        (_with(IMPRESSION, "served", 3), "bad_type", "served", "got 3"),
        (_with(IMPRESSION, "served.version", 1.5), "bad_id", "served.version", "got 1.5"),
        (_with(IMPRESSION, "served.arm", "B"), "bad_type", "served.arm", "the name of an arm"),
        (_with(IMPRESSION, "served.arm", "b\n"), "bad_type", "served.arm", "got 'b\\n'"),
        (_with(IMPRESSION, "served.arm", 7), "bad_type", "served.arm", "got 7"),
        (_with(IMPRESSION, "served.scores", [0.1]), "bad_type", "served.scores", "score per task"),
        (_with(IMPRESSION, "served.scores.click", "hi"), "bad_number", "served.scores.click", "got 'hi'"),
        (_with(IMPRESSION, "event_time_ms", 0), "bad_time", "event_time_ms", "got 0"),
        (_with(IMPRESSION, "event_time_ms", -(2**63)), "bad_time", "event_time_ms", "integer Unix milliseconds"),
        (_with(IMPRESSION, "event_time_ms", "now"), "bad_time", "event_time_ms", "got 'now'"),
        (_with(IMPRESSION, "event_time_ms", ARRIVAL_MS + 300_001), "future_time", "event_time_ms", "300001 ms after"),
        (_with(IMPRESSION, "event_time_ms", 2**63 - 1), "bad_time", "event_time_ms", "got 9223372036854775807"),
        (b'{"impression_id":"x",' + json.dumps(IMPRESSION).encode()[1:], "unparsable", None, "Expected `int`"),
    ],
)
def test_a_bad_impression_is_refused_alone_and_says_why(
    value: bytes, code: str, field: str | None, words: str, wire_schema: Schema, as_record: MakeRecord
) -> None:
    good = json.dumps(IMPRESSION).encode()
    records = [as_record("impressions", v, offset) for offset, v in enumerate([good, value, good])]

    decoded = decode(records, wire_schema)

    assert decoded.impressions.offset.tolist() == [0, 2]
    [letter] = decoded.dead
    assert (letter.topic, letter.partition, letter.offset, letter.row) == ("impressions", 2, 1, None)
    assert (letter.code, letter.field, letter.payload) == (code, field, value)
    assert words in letter.reason
    assert (decoded.dead_impressions, decoded.dead_feedback) == (1, 0)


@pytest.mark.parametrize(
    ("value", "code", "field", "words"),
    [
        (_without(FEEDBACK, "task"), "missing_field", "task", "got nothing"),
        (_with(FEEDBACK, "value", None), "missing_field", "value", "got null"),
        (_with(FEEDBACK, "task", "klick"), "unknown_task", "task", "one of click, like, rating, got 'klick'"),
        (_with(FEEDBACK, "task", 1), "unknown_task", "task", "got 1"),
        (_with(FEEDBACK, "value", -0.5), "label_range", "value", "expected 0 … 5 for task 'rating', got -0.5"),
        (_with(FEEDBACK, "value", 5.001), "label_range", "value", "got 5.001"),
        (_with(FEEDBACK, "value", 1e300), "label_range", "value", "got 1e+300"),
        (_with(FEEDBACK, "value", "high"), "label_range", "value", "got 'high'"),
        (_with(FEEDBACK | {"task": "click"}, "value", 0.5), "label_range", "value", "0 or 1 for task 'click'"),
        (_with(FEEDBACK | {"task": "click"}, "value", 2), "label_range", "value", "got 2"),
        (_with(FEEDBACK | {"task": "click"}, "value", True), "label_range", "value", "got True"),
        (_with(FEEDBACK | {"task": "click"}, "value", "true"), "label_range", "value", "got 'true'"),
        (_with(FEEDBACK, "impression_id", 2**64), "bad_id", "impression_id", "got 18446744073709551616"),
        (_with(FEEDBACK, "event_time_ms", ARRIVAL_MS + 300_001), "future_time", "event_time_ms", "300001"),
        (b"null", "unparsable", None, "got null"),
    ],
)
def test_bad_feedback_is_refused_alone_and_says_why(
    value: bytes, code: str, field: str | None, words: str, wire_schema: Schema, as_record: MakeRecord
) -> None:
    good = json.dumps(FEEDBACK).encode()

    decoded = decode([as_record("feedback", v, i) for i, v in enumerate([value, good])], wire_schema)

    assert decoded.feedback.offset.tolist() == [1]
    [letter] = decoded.dead
    assert (letter.topic, letter.offset, letter.code, letter.field) == ("feedback", 0, code, field)
    assert words in letter.reason
    assert (decoded.dead_impressions, decoded.dead_feedback) == (0, 1)


def test_labels_on_the_edge_of_their_range_are_good(wire_schema: Schema, as_record: MakeRecord) -> None:
    edges = [("click", 0), ("like", 1), ("click", 1.0), ("rating", 0), ("rating", 5), ("rating", 5e-3)]
    records = [
        as_record("feedback", json.dumps(FEEDBACK | {"task": task, "value": value}).encode()) for task, value in edges
    ]
    block = decode(records, wire_schema).feedback

    assert block.task.tolist() == [0, 1, 0, 2, 2, 2]
    np.testing.assert_array_equal(block.value, np.array([v for _, v in edges], np.float32))


def test_event_time_may_be_as_late_as_the_limit_and_the_limit_is_the_callers(
    wire_schema: Schema, as_record: MakeRecord
) -> None:
    record = as_record("impressions", _with(IMPRESSION, "event_time_ms", ARRIVAL_MS + 300_000))

    assert len(decode([record], wire_schema).impressions) == 1
    assert [letter.code for letter in decode([record], wire_schema, max_future_ms=299_999).dead] == ["future_time"]


def test_unknown_fields_are_kept_out_and_counted_in_good_events_only(
    wire_schema: Schema, as_record: MakeRecord
) -> None:
    odd = json.loads(json.dumps(IMPRESSION))
    odd["device"] = {"os": "x", "nested": [1, {"a": "HUGE"}]}
    odd["features"] |= {"colour": 1, "user_id": 3}
    odd["served"] |= {"host": "a"}
    odd["served"]["scores"]["klick"] = 0.1
    bad = odd | {"item_id": "x"}
    late = odd | {"event_time_ms": 0}
    values = [IMPRESSION, odd, bad, late, IMPRESSION]
    wire = [json.dumps(v).replace('"HUGE"', "1e999").encode() for v in values]
    records = [as_record("impressions", value, offset) for offset, value in enumerate(wire)]
    records.append(as_record("feedback", json.dumps(FEEDBACK | {"who": 1, "why": None}).encode()))

    decoded = decode(records, wire_schema)

    assert decoded.unknown_fields == 5 + 2
    assert decoded.impressions.ids[1].tolist() == decoded.impressions.ids[0].tolist()
    assert decoded.impressions.offset.tolist() == [0, 1, 4]
    assert len(decoded.feedback) == 1


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ((("codec", b"avro"),), "unknown_codec"),
        ((("codec", b""),), "unknown_codec"),
        ((("codec", b"json"), ("schema", b"0123456789abcdef")), "schema_mismatch"),
        ((("schema", b"\xff\x00"),), "schema_mismatch"),
        ((("codec", b"arrow"),), "schema_mismatch"),
    ],
)
def test_headers_are_checked_before_the_payload(
    headers: tuple[tuple[str, bytes], ...], code: str, wire_schema: Schema, as_record: MakeRecord
) -> None:
    decoded = decode([as_record("impressions", json.dumps(IMPRESSION).encode(), headers=headers)], wire_schema)
    [letter] = decoded.dead

    assert letter.code == code
    if code == "schema_mismatch":
        assert wire_schema.hash in letter.reason
    assert len(decoded.impressions) == 0


def test_a_schema_mismatch_names_both_hashes(wire_schema: Schema, as_record: MakeRecord) -> None:
    other = Schema("other", wire_schema.tasks, wire_schema.features)
    [out] = encode_impressions(decode([], wire_schema).impressions.empty(wire_schema, 1), other, "json", 1)
    [letter] = decode([as_record("impressions", out.value, headers=out.headers)], wire_schema).dead

    assert wire_schema.hash in letter.reason
    assert other.hash in letter.reason


def test_a_record_of_another_topic_is_the_callers_mistake(wire_schema: Schema, as_record: MakeRecord) -> None:
    with pytest.raises(ValueError, match=r"topic 'clicks': expected 'impressions' or 'feedback'"):
        decode([as_record("clicks", b"{}")], wire_schema)


def test_encoded_json_is_the_documented_form(wire_schema: Schema, as_record: MakeRecord) -> None:
    impressions = decode([as_record("impressions", json.dumps(IMPRESSION).encode())], wire_schema).impressions
    feedback = decode([as_record("feedback", json.dumps(FEEDBACK).encode())], wire_schema).feedback
    [impression_out] = encode_impressions(impressions, wire_schema, "json", 1)

    [feedback_out] = encode_feedback(feedback, wire_schema, "json", 1)

    assert json.loads(impression_out.value) == IMPRESSION
    assert json.loads(feedback_out.value) == FEEDBACK
    assert dict(impression_out.headers) == {"codec": b"json", "schema": wire_schema.hash.encode()}


@pytest.mark.parametrize("codec", ["json", "arrow"])
def test_an_infinity_is_refused_by_the_encoder(codec: Any, wire_schema: Schema, as_record: MakeRecord) -> None:
    block = decode([as_record("impressions", json.dumps(IMPRESSION).encode())] * 3, wire_schema).impressions
    block.numerics[1, 0] = np.inf

    with pytest.raises(ValueError, match=r"numerics: expected finite .* row 1"):
        encode_impressions(block, wire_schema, codec, 1)
