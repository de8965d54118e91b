"""The Arrow wire form: round trips, routing, columns of every make, bad rows, damage."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from smes.arm_names import arm_column, names_of
from smes.events import FeedbackBlock, ImpressionBlock
from smes.schema import MISSING, Feature, Schema, Task
from stream.codec.codec import encode_feedback, encode_impressions
from stream.log.event_log import Headers, Record
from stream.topics import partition_of
from tests.stream.wire import ARRIVAL_MS, MakeRecord, assert_same_events, decode, ipc


def _required(n: int) -> dict[str, Any]:
    """The required columns of ``n`` good impressions with ids 1 … n."""
    ids = pa.array(np.arange(1, n + 1))
    return {"impression_id": ids, "user_id": ids, "item_id": ids, "event_time_ms": pa.array([ARRIVAL_MS] * n)}


def _random_impressions(schema: Schema, n: int, seed: int) -> ImpressionBlock:
    rng = np.random.default_rng(seed)
    block = ImpressionBlock.empty(schema, n)
    block.impression_id[:] = rng.integers(-(2**62), 2**62, n)
    block.event_time_ms[:] = ARRIVAL_MS - rng.integers(0, 10_000, n)
    block.ids[:] = rng.integers(-(2**62), 2**62, block.ids.shape)
    block.ids[:, 2][rng.random(n) < 0.3] = MISSING
    lengths = rng.integers(0, 4, n)
    block.ids[:, 3:6][np.arange(3) >= lengths[:, None]] = MISSING
    block.numerics[:] = rng.normal(size=block.numerics.shape)
    block.numerics[rng.random(block.numerics.shape) < 0.3] = np.nan
    block.request_id[::2] = 77
    served = rng.random(n) < 0.5
    block.served_version[served] = 12
    block.served_scores[served] = rng.random((served.sum(), schema.num_tasks))
    block.served_scores[rng.random(block.served_scores.shape) < 0.2] = np.nan
    arms = ("main", "b", "a-name_of16bytes", None)
    block.served_arm[served] = arm_column([arms[i] for i in rng.integers(0, 4, int(served.sum()))])
    return block


def _times(second: int | None) -> Any:
    """A column of three times of which only the second one may be bad."""
    return pa.array([ARRIVAL_MS, second, ARRIVAL_MS])


@pytest.mark.parametrize("codec", ["json", "arrow"])
@pytest.mark.parametrize("n", [0, 1, 200])
def test_impressions_survive_the_round_trip_in_their_partitions(
    codec: Any, n: int, wire_schema: Schema, as_record: MakeRecord
) -> None:
    block = _random_impressions(wire_schema, n, seed=3)

    outs = encode_impressions(block, wire_schema, codec, 3)

    assert len(outs) == (n if codec == "json" else len(set(partition_of(block.impression_id, 3).tolist())))
    records = [
        as_record("impressions", out.value, offset, out.headers, out.partition) for offset, out in enumerate(outs)
    ]
    records.sort(key=lambda record: record.partition)
    decoded = decode(records, wire_schema)
    assert decoded.dead == []
    assert decoded.unknown_fields == 0
    expected = block.take(np.argsort(partition_of(block.impression_id, 3), kind="stable"))
    assert_same_events(decoded.impressions, expected)
    np.testing.assert_array_equal(decoded.impressions.partition, partition_of(expected.impression_id, 3))


@pytest.mark.parametrize("codec", ["json", "arrow"])
def test_feedback_survives_the_round_trip_and_follows_its_impression(
    codec: Any, wire_schema: Schema, as_record: MakeRecord
) -> None:
    rng = np.random.default_rng(0)
    block = FeedbackBlock.empty(300)
    block.impression_id[:] = rng.integers(0, 50, 300)
    block.event_time_ms[:] = ARRIVAL_MS - rng.integers(0, 10_000, 300)
    block.task[:] = rng.integers(0, 3, 300)
    block.value[:] = np.where(block.task == 2, rng.random(300) * 5, rng.integers(0, 2, 300))
    outs = encode_feedback(block, wire_schema, codec, 4)
    records = sorted(
        (as_record("feedback", out.value, i, out.headers, out.partition) for i, out in enumerate(outs)),
        key=lambda record: record.partition,
    )

    decoded = decode(records, wire_schema)

    assert decoded.dead == []
    assert_same_events(decoded.feedback, block.take(np.argsort(partition_of(block.impression_id, 4), kind="stable")))
    np.testing.assert_array_equal(decoded.feedback.partition, partition_of(decoded.feedback.impression_id, 4))


def test_rows_come_in_record_order_when_codecs_alternate(wire_schema: Schema, as_record: MakeRecord) -> None:
    records: list[Record] = []
    expected: list[int] = []
    for i, codec in enumerate(["json", "arrow", "arrow", "json"]):
        block = _random_impressions(wire_schema, 3, seed=i)
        expected += block.impression_id.tolist()
        for out in encode_impressions(block, wire_schema, "json" if codec == "json" else "arrow", 1):
            records.append(as_record("impressions", out.value, len(records), out.headers))

    assert decode(records, wire_schema).impressions.impression_id.tolist() == expected


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([1, None, -3], pa.int8()), [1, MISSING, -3]),
        (pa.array([1, None, 2**32 - 1], pa.uint32()), [1, MISSING, 2**32 - 1]),
        (pa.array([2**63 - 1, None, 0], pa.uint64()), [2**63 - 1, MISSING, 0]),
        (pa.array([9, None, 9]).dictionary_encode(), [9, MISSING, 9]),
        (pa.array([9, 1, None, 5]).slice(1), [1, MISSING, 5]),
        (pa.nulls(3), [MISSING] * 3),
    ],
)
def test_id_columns_of_any_integer_type_are_read(
    column: Any, expected: list[int], wire_schema: Schema, as_record: MakeRecord, arrow_headers: Headers
) -> None:
    value = ipc(_required(3) | {"features.tab": column})

    decoded = decode([as_record("impressions", value, headers=arrow_headers)], wire_schema)

    assert decoded.impressions.ids[:, 2].tolist() == expected
    assert decoded.dead == []


@pytest.mark.parametrize(
    "column",
    [
        pa.array([[0], [1, 2, 3, 4], None, []]).slice(1),
        pa.array([[1, 2, 3, 4], None, []], pa.large_list(pa.int32())),
        # A null bag that still owns elements, which must not be read.
        pa.ListArray.from_arrays(
            pa.array([0, 4, 6, 6], pa.int32()), pa.array([1, 2, 3, 4, 8, None]), mask=pa.array([False, True, False])
        ),
    ],
)
def test_bags_are_cut_and_null_bags_are_empty(
    column: Any, wire_schema: Schema, as_record: MakeRecord, arrow_headers: Headers
) -> None:
    value = ipc(_required(3) | {"features.tags": column})

    decoded = decode([as_record("impressions", value, headers=arrow_headers)], wire_schema)

    assert decoded.dead == []
    assert decoded.impressions.ids[:, 3:6].tolist() == [[1, 2, 3], [MISSING] * 3, [MISSING] * 3]


@pytest.mark.parametrize(
    "column",
    [
        pa.array([[0.5, 0.25, None], None], pa.list_(pa.float32(), 3)),
        pa.array([[9, 9, 9], [0.5, 0.25, None], None], pa.list_(pa.float64(), 3)).slice(1),
        pa.array([[0.5, 0.25, None], None], pa.list_(pa.float64())),
    ],
)
def test_served_scores_are_read_from_any_list_of_numbers(
    column: Any, wire_schema: Schema, as_record: MakeRecord, arrow_headers: Headers
) -> None:
    value = ipc(_required(2) | {"served_scores": column, "served_version": pa.array([4, None])})
    block = decode([as_record("impressions", value, headers=arrow_headers)], wire_schema).impressions
    nan = np.nan

    np.testing.assert_array_equal(block.served_scores, np.array([[0.5, 0.25, nan], [nan, nan, nan]], np.float32))

    assert block.served_version.tolist() == [4, MISSING]


@pytest.mark.parametrize(
    ("column", "name", "code", "field", "words"),
    [
        (pa.array([1, MISSING, 3]), "features.tab", "bad_id", "features.tab", "null sentinel"),
        (pa.array([1, MISSING, None]), "features.tab", "bad_id", "features.tab", "null sentinel"),
        (pa.array([1, 2**63, 3], pa.uint64()), "features.tab", "bad_id", "features.tab", "got 9223372036854775808"),
        (pa.array([None, 1.0, None]), "features.tab", "bad_id", "features.tab", "expected an integer, got 1.0"),
        (pa.array([None, "x", None]), "features.tab", "bad_id", "features.tab", "expected an integer, got 'x'"),
        (pa.array([None, True, None]), "features.tab", "bad_id", "features.tab", "got True"),
        (pa.array([[1], [2, None], []]), "features.tags", "bad_id", "features.tags", "position 1, got null"),
        (pa.array([[1], [2, 3, 4, MISSING], []]), "features.tags", "bad_id", "features.tags", "null sentinel"),
        (pa.array([[], [1.5], None]), "features.tags", "bad_id", "features.tags", "got 1.5"),
        (pa.array([None, 3, None]), "features.tags", "bad_type", "features.tags", "array of integers, got 3"),
        (pa.array([1, np.inf, np.nan]), "features.price", "bad_number", "features.price", "got inf"),
        (pa.array([1, -1e39, None]), "features.age", "bad_number", "features.age", "got -1e+39"),
        (pa.array([None, "a", None]), "features.age", "bad_number", "features.age", "got 'a'"),
        (pa.array([None, 0.5, None]), "request_id", "bad_id", "request_id", "got 0.5"),
        (pa.array([3, MISSING, None]), "served_version", "bad_id", "served.version", "null sentinel"),
        (
            pa.array([None, [0, np.inf, 1], None], pa.list_(pa.float32(), 3)),
            "served_scores",
            "bad_number",
            "served.scores.like",
            "got inf",
        ),
        (pa.array([None, [0.5], None]), "served_scores", "bad_type", "served.scores", "a score per task, got [0.5]"),
        (
            pa.array(["b", "no arm", None]),
            "served_arm",
            "bad_type",
            "served.arm",
            "the first a letter or digit, got 'no arm'",
        ),
        (pa.array([None, "seventeen-letters", "b"]), "served_arm", "bad_type", "served.arm", "got 'seventeen-letters'"),
        (pa.array([None, 3, None]), "served_arm", "bad_type", "served.arm", "got 3"),
        (pa.array([1, None, 3]), "user_id", "missing_field", "user_id", "expected an integer, got null"),
        (pa.array([1, MISSING, 3]), "item_id", "bad_id", "item_id", "null sentinel"),
        (_times(0), "event_time_ms", "bad_time", "event_time_ms", "got 0"),
        (_times(MISSING), "event_time_ms", "bad_time", "event_time_ms", "integer Unix milliseconds"),
        (_times(ARRIVAL_MS // 1000), "event_time_ms", "bad_time", "event_time_ms", "which looks like seconds"),
        (_times(None), "event_time_ms", "missing_field", "event_time_ms", "got null"),
        (_times(ARRIVAL_MS + 300_001), "event_time_ms", "future_time", "event_time_ms", "300001 ms after"),
    ],
)
@pytest.mark.parametrize("batch_rows", [1, 1000])
def test_a_bad_row_is_refused_alone_and_says_why(
    column: Any,
    name: str,
    code: str,
    field: str,
    words: str,
    batch_rows: int,
    wire_schema: Schema,
    as_record: MakeRecord,
    arrow_headers: Headers,
) -> None:
    value = ipc(_required(3) | {name: column}, batch_rows=batch_rows)

    decoded = decode([as_record("impressions", value, offset=6, headers=arrow_headers)], wire_schema)

    assert decoded.impressions.impression_id.tolist() == [1, 3]
    [letter] = decoded.dead
    assert (letter.offset, letter.row, letter.code, letter.field, letter.events) == (6, 1, code, field, 1)
    assert words in letter.reason
    assert json.loads(letter.payload)["impression_id"] == 2
    assert (decoded.dead_impressions, decoded.dead_feedback) == (1, 0)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string()), pa.null()])
def test_arms_are_read_from_any_column_of_texts(
    kind: Any, wire_schema: Schema, as_record: MakeRecord, arrow_headers: Headers
) -> None:
    names = [None, None, None] if kind == pa.null() else ["b", None, "main"]

    value = ipc(_required(3) | {"served_arm": pa.array(names, kind)})

    decoded = decode([as_record("impressions", value, headers=arrow_headers)], wire_schema)
    assert decoded.dead == []
    assert names_of(decoded.impressions.served_arm) == names


def test_an_arm_that_is_no_text_at_all_costs_its_record(
    wire_schema: Schema, as_record: MakeRecord, arrow_headers: Headers
) -> None:
    not_utf8 = pa.array([b"b", b"\xff\xfe", None], pa.binary()).view(pa.string())

    value = ipc(_required(3) | {"served_arm": not_utf8})

    decoded = decode([as_record("impressions", value, headers=arrow_headers)], wire_schema)
    [letter] = decoded.dead
    assert (letter.code, letter.row) == ("unparsable", None)
    assert (len(decoded.impressions), decoded.dead_impressions) == (0, 3)


def _feedback(n: int) -> dict[str, Any]:
    return {
        "impression_id": pa.array(np.arange(1, n + 1)),
        "event_time_ms": pa.array([ARRIVAL_MS] * n),
        "task": pa.array(["click"] * n),
        "value": pa.array([1.0] * n, pa.float32()),
    }


@pytest.mark.parametrize(
    ("column", "name", "code", "words"),
    [
        (pa.array(["like", "klick", "click"]), "task", "unknown_task", "got 'klick'"),
        (pa.array(["like", "klick", "click"]).dictionary_encode(), "task", "unknown_task", "got 'klick'"),
        (pa.array(["like", None, "click"], pa.large_string()), "task", "missing_field", "got null"),
        (pa.array(["like", None, "click"]).dictionary_encode(), "task", "missing_field", "got null"),
        (pa.array([1, 0.5, 0], pa.float32()), "value", "label_range", "0 or 1"),
        (pa.array([1, 2, 0]), "value", "label_range", "got 2"),
        (pa.array([1, np.nan, 0], pa.float32()), "value", "label_range", "got nan"),
        (pa.array([1, 1.0000000001, 0]), "value", "label_range", "got 1.0000000001"),
        (pa.array([1, None, 0], pa.float32()), "value", "missing_field", "got null"),
        (pa.array([1, None, 3]), "impression_id", "missing_field", "got null"),
    ],
)
def test_a_bad_feedback_row_is_refused_alone_and_says_why(
    column: Any,
    name: str,
    code: str,
    words: str,
    wire_schema: Schema,
    as_record: MakeRecord,
    arrow_headers: Headers,
) -> None:
    value = ipc(_feedback(3) | {name: column})

    decoded = decode([as_record("feedback", value, headers=arrow_headers)], wire_schema)

    assert decoded.feedback.impression_id.tolist() == [1, 3]
    [letter] = decoded.dead
    assert (letter.row, letter.code, letter.field) == (1, code, name)
    assert words in letter.reason
    assert decoded.dead_feedback == 1


def test_tasks_are_found_by_name_whatever_the_producers_numbering(
    wire_schema: Schema, as_record: MakeRecord, arrow_headers: Headers
) -> None:
    names = pa.array(["rating", "click", "like"])
    task = pa.DictionaryArray.from_arrays(pa.array([0, 1, 2, 0], pa.uint8()), names)
    value = ipc(_feedback(4) | {"task": task})

    decoded = decode([as_record("feedback", value, headers=arrow_headers)], wire_schema)

    assert decoded.feedback.task.tolist() == [2, 0, 1, 2]


def test_a_regression_label_at_a_bound_that_float32_cannot_hold(as_record: MakeRecord) -> None:
    schema = Schema("edge", (Task("watch", "regression", max_value=0.1),))
    block = FeedbackBlock.empty(1)
    block.event_time_ms[:] = ARRIVAL_MS
    block.value[:] = 0.1

    assert float(block.value[0]) > 0.1
    for out in encode_feedback(block, schema, "arrow", 1) + encode_feedback(block, schema, "json", 1):
        assert len(decode([as_record("feedback", out.value, headers=out.headers)], schema).feedback) == 1


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"event_time_ms": None}, "missing_field", "event_time_ms: expected a column, got no such column"),
        ({"user_id": pa.nulls(5)}, "missing_field", "got a column of nulls"),
        ({"impression_id": pa.array(["1"] * 5)}, "bad_id", "expected an int64 column, got string"),
        ({"event_time_ms": pa.array([1.0] * 5)}, "bad_time", "expected an int64 column, got double"),
    ],
)
def test_a_required_column_that_no_row_can_use_refuses_the_record_with_all_its_rows(
    change: dict[str, Any],
    code: str,
    words: str,
    wire_schema: Schema,
    as_record: MakeRecord,
    arrow_headers: Headers,
) -> None:
    columns = {name: column for name, column in (_required(5) | change).items() if column is not None}
    value = ipc(columns, batch_rows=2)
    decoded = decode([as_record("impressions", value, headers=arrow_headers)], wire_schema)
    [letter] = decoded.dead

    assert (letter.code, letter.row, letter.events, letter.payload) == (code, None, 5, value)
    assert words in letter.reason
    assert decoded.dead_impressions == 5
    assert len(decoded.impressions) == 0


def test_a_row_count_that_the_bytes_cannot_hold_counts_as_one(
    wire_schema: Schema, as_record: MakeRecord, arrow_headers: Headers
) -> None:
    value = ipc({"impression_id": pa.nulls(10**9)}, batch_rows=10**9)

    decoded = decode([as_record("impressions", value, headers=arrow_headers)], wire_schema)

    assert decoded.dead_impressions == 1


def test_unknown_columns_are_kept_out_and_counted_per_good_row(
    wire_schema: Schema, as_record: MakeRecord, arrow_headers: Headers
) -> None:
    columns = _required(3) | {"features.colour": pa.array([1, 2, 3]), "x": pa.array(["a", "b", None])}
    columns["event_time_ms"] = _times(0)

    decoded = decode([as_record("impressions", ipc(columns), headers=arrow_headers)], wire_schema)

    assert decoded.unknown_fields == 4
    assert decoded.impressions.impression_id.tolist() == [1, 3]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda value: b"", "end-of-stream"),
        (lambda value: value[:-8], "end-of-stream"),
        (lambda value: value[len(value) // 2 :], "expected an Arrow IPC stream"),
        (lambda value: b"{}" + value[-8:], "expected an Arrow IPC stream"),
    ],
)
def test_a_damaged_stream_is_one_letter_and_counts_as_one(
    spoil: Callable[[bytes], bytes],
    words: str,
    wire_schema: Schema,
    as_record: MakeRecord,
    arrow_headers: Headers,
) -> None:
    good = ipc(_required(3))
    records = [as_record("impressions", v, i, arrow_headers) for i, v in enumerate([spoil(good), good])]
    decoded = decode(records, wire_schema)
    [letter] = decoded.dead

    assert (letter.code, letter.offset, letter.row) == ("unparsable", 0, None)
    assert words in letter.reason
    assert decoded.dead_impressions == 1
    assert decoded.impressions.offset.tolist() == [1, 1, 1]


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
@pytest.mark.parametrize("dictionary", [False, True])
def test_a_compressed_stream_is_refused(
    compression: str, dictionary: bool, wire_schema: Schema, as_record: MakeRecord, arrow_headers: Headers
) -> None:
    columns = _feedback(100)
    if dictionary:
        columns["task"] = columns["task"].dictionary_encode()
    value = ipc(columns, compression=compression)
    [letter] = decode([as_record("feedback", value, headers=arrow_headers)], wire_schema).dead

    assert "uncompressed" in letter.reason


def test_offsets_that_leave_their_buffer_are_damage(
    wire_schema: Schema, as_record: MakeRecord, arrow_headers: Headers
) -> None:
    good = ipc(_required(3) | {"features.tags": pa.array([[1], [2], [3]])})
    offsets, beyond = np.array([0, 1, 2, 3], np.int32).tobytes(), np.array([0, 4_000_000, 2, 3], np.int32).tobytes()

    assert good.count(offsets) == 1
    value = good.replace(offsets, beyond)
    decoded = decode([as_record("impressions", value, headers=arrow_headers)], wire_schema)
    assert [(letter.code, letter.field) for letter in decoded.dead] == [("unparsable", "features.tags")]
    assert decoded.dead_impressions == 3


def test_letters_stay_small_when_one_long_string_is_repeated_in_every_row(
    wire_schema: Schema, as_record: MakeRecord, arrow_headers: Headers
) -> None:
    rows, text = 2_000, "x" * 500_000
    task = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array([text]))
    value = ipc(_feedback(rows) | {"task": task}, batch_rows=rows)

    decoded = decode([as_record("feedback", value, headers=arrow_headers)], wire_schema)

    assert decoded.dead_feedback == len(decoded.dead) == rows
    assert sum(len(letter.payload) + len(letter.reason) for letter in decoded.dead) < 6 * len(value)


def test_a_schema_without_features_or_numbers(as_record: MakeRecord) -> None:
    schema = Schema("bare", (Task("click"),), (Feature("user_id", source="user", dim=4),))
    block = ImpressionBlock.empty(schema, 2)
    block.event_time_ms[:] = ARRIVAL_MS
    block.ids[:] = [[1, 2], [3, 4]]
    for out in encode_impressions(block, schema, "arrow", 1):
        record = as_record("impressions", out.value, headers=out.headers)
        assert decode([record], schema).impressions.ids.tolist() == [[1, 2], [3, 4]]
    json_records = [
        as_record("impressions", o.value, headers=o.headers) for o in encode_impressions(block, schema, "json", 1)
    ]

    assert decode(json_records, schema).impressions.ids.tolist() == [[1, 2], [3, 4]]
