"""Blocks in memory give the batches that the same events give through an event log, and a restart skips what was read.

Guarantee impressions: what a backtest trains on is what the trainer would have trained on.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest

from smes.events import ExampleBlock, FeedbackBlock, ImpressionBlock
from smes.schema import MISSING, Feature, Schema, Task
from stream.block_stream import BlockStream
from stream.codec.codec import encode_feedback, encode_impressions
from stream.config import JoinConfig, MiniBatchConfig, StreamConfig
from stream.dead_letters import DeadLetterWriter
from stream.example_stream import ExampleStream
from stream.log.memory_log import InMemoryLog
from stream.topics import FEEDBACK, IMPRESSIONS

SCHEMA = Schema("blocks", tasks=(Task("click", window_s=5), Task("like", window_s=10)), features=(Feature("tab"),))
JOIN, BATCH = JoinConfig(allowed_lateness_s=1), MiniBatchConfig(size=32, max_wait_s=None)
START_MS = 1_700_000_000_000
N = 1000

Pair = tuple[ImpressionBlock, FeedbackBlock]


def pairs(per_pair: int = 60) -> list[Pair]:
    """Merged by event time: impressions 50 ms apart, and feedback on a third of them within 4 s."""
    rng = np.random.default_rng(0)
    impressions = ImpressionBlock.empty(SCHEMA, N)
    impressions.impression_id[:] = np.arange(N)
    impressions.event_time_ms[:] = START_MS + 50 * np.arange(N)
    impressions.ids[:] = rng.integers(0, 20, (N, 3))
    rows = np.flatnonzero(rng.random(N) < 0.33)
    feedback = FeedbackBlock.empty(len(rows))
    feedback.impression_id[:] = rows
    feedback.task[:] = rng.integers(0, 2, len(rows))
    feedback.value[:] = 1
    feedback.event_time_ms[:] = impressions.event_time_ms[rows] + rng.integers(1, 4000, len(rows))
    feedback = feedback.take(np.argsort(feedback.event_time_ms, kind="stable"))
    cuts_ms = np.r_[impressions.event_time_ms[::per_pair], np.iinfo(np.int64).max]
    return [
        (
            impressions.take((impressions.event_time_ms >= a) & (impressions.event_time_ms < b)),
            feedback.take((feedback.event_time_ms >= a) & (feedback.event_time_ms < b)),
        )
        for a, b in pairwise(cuts_ms)
    ]


def stream_of(blocks: Iterator[Pair]) -> BlockStream:
    return BlockStream(SCHEMA, JOIN, BATCH, blocks)


def take_all(stream: BlockStream | ExampleStream) -> list[ExampleBlock]:
    batches = []
    while stream.poll(0) or stream.upcoming() is not None:
        while (batch := stream.next_batch()) is not None:
            batches.append(batch)
    return batches


def same(one: list[ExampleBlock], other: list[ExampleBlock]) -> None:
    assert [len(b) for b in one] == [len(b) for b in other]
    for batch, wanted in zip(one, other, strict=True):
        columns = batch.arrays()
        for name, array in wanted.arrays().items():
            if name != "feedback_arrival_ms":  # a block in memory has arrived nowhere
                np.testing.assert_array_equal(columns[name], array, err_msg=name)


def test_batches_are_those_of_an_event_log() -> None:
    log = InMemoryLog()
    for topic in (IMPRESSIONS, FEEDBACK):
        log.ensure_topic(topic, 1)
    for impressions, feedback in pairs(per_pair=37):
        log.append(IMPRESSIONS, encode_impressions(impressions, SCHEMA, "json", 1))
        log.append(FEEDBACK, encode_feedback(feedback, SCHEMA, "json", 1))
    config = StreamConfig(join=JOIN, batch=BATCH, events_per_read=100)
    logged = ExampleStream(SCHEMA, config, log, DeadLetterWriter(log))
    expected = take_all(logged)
    logged.assembler.flush()
    while (batch := logged.next_batch()) is not None:
        expected.append(batch)

    got = take_all(stream_of(iter(pairs())))

    same(got, expected)


def test_every_event_is_handed_out() -> None:
    blocks = stream_of(iter(pairs()))

    got = take_all(blocks)

    ledger = blocks.ledger()
    total = sum(len(feedback) for _, feedback in pairs())
    assert sum(map(len, got)) == N
    assert (ledger.impressions, ledger.handed_out, ledger.waiting, ledger.late) == (N, N, 0, 0)
    assert (ledger.feedback, ledger.attached) == (total, total)
    assert all((batch.feedback_arrival_ms[batch.labels == 0] == MISSING).all() for batch in got)


def test_it_has_not_ended_before_the_last_pair() -> None:
    stream = stream_of(iter(pairs()))

    stream.poll(0)

    assert not stream.ended
    assert not stream.has_reached(stream.end())


def test_it_ends_once_and_then_has_nothing() -> None:
    stream = stream_of(iter(pairs()))

    take_all(stream)

    assert stream.ended
    assert stream.has_reached(stream.end())
    assert [stream.poll(0), stream.poll(0)] == [0, 0]
    assert stream.next_batch() is None


def test_no_blocks_no_batches() -> None:
    stream = stream_of(iter(()))

    assert take_all(stream) == []
    assert stream.ended
    assert stream.positions_by_topic() == {"blocks": {"0": 0}}


@pytest.mark.parametrize("polls", [0, 7, 1000])
def test_a_restart_skips_what_was_read(polls: int) -> None:
    whole = take_all(stream_of(iter(pairs())))
    first = stream_of(iter(pairs()))
    taken: list[ExampleBlock] = []
    for poll in range(polls):
        first.poll(0)
        if poll % 3 == 2 and len(taken) < 12 and (batch := first.next_batch()) is not None:
            taken.append(batch)  # others stay in the queue, and must not be lost

    assert (first.upcoming() is not None) == (polls > 0)
    second = stream_of(iter(pairs()))

    second.load_state({name: array.copy() for name, array in first.state().items()})

    same(taken + take_all(second), whole)
    assert second.positions_by_topic() == {"blocks": {"0": len(pairs())}}
