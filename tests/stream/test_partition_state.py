"""State by topic and partition: a restart goes on exactly, also with more partitions than the state has.

Guarantee shown: when a topic grows from two partitions to four, no event is lost or trained on twice, and the examples,
their order and the batches are those of a run that had four partitions from the beginning. The condition is that the
producers wrote the events of the new partitions after those that are in the state: none is older than the watermark.
"""

from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smes.events import ExampleBlock, FeedbackBlock, ImpressionBlock
from stream.codec.codec import encode_feedback, encode_impressions
from stream.config import JoinConfig, MiniBatchConfig, StreamConfig
from stream.dead_letters import DeadLetterWriter
from stream.example_stream import ExampleStream
from stream.join.joiner import Joiner
from stream.log.event_log import OutRecord, TopicPartition
from stream.log.memory_log import InMemoryLog
from stream.mini_batches import Assembler
from stream.partition_state import load_rows, save_rows, saved_partitions, state_name
from stream.topics import FEEDBACK, IMPRESSIONS
from tests.stream.join_reference import (
    EVENTS,
    SCHEMA,
    Feedback,
    Impression,
    Row,
    as_rows,
    assert_same_arrays,
    feedback_block,
    impression_block,
    joiner,
)

Read = tuple[ImpressionBlock, FeedbackBlock]
RANDOMS = st.randoms(use_true_random=False)


def reads(impressions: list[Impression], feedback: list[Feedback], partitions: int, random: Random) -> list[Read]:
    """Reads of up to 8 events of each topic; an event's partition follows from its id."""

    def partition_of(key: int, time: int) -> int:
        return key % partitions

    impressions, feedback, taken = list(impressions), list(feedback), []
    while impressions or feedback:
        i, f = random.randint(0, 8), random.randint(0, 8)
        taken.append((impression_block(impressions[:i], partition_of), feedback_block(feedback[:f], partition_of)))
        del impressions[:i], feedback[:f]
    return taken


def push_all(join: Joiner, blocks: list[Read]) -> list[Row]:
    return [row for read in blocks for row in as_rows(join.push(*read))]


def copied(state: dict[str, Any]) -> dict[str, Any]:
    return {name: array.copy() for name, array in state.items()}


# The same partitions: exactly as if nothing had happened.


@given(EVENTS, RANDOMS, st.integers(1, 7))
@settings(max_examples=60, deadline=None)
@pytest.mark.timeout(600)  # bounds hangs only
def test_a_restart_anywhere_changes_no_batch_and_no_array(  # type: ignore[no-untyped-def] # plain data
    events,
    random,
    size,
):
    def assembler() -> Assembler:
        return Assembler(SCHEMA, JoinConfig(1.0, 1e6), MiniBatchConfig(size, max_age_s=20), 2)

    never_stopped, restarted = assembler(), assembler()
    impressions, feedback = events
    for read in reads(impressions, feedback, 2, random):
        for each in (never_stopped, restarted):
            each.push(*read)
        never_stopped.count_refused({TopicPartition(FEEDBACK, 1): 1}, {TopicPartition(IMPRESSIONS, 0): 2})
        restarted.count_refused({TopicPartition(FEEDBACK, 1): 1}, {TopicPartition(IMPRESSIONS, 0): 2})
        if random.random() < 0.5:
            never_stopped.next_batch()
            restarted.next_batch()
        if random.random() < 0.4:
            state, restarted = copied(restarted.state()), assembler()
            restarted.load_state(state)

    never_stopped.flush()
    restarted.flush()

    assert restarted.ledger() == never_stopped.ledger()
    assert_same_arrays(restarted.state(), never_stopped.state())


# More partitions: joins.


def grown(events: tuple[list[Impression], list[Feedback]], at_ms: int) -> tuple[Any, Any]:
    """The events before and those from ``at_ms`` on."""
    impressions, feedback = events
    before = [r for r in impressions if r[1] < at_ms], [r for r in feedback if r[1] < at_ms]
    after = [r for r in impressions if r[1] >= at_ms], [r for r in feedback if r[1] >= at_ms]
    return before, after


