"""Events of an old schema, declared for a change-over: read by it, converted, and what has no place is counted."""

import numpy as np
import pytest

from smes.events import DROPPED, FeedbackBlock, ImpressionBlock
from smes.schema import Feature, Schema, Task
from smes.schema_change import Renames, SchemaChange
from stream.codec.codec import Codec, decode, encode_feedback, encode_impressions
from stream.log.event_log import OutRecord, Record
from stream.topics import FEEDBACK, IMPRESSIONS
from tests.smes.test_schema_change import random_impressions

NOW_MS = 1_700_000_000_000
WAS = Schema(
    "shop",
    tasks=(Task("click"), Task("watch", "regression"), Task("like")),
    features=(Feature("tab"), Feature("price", "numeric"), Feature("tags", "bag", max_length=2)),
)
NOW = Schema(
    "shop",
    tasks=(Task("share"), Task("like"), Task("clicked")),
    features=(Feature("tags", "bag", max_length=4), Feature("cost", "numeric"), Feature("colour")),
)
CHANGE = SchemaChange(WAS, NOW, Renames(features={"cost": "price"}, tasks={"clicked": "click"}))


def shown(schema: Schema, n: int, seed: int) -> ImpressionBlock:
    block = random_impressions(schema, n, seed)
    block.ids[:, :2] = np.arange(2 * n).reshape(n, 2)
    tags = block.ids[:, schema.id_slices["tags"]]
    tags.sort(axis=1)
    tags[:] = tags[:, ::-1]  # missing ones come last
    block.event_time_ms[:] = NOW_MS - 1000 + np.arange(n)
    return block


def outcomes(n: int) -> FeedbackBlock:
    block = FeedbackBlock.empty(n)
    block.task[:] = np.arange(n) % 3
    block.value[:] = 1
    block.event_time_ms[:] = NOW_MS
    return block


def read(topic: str, records: list[OutRecord]) -> list[Record]:
    return [Record(topic, r.partition or 0, i, r.value, r.headers, NOW_MS) for i, r in enumerate(records)]


@pytest.mark.parametrize("codec", ["json", "arrow"])
def test_events_of_both_schemas_in_any_mixture_are_read(codec: Codec) -> None:
    before, after = shown(WAS, 6, 1), shown(NOW, 6, 2)
    clicks = outcomes(6)
    mixed = [
        record
        for pair in zip(
            encode_impressions(before, WAS, codec, 1) * 2, encode_impressions(after, NOW, codec, 1) * 2, strict=True
        )
        for record in pair
    ]
    feedback = encode_feedback(clicks, WAS, codec, 1)

    found = decode(read(IMPRESSIONS, mixed) + read(FEEDBACK, feedback), NOW, changes=[CHANGE], now_ms=NOW_MS)

    assert found.dead == []
    expected, of_before = CHANGE.impressions(before), found.impressions.no_label != 0
    for name in ("ids", "numerics", "served_scores", "event_time_ms", "no_label"):
        column = getattr(found.impressions, name)
        np.testing.assert_array_equal(column[of_before], np.concatenate([getattr(expected, name)] * 2))
        np.testing.assert_array_equal(column[~of_before], np.concatenate([getattr(after, name)] * 2))
    assert len(found.impressions) == 24
    assert found.feedback.task.tolist() == [2, DROPPED, 1] * 2
    assert found.unknown_fields == 2 * int(CHANGE.count_dropped_values(before).sum())


@pytest.mark.parametrize("codec", ["json", "arrow"])
def test_an_old_schema_that_is_not_declared_is_refused_and_what_can_be_done_is_told(codec: Codec) -> None:
    records = read(IMPRESSIONS, encode_impressions(shown(WAS, 3, 1), WAS, codec, 1))

    found = decode(records, NOW, now_ms=NOW_MS)

    assert len(found.impressions) == 0
    assert {letter.code for letter in found.dead} == {"schema_mismatch"}
    assert all("stream.old_schemas" in letter.reason for letter in found.dead)


def test_a_bad_event_of_an_old_schema_is_judged_by_that_one() -> None:
    block = shown(WAS, 1, 1)
    block.ids[0, WAS.id_slices["tab"]] = 1
    [good] = encode_impressions(block, WAS, "json", 1)
    bad = OutRecord(good.value.replace(b'"tab":', b'"tab": "x", "was":'), good.headers, 0)
    other = OutRecord(good.value.replace(b'"price":', b'"prices":'), good.headers, 0)

    found = decode(read(IMPRESSIONS, [bad, other]), NOW, changes=[CHANGE], now_ms=NOW_MS)

    assert [letter.offset for letter in found.dead] == [0]
    assert "features.tab" in found.dead[0].reason
    assert np.isnan(found.impressions.numerics[0, 0])
