"""However a record is made, decoding it takes memory by its bytes, and what would take more is a dead letter.

Guarantee shown: records that cost few bytes on the wire and much memory here (columns of nulls, dictionaries, runs,
views, absent columns, nesting, sheer size) are refused with a reason and counted, and decoding them never raises.
"""

import json
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from smes.events import ImpressionBlock
from smes.schema import MISSING, Feature, Schema, Task
from stream.codec.codec import MAX_BYTES, Decoded, encode_impressions
from stream.codec.limits import MAX_ROWS, max_rows
from stream.log.event_log import Headers, Record
from tests.stream.wire import ARRIVAL_MS, MakeRecord, decode, ipc

MB = 1024 * 1024
TWO_BILLION = 2**31 - 1


@contextmanager
def memory_within(megabytes: int) -> Iterator[None]:
    """Fails if Python, NumPy or Arrow take more at any moment in between."""
    pool = pa.default_memory_pool()
    before = pool.max_memory()
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < megabytes * MB, f"{peak / MB:.0f} MB, expected at most {megabytes}"
    assert pool.max_memory() - before < megabytes * MB


@pytest.fixture
def refused(wire_schema: Schema, as_record: MakeRecord, arrow_headers: Headers) -> Callable[[str, bytes], Decoded]:
    """Decodes one Arrow record of a topic."""

    def decode_one(topic: str, value: bytes) -> Decoded:
        return decode([as_record(topic, value, headers=arrow_headers)], wire_schema)

    return decode_one


def columns(n: int) -> dict[str, Any]:
    ids = pa.array(np.arange(1, n + 1))
    return {"impression_id": ids, "user_id": ids, "item_id": ids, "event_time_ms": pa.array([ARRIVAL_MS] * n)}


def one_list(values: Any, length: int) -> Any:
    return pa.ListArray.from_arrays(pa.array([0, length], pa.int32()), values)


def repeated(value: Any, kind: Any, n: int) -> Any:
    return pa.DictionaryArray.from_arrays(pa.array([0] * n, pa.int8()), pa.array([value], kind))


# Lists.


@pytest.mark.parametrize(
    "column",
    [
        pytest.param(one_list(pa.nulls(TWO_BILLION), TWO_BILLION), id="nulls"),
        pytest.param(
            one_list(
                pa.RunEndEncodedArray.from_arrays(pa.array([TWO_BILLION], pa.int32()), pa.array([1])), TWO_BILLION
            ),
            id="runs",
        ),
        pytest.param(pa.FixedSizeListArray.from_arrays(pa.nulls(TWO_BILLION), TWO_BILLION), id="fixed size of nulls"),
        pytest.param(one_list(one_list(pa.nulls(TWO_BILLION), TWO_BILLION), 1), id="list of lists"),
    ],
)
@pytest.mark.parametrize("name", ["features.tags", "features.tab", "features.price", "served_scores", "request_id"])
def test_a_list_that_costs_no_bytes_is_refused_in_little_memory(
    column: Any, name: str, refused: Callable[[str, bytes], Decoded]
) -> None:
    value = ipc(columns(1) | {name: column})
    assert len(value) < 10_000

    with memory_within(100):
        decoded = refused("impressions", value)

    assert (len(decoded.impressions), decoded.dead_impressions) == (0, 1)
    [letter] = decoded.dead
    assert letter.row in (0, None)
    assert len(letter.payload) < 100_000


def test_fixed_size_lists_are_bags(refused: Callable[[str, bytes], Decoded]) -> None:
    tags = pa.array([[1, 2], None, [3, None], [4, 5]], pa.list_(pa.int32(), 2))

    decoded = refused("impressions", ipc(columns(4) | {"features.tags": tags}))

    assert decoded.impressions.ids[:, 3:6].tolist() == [[1, 2, MISSING], [MISSING] * 3, [4, 5, MISSING]]
    assert [(letter.row, letter.code) for letter in decoded.dead] == [(2, "bad_id")]


def test_a_bag_is_bad_only_for_its_own_elements(refused: Callable[[str, bytes], Decoded]) -> None:
    tags = pa.array([[], [None], [], [1], None, [2, None], [3], []], pa.list_(pa.int64()))

    decoded = refused("impressions", ipc(columns(8) | {"features.tags": tags}))

    assert sorted(letter.row or 0 for letter in decoded.dead) == [1, 5]
    assert decoded.impressions.impression_id.tolist() == [1, 3, 4, 5, 7, 8]


