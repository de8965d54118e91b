"""Histories that are built while a log is replayed, compared with a naive loop over the whole log.

A history holds what the user was shown, with the feedback that happened, before the cutoff. It does not depend on how
the log is cut into blocks, nor on anything at the cutoff or later. All rows of a request, and all rows of a user's
window, have the same history.
"""

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from simulators.history import HistoryBuilder
from smes.arrays import I64
from smes.events import ImpressionBlock
from smes.schema import MISSING, Feature, History, Schema, Task

LENGTH, WINDOW_MS = 3, 50
SCHEMA = Schema(
    "history",
    tasks=(Task("click"), Task("watch", kind="regression"), Task("like")),
    features=(
        Feature("tab"),
        Feature("seen", kind="sequence", max_length=LENGTH, vocabulary="item_id", query="item_id"),
        Feature("outcomes", kind="sequence", max_length=LENGTH, accompanies="seen"),
    ),
    history=History("seen", "outcomes", window_s=WINDOW_MS / 1000),
)
BITS = {0: 1, 2: 2}  # task → value in an outcome; watch is not a binary task
ITEMS, OUTCOMES = SCHEMA.id_slices["seen"], SCHEMA.id_slices["outcomes"]


@st.composite
def logs(draw: st.DrawFn, *, requests: bool) -> tuple[ImpressionBlock, I64]:
    """Impressions of few users with many ties in time, and when each got feedback."""
    n = draw(st.integers(1, 60))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    block = ImpressionBlock.empty(SCHEMA, n)
    block.impression_id[:] = np.arange(n)
    block.event_time_ms[:] = np.sort(rng.integers(1000, 1000 + 6 * n, n))
    block.ids[:, 0] = rng.integers(0, 4, n)
    block.ids[:, 1] = rng.integers(100, 200, n)
    if requests:  # rows of one request may differ in time, and rows of other requests may lie between them
        begun = rng.integers(0, 5, n)
        block.request_id[:] = (block.event_time_ms // 20 * 5 + begun) * 4 + block.ids[:, 0]
    times = block.event_time_ms[:, None] + rng.integers(1, 90, (n, 3))
    times[rng.random((n, 3)) < 0.5] = MISSING
    return block, times


def cutoff_of(block: ImpressionBlock, row: int) -> int:
    request = int(block.request_id[row])
    if request == MISSING:
        return int(block.event_time_ms[row]) // WINDOW_MS * WINDOW_MS
    return int(block.event_time_ms[block.request_id == request].min())


def naive(block: ImpressionBlock, times: I64, row: int) -> tuple[list[int], list[int]]:
    cutoff = cutoff_of(block, row)
    items, outcomes = [], []
    for earlier in range(len(block) - 1, -1, -1):
        if block.user_id[earlier] == block.user_id[row] and block.event_time_ms[earlier] < cutoff:
            items.append(int(block.item_id[earlier]))
            known = (value for task, value in BITS.items() if MISSING < times[earlier, task] < cutoff)
            outcomes.append(sum(known))
    padding = [MISSING] * LENGTH
    return (items + padding)[:LENGTH], (outcomes + padding)[:LENGTH]


def built(block: ImpressionBlock, times: I64, rows_per_block: int) -> I64:
    builder, filled = HistoryBuilder(SCHEMA), replace(block, ids=block.ids.copy())
    for start in range(0, len(block), rows_per_block):
        rows = slice(start, start + rows_per_block)
        builder.fill(filled.take(rows), times[rows])
    return filled.ids


@settings(max_examples=150, deadline=None)
@given(logs(requests=False), st.sampled_from([1, 3, 7, 1000]))
def test_the_history_of_a_window_is_the_naive_one(log: tuple[ImpressionBlock, I64], rows_per_block: int) -> None:
    block, times = log
    ids = built(block, times, rows_per_block)
    for row in range(len(block)):
        assert (ids[row, ITEMS].tolist(), ids[row, OUTCOMES].tolist()) == naive(block, times, row)
    np.testing.assert_array_equal(ids[:, :3], block.ids[:, :3])


@settings(max_examples=150, deadline=None)
@given(logs(requests=True), st.sampled_from([1, 3, 7, 1000]))
def test_the_history_of_a_request_is_as_of_its_first_impression(
    log: tuple[ImpressionBlock, I64], rows_per_block: int
) -> None:
    block, times = log
    ids = built(block, times, rows_per_block)
    for row in range(len(block)):
        assert (ids[row, ITEMS].tolist(), ids[row, OUTCOMES].tolist()) == naive(block, times, row)


@settings(max_examples=100, deadline=None)
@given(st.data(), st.booleans())
def test_nothing_at_the_cutoff_or_after_it_changes_a_history(data: st.DataObject, requests: bool) -> None:
    block, times = data.draw(logs(requests=requests))
    row = data.draw(st.integers(0, len(block) - 1))
    cutoff = cutoff_of(block, row)
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    changed = times.copy()
    future = (times == MISSING) | (times >= cutoff)
    moved = np.where(rng.random(times.shape) < 0.5, MISSING, cutoff + rng.integers(0, 100, times.shape))
    changed[future] = np.maximum(moved, np.where(moved == MISSING, MISSING, block.event_time_ms[:, None]))[future]
    items = block.ids.copy()
    items[block.event_time_ms >= cutoff, 1] += 1000
    before, after = built(block, times, 8), built(replace(block, ids=items), changed, 8)
    np.testing.assert_array_equal(after[row, ITEMS.start :], before[row, ITEMS.start :])


def clicked_impressions() -> tuple[ImpressionBlock, I64]:
    """Six impressions of one user, each clicked a millisecond later; the second to fifth lie in one window."""
    block = ImpressionBlock.empty(SCHEMA, 6)
    block.event_time_ms[:] = [10, 1001, 1003, 1005, 1007, 1060]
    block.ids[:, 0], block.ids[:, 1] = 1, np.arange(6)
    times = np.full((6, 3), MISSING, np.int64)
    times[:, 0] = block.event_time_ms + 1
    return block, times


def test_all_impressions_of_a_users_window_have_the_same_history() -> None:
    block, times = clicked_impressions()

    assert built(block, times, 2)[:, ITEMS].tolist() == [
        [MISSING] * 3,
        *[[0, MISSING, MISSING]] * 4,
        [4, 3, 2],
    ]


def test_all_impressions_of_a_request_have_the_same_history_also_when_requests_interleave() -> None:
    block, times = clicked_impressions()
    block.request_id[1:5] = [70, 71, 70, 71]

    assert built(block, times, 1)[1:5, ITEMS].tolist() == [
        *[[0, MISSING, MISSING], [1, 0, MISSING]] * 2,
    ]


def test_memory_does_not_grow_with_requests() -> None:
    builder, rng = HistoryBuilder(SCHEMA, requests_kept=50), np.random.default_rng(0)
    at_first = builder.nbytes

    for start in range(0, 5000, 100):
        block = ImpressionBlock.empty(SCHEMA, 100)
        block.event_time_ms[:] = 1000 + start + np.arange(100)
        block.request_id[:] = start + np.arange(100) // 2
        block.ids[:, 0] = rng.integers(0, 9, 50).repeat(2)
        builder.fill(block, np.full((100, 3), MISSING, np.int64))
        assert (block.ids[0::2, ITEMS] == block.ids[1::2, ITEMS]).all()

    assert builder.nbytes == at_first