@given(EVENTS, RANDOMS, st.integers(1, 50_000), st.sampled_from([0, 1000, 20_000]))
@settings(max_examples=100, deadline=None)
@pytest.mark.timeout(600)  # bounds hangs only
def test_a_join_that_grows_gives_what_one_with_all_partitions_gives(  # type: ignore[no-untyped-def] # plain data
    events,
    random,
    at_ms,
    lateness_ms,
):
    before, after = grown(events, at_ms)
    old = reads(before[0], before[1], 2, random)
    new = reads(after[0], after[1], 4, random)
    stop = random.randint(0, len(old))
    expected = joiner(lateness_ms / 1000, partitions=4)
    wanted = push_all(expected, old + new) + as_rows(expected.flush())

    two = joiner(lateness_ms / 1000, partitions=2)
    rows = push_all(two, old[:stop])
    four = joiner(lateness_ms / 1000, partitions=4)
    four.load_state(copied(two.state()))
    rows += push_all(four, old[stop:] + new) + as_rows(four.flush())

    assert rows == wanted
    assert four.ledger == expected.ledger
    for partition in range(4):
        assert four.partition_ledger(partition) == expected.partition_ledger(partition)


def test_the_watermark_waits_for_new_partitions() -> None:
    two = joiner(lateness_s=0, partitions=2)
    two.push(impression_block([(2, 30_000), (3, 30_000)]), feedback_block([(2, 30_000, 0, 1.0), (3, 30_000, 0, 1.0)]))
    four = joiner(lateness_s=0, partitions=4)
    four.load_state(two.state())

    examples = four.push(
        impression_block([(4, 90_000), (5, 90_000)]), feedback_block([(4, 90_000, 0, 1.0), (5, 90_000, 0, 1.0)])
    )

    assert len(examples) == 0
    assert four.watermark_ms == two.watermark_ms == 30_000


def test_a_join_with_fewer_partitions_than_the_state_is_refused() -> None:
    four, two = joiner(partitions=4), joiner(partitions=2)

    with pytest.raises(ValueError, match="state of 4 partitions, expected at most 2"):
        two.load_state(four.state())


def test_feedback_that_waits_is_counted_where_it_was_read_and_kept_there() -> None:
    join = joiner()
    join.push(impression_block([]), feedback_block([(4, 1000, 0, 1.0), (4, 1000, 1, 1.0)], lambda key, time: 1))

    state = join.state()

    assert join.partition_ledger(1).feedback_waiting == 2
    assert state[state_name(FEEDBACK, 1, "entry.impression_id")].tolist() == [4]
    assert state[state_name(FEEDBACK, 0, "entry.impression_id")].tolist() == []


def test_an_entry_moves_to_the_partition_of_its_impression() -> None:
    join = joiner()
    join.push(impression_block([]), feedback_block([(4, 1000, 0, 1.0)], lambda key, time: 1))
    join.push(impression_block([(4, 900)]), feedback_block([]))

    state = join.state()

    assert (join.partition_ledger(1).attached, join.partition_ledger(0).impressions_waiting) == (1, 1)
    assert state[state_name(IMPRESSIONS, 0, "entry.impression_id")].tolist() == [4]
    assert state[state_name(IMPRESSIONS, 0, "waiting.impression_id")].tolist() == [4]


def test_the_state_of_one_partition_goes_on_without_the_others() -> None:
    shown_at = [(key, 100 * key) for key in range(200)]
    blocks = reads(shown_at, [(key, time + 500, 0, 1.0) for key, time in shown_at], 2, Random(0))
    both = joiner()
    rows = push_all(both, blocks[:20])
    state = both.state()
    wanted = push_all(both, blocks[20:]) + as_rows(both.flush())

    for partition in (0, 1):
        own = {name: array for name, array in state.items() if f"/{partition}/" in name or "/" not in name}
        alone = Joiner(SCHEMA, JoinConfig(1.0, 1e6), [TopicPartition(t, partition) for t in (IMPRESSIONS, FEEDBACK)])
        alone.load_state(own)
        for shown, outcomes in blocks[20:]:
            mine = shown.take(shown.partition == partition), outcomes.take(outcomes.partition == partition)
            rows += as_rows(alone.push(*mine))
        rows += as_rows(alone.flush())
        assert alone.ledger == both.partition_ledger(partition)

    assert sorted(rows) == sorted(push_all(joiner(), blocks[:20]) + wanted)


