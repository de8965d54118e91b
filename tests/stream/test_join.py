"""The join against a declarative reference, under every way of slicing the reads."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smes.events import ExampleBlock, FeedbackBlock, ImpressionBlock
from smes.schema import MISSING, Feature, Schema, Task
from stream.join.joiner import JoinConfig, Joiner, join_sources
from stream.join.ledgers import JoinLedger
from stream.log.event_log import TopicPartition

SCHEMA = Schema(
    name="test",
    features=(Feature("tab"), Feature("price", kind="numeric")),
    tasks=(Task("click", window_s=5), Task("like", window_s=10), Task("watch", kind="regression", window_s=8)),
)
PARTITIONS = 2
Impression = tuple[int, int]  # id, time (ms)
Feedback = tuple[int, int, int, float]  # impression id, time (ms), task, value


def impression_block(rows: list[Impression]) -> ImpressionBlock:
    block = ImpressionBlock.empty(SCHEMA, len(rows))
    block.impression_id[:] = [r[0] for r in rows]
    block.event_time_ms[:] = [r[1] for r in rows]
    block.ids[:, 0] = block.impression_id % 7
    block.ids[:, 1] = block.impression_id % 11
    block.numerics[:, 0] = block.impression_id / 2
    block.partition[:] = block.impression_id % PARTITIONS
    return block


def feedback_block(rows: list[Feedback]) -> FeedbackBlock:
    block = FeedbackBlock.empty(len(rows))
    block.impression_id[:] = [r[0] for r in rows]
    block.event_time_ms[:] = [r[1] for r in rows]
    block.task[:] = [r[2] for r in rows]
    block.value[:] = [r[3] for r in rows]
    block.arrival_ms[:] = block.event_time_ms + 3
    block.partition[:] = block.impression_id % PARTITIONS
    return block


def joiner(lateness_s: float = 1.0, remember_s: float = 1e6) -> Joiner:
    return Joiner(SCHEMA, JoinConfig(lateness_s, remember_s), join_sources(PARTITIONS))


def reference(
    impressions: list[Impression], feedback: list[Feedback], lateness_ms: int
) -> tuple[list[tuple[int, int, tuple[float | None, ...]]], JoinLedger]:
    """What the module's docstring says, event by event, over whole partitions: no state machine, no order of reads."""
    ledger = JoinLedger(impressions=len(impressions), feedback=len(feedback))
    windows = [t.window_ms for t in SCHEMA.tasks]
    latest = [-(2**60)] * PARTITIONS
    kept: dict[int, int] = {}
    for key, time in impressions:
        before = latest[key % PARTITIONS] - lateness_ms
        latest[key % PARTITIONS] = max(latest[key % PARTITIONS], time)
        if key in kept:
            ledger.impressions_duplicate += 1
        elif time + max(windows) < before:
            ledger.impressions_late += 1
        else:
            kept[key] = time
    latest = [-(2**60)] * PARTITIONS
    seen: set[tuple[int, int]] = set()
    labels: dict[tuple[int, int], float] = {}
    for key, time, task, value in feedback:
        before = latest[key % PARTITIONS] - lateness_ms
        latest[key % PARTITIONS] = max(latest[key % PARTITIONS], time)
        if (key, task) in seen:
            ledger.feedback_duplicate += 1
            continue
        seen.add((key, task))
        if key not in kept:
            ledger.orphaned += 1
        elif time > kept[key] + windows[task] or before > kept[key] + max(windows):
            ledger.feedback_late += 1
        elif time < kept[key] - lateness_ms:
            ledger.orphaned += 1
        else:
            ledger.attached += 1
            labels[key, task] = value
    ledger.emitted = len(kept)
    examples = [
        (time, key, tuple(labels.get((key, t)) for t in range(SCHEMA.num_tasks)))
        for time, key in sorted((time, key) for key, time in kept.items())
    ]
    return examples, ledger


def as_rows(block: ExampleBlock) -> list[tuple[int, int, tuple[float | None, ...]]]:
    rows = []
    for i in range(len(block)):
        attached = block.feedback_arrival_ms[i] != MISSING
        labels = tuple(float(v) if a else None for v, a in zip(block.labels[i], attached, strict=True))
        rows.append((int(block.event_time_ms[i]), int(block.impression_id[i]), labels))
    return rows


EVENTS = st.tuples(
    st.lists(st.tuples(st.integers(0, 12), st.integers(1, 40_000)), max_size=40),
    st.lists(
        st.tuples(st.integers(0, 14), st.integers(1, 50_000), st.integers(0, 2), st.sampled_from([0.0, 1.0])),
        max_size=60,
    ),
)


