"""How far a partition is: one event moves the watermark no further than its neighbours; a real jump is followed.

Guarantee shown: a record with a wrong clock makes no other event late and changes no other example, however reads are
sliced and wherever the join is restarted. After a gap in the log, a few events are enough.
"""

from collections.abc import Iterator
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from smes.arrays import Arrays
from smes.events import FeedbackBlock, ImpressionBlock
from stream.codec.codec import encode_feedback, encode_impressions
from stream.config import JoinConfig, MiniBatchConfig, StreamConfig
from stream.dead_letters import DeadLetterWriter
from stream.example_stream import ExampleStream
from stream.join.joiner import Joiner, join_sources
from stream.join.ledgers import JoinLedger, StreamLedger
from stream.join.watermarks import START_OF_TIME, Watermarks
from stream.log.event_log import EventLog
from stream.log.memory_log import InMemoryLog
from stream.log.redis_log import RedisStreamsLog, connect_log
from stream.topics import FEEDBACK, IMPRESSIONS
from tests.stream.join_reference import (
    SCHEMA,
    Row,
    as_rows,
    assert_same_arrays,
    feedback_block,
    impression_block,
    joiner,
    watermarks_before,
)

START_MS = 1_700_000_000_000
AHEAD_MS = 299_000
YEARS_MS = 5 * 365 * 86_400_000
PARTITIONS, IMPRESSIONS_IN_ALL = 4, 8000
AHEAD_IDS = (2000, 2001, 2002, 2003)  # one in each partition, a quarter into the log


def before(
    events: list[tuple[int, int]], *, lateness_ms: int = 0, vouchers: int = 4, watermarks: Watermarks | None = None
) -> list[int]:
    """The watermark of one partition before each event (impression id, time) and after the last."""
    if watermarks is None:
        watermarks = Watermarks(lateness_ms, vouchers)
        watermarks.grow(1)
    ids, times_ms = (np.array(column, np.int64) for column in zip(*events, strict=True))
    found = watermarks.before(np.zeros(len(events), np.int32), times_ms, ids, START_OF_TIME)
    return [*found.tolist(), watermarks.of(0)]


# What vouches for what.


def test_the_example_in_the_docstring() -> None:
    times = [10, 11, 12, 13, 312, 14, 15, 16, 17]

    _, *vouched = before(list(enumerate(times)))

    assert vouched == [START_OF_TIME] * 3 + [10, 11, 12, 13, 14, 15]


@given(
    st.lists(st.integers(0, 2000), min_size=10, max_size=80),
    st.randoms(use_true_random=False),
    st.integers(2, 5),
)
@settings(max_examples=200, deadline=None)
def test_wrong_clocks_fewer_than_the_vouchers_make_no_honest_event_late(  # type: ignore[no-untyped-def] # plain data
    disorder_ms,
    random,
    vouchers,
):
    honest = [(key, START_MS + 500 * key - late) for key, late in enumerate(disorder_ms)]
    events = []
    for key, time in honest:  # of any 2 * vouchers - 1 neighbours, at most vouchers - 1 are ahead
        wrong = random.randint(0, vouchers - 1) if key % (2 * vouchers) == 0 else 0
        events += [(1000 + 10 * key + i, time + random.choice([3000, AHEAD_MS, YEARS_MS])) for i in range(wrong)]
        events.append((key, time))

    found = before(events, lateness_ms=2000, vouchers=vouchers)

    assert all(own <= time for own, (key, time) in zip(found, events, strict=False) if key < 1000)


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 60)), max_size=60),
    st.sampled_from([0, 5, 30]),
    st.sampled_from([1, 2, 4, 9]),
    st.integers(0, 60),
)
@settings(max_examples=200, deadline=None)
def test_equals_the_naive_loop_and_goes_on_after_a_restart(  # type: ignore[no-untyped-def] # plain data
    events,
    lateness_ms,
    vouchers,
    stop,
):
    def fresh() -> Watermarks:
        watermarks = Watermarks(lateness_ms, vouchers)
        watermarks.grow(2)
        return watermarks

    watermarks, found, expected = fresh(), list[int](), watermarks_before(events, lateness_ms, vouchers)
    for part in (events[:stop], events[stop:]):
        if part:
            found += before(part, watermarks=watermarks)[:-1]
        state, watermarks = watermarks.state("t", 0), fresh()
        watermarks.load_state("t", [0], state)
        assert_same_arrays(watermarks.state("t", 0), state)

    assert [own if own > START_OF_TIME else None for own in found] == [
        own if own > -(2**60) - lateness_ms else None for own in expected
    ]


def test_copies_of_one_record_do_not_vouch_for_each_other() -> None:
    found = before([(key, key) for key in range(10)] + [(99, AHEAD_MS)] * 20 + [(key, key) for key in range(10, 20)])

    assert found[-1] == 16