# Dictionaries and views.


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary()])
@pytest.mark.parametrize("name", ["features.tab", "features.price", "features.tags", "request_id", "served_version"])
def test_one_long_text_in_every_row_is_not_copied_into_each(
    name: str, kind: Any, refused: Callable[[str, bytes], Decoded]
) -> None:
    rows = 4000
    value = ipc(columns(rows) | {name: repeated(b"x" * MB, kind, rows)}, batch_rows=rows)  # as rows: 4 GB

    with memory_within(150):
        decoded = refused("impressions", value)

    assert decoded.dead_impressions == rows
    assert all(len(letter.payload) < 5000 for letter in decoded.dead)


def test_a_text_view_of_one_buffer_in_every_row_is_not_copied_into_each(
    refused: Callable[[str, bytes], Decoded],
) -> None:
    rows = 4000
    view = struct.pack("<i4sii", MB, b"xxxx", 0, 0)  # length, prefix, buffer, offset
    buffers = [None, pa.py_buffer(view * rows), pa.py_buffer(b"x" * MB)]
    views = pa.Array.from_buffers(pa.string_view(), rows, buffers)
    value = ipc(columns(rows) | {"features.tab": views}, batch_rows=rows)
    assert len(value) < 3 * MB

    with memory_within(150):
        decoded = refused("impressions", value)

    assert decoded.dead_impressions == rows


@pytest.mark.parametrize(("indices", "names"), [(pa.int8(), 128), (pa.uint8(), 256), (pa.int16(), 300)])
def test_a_null_task_in_a_full_dictionary_is_a_dead_letter(
    indices: Any, names: int, refused: Callable[[str, bytes], Decoded]
) -> None:
    dictionary = pa.array(["click", *(f"t{i}" for i in range(names - 1))])
    feedback = {
        "impression_id": pa.array([1, 2, 3]),
        "event_time_ms": pa.array([ARRIVAL_MS] * 3),
        "task": pa.DictionaryArray.from_arrays(pa.array([0, None, 5], indices), dictionary),
        "value": pa.array([1.0] * 3),
    }

    decoded = refused("feedback", ipc(feedback))

    assert decoded.feedback.impression_id.tolist() == [1]
    assert [(letter.row, letter.code) for letter in decoded.dead] == [(1, "missing_field"), (2, "unknown_task")]


def test_dictionaries_that_grow_from_batch_to_batch_are_refused(refused: Callable[[str, bytes], Decoded]) -> None:
    def batch(n: int) -> Any:
        task = pa.DictionaryArray.from_arrays(pa.array([n - 1]), pa.array(["click", *(f"t{i}" for i in range(n - 1))]))
        return pa.record_batch(
            {
                "impression_id": pa.array([n]),
                "event_time_ms": pa.array([ARRIVAL_MS]),
                "task": task,
                "value": pa.array([1.0]),
            }
        )

    def stream(batches: list[Any], *, deltas: bool) -> bytes:
        sink = pa.BufferOutputStream()
        options = pa.ipc.IpcWriteOptions(emit_dictionary_deltas=deltas)
        with pa.ipc.new_stream(sink, batches[0].schema, options=options) as writer:
            for each in batches:
                writer.write_batch(each)
        return bytes(sink.getvalue())

    batches = [batch(n) for n in range(1, 6)]

    [letter] = refused("feedback", stream(batches, deltas=True)).dead
    assert (letter.code, letter.row) == ("unparsable", None)
    assert "expected whole dictionaries" in letter.reason
    assert refused("feedback", stream(batches, deltas=False)).feedback.impression_id.tolist() == [1]