@given(EVENTS, st.randoms(use_true_random=False), st.sampled_from([0, 1000, 20_000]), st.booleans())
@settings(max_examples=300, deadline=None)
def test_equals_the_reference_however_reads_are_sliced(events, random, lateness_ms, in_order):  # type: ignore[no-untyped-def] # hypothesis passes plain data
    impressions, feedback = events
    if in_order:
        impressions, feedback = sorted(impressions, key=lambda r: r[1]), sorted(feedback, key=lambda r: r[1])
    expected, expected_ledger = reference(impressions, feedback, lateness_ms)
    # Partitions advance independently: cut each into slices and draw which partition is read next.
    queues = [[r for r in impressions if r[0] % PARTITIONS == p] for p in range(PARTITIONS)]
    queues += [[r for r in feedback if r[0] % PARTITIONS == p] for p in range(PARTITIONS)]
    join, rows = joiner(lateness_ms / 1000), []
    while any(queues):
        taken = []
        for queue in queues:
            size = random.randint(0, 4)
            taken.append(queue[:size])
            del queue[:size]
        block = join.push(impression_block(taken[0] + taken[1]), feedback_block(taken[2] + taken[3]))
        rows += as_rows(block)
        join.ledger.check()
        if random.random() < 0.2:
            restored = joiner(lateness_ms / 1000)
            restored.load_state(join.state())
            join = restored
    rows += as_rows(join.flush())
    join.ledger.check()
    assert rows == expected
    assert join.ledger == expected_ledger


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


def test_waits_for_the_slowest_source_unless_it_is_idle() -> None:
    join = joiner(lateness_s=0)
    fast = impression_block([(2, 1000), (4, 60_000)])
    assert len(join.push(fast, feedback_block([(2, 60_000, 0, 1.0)]))) == 0
    assert join.ledger.impressions_waiting == 2
    nothing = impression_block([]), feedback_block([])
    idle = [TopicPartition("impressions", 1), TopicPartition("feedback", 1)]
    assert join.push(*nothing, idle=idle).impression_id.tolist() == [2]
    # The idle source wakes: the watermark does not go back, what it missed is late.
    assert len(join.push(impression_block([(3, 2000)]), feedback_block([]))) == 0
    assert (join.ledger.impressions_late, join.watermark_ms) == (1, 60_000)


def test_ids_are_remembered_then_forgotten() -> None:
    join = joiner(lateness_s=0, remember_s=5)
    only_even = [TopicPartition("impressions", 1), TopicPartition("feedback", 1)]

    def at(time_ms: int, impressions: list[Impression], feedback: list[Feedback]) -> None:
        key = 2 * time_ms  # even: its own partition, an impression and a feedback that move the clock
        join.push(
            impression_block([*impressions, (key, time_ms)]),
            feedback_block([*feedback, (key, time_ms, 1, 1.0)]),
            idle=only_even,
        )

    at(1000, [(8, 1000)], [])
    at(12_000, [], [])  # 8 was due at 11 000 and is remembered until 16 000
    at(13_000, [(8, 1000)], [(8, 1500, 0, 1.0)])
    assert (join.ledger.impressions_duplicate, join.ledger.feedback_late) == (1, 1)
    at(40_000, [], [])
    at(41_000, [(8, 1000)], [(8, 1600, 2, 1.0)])
    assert (join.ledger.impressions_late, join.ledger.orphaned) == (1, 1)
    join.ledger.check()
    join.flush()
    assert join.state()["entry.impression_id"].size == 0


def test_partitions_changed_under_a_checkpoint() -> None:
    other = Joiner(SCHEMA, JoinConfig(), join_sources(PARTITIONS + 1))
    with pytest.raises(ValueError, match="4 sources, expected 6"):
        other.load_state(joiner().state())


def test_memory_is_bounded_by_what_waits() -> None:
    join = joiner(lateness_s=0, remember_s=1)
    template = impression_block([(0, 0)] * 200)
    for step in range(200):
        ids = np.arange(step * 200, (step + 1) * 200, dtype=np.int64)
        block = replace(template, impression_id=ids, event_time_ms=ids * 5, partition=(ids % 2).astype(np.int32))
        feedback = FeedbackBlock.empty(200)
        feedback = replace(
            feedback, impression_id=ids, event_time_ms=ids * 5 + 100, partition=(ids % 2).astype(np.int32)
        )
        join.push(block, feedback)
    # 10 s window + 1 s of memory at one impression per 5 ms, 200 at a time.
    assert len(join.state()["entry.impression_id"]) <= 11_000 / 5 + 2 * 200
    assert len(join._waiting.arrays["ids"]) <= 2 * (10_000 / 5 + 2 * 200)