def test_feedback_on_one_impression_vouches_once() -> None:
    device = [(99, AHEAD_MS + i) for i in range(10)]  # click, like, … from one device with a wrong clock

    found = before([(key, key) for key in range(10)] + device + [(key, key) for key in range(10, 20)])

    assert found[-1] == 16


def test_events_from_the_past_do_not_hold_the_watermark_back() -> None:
    events = [(key, 1_000_000 + key) for key in range(10)]
    for key in range(10, 60):  # nine late ones for each that is in time
        events += [(1000 * key + i, key) for i in range(9)] + [(key, 1_000_000 + key)]

    assert before(events, lateness_ms=10)[-1] == 1_000_000 + 59 - 3 - 10


def test_a_jump_is_followed_once_enough_events_confirm_it() -> None:
    day_ms = 86_400_000
    evening, morning = [(key, key) for key in range(10)], [(key, day_ms + key) for key in range(10, 20)]

    found = before(evening + morning)

    assert found[10:14] == [6, 7, 8, 9]  # the morning's first three events alone say nothing
    assert found[14:] == [day_ms + key for key in range(10, 17)]


def test_one_event_a_minute_moves_the_watermark_on() -> None:
    found = before([(key, 60_000 * key) for key in range(10)], lateness_ms=1000)

    assert found == [START_OF_TIME] * 4 + [60_000 * key - 1000 for key in range(7)]


def test_with_one_voucher_the_latest_event_counts() -> None:
    assert before([(1, 10), (2, 30), (3, 20)], vouchers=1) == [START_OF_TIME, 10, 30, 30]


def test_a_state_saved_with_another_number_of_vouchers_is_gone_on_with() -> None:
    two, four = Watermarks(0, 2), Watermarks(0, 4)
    two.grow(1)
    four.grow(1)
    before([(key, 10 * key) for key in range(10)], watermarks=two)

    four.load_state("t", [0], two.state("t", 0))

    assert four.of(0) == 80
    assert before([(10, 100), (11, 110), (12, 120), (13, 130)], watermarks=four) == [80, 80, 80, 90, 100]


def test_a_state_from_when_the_latest_event_counted_alone_is_gone_on_with() -> None:
    watermarks = Watermarks(0, 2)
    watermarks.grow(1)

    watermarks.load_state("t", [0], {"t/0/latest_ms": np.array([70])})

    assert before([(1, 80), (2, 90), (3, 100)], watermarks=watermarks) == [70, 70, 80, 90]


# The join: one record 299 s ahead in each of four partitions, 8,000 impressions.


def world(ahead_ms: int) -> tuple[ImpressionBlock, FeedbackBlock]:
    """An impression every 10 ms, clicks on a half of them; those of ``AHEAD_IDS`` and their clicks lie ahead."""
    keys = range(IMPRESSIONS_IN_ALL)
    moved = dict.fromkeys(AHEAD_IDS, ahead_ms)
    time = {key: START_MS + 10 * key + moved.get(key, 0) for key in keys}
    clicked = [key for key in keys if key % 3 == 0 or key in moved]
    shown = impression_block([(key, time[key]) for key in keys], lambda key, time: key % PARTITIONS)
    clicks = [(key, time[key] + 700 + key % 5, 0, 1.0) for key in clicked]
    return shown, feedback_block(clicks, lambda key, time: key % PARTITIONS)


def read_in_slices(
    shown: ImpressionBlock, clicks: FeedbackBlock, random: Random, at_most: int
) -> Iterator[tuple[ImpressionBlock, FeedbackBlock]]:
    """Reads in which every partition advances on its own by up to so many events."""
    left = [[np.flatnonzero(block.partition == p) for p in range(PARTITIONS)] for block in (shown, clicks)]
    while any(len(rows) for topic in left for rows in topic):
        taken: list[list[Any]] = [[], []]
        for topic in range(2):
            for p in range(PARTITIONS):
                size = random.randint(0, at_most)
                taken[topic].append(left[topic][p][:size])
                left[topic][p] = left[topic][p][size:]
        yield shown.take(np.concatenate(taken[0])), clicks.take(np.concatenate(taken[1]))


def run(ahead_ms: int, seed: int, at_most: int, *, restarts: bool = False) -> tuple[list[Row], JoinLedger, int]:
    """Every example in its order, the ledger, and how many examples came before the end of the log."""

    def fresh() -> Joiner:
        return Joiner(SCHEMA, JoinConfig(), join_sources(PARTITIONS))

    random, join, rows = Random(seed), fresh(), list[Row]()
    for read in read_in_slices(*world(ahead_ms), random, at_most):
        rows += as_rows(join.push(*read))
        join.ledger.check()
        if restarts and random.random() < 0.2:
            state: Arrays = {name: array.copy() for name, array in join.state().items()}
            join = fresh()
            join.load_state(state)
            assert_same_arrays(join.state(), state)
    before_the_end = len(rows)
    rows += as_rows(join.flush())
    return rows, join.ledger, before_the_end


