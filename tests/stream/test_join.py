"""The join: equal to a declarative reference however reads are sliced; what is late, remembered, idle, forgotten."""

import tracemalloc
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smes.events import FeedbackBlock
from smes.schema import MISSING
from stream.config import JoinConfig
from stream.join.joiner import Joiner
from stream.log.event_log import TopicPartition
from tests.stream.join_reference import (
    EVENTS,
    PARTITIONS,
    Feedback,
    Impression,
    as_rows,
    assert_same_arrays,
    feedback_block,
    impression_block,
    joiner,
    reference,
    without_copies,
)

ODD_PARTITION = (TopicPartition("impressions", 1), TopicPartition("feedback", 1))
NOTHING = impression_block([]), feedback_block([])


def slices(
    impressions: list[Impression], feedback: list[Feedback], random: Random
) -> list[tuple[list[Impression], list[Feedback]]]:
    """The partitions' events in reads of 0 to 4 each; partitions advance independently of each other."""
    shown = [[r for r in impressions if r[0] % PARTITIONS == p] for p in range(PARTITIONS)]
    outcomes = [[r for r in feedback if r[0] % PARTITIONS == p] for p in range(PARTITIONS)]
    reads = []
    while any(shown) or any(outcomes):
        read: tuple[list[Impression], list[Feedback]] = ([], [])
        for impression_queue in shown:
            size = random.randint(0, 4)
            read[0].extend(impression_queue[:size])
            del impression_queue[:size]
        for feedback_queue in outcomes:
            size = random.randint(0, 4)
            read[1].extend(feedback_queue[:size])
            del feedback_queue[:size]
        reads.append(read)
    return reads