def test_of_a_dictionary_only_what_a_batch_uses_is_made(
    wire_schema: Schema, refused: Callable[[str, bytes], Decoded]
) -> None:
    n = 200_000  # batches of a record may share one
    arms = pa.array([*(f"arm{i}" for i in range(n - 1)), "main"])
    elements = pa.array(np.arange(4 * n) % 9, mask=np.arange(4 * n) < 4)
    tags = pa.ListArray.from_arrays(pa.array(np.arange(0, 4 * n + 1, 4), pa.int32()), elements)
    structs = pa.StructArray.from_arrays([tags], ["features.tags"])
    index = pa.array([n - 1], pa.int32())
    of_dictionaries = {
        "served_arm": pa.DictionaryArray.from_arrays(index, arms),
        "request": pa.DictionaryArray.from_arrays(index, structs),
    }
    value = ipc(columns(1) | of_dictionaries)
    with memory_within(4):
        decoded = refused("impressions", value)
    assert (decoded.dead, decoded.impressions.served_arm[0].tobytes().rstrip(b"\0")) == ([], b"main")
    assert decoded.impressions.ids[0, wire_schema.id_slices["tags"]].tolist() == [(4 * n - 4 + i) % 9 for i in range(3)]


def test_a_column_that_arrow_refuses_is_one_dead_letter_among_good_records(
    wire_schema: Schema, as_record: MakeRecord, arrow_headers: Headers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_null(*args: Any) -> Any:
        raise pa.ArrowNotImplementedError("no kernel matching input types")

    good = ipc(columns(3) | {"odd": pa.array([1, 2, 3])})
    scores = pa.array([None, [0.5], None], pa.list_(pa.float32()))
    records = [as_record("impressions", v, i, arrow_headers) for i, v in enumerate([good, good, good])]
    records.insert(1, as_record("impressions", ipc(columns(3) | {"served_scores": scores}), 9, arrow_headers))
    monkeypatch.setattr("stream.codec.arrow_columns.pc.list_value_length", fill_null)

    decoded = decode(records, wire_schema)

    assert decoded.impressions.offset.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [(letter.offset, letter.code, letter.row) for letter in decoded.dead] == [(9, "unparsable", None)]
    assert decoded.dead_impressions == 3
    assert "no kernel" in decoded.dead[0].reason
    assert decoded.unknown_fields == 9


ODD = [
    pa.array([None, {"a": 1}, None]),
    pa.array([None, [{"a": 1}], None]),
    pa.array([None, [[1], None, []], None]),
    pa.array([None, [("k", 1)], None], pa.map_(pa.string(), pa.int64())),
    pa.array([None, b"\xff" * 5, None], pa.binary(5)),
    pa.array([None, b"\xff", None], pa.binary_view()),
    pa.array([None, 1, None], pa.timestamp("ms")),
    pa.array([None, 1, None], pa.duration("ns")),
    pa.array([None, 1, None], pa.date64()),
    pa.array([None, Decimal("1.5"), None], pa.decimal256(60, 3)),
    pa.array([None, (1, 2, 3), None], pa.month_day_nano_interval()),
    pa.array([None, np.float16(2), None], pa.float16()),
    pa.array([None, [1, 2], None], pa.list_view(pa.int64())),
    pa.array([None, ["a", "b"], None], pa.large_list_view(pa.string())),
    pa.RunEndEncodedArray.from_arrays(pa.array([1, 3], pa.int16()), pa.array([None, 7])),
    pa.UnionArray.from_sparse(pa.array([0, 1, 0], pa.int8()), [pa.array([1, 2, 3]), pa.array(["x", "y", "z"])]),
    pa.DictionaryArray.from_arrays(pa.array([None, 0, None], pa.uint64()), pa.array([[1, None]])),
    pa.DictionaryArray.from_arrays(pa.array([None, 0, None]), pa.array([1.5])),
    pa.DictionaryArray.from_arrays(pa.array([None, 0, None]), pa.array([True])),
    pa.DictionaryArray.from_arrays(pa.array([None, 0, None]), pa.nulls(1)),
    pa.ExtensionArray.from_storage(pa.uuid(), pa.array([None, b"0" * 16, None], pa.binary(16))),
]


@pytest.mark.parametrize("column", ODD, ids=lambda column: str(column.type))
@pytest.mark.parametrize("name", [*columns(1), "request_id", "features.tab", "features.tags", "features.price"])
def test_no_type_of_column_makes_decoding_fail(
    column: Any, name: str, refused: Callable[[str, bytes], Decoded]
) -> None:
    decoded = refused("impressions", ipc(columns(3) | {name: column}))

    assert len(decoded.impressions) + decoded.dead_impressions == 3
    assert all(0 < len(letter.reason) < 1000 for letter in decoded.dead)


@pytest.mark.parametrize("column", ODD, ids=lambda column: str(column.type))
@pytest.mark.parametrize("name", ["served_version", "served_scores", "features.age"])
def test_no_type_of_optional_column_makes_decoding_fail(
    column: Any, name: str, refused: Callable[[str, bytes], Decoded]
) -> None:
    decoded = refused("impressions", ipc(columns(3) | {name: column}))

    assert len(decoded.impressions) + decoded.dead_impressions == 3


@pytest.mark.parametrize("column", ODD, ids=lambda column: str(column.type))
@pytest.mark.parametrize("name", ["impression_id", "event_time_ms", "task", "value"])
def test_no_type_of_column_of_feedback_makes_decoding_fail(
    column: Any, name: str, refused: Callable[[str, bytes], Decoded]
) -> None:
    feedback = {
        "impression_id": pa.array([1, 2, 3]),
        "event_time_ms": pa.array([ARRIVAL_MS] * 3),
        "task": pa.array(["click"] * 3),
        "value": pa.array([1.0] * 3),
    }

    decoded = refused("feedback", ipc(feedback | {name: column}))

    assert len(decoded.feedback) + decoded.dead_feedback == 3


@pytest.mark.parametrize("name", ["impression_id", "user_id", "item_id", "event_time_ms"])
def test_a_null_in_a_dictionary_is_a_null(name: str, refused: Callable[[str, bytes], Decoded]) -> None:
    ids = pa.DictionaryArray.from_arrays(pa.array([1, 0, 1]), pa.array([None, ARRIVAL_MS]))

    decoded = refused("impressions", ipc(columns(3) | {name: ids}))

    assert [(letter.row, letter.code, letter.field) for letter in decoded.dead] == [(1, "missing_field", name)]
    assert len(decoded.impressions) == 2


# Rows and batches.


def test_ten_million_rows_are_refused_and_counted(refused: Callable[[str, bytes], Decoded]) -> None:
    n = 10_000_000
    tiny = pa.array(np.zeros(n, np.int8))
    times = pa.DictionaryArray.from_arrays(tiny, pa.array([ARRIVAL_MS]))
    value = ipc({"impression_id": tiny, "user_id": tiny, "item_id": tiny, "event_time_ms": times}, batch_rows=n)

    with memory_within(100):
        decoded = refused("impressions", value)

    [letter] = decoded.dead
    assert (letter.code, letter.events, decoded.dead_impressions) == ("too_large", n, n)
    assert f"{n} rows, expected at most {MAX_ROWS}" in letter.reason


def test_rows_of_a_wide_schema_are_bounded_by_their_width(as_record: MakeRecord) -> None:
    features = tuple(Feature(f"f{i}", "bag", max_length=1024) for i in range(20))
    wide = Schema("wide", tasks=(Task("click"),), features=features)
    n = 20_000  # 20 · 1024 · 8 bytes a row: 3.3 GB
    head = (("codec", b"arrow"), ("schema", wide.hash.encode()))

    with memory_within(100):
        decoded = decode([as_record("impressions", ipc(columns(n), batch_rows=n), headers=head)], wide)

    assert [(letter.code, letter.events) for letter in decoded.dead] == [("too_large", n)]
    assert 100 < max_rows(wide) < 1000


def test_the_encoder_makes_no_record_that_the_decoder_refuses(as_record: MakeRecord) -> None:
    wide = Schema("wide", tasks=(Task("click"),), features=tuple(Feature(f"f{i}", "bag") for i in range(40)))
    n = 3 * max_rows(wide) // 2
    block = ImpressionBlock.empty(wide, n)
    block.impression_id[:] = block.ids[:, 0] = block.ids[:, 1] = np.arange(n)
    block.event_time_ms[:] = ARRIVAL_MS

    records = encode_impressions(block, wide, "arrow", 1)

    assert len(records) == 2
    decoded = [decode([as_record("impressions", r.value, headers=r.headers)], wide) for r in records]
    assert sum(len(each.impressions) for each in decoded) == n
    assert not any(each.dead for each in decoded)


def test_more_batches_than_a_record_needs_are_refused(refused: Callable[[str, bytes], Decoded]) -> None:
    [letter] = refused("impressions", ipc(columns(5000), batch_rows=1)).dead

    assert letter.code == "too_large"
    assert "Arrow messages" in letter.reason


# Size.


def filled(event: dict[str, Any], text: str, size: int) -> bytes:
    """The event with an unknown field of ``text`` over and over, and spaces up to ``size`` bytes."""
    start = json.dumps(event)[:-1] + ', "odd": ['
    times = (size - len(start) - 10) // (len(text) + 1)
    value = (start + ",".join([text] * times) + "]}").encode()
    return value + b" " * (size - len(value))


@pytest.mark.parametrize("text", ["[]", "{}", "1", "1.5", '{"a":[[]]}', "null"])
@pytest.mark.parametrize(("extra", "code"), [(0, None), (1, "too_large"), (15 * MB, "too_large")])
def test_json_is_decoded_up_to_a_megabyte(
    text: str, extra: int, code: str | None, wire_schema: Schema, as_record: Callable[..., Record]
) -> None:
    event = {"impression_id": 1, "user_id": 1, "item_id": 1, "event_time_ms": ARRIVAL_MS}
    value = filled(event, text, MAX_BYTES["json"] + extra)

    with memory_within(100):
        decoded = decode([as_record("impressions", value)], wire_schema)

    assert [letter.code for letter in decoded.dead] == ([] if code is None else [code])
    assert len(decoded.impressions) + decoded.dead_impressions == 1


# Times in another unit.


@pytest.mark.parametrize(("factor", "unit"), [(1e-3, "seconds"), (1e3, "microseconds"), (1e6, "nanoseconds")])
@pytest.mark.parametrize("codec", ["json", "arrow"])
def test_a_time_in_another_unit_is_refused_with_that_hint(
    factor: float, unit: str, codec: str, wire_schema: Schema, as_record: MakeRecord, arrow_headers: Headers
) -> None:
    time = int(ARRIVAL_MS * factor)
    if codec == "json":
        event = {"impression_id": 1, "user_id": 1, "item_id": 1, "event_time_ms": time}
        record = as_record("impressions", json.dumps(event).encode())
    else:
        value = ipc(columns(1) | {"event_time_ms": pa.array([time])})
        record = as_record("impressions", value, headers=arrow_headers)

    [letter] = decode([record], wire_schema).dead

    assert (letter.code, letter.field) == ("bad_time", "event_time_ms")
    assert letter.reason.endswith(f"got {time}, which looks like {unit}")


@pytest.mark.parametrize(
    ("event_time_ms", "code"),
    [
        (946_684_799_999, "bad_time"),
        (946_684_800_000, None),
        (ARRIVAL_MS + 300_000, None),
        (ARRIVAL_MS + 300_001, "future_time"),
        (ARRIVAL_MS + 86_400_000, "future_time"),
        (ARRIVAL_MS + 86_400_001, "bad_time"),
    ],
)
@pytest.mark.parametrize("arrival_ms", [-1, 0, ARRIVAL_MS - 7_200_000, ARRIVAL_MS])
def test_an_event_is_judged_by_the_later_of_two_clocks(
    arrival_ms: int, event_time_ms: int, code: str | None, wire_schema: Schema, as_record: MakeRecord
) -> None:
    event = {"impression_id": 1, "user_id": 1, "item_id": 1, "event_time_ms": event_time_ms}

    decoded = decode([as_record("impressions", json.dumps(event).encode(), arrival_ms=arrival_ms)], wire_schema)

    assert [letter.code for letter in decoded.dead] == ([] if code is None else [code])


@pytest.mark.parametrize(
    ("ahead_ms", "code"), [(7_200_000, None), (7_500_000, None), (7_500_001, "future_time"), (90_000_000, "bad_time")]
)
def test_a_producer_may_be_ahead_of_the_reader_by_its_records_stamp_but_not_by_more_than_a_day(
    ahead_ms: int, code: str | None, wire_schema: Schema, as_record: MakeRecord
) -> None:
    event = {"impression_id": 1, "user_id": 1, "item_id": 1, "event_time_ms": ARRIVAL_MS + ahead_ms}
    stamp_ms = ARRIVAL_MS + (90_000_000 if code == "bad_time" else 7_200_000)

    decoded = decode([as_record("impressions", json.dumps(event).encode(), arrival_ms=stamp_ms)], wire_schema)

    assert [letter.code for letter in decoded.dead] == ([] if code is None else [code])