@pytest.fixture(scope="module")
def control() -> list[Row]:
    """The examples of the log without wrong clocks."""
    return run(0, 0, 500)[0]


@pytest.mark.parametrize("ahead_ms", [AHEAD_MS, YEARS_MS, -YEARS_MS])
@pytest.mark.parametrize(("seed", "at_most"), [(1, 7), (2, 100), (3, 4000)])
def test_one_wrong_clock_per_partition_changes_no_other_example(
    ahead_ms: int, seed: int, at_most: int, control: list[Row]
) -> None:
    rows, ledger, _ = run(ahead_ms, seed, at_most, restarts=True)

    assert [row for row in rows if row[1] not in AHEAD_IDS] == [row for row in control if row[1] not in AHEAD_IDS]
    late = len(AHEAD_IDS) if ahead_ms < 0 else 0
    assert (ledger.impressions_late, ledger.emitted) == (late, IMPRESSIONS_IN_ALL - late)
    assert ledger.feedback_late + ledger.orphaned <= len(AHEAD_IDS)


def test_an_impression_ahead_of_the_others_waits_until_the_stream_comes_there() -> None:
    rows, _, before_the_end = run(AHEAD_MS, 1, 100)

    assert {key for _, key, _ in rows[-len(AHEAD_IDS) :]} == set(AHEAD_IDS)
    # The last window (10 s), the allowed lateness (1 s) and three clicks of each partition (12 impressions apart) wait.
    assert before_the_end >= IMPRESSIONS_IN_ALL - 1000 - 100 - 3 * 12


def test_what_waits_before_a_night_without_traffic_comes_out_in_the_morning() -> None:
    join = joiner(vouchers=4)
    ids = list(range(200))

    def read(ids: list[int], at_ms: int) -> list[Row]:
        shown = impression_block([(key, at_ms + 10 * key) for key in ids])
        return as_rows(join.push(shown, feedback_block([(key, at_ms + 10 * key, 0, 1.0) for key in ids])))

    evening = read(ids, START_MS)
    three_each = read([key + 1000 for key in range(6)], START_MS + 30_000_000)
    morning = read([1006, 1007], START_MS + 30_000_000)

    assert (evening, three_each) == ([], [])  # a window of 10 s; three events in a partition confirm nothing
    assert [key for _, key, _ in morning] == ids


def test_a_log_of_fewer_events_than_vouchers_is_closed_by_its_end() -> None:
    join = joiner(vouchers=4)

    waiting = join.push(impression_block([(2, 1000), (4, 90_000)]), feedback_block([(2, 1500, 0, 1.0)]))

    assert len(waiting) == 0
    assert join.flush().impression_id.tolist() == [2, 4]


# From a real log, through the codecs, which refuse what lies more than 300 s ahead of its arrival.


@pytest.fixture(params=["memory", "redis"])
def log(request: pytest.FixtureRequest, namespace: str) -> Iterator[EventLog]:
    now = {"ms": START_MS}
    if request.param == "memory":
        yield InMemoryLog(now_ms=lambda: now["ms"])
        return
    url: str = request.getfixturevalue("redis_url")
    yield RedisStreamsLog(connect_log(url, timeout_s=30), namespace, now_ms=lambda: now["ms"])
    with redis.Redis.from_url(url) as client:
        for key in client.scan_iter(f"{{{namespace}}}:*"):
            client.delete(key)


@pytest.mark.parametrize("events_per_read", [300, 16_384])
def test_none_is_late_but_those_four_in_a_log(log: EventLog, events_per_read: int) -> None:
    batch = MiniBatchConfig(size=100, max_wait_s=None)
    config = StreamConfig(batch=batch, events_per_read=events_per_read, idle_after_s=3600)
    shown, clicks = world(AHEAD_MS)
    for topic in (IMPRESSIONS, FEEDBACK):
        log.ensure_topic(topic, PARTITIONS)
    log.append(IMPRESSIONS, encode_impressions(shown, SCHEMA, "json", PARTITIONS))
    log.append(FEEDBACK, encode_feedback(clicks, SCHEMA, "json", PARTITIONS))
    stream = ExampleStream(SCHEMA, replace(config, max_future_s=1e6), log, DeadLetterWriter(log))
    while not stream.has_reached(stream.end()):
        stream.poll(1.0)
    stream.assembler.flush()

    ledger: StreamLedger = stream.ledger()

    assert (ledger.impressions, ledger.late, ledger.dead_lettered) == (IMPRESSIONS_IN_ALL, 0, 0)
    assert (ledger.attached, ledger.feedback_late, ledger.orphaned) == (len(clicks), 0, 0)
