"""The join said a second time: event by event over whole partitions, without a state machine or an order of reads."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from smes.arrays import Arrays
from smes.events import ExampleBlock, FeedbackBlock, ImpressionBlock
from smes.schema import MISSING, Feature, Schema, Task
from stream.config import JoinConfig
from stream.join.joiner import Joiner, join_sources
from stream.join.ledgers import JoinLedger

SCHEMA = Schema(
    name="test",
    features=(Feature("tab"), Feature("price", kind="numeric")),
    tasks=(Task("click", window_s=5), Task("like", window_s=10), Task("watch", kind="regression", window_s=8)),
)
PARTITIONS = 2

Impression = tuple[int, int]  # id, time (ms)
Feedback = tuple[int, int, int, float]  # impression id, time (ms), task, value
Row = tuple[int, int, tuple[float | None, ...]]  # time (ms), impression id, label per task
PartitionOf = Callable[[int, int], int]  # (impression id, time) → partition

EVENTS = st.tuples(
    st.lists(st.tuples(st.integers(0, 12), st.integers(1, 40_000)), max_size=40),
    st.lists(
        st.tuples(st.integers(0, 14), st.integers(1, 50_000), st.integers(0, 2), st.sampled_from([0.0, 1.0])),
        max_size=60,
    ),
)


def by_id(key: int, time: int) -> int:
    """The partition of an event as the keyed topics have it."""
    return key % PARTITIONS


def impression_block(rows: list[Impression], partition_of: PartitionOf = by_id) -> ImpressionBlock:
    """One impression per (id, time)."""
    block = ImpressionBlock.empty(SCHEMA, len(rows))
    block.impression_id[:] = [r[0] for r in rows]
    block.event_time_ms[:] = [r[1] for r in rows]
    block.ids[:, 0] = block.impression_id % 7
    block.ids[:, 1] = block.impression_id % 11
    block.numerics[:, 0] = block.impression_id / 2
    block.partition[:] = [partition_of(r[0], r[1]) for r in rows]
    return block


def feedback_block(rows: list[Feedback], partition_of: PartitionOf = by_id) -> FeedbackBlock:
    """One event per (impression id, time, task, value)."""
    block = FeedbackBlock.empty(len(rows))
    block.impression_id[:] = [r[0] for r in rows]
    block.event_time_ms[:] = [r[1] for r in rows]
    block.task[:] = [r[2] for r in rows]
    block.value[:] = [r[3] for r in rows]
    block.arrival_ms[:] = block.event_time_ms + 3
    block.partition[:] = [partition_of(r[0], r[1]) for r in rows]
    return block


def joiner(lateness_s: float = 1.0, remember_s: float = 1e6, partitions: int = PARTITIONS, vouchers: int = 1) -> Joiner:
    """A join of all partitions. With one voucher, a single event says how far its partition is."""
    return Joiner(SCHEMA, JoinConfig(lateness_s, remember_s, vouchers), join_sources(partitions))


def watermarks_before(events: list[Impression], lateness_ms: int, vouchers: int) -> list[int]:
    """The watermark of one partition before each of its events, as :mod:`stream.join.watermarks` says."""
    before, vouched, recent = [], -(2**60), dict[int, int]()
    for key, time in events:
        before.append(vouched - lateness_ms)
        if time < before[-1]:
            continue
        recent[key] = max(time, recent.get(key, time))
        recent = dict(list(recent.items())[-(2 * vouchers - 1) :])
        if len(recent) >= vouchers:
            vouched = max(vouched, sorted(recent.values())[-vouchers])
    return before


def by_partition_before(events: list[Impression], lateness_ms: int, vouchers: int) -> list[int]:
    """The same for the events of all partitions, in their order."""
    parts = [[e for e in events if e[0] % PARTITIONS == p] for p in range(PARTITIONS)]
    before = [iter(watermarks_before(part, lateness_ms, vouchers)) for part in parts]
    return [next(before[key % PARTITIONS]) for key, _ in events]


def reference(
    impressions: list[Impression], feedback: list[Feedback], lateness_ms: int, vouchers: int = 1
) -> tuple[list[Row], JoinLedger]:
    """What the docstring of :mod:`stream.join.joiner` says."""
    ledger = JoinLedger(impressions=len(impressions), feedback=len(feedback))
    windows = [t.window_ms for t in SCHEMA.tasks]
    kept: dict[int, int] = {}
    own = by_partition_before(impressions, lateness_ms, vouchers)
    for (key, time), before in zip(impressions, own, strict=True):
        if key in kept:
            ledger.impressions_duplicate += 1
        elif time + max(windows) < before:
            ledger.impressions_late += 1
        else:
            kept[key] = time
    seen: set[tuple[int, int]] = set()
    labels: dict[tuple[int, int], float] = {}
    own = by_partition_before([(key, time) for key, time, _, _ in feedback], lateness_ms, vouchers)
    for (key, time, task, value), before in zip(feedback, own, strict=True):
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


def without_copies(ledger: JoinLedger) -> JoinLedger:
    """The ledger with further copies of feedback among the orphaned.

    Feedback whose impression never came is forgotten when it is orphaned. A copy that is read after that is orphaned
    again, one that is read before is a duplicate; so the reads decide which.
    """
    return replace(ledger, orphaned=ledger.orphaned + ledger.feedback_duplicate, feedback_duplicate=0)


def as_rows(block: ExampleBlock) -> list[Row]:
    """Examples as the reference gives them."""
    rows = []
    for i in range(len(block)):
        attached = block.feedback_arrival_ms[i] != MISSING
        labels = tuple(float(v) if a else None for v, a in zip(block.labels[i], attached, strict=True))
        rows.append((int(block.event_time_ms[i]), int(block.impression_id[i]), labels))
    return rows


def assert_same_arrays(got: Arrays, expected: Arrays) -> None:
    """Same names, same dtypes, same values."""
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)
        assert got[name].dtype == array.dtype, name
