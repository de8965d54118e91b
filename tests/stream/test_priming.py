"""A live stream that a log in files has primed gives what one stream over both would have given, and nothing twice.

The reference is the naive one: a stream of blocks over all events, never interrupted.
"""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smes.events import ExampleBlock, FeedbackBlock, ImpressionBlock
from smes.schema import Feature, Schema, Task
from stream.block_stream import BlockStream
from stream.codec.codec import encode_feedback, encode_impressions
from stream.config import JoinConfig, MiniBatchConfig, StreamConfig
from stream.dead_letters import DeadLetterWriter
from stream.example_stream import ExampleStream
from stream.join.waits import Wait
from stream.log.memory_log import InMemoryLog
from stream.priming import live_state
from stream.topics import FEEDBACK, IMPRESSIONS

SCHEMA = Schema("primed", tasks=(Task("click", window_s=5), Task("like", window_s=10)), features=(Feature("tab"),))
BATCH = MiniBatchConfig(size=16, max_wait_s=None)
START_MS, N = 1_700_000_000_000, 240
Events = tuple[ImpressionBlock, FeedbackBlock]


def events(seed: int) -> Events:
    """Impressions 100 ms apart, the ids in no order, and feedback on some of them within 9 s; both by their times."""
    rng = np.random.default_rng(seed)
    impressions = ImpressionBlock.empty(SCHEMA, N)
    impressions.impression_id[:] = rng.permutation(N) + 1000
    impressions.event_time_ms[:] = START_MS + 100 * np.arange(N)
    impressions.ids[:] = rng.integers(0, 20, (N, 3))
    rows, tasks = np.nonzero(rng.random((N, 2)) < 0.3)
    feedback = FeedbackBlock.empty(len(rows))
    feedback.impression_id[:] = impressions.impression_id[rows]
    feedback.task[:], feedback.value[:] = tasks, 1
    delays_ms = np.where(tasks == 0, rng.integers(1, 4900, len(rows)), rng.integers(1, 9900, len(rows)))
    feedback.event_time_ms[:] = impressions.event_time_ms[rows] + delays_ms
    return impressions, feedback.take(np.argsort(feedback.event_time_ms, kind="stable"))


def up_to(both: Events, last: int) -> Events:
    """The first ``last`` impressions and all their feedback, as a log in files has them."""
    impressions = both[0].take(slice(0, last))
    return impressions, both[1].take(np.isin(both[1].impression_id, impressions.impression_id))


def pairs(both: Events) -> list[Events]:
    impressions, feedback = both
    cuts_ms = np.r_[np.iinfo(np.int64).min, impressions.event_time_ms[30::30], np.iinfo(np.int64).max]
    return [
        (
            impressions.take((impressions.event_time_ms > a) & (impressions.event_time_ms <= b)),
            feedback.take((feedback.event_time_ms > a) & (feedback.event_time_ms <= b)),
        )
        for a, b in pairwise(cuts_ms)
    ]


def batches_of(stream: BlockStream | ExampleStream, *, flush: bool) -> list[ExampleBlock]:
    """Everything that the stream gives, and with ``flush`` what waits at its end as well."""
    found: list[ExampleBlock] = []
    while stream.poll(0.0):
        while (batch := stream.next_batch()) is not None:
            found.append(batch)
    if flush:
        stream.flush()
    while (batch := stream.next_batch()) is not None:
        found.append(batch)
    return found


def live_stream(state: dict[str, np.ndarray], live: Events, join: JoinConfig, partitions: int) -> ExampleStream:
    """A stream over a log of ``live`` events that goes on from the state of a stream of blocks."""
    log = InMemoryLog(now_ms=lambda: START_MS)
    for topic, records in (
        (IMPRESSIONS, encode_impressions(live[0], SCHEMA, "arrow", partitions)),
        (FEEDBACK, encode_feedback(live[1], SCHEMA, "arrow", partitions)),
    ):
        log.ensure_topic(topic, partitions)
        log.append(topic, records)
    config = StreamConfig(join=join, batch=BATCH, idle_after_s=3600.0, max_future_s=3600.0)
    stream = ExampleStream(SCHEMA, config, log, DeadLetterWriter(log), now_ms=lambda: START_MS)
    incarnations = log.incarnations(IMPRESSIONS) | log.incarnations(FEEDBACK)
    stream.load_state(live_state(state, log.begin(IMPRESSIONS) | log.begin(FEEDBACK), incarnations))
    return stream


@settings(max_examples=10)
@given(
    seed=st.integers(0, 2**16),
    primed=st.integers(1, N),
    overlap=st.integers(0, N),
    partitions=st.integers(1, 3),
    wait=st.sampled_from([{"default": "window"}, {"default": "immediate"}, {"default": "window", "click": 2.0}]),
)
def test_primed_and_live_together_give_what_one_stream_gives(
    seed: int, primed: int, overlap: int, partitions: int, wait: dict[str, Wait]
) -> None:
    both, join = events(seed), JoinConfig(allowed_lateness_s=1, remember_s=30, wait=wait)
    whole = batches_of(BlockStream(SCHEMA, join, BATCH, iter(pairs(both))), flush=True)

    offline = BlockStream(SCHEMA, join, BATCH, iter(pairs(up_to(both, primed))), own_ids=True, stays_open=True)
    found = batches_of(offline, flush=False)
    begin = max(0, primed - overlap)
    since_ms = START_MS + 100 * begin
    rest = both[0].take(slice(begin, None)), both[1].take(both[1].event_time_ms >= since_ms)
    stream = live_stream(offline.state(), rest, join, partitions)
    found += batches_of(stream, flush=True)

    one, other = ExampleBlock.concat(whole), ExampleBlock.concat(found)
    for name, column in one.arrays().items():
        if name not in ("partition", "feedback_arrival_ms"):
            np.testing.assert_array_equal(getattr(other, name), column, err_msg=name)
    assert [len(batch) for batch in found] == [len(batch) for batch in whole]
    ledger = stream.ledger()
    assert (ledger.handed_out, ledger.waiting) == (N, 0)
    assert ledger.impressions == primed + N - begin
    assert ledger.late + ledger.duplicate == primed - begin  # every event of both logs is counted


@pytest.mark.parametrize("partitions", [1, 2])
def test_without_ids_of_its_own_the_log_ends_where_its_newest_impression_is(partitions: int) -> None:
    """Row numbers say nothing: live impressions have ids that a row that waited has, too, and both count."""
    both, join = events(5), JoinConfig(allowed_lateness_s=1, remember_s=30)
    log_in_files = up_to(both, 150)
    offline = BlockStream(SCHEMA, join, BATCH, iter(pairs(log_in_files)))
    trained = batches_of(offline, flush=True)
    assert sum(batch.num_impressions for batch in trained) == 150

    live = ImpressionBlock(**(both[0].arrays() | {"impression_id": both[0].impression_id[::-1].copy()}))
    found = ExampleBlock.concat(batches_of(live_stream(offline.state(), (live, both[1]), join, partitions), flush=True))
    np.testing.assert_array_equal(np.sort(found.impression_id), np.sort(live.impression_id[150:]))