# More partitions: a stream from an event log.

START_MS = 1_700_000_000_000
CONFIG = StreamConfig(
    join=JoinConfig(allowed_lateness_s=0),
    batch=MiniBatchConfig(size=10, max_wait_s=None),
    events_per_read=40,
    idle_after_s=10,
)


def records(ids: range, partitions: int) -> dict[str, list[OutRecord]]:
    """Per id an impression 100 ms after the one before, and a click on it a second later."""
    times_ms = [START_MS + 100 * i for i in ids]
    shown = impression_block(list(zip(ids, times_ms, strict=True)))
    clicks = feedback_block([(i, t + 1000, 0, 1.0) for i, t in zip(ids, times_ms, strict=True)])
    return {
        IMPRESSIONS: encode_impressions(shown, SCHEMA, "json", partitions),
        FEEDBACK: encode_feedback(clicks, SCHEMA, "json", partitions),
    }


def log_of(partitions: int, *parts: dict[str, list[OutRecord]]) -> InMemoryLog:
    log = InMemoryLog()
    for topic in (IMPRESSIONS, FEEDBACK):
        log.ensure_topic(topic, partitions)
        log.append(topic, [OutRecord(b"{", (), 1)])  # refused
        for part in parts:
            log.append(topic, part[topic])
    return log


def grow(log: InMemoryLog, *parts: dict[str, list[OutRecord]]) -> InMemoryLog:
    """The same log with four partitions, and more events in them."""
    for topic in (IMPRESSIONS, FEEDBACK):
        log.add_partitions(topic, 4)
        for part in parts:
            log.append(topic, part[topic])
    return log


def open_stream(log: InMemoryLog) -> ExampleStream:
    return ExampleStream(SCHEMA, CONFIG, log, DeadLetterWriter(log))


def take_all(stream: ExampleStream) -> list[ExampleBlock]:
    batches = []
    while stream.poll(0) or not stream.has_reached(stream.end()):
        while (batch := stream.next_batch()) is not None:
            batches.append(batch)
    return batches


def with_one_unknown_field(part: dict[str, list[OutRecord]]) -> dict[str, list[OutRecord]]:
    first, *others = part[FEEDBACK]
    return {**part, FEEDBACK: [replace(first, value=first.value[:-1] + b',"x":1}'), *others]}


@pytest.fixture
def before() -> dict[str, list[OutRecord]]:
    """300 impressions in two partitions."""
    return with_one_unknown_field(records(range(300), 2))


@pytest.fixture
def after() -> dict[str, list[OutRecord]]:
    """300 more, written when there are four."""
    return records(range(300, 600), 4)


@pytest.fixture
def log(before: dict[str, list[OutRecord]]) -> InMemoryLog:
    """A log of two partitions that may grow."""
    return log_of(2, before)


@pytest.fixture
def two(log: InMemoryLog) -> tuple[list[ExampleBlock], dict[str, Any]]:
    """Three batches of a stream of two partitions, and its state then: more are ready, and more is left to read."""
    stream = open_stream(log)
    while stream.upcoming() is None:
        stream.poll(0)
    taken = [batch for _ in range(3) if (batch := stream.next_batch()) is not None]
    assert len(taken) == 3
    assert stream.upcoming() is not None
    assert not stream.has_reached(stream.end())
    return taken, copied(stream.state())


def test_a_stream_that_grows_accounts_for_every_event(
    log: InMemoryLog,
    two: tuple[list[ExampleBlock], dict[str, Any]],
    after: dict[str, list[OutRecord]],
) -> None:
    taken, state = two
    four = open_stream(grow(log, after))
    four.load_state(state)

    batches = taken + take_all(four)
    ledger = four.ledger()

    assert (ledger.impressions, ledger.feedback) == (601, 601)
    assert (ledger.dead_lettered, ledger.feedback_dead_lettered, ledger.unknown_fields) == (1, 1, 1)
    assert ledger.handed_out == sum(map(len, batches))
    assert ledger.handed_out + ledger.waiting == 600
    assert (ledger.attached, ledger.late, ledger.orphaned, ledger.duplicate) == (600, 0, 0, 0)


