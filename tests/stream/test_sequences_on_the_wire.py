"""Sequences through both codecs: order and alignment survive, misaligned events are refused for the same reason."""

import json
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smes.events import ImpressionBlock
from smes.schema import MISSING, Feature, Schema, Task
from stream.codec.codec import decode, encode_impressions, headers
from stream.log.event_log import Record

MakeRecord = Callable[..., Record]
NOW_MS = 1_700_000_000_000
SCHEMA = Schema(
    "sequences",
    tasks=(Task("click"),),
    features=(
        Feature("tab"),
        Feature("seen", kind="sequence", max_length=3, vocabulary="item_id", query="item_id"),
        Feature("tags", kind="bag", max_length=2),
        Feature("outcomes", kind="sequence", max_length=3, accompanies="seen"),
    ),
)


@pytest.mark.parametrize("codec", ["json", "arrow"])
def test_sequences_survive_the_round_trip(codec: Literal["json", "arrow"], as_record: MakeRecord) -> None:
    rng = np.random.default_rng(0)
    block = ImpressionBlock.empty(SCHEMA, 50)
    block.impression_id[:], block.event_time_ms[:] = np.arange(50), NOW_MS
    block.ids[:, :2] = rng.integers(0, 9, (50, 2))
    for row, length in enumerate(rng.integers(0, 4, 50)):
        for name in ("seen", "outcomes"):  # equal ids in a row: order and repetition count
            start = SCHEMA.id_slices[name].start
            block.ids[row, start : start + length] = rng.integers(-3, 3, length)
    records = encode_impressions(block, SCHEMA, codec, 1)

    decoded = decode([as_record("impressions", r.value, i, r.headers) for i, r in enumerate(records)], SCHEMA)

    assert not decoded.dead
    np.testing.assert_array_equal(decoded.impressions.ids, block.ids)


LISTS = st.one_of(st.none(), st.lists(st.integers(0, 9), max_size=6))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(LISTS, LISTS), min_size=1, max_size=6))
def test_a_sequence_as_long_as_its_companion_is_kept_any_other_refused(
    as_record: MakeRecord, pairs: list[tuple[list[int] | None, list[int] | None]]
) -> None:
    fits = [min(len(seen or ()), 3) == min(len(outcomes or ()), 3) for seen, outcomes in pairs]
    events: list[dict[str, Any]] = [
        {
            "impression_id": i, "user_id": 1, "item_id": 2, "event_time_ms": NOW_MS,
            "features": {"seen": seen, "outcomes": outcomes},
        }
        for i, (seen, outcomes) in enumerate(pairs)
    ]  # fmt: skip
    from_json = decode([as_record("impressions", json.dumps(e).encode(), i) for i, e in enumerate(events)], SCHEMA)
    columns = {name: [e[name] for e in events] for name in ("impression_id", "user_id", "item_id", "event_time_ms")}
    arrays = {name: pa.array(values, pa.int64()) for name, values in columns.items()} | {
        f"features.{name}": pa.array([pair[i] for pair in pairs], pa.list_(pa.int64()))
        for i, name in enumerate(("seen", "outcomes"))
    }
    batch, sink = pa.RecordBatch.from_pydict(arrays), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    record = as_record("impressions", sink.getvalue().to_pybytes(), headers=headers("arrow", SCHEMA))
    from_arrow = decode([record], SCHEMA)
    for decoded in (from_json, from_arrow):
        assert decoded.impressions.impression_id.tolist() == [i for i, fit in enumerate(fits) if fit]
        assert [(d.code, d.field) for d in decoded.dead] == [("misaligned", "features.outcomes")] * fits.count(False)
        for row, i in enumerate(decoded.impressions.impression_id.tolist()):
            for name, values in zip(("seen", "outcomes"), pairs[i], strict=True):
                expected = ([*(values or []), MISSING, MISSING, MISSING])[:3]
                assert decoded.impressions.ids[row, SCHEMA.id_slices[name]].tolist() == expected

    assert [d.reason for d in from_json.dead] == [d.reason for d in from_arrow.dead]
