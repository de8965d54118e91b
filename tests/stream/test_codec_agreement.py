"""The same rows, once as JSON and once as Arrow, have the same fate."""

import json
from typing import Any

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from smes.schema import MISSING, Schema
from stream.log.event_log import Headers
from tests.stream.wire import ARRIVAL_MS, MakeRecord, assert_same_events, decode, ipc

IDS = st.none() | st.integers(-5, 5) | st.sampled_from([MISSING, 2**63 - 1])
FLOATS = st.none() | st.floats(-10, 10, width=32) | st.sampled_from([1e39, -3.4e38, 0.0])
OPTIONAL_IDS = st.sampled_from(
    [
        (pa.int64(), IDS),
        (pa.uint64(), st.none() | st.sampled_from([0, 2**63 - 1, 2**63])),
        (pa.float64(), st.none() | st.sampled_from([1.0, 2.5])),
        (pa.string(), st.none() | st.sampled_from(["", "1", "x"])),
        (pa.bool_(), st.none() | st.booleans()),
    ]
)
NUMBERS = st.sampled_from([(pa.float64(), FLOATS), (pa.int32(), st.none() | st.integers(-9, 9)), (pa.string(), IDS)])
BAGS = st.sampled_from(
    [
        (pa.list_(pa.int64()), st.none() | st.lists(IDS, max_size=5)),
        (pa.list_(pa.float64()), st.none() | st.lists(st.just(1.5), max_size=2)),
        (pa.int64(), IDS),
    ]
)
ARMS = st.sampled_from(
    [
        (pa.string(), st.none() | st.sampled_from(["main", "b", "", "B", "sixteen-letters-", "seventeen-letters"])),
        (pa.int64(), IDS),
    ]
)
TIMES = st.none() | st.sampled_from([0, -1, 1, ARRIVAL_MS, ARRIVAL_MS + 300_000, ARRIVAL_MS + 300_001])


@st.composite
def _column(draw: st.DrawFn, kinds: st.SearchStrategy[Any], n: int) -> Any:
    kind, values = draw(kinds)
    column = draw(st.lists(values, min_size=n, max_size=n))
    if kind == pa.string():
        column = [None if v is None else str(v) for v in column]
    return pa.array(column, kind)


@st.composite
def impression_columns(draw: st.DrawFn) -> dict[str, Any]:
    n = draw(st.integers(1, 6))
    required = {name: (pa.int64(), IDS) for name in ("impression_id", "user_id", "item_id")}
    required["event_time_ms"] = (pa.int64(), TIMES)
    optional = {
        "request_id": OPTIONAL_IDS,
        "features.tab": OPTIONAL_IDS,
        "features.tags": BAGS,
        "features.price": NUMBERS,
        "served_version": OPTIONAL_IDS,
        "served_arm": ARMS,
        "features.unknown": OPTIONAL_IDS,
    }
    columns = {name: draw(_column(st.just(kind), n)) for name, kind in required.items()}
    for name, kinds in optional.items():
        if draw(st.booleans()):
            columns[name] = draw(_column(kinds, n))
    return columns


def _json_event(row: dict[str, Any]) -> dict[str, Any]:
    event = {name: value for name, value in row.items() if not name.startswith(("features.", "served_"))}
    event["features"] = {name[9:]: value for name, value in row.items() if name.startswith("features.")}
    event["served"] = {"version": row.get("served_version"), "arm": row.get("served_arm")}
    return event


def _fates(letters: list[Any], *, arrow: bool) -> list[tuple[Any, ...]]:
    return sorted(
        (letter.row if arrow else letter.offset, letter.code, letter.field or "", letter.reason) for letter in letters
    )


def _naive_ids(event: dict[str, Any]) -> list[int]:
    """One row of ``ids`` for ``wire_schema``, by hand."""
    features = event["features"]
    bag = (features.get("tags") or [])[:3]
    values = [event["user_id"], event["item_id"], features.get("tab"), *bag, *[None] * (3 - len(bag)), None]
    return [MISSING if v is None else v for v in values]


@given(columns=impression_columns())
def test_json_and_arrow_agree_on_impressions(
    columns: dict[str, Any], wire_schema: Schema, as_record: MakeRecord, arrow_headers: Headers
) -> None:
    rows = [_json_event(row) for row in pa.table(columns).to_pylist()]
    by_arrow = decode([as_record("impressions", ipc(columns), headers=arrow_headers)], wire_schema)

    by_json = decode(
        [as_record("impressions", json.dumps(row).encode(), offset) for offset, row in enumerate(rows)], wire_schema
    )

    assert _fates(by_json.dead, arrow=False) == _fates(by_arrow.dead, arrow=True)
    assert by_json.unknown_fields == by_arrow.unknown_fields
    assert len(by_json.impressions) + by_json.dead_impressions == len(rows)
    assert_same_events(by_arrow.impressions, by_json.impressions)
    survivors = [rows[offset] for offset in by_json.impressions.offset.tolist()]
    assert by_json.impressions.ids.tolist() == [_naive_ids(row) for row in survivors]


@given(data=st.data(), n=st.integers(1, 8))
def test_json_and_arrow_agree_on_feedback(
    data: st.DataObject, n: int, wire_schema: Schema, as_record: MakeRecord, arrow_headers: Headers
) -> None:
    kinds = {
        "impression_id": (pa.int64(), IDS),
        "event_time_ms": (pa.int64(), TIMES),
        "task": (pa.string(), st.none() | st.sampled_from(["click", "like", "rating", "klick", ""])),
        "value": (pa.float64(), st.none() | st.sampled_from([0.0, 1.0, 0.5, 5.0, 5.1, -0.1, 1e39, 1 + 1e-12])),
    }
    columns = {name: data.draw(_column(st.just(kind), n)) for name, kind in kinds.items()}
    rows = pa.table(columns).to_pylist()
    if data.draw(st.booleans()):
        columns["task"] = columns["task"].dictionary_encode()
    by_arrow = decode([as_record("feedback", ipc(columns), headers=arrow_headers)], wire_schema)

    by_json = decode(
        [as_record("feedback", json.dumps(row).encode(), offset) for offset, row in enumerate(rows)], wire_schema
    )

    assert _fates(by_json.dead, arrow=False) == _fates(by_arrow.dead, arrow=True)
    assert len(by_json.feedback) + by_json.dead_feedback == n
    assert_same_events(by_arrow.feedback, by_json.feedback)