def test_a_stream_that_grows_gives_the_batches_of_one_that_always_had_all_partitions(
    log: InMemoryLog,
    two: tuple[list[ExampleBlock], dict[str, Any]],
    after: dict[str, list[OutRecord]],
) -> None:
    taken, state = two
    grow(log, after)
    wanted = take_all(open_stream(log))
    four = open_stream(log)
    four.load_state(state)

    got = taken + take_all(four)

    assert [len(batch) for batch in got] == [len(batch) for batch in wanted]
    for batch, expected in zip(got, wanted, strict=True):
        assert_same_arrays(
            {name: array for name, array in batch.arrays().items() if name != "feedback_arrival_ms"},
            {name: array for name, array in expected.arrays().items() if name != "feedback_arrival_ms"},
        )


def test_a_stream_that_grows_trains_on_nothing_twice(
    log: InMemoryLog,
    two: tuple[list[ExampleBlock], dict[str, Any]],
    after: dict[str, list[OutRecord]],
) -> None:
    taken, state = two
    four = open_stream(grow(log, after))
    four.load_state(state)

    ids = np.concatenate([batch.impression_id for batch in taken + take_all(four)])

    assert ids.tolist() == list(range(len(ids)))
    assert len(ids) > 450


def test_new_partitions_are_read_from_the_beginning_of_the_log(
    log: InMemoryLog,
    two: tuple[list[ExampleBlock], dict[str, Any]],
    after: dict[str, list[OutRecord]],
) -> None:
    _, state = two
    grow(log, after)
    log.truncate(TopicPartition(IMPRESSIONS, 3), 5)
    four = open_stream(log)

    four.load_state(state)

    assert four.positions[TopicPartition(IMPRESSIONS, 2)] == 0
    assert four.positions[TopicPartition(IMPRESSIONS, 3)] == 5
    assert four.positions[TopicPartition(IMPRESSIONS, 0)] == state[state_name(IMPRESSIONS, 0, "position")][0]


def test_a_stream_with_fewer_partitions_than_the_state_is_refused(
    before: dict[str, list[OutRecord]], after: dict[str, list[OutRecord]]
) -> None:
    four, two = open_stream(log_of(4, before, after)), open_stream(log_of(2, before))

    with pytest.raises(ValueError, match="state of 4 partitions, expected at most 2"):
        two.load_state(four.state())


def test_every_array_is_named_by_topic_and_partition(
    two: tuple[list[ExampleBlock], dict[str, Any]],
) -> None:
    _, state = two

    whole = {name for name in state if not name.startswith(("impressions/0/", "impressions/1/"))}
    whole = {name for name in whole if not name.startswith(("feedback/0/", "feedback/1/"))}

    assert whole == {"watermark_ms", "waits", "late_counts", "ready_sizes", "ended"}


def test_rows_are_saved_by_partition_and_keep_their_order() -> None:
    columns = {"x": np.array([5, 6, 7, 8]), "partition": np.array([1, 0, 1, 3], np.int32)}

    state = save_rows("t", "table", columns, range(4))

    assert {name: array.tolist() for name, array in state.items()} == {
        "t/0/table.x": [6],
        "t/1/table.x": [5, 7],
        "t/2/table.x": [],
        "t/3/table.x": [8],
    }


def test_rows_are_loaded_with_their_partition() -> None:
    columns = {"x": np.array([5, 6, 7, 8]), "partition": np.array([1, 0, 1, 3], np.int32)}
    state = {**save_rows("t", "table", columns, range(4)), "t2/7/table.x": np.array([0])}

    loaded = load_rows("t", "table", state)

    assert saved_partitions(state, "t") == [0, 1, 2, 3]
    assert (loaded["x"].tolist(), loaded["partition"].tolist()) == ([6, 5, 7, 8], [0, 1, 1, 3])
