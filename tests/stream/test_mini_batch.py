"""Where batches end, against one example at a time, under every slicing of the input."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smes.events import CLOSING, FIRST, FURTHER, ExampleBlock
from smes.schema import Schema, Task
from stream.batch_queue import MiniBatcher
from stream.config import MiniBatchConfig

SCHEMA = Schema(name="test", tasks=(Task("click", window_s=5),))


def block(times_ms: list[int], first_id: int = 0) -> ExampleBlock:
    result = ExampleBlock.empty(SCHEMA, len(times_ms))
    result.event_time_ms[:] = times_ms
    result.due_ms[:] = result.event_time_ms + SCHEMA.max_window_ms
    result.impression_id[:] = np.arange(first_id, first_id + len(times_ms))
    return result


def reference(times_ms: list[int], size: int, max_age_ms: int) -> list[list[int]]:
    batches: list[list[int]] = []
    for index, time in enumerate(times_ms):
        if batches and len(batches[-1]) < size and time <= times_ms[batches[-1][0]] + max_age_ms:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


@given(st.lists(st.integers(0, 30_000), max_size=60), st.integers(1, 9), st.sampled_from([1, 500, 5000]), st.data())
@settings(max_examples=100, deadline=None)
@pytest.mark.timeout(600)  # bounds hangs only
def test_equals_the_reference(times_ms: list[int], size: int, max_age_ms: int, data: st.DataObject) -> None:
    times_ms = sorted(times_ms)
    batcher = MiniBatcher(SCHEMA, MiniBatchConfig(size, max_age_ms / 1000))
    got, start = [], 0
    while start < len(times_ms):
        stop = start + data.draw(st.integers(1, 12))
        following = times_ms[stop] if stop < len(times_ms) else times_ms[-1]
        # The join emitted up to the watermark less the window: what follows is not older than that.
        watermark = data.draw(st.integers(0, following)) + SCHEMA.max_window_ms
        got += batcher.push(block(times_ms[start:stop], start), watermark)
        if data.draw(st.booleans()):
            restored = MiniBatcher(SCHEMA, MiniBatchConfig(size, max_age_ms / 1000))
            restored.pending = batcher.pending
            batcher = restored
        assert len(batcher) + sum(len(b) for b in got) == min(stop, len(times_ms))
        start = stop
    got += batcher.flush()

    assert [b.impression_id.tolist() for b in got] == reference(times_ms, size, max_age_ms)
    assert batcher.flush() == []


@given(st.lists(st.integers(0, 30_000), max_size=60), st.integers(1, 9), st.sampled_from([500, 5000]), st.data())
@settings(max_examples=100, deadline=None)
@pytest.mark.timeout(600)  # bounds hangs only
def test_batches_that_a_clock_ended_end_there_again(
    times_ms: list[int], size: int, max_age_ms: int, data: st.DataObject
) -> None:
    times_ms = sorted(times_ms)

    def push_all(batcher: MiniBatcher, *, clock: bool) -> tuple[list[list[int]], list[int]]:
        batches, ends, start = [], [], 0
        while start < len(times_ms):
            stop = start + data.draw(st.integers(1, 12))
            following = times_ms[stop] if stop < len(times_ms) else times_ms[-1]
            watermark = data.draw(st.integers(0, following)) + SCHEMA.max_window_ms
            got = batcher.push(block(times_ms[start:stop], start), watermark)
            if clock and data.draw(st.booleans()):
                got += batcher.flush()
            batches += [b.impression_id.tolist() for b in got]
            ends += np.cumsum([batcher.ended - sum(map(len, got)), *map(len, got)])[1:].tolist()
            start = stop
        return batches, ends

    config = MiniBatchConfig(size, max_age_ms / 1000)
    first = MiniBatcher(SCHEMA, config)
    batches, ends = push_all(first, clock=True)
    died = data.draw(st.integers(0, len(ends)))  # after so many batches
    again = MiniBatcher(SCHEMA, config)
    again.ends.extend(ends[:died])
    repeated, repeated_ends = push_all(again, clock=False)

    assert repeated[:died] == batches[:died]
    assert repeated_ends[:died] == ends[:died]
    assert again.ended + len(again) == len(times_ms)


@given(
    st.lists(st.tuples(st.integers(0, 9000), st.sampled_from([FIRST, FURTHER, CLOSING])), max_size=60),
    st.integers(1, 5),
    st.sampled_from([1, 500, 5000]),
    st.data(),
)
@settings(max_examples=100, deadline=None)
@pytest.mark.timeout(600)  # bounds hangs only
def test_a_batch_is_full_by_what_is_trained_on_or_by_as_many_closing_examples(
    rows: list[tuple[int, int]], size: int, max_age_ms: int, data: st.DataObject
) -> None:
    rows = sorted(rows)
    examples = block([due for due, _ in rows])
    examples.due_ms[:] = [due for due, _ in rows]
    examples.kind[:] = [kind for _, kind in rows]
    expected: list[list[int]] = []
    for index, (due, _) in enumerate(rows):
        last = expected[-1] if expected else []
        closings = sum(rows[i][1] == CLOSING for i in last)
        full = size in (closings, len(last) - closings)
        if not last or full or due > rows[last[0]][0] + max_age_ms:
            expected.append([])
        expected[-1].append(index)

    batcher, got, start = MiniBatcher(SCHEMA, MiniBatchConfig(size, max_age_ms / 1000)), [], 0
    while start < len(rows):
        stop = start + data.draw(st.integers(1, 12))
        following = rows[stop][0] if stop < len(rows) else rows[-1][0]
        got += batcher.push(examples.take(slice(start, stop)), data.draw(st.integers(0, following)))
        start = stop
    got += batcher.flush()

    assert [b.impression_id.tolist() for b in got] == expected


def test_an_old_batch_does_not_wait_to_be_full() -> None:
    batcher = MiniBatcher(SCHEMA, MiniBatchConfig(size=100, max_age_s=2))

    assert batcher.push(block([1000, 1500]), watermark_ms=6600) == []
    assert batcher.push(block([]), watermark_ms=8000) == []
    (batch,) = batcher.push(block([]), watermark_ms=8001)
    assert batch.event_time_ms.tolist() == [1000, 1500]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"size": 0}, r"MiniBatchConfig\.size: 0, expected at least 1"),
        ({"max_age_s": 0.0}, r"MiniBatchConfig\.max_age_s: 0\.0, expected more than 0"),
        ({"max_wait_s": 0.0}, r"MiniBatchConfig\.max_wait_s: 0\.0, expected more than 0"),
    ],
)
def test_refuses_bad_bounds(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MiniBatchConfig(**wrong)