@given(
    EVENTS,
    st.randoms(use_true_random=False),
    st.sampled_from([0, 1000, 20_000]),
    st.sampled_from([1, 2, 4]),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
@pytest.mark.timeout(600)  # takes seconds on an idle machine; bounds hangs only
def test_equals_the_reference_however_reads_are_sliced(  # type: ignore[no-untyped-def] # plain data
    events,
    random,
    lateness_ms,
    vouchers,
    in_order,
):
    impressions, feedback = events
    if in_order:
        impressions, feedback = sorted(impressions, key=lambda r: r[1]), sorted(feedback, key=lambda r: r[1])
    expected, expected_ledger = reference(impressions, feedback, lateness_ms, vouchers)

    join, rows = joiner(lateness_ms / 1000, vouchers=vouchers), []
    for shown, outcomes in slices(impressions, feedback, random):
        rows += as_rows(join.push(impression_block(shown), feedback_block(outcomes)))
        join.ledger.check()
        if random.random() < 0.2:
            restored = joiner(lateness_ms / 1000, vouchers=vouchers)
            restored.load_state(join.state())
            join = restored
    rows += as_rows(join.flush())

    assert rows == expected
    assert without_copies(join.ledger) == without_copies(expected_ledger)


@given(EVENTS, st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
@pytest.mark.timeout(600)  # bounds hangs only
def test_the_ledgers_of_the_partitions_balance_and_add_up(  # type: ignore[no-untyped-def] # plain data
    events,
    random,
):
    join = joiner()
    impressions, feedback = events
    for shown, outcomes in slices(impressions, feedback, random):
        join.push(impression_block(shown), feedback_block(outcomes))

        parts = [join.partition_ledger(p) for p in range(PARTITIONS)]
        for part in parts:
            part.check()
        assert sum(part.impressions_waiting for part in parts) == join.ledger.impressions_waiting
        assert sum(part.feedback_waiting for part in parts) == join.ledger.feedback_waiting
        assert sum(part.orphaned for part in parts) == join.ledger.orphaned


@given(EVENTS, st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
@pytest.mark.timeout(600)  # bounds hangs only
def test_a_state_that_was_loaded_is_saved_as_it_was(  # type: ignore[no-untyped-def] # plain data
    events,
    random,
):
    join = joiner()
    impressions, feedback = events
    for shown, outcomes in slices(impressions, feedback, random):
        join.push(impression_block(shown), feedback_block(outcomes))
        restored = joiner()
        restored.load_state(join.state())

        assert_same_arrays(restored.state(), join.state())


def test_example_carries_the_impression_and_masks_only_regression() -> None:
    join = joiner()
    join.push(impression_block([(4, 1000), (6, 1000)]), feedback_block([(4, 2000, 0, 1.0), (4, 9000, 2, 3.5)]))

    block = join.flush()

    assert block.impression_id.tolist() == [4, 6]
    assert block.user_id.tolist() == [4, 6]
    assert block.numerics[:, 0].tolist() == [2.0, 3.0]
    assert block.labels.tolist() == [[1, 0, 3.5], [0, 0, 0]]
    assert block.label_mask.tolist() == [[True, True, True], [True, True, False]]
    assert block.feedback_arrival_ms.tolist() == [[2003, MISSING, 9003], [MISSING] * 3]


def test_example_carries_the_partition_of_its_impression() -> None:
    join = joiner()
    join.push(impression_block([(4, 1000), (5, 1000)]), feedback_block([(4, 2000, 0, 1.0)], lambda key, time: 1))

    block = join.flush()

    assert dict(zip(block.impression_id.tolist(), block.partition.tolist(), strict=True)) == {4: 0, 5: 1}


def test_the_watermark_waits_for_the_slowest_source() -> None:
    join = joiner(lateness_s=0)

    examples = join.push(impression_block([(2, 1000), (4, 60_000)]), feedback_block([(2, 60_000, 0, 1.0)]))

    assert len(examples) == 0
    assert join.ledger.impressions_waiting == 2


def test_the_watermark_does_not_wait_for_an_idle_source() -> None:
    join = joiner(lateness_s=0)
    join.push(impression_block([(2, 1000), (4, 60_000)]), feedback_block([(2, 60_000, 0, 1.0)]))

    examples = join.push(*NOTHING, idle=ODD_PARTITION)

    assert examples.impression_id.tolist() == [2]


def test_an_idle_source_that_wakes_finds_late_what_it_missed() -> None:
    join = joiner(lateness_s=0)
    join.push(impression_block([(2, 1000), (4, 60_000)]), feedback_block([(2, 60_000, 0, 1.0)]), idle=ODD_PARTITION)

    examples = join.push(impression_block([(3, 2000)]), feedback_block([]))

    assert len(examples) == 0
    assert (join.ledger.impressions_late, join.watermark_ms) == (1, 60_000)


def join_until(time_ms: int) -> Joiner:
    """Impression 8 was shown at 1 s, so it is due at 11 s and remembered until 16 s; the watermark is ``time_ms``."""
    join = joiner(lateness_s=0, remember_s=5)
    for now_ms in (1000, 12_000, time_ms):
        shown = [(8, 1000), (2000, now_ms)] if now_ms == 1000 else [(2 * now_ms, now_ms)]
        join.push(impression_block(shown), feedback_block([(2 * now_ms, now_ms, 1, 1.0)]), idle=ODD_PARTITION)
    return join


def test_a_copy_of_a_remembered_impression_is_a_duplicate() -> None:
    join = join_until(13_000)

    join.push(impression_block([(8, 1000)]), feedback_block([(8, 1500, 0, 1.0)]), idle=ODD_PARTITION)

    assert (join.ledger.impressions_duplicate, join.ledger.feedback_late) == (1, 1)


def test_a_copy_of_a_forgotten_impression_is_late_and_its_feedback_orphaned() -> None:
    join = join_until(40_000)

    join.push(impression_block([(8, 1000)]), feedback_block([(8, 1600, 2, 1.0)]), idle=ODD_PARTITION)
    join.push(*NOTHING, idle=ODD_PARTITION)

    assert (join.ledger.impressions_late, join.ledger.orphaned) == (1, 1)
    join.ledger.check()


def entries_in(join: Joiner) -> int:
    return sum(len(array) for name, array in join.state().items() if name.endswith("entry.impression_id"))


def test_the_end_of_the_stream_forgets_everything() -> None:
    join = join_until(40_000)

    join.flush()

    assert entries_in(join) == 0


def test_memory_is_bounded_by_what_waits() -> None:
    join = joiner(lateness_s=0, remember_s=1)
    template, feedback = impression_block([(0, 0)] * 200), FeedbackBlock.empty(200)

    def push(step: int) -> None:
        ids = np.arange(step * 200, (step + 1) * 200, dtype=np.int64)
        partition = (ids % 2).astype(np.int32)
        join.push(
            replace(template, impression_id=ids, event_time_ms=ids * 5, partition=partition),
            replace(feedback, impression_id=ids, event_time_ms=ids * 5 + 100, partition=partition),
        )

    tracemalloc.start()
    for step in range(50):
        push(step)
    early_bytes, _ = tracemalloc.get_traced_memory()
    for step in range(50, 400):
        push(step)
    late_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    # A window of 10 s and 1 s of memory at one impression per 5 ms, 200 at a time.
    assert entries_in(join) <= 11_000 / 5 + 2 * 200
    assert late_bytes < 1.1 * early_bytes


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"allowed_lateness_s": -1.0}, "JoinConfig.allowed_lateness_s: -1.0, expected at least 0"),
        ({"remember_s": -0.5}, "JoinConfig.remember_s: -0.5, expected at least 0"),
        ({"vouchers": 0}, "JoinConfig.vouchers: 0, expected at least 1, at most 64"),
    ],
)
def test_values_out_of_range_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        JoinConfig(**wrong)
