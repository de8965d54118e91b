"""Impressions that are trained on before their windows close: every example, in its order, against a declaration."""

from collections import Counter
from copy import copy
from random import Random
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smes.events import CLOSING, FIRST, FURTHER, WHOLE, ExampleBlock
from smes.schema import MISSING
from stream.config import JoinConfig
from stream.join.joiner import Joiner, join_sources
from stream.join.waits import Correction, Wait
from tests.stream.join_reference import (
    PARTITIONS,
    SCHEMA,
    Feedback,
    Impression,
    as_rows,
    assert_same_arrays,
    by_partition_before,
    feedback_block,
    impression_block,
    reference,
    without_copies,
)
from tests.stream.test_join import slices

WAITS = st.fixed_dictionaries(
    {},
    optional={
        name: st.one_of(st.sampled_from(["immediate", "window"]), st.sampled_from([0.5, 2.0, 5.0, 7.5, 60.0]))
        for name in ("default", "click", "like", "watch")
    },
)
CORRECTIONS = st.sampled_from(["es_dfm", "fnw", "none"])


def _events(seed: int) -> tuple[list[Impression], list[Feedback]]:
    """Impressions, and feedback near the ends of their waits and windows, in any order.

    Copies of feedback follow the first one at once: of an orphan without an impression nothing is remembered.
    """
    rng = Random(seed)
    impressions = [(rng.randint(0, 12), rng.randint(1, 25_000)) for _ in range(rng.randint(0, 20))]
    feedback: dict[tuple[int, int], list[Feedback]] = {}
    for _ in range(rng.randint(0, 40)):
        (key, shown_ms), task = rng.choice([*impressions, (99, 20_000)]), rng.randint(0, 2)
        delay_ms = rng.choice([rng.randint(-1500, 11_000), -1000, 0, 500, 2000, 5000, 7500, 8000, 10_000])
        event = (key, max(1, shown_ms + delay_ms), task, rng.choice([0.0, 1.0, 1.0]))
        feedback.setdefault((key, task), [event, (*event[:3], 1.0)] if rng.random() < 0.2 else [event])
    return impressions, [event for events in feedback.values() for event in events]


EVENTS, RANDOMS = st.integers(0, 2**32).map(_events), st.integers(0, 2**32).map(Random)
WINDOWS_MS = [task.window_ms for task in SCHEMA.tasks]
BINARY = [task.kind == "binary" for task in SCHEMA.tasks]


class Example(NamedTuple):
    """A row of the reference. ``what`` is the stage, and above all stages the task that is corrected, or the end."""

    due_ms: int
    what: int
    key: int
    kind: int
    labels: tuple[float | None, ...]  # None: masked


def waits_ms(wait: dict[str, Wait]) -> list[int]:
    """When each task is trained on, after its impression."""
    waits: list[float | str] = []
    for task in SCHEMA.tasks:
        chosen = wait.get(task.name, wait.get("default", "window"))
        if not isinstance(chosen, str) and chosen >= task.window_s:
            chosen = "window"
        waits.append(chosen)
    longest = max((w for w, chosen in zip(WINDOWS_MS, waits, strict=True) if chosen == "window"), default=0)
    return [longest if w == "window" else 0 if w == "immediate" else round(float(w) * 1000) for w in waits]


def to_window(wait: dict[str, Wait]) -> list[bool]:
    """Which tasks wait for their windows."""
    chosen = [wait.get(task.name, wait.get("default", "window")) for task in SCHEMA.tasks]
    return [
        w == "window" or (not isinstance(w, str) and w >= task.window_s)
        for w, task in zip(chosen, SCHEMA.tasks, strict=True)
    ]


def delayed_reference(
    impressions: list[Impression],
    feedback: list[Feedback],
    lateness_ms: int,
    vouchers: int,
    wait: dict[str, Wait],
    correction: Correction,
) -> tuple[list[Example], int]:
    """Every example in order, and how many labels are corrections, as :mod:`stream.join.joiner` says."""
    whole, _ = reference(impressions, feedback, lateness_ms, vouchers)
    labels = {key: row_labels for _, key, row_labels in whole}
    time_of = {key: time for time, key, _ in whole}
    read_ms: dict[int, int] = {}
    own = by_partition_before(impressions, lateness_ms, vouchers)
    for (key, time), before in zip(impressions, own, strict=True):
        if time + max(WINDOWS_MS) >= before:
            read_ms.setdefault(key, before)
    label_ms: dict[tuple[int, int], int] = {}
    own = by_partition_before([(key, time) for key, time, _, _ in feedback], lateness_ms, vouchers)
    for (key, time, task, _), before in zip(feedback, own, strict=True):
        label_ms.setdefault((key, task), max(time, before))

    waits, for_window = waits_ms(wait), to_window(wait)
    stages = sorted(set(waits))
    examples, corrected = [], 0
    for key, time in time_of.items():
        stage_ms = [max(time + waits[t], read_ms[key]) for t in range(len(waits))]
        at_stage: list[float | None] = [0.0 if binary else None for binary in BINARY]
        for t, value in enumerate(labels[key]):
            if value is None:
                continue
            fakes = correction == "fnw" and BINARY[t] and not for_window[t] and value > 0
            if label_ms[key, t] <= stage_ms[t] and not fakes:
                at_stage[t] = value
            elif value > 0 or not BINARY[t]:
                corrected += 1
                only = tuple(value if u == t else None for u in range(len(waits)))
                due_ms = max(label_ms[key, t], stage_ms[t])
                examples.append(Example(due_ms, len(stages) + t, key, FURTHER, only))
        for stage, wait_ms in enumerate(stages):
            row = tuple(at_stage[t] if waits[t] == wait_ms else None for t in range(len(waits)))
            kind = WHOLE if all(for_window) else FIRST if stage == 0 else FURTHER
            examples.append(Example(max(time + wait_ms, read_ms[key]), stage, key, kind, row))
        if not all(for_window):
            final = tuple(0.0 if v is None and BINARY[t] else v for t, v in enumerate(labels[key]))
            examples.append(Example(time + max(WINDOWS_MS), len(stages) + len(waits), key, CLOSING, final))
    return sorted(examples), corrected


def as_examples(block: ExampleBlock) -> list[tuple[Any, ...]]:
    """Rows as the reference gives them, but for ``what``."""
    return [
        (
            int(block.due_ms[i]),
            int(block.impression_id[i]),
            int(block.kind[i]),
            tuple(float(v) if m else None for v, m in zip(block.labels[i], block.label_mask[i], strict=True)),
        )
        for i in range(len(block))
    ]


def join_of(lateness_ms: int, wait: dict[str, Wait], correction: Correction = "es_dfm", vouchers: int = 1) -> Joiner:
    config = JoinConfig(lateness_ms / 1000, 1e6, vouchers, wait, correction)
    return Joiner(SCHEMA, config, join_sources(PARTITIONS))


def joined(
    impressions: list[Impression], feedback: list[Feedback], random: Random, join: Joiner, fresh: Any = None
) -> ExampleBlock:
    """Everything that the join emits under one slicing; restored from its state now and then if ``fresh`` makes one."""
    blocks = [ExampleBlock.empty(SCHEMA)]
    emitted: Counter[int] = Counter()

    def take(block: ExampleBlock) -> None:
        blocks.append(block)
        emitted.update(block.impression_id[block.begins].tolist())
        join.ledger.check()
        assert join.ledger.emitted == emitted.total()

    for shown, outcomes in slices(impressions, feedback, random):
        take(join.push(impression_block(shown), feedback_block(outcomes)))
        if fresh is not None and random.random() < 0.3:
            state = join.state()
            join = fresh()
            join.load_state(state)
            assert_same_arrays(join.state(), state)
        for partition in range(PARTITIONS):
            join.partition_ledger(partition).check()
    take(join.flush())
    assert join.ledger.impressions_waiting == join.ledger.feedback_waiting == 0
    return ExampleBlock.concat(blocks)


def with_order(events: Any, in_order: bool) -> tuple[list[Impression], list[Feedback]]:
    impressions, feedback = events
    return (sorted(impressions, key=lambda r: r[1]), sorted(feedback, key=lambda r: r[1])) if in_order else events


ANY = (
    EVENTS,
    RANDOMS,
    st.sampled_from([0, 1000, 20_000]),
    st.sampled_from([1, 2, 4]),
    st.booleans(),
    WAITS,
    CORRECTIONS,
)


@given(*ANY)
@settings(max_examples=200, deadline=None)
@pytest.mark.timeout(600)  # bounds hangs only
def test_every_example_is_as_declared_however_reads_are_sliced(  # type: ignore[no-untyped-def] # plain data
    events, random, lateness_ms, vouchers, in_order, wait, correction
):
    impressions, feedback = with_order(events, in_order)
    expected, corrected = delayed_reference(impressions, feedback, lateness_ms, vouchers, wait, correction)

    def fresh() -> Joiner:
        return join_of(lateness_ms, wait, correction, vouchers)

    block = joined(impressions, feedback, random, join := fresh())
    resumed = joined(impressions, feedback, random, fresh(), fresh)

    assert as_examples(block) == [(e.due_ms, e.key, e.kind, e.labels) for e in expected]
    assert_same_arrays(resumed.arrays(), block.arrays())
    assert join.ledger.corrected == corrected


@given(*ANY)
@settings(max_examples=100, deadline=None)
@pytest.mark.timeout(600)  # bounds hangs only
def test_each_impression_closes_once_by_the_window_and_each_positive_trains_once(  # type: ignore[no-untyped-def]
    events, random, lateness_ms, vouchers, in_order, wait, correction
):
    impressions, feedback = with_order(events, in_order)
    join, waits = join_of(lateness_ms, wait, correction, vouchers), join_of(lateness_ms, {}, vouchers=vouchers)
    # In the same slices: whether feedback counts as late or as orphaned may depend on them.
    block = joined(impressions, feedback, copy(random), join)
    whole = joined(impressions, feedback, random, waits)

    last = block.take(np.isin(block.kind, (WHOLE, CLOSING)))
    assert sorted(as_rows(last)) == sorted(as_rows(whole))
    assert (last.label_mask == (last.feedback_arrival_ms != MISSING) | np.array(BINARY)).all()
    # Ledgers: all but the column of an attached label is as if every task had waited.
    expected, got = without_copies(waits.ledger), without_copies(join.ledger)
    assert got.attached + got.corrected == expected.attached
    expected.attached, expected.corrected = got.attached, got.corrected
    assert got == expected
    # Every positive and every value is trained on exactly once, and nothing else is.
    trained = block.to_train_on()
    learned = Counter(
        (int(trained.impression_id[i]), t, float(trained.labels[i, t]))
        for i, t in zip(*np.nonzero(trained.label_mask & ((trained.labels > 0) | ~np.array(BINARY))), strict=True)
    )
    final = Counter(
        (key, t, value)
        for _, key, labels in as_rows(whole)
        for t, value in enumerate(labels)
        if value is not None and (value > 0 or not BINARY[t])
    )
    assert learned == final
    # Each impression is a negative at most once, and every one is trained on for every binary task.
    cells = zip(*np.nonzero(trained.label_mask & np.array(BINARY)), strict=True)
    assert {(int(trained.impression_id[i]), t) for i, t in cells} == {
        (key, t) for _, key, _ in as_rows(whole) for t in range(len(BINARY)) if BINARY[t]
    }
    negatives = Counter(
        (int(trained.impression_id[i]), int(t))
        for i, t in zip(*np.nonzero(trained.label_mask & (trained.labels == 0)), strict=True)
        if BINARY[t]
    )
    assert max(negatives.values(), default=0) <= 1


@given(EVENTS, RANDOMS, WAITS, CORRECTIONS)
@settings(max_examples=100, deadline=None)
@pytest.mark.timeout(600)  # bounds hangs only
def test_late_shares_are_counted_one_example_after_the_other(  # type: ignore[no-untyped-def] # plain data
    events, random, wait, correction
):
    impressions, feedback = events
    block = joined(impressions, feedback, random, join_of(1000, wait, correction))
    examples, _ = delayed_reference(impressions, feedback, 1000, 1, wait, correction)
    for_window = to_window(wait)

    counts = [[0.0] * 4 for _ in BINARY]
    stages = len(set(waits_ms(wait)))
    corrections = [e for e in examples if e.kind == FURTHER and e.what >= stages]
    late = {(e.key, t) for e in corrections for t, value in enumerate(e.labels) if value}
    for i, example in enumerate(examples):
        for t, value in enumerate(example.labels):
            expected = 0.0
            if value is not None and BINARY[t] and not for_window[t]:
                on_time, after, closed_on_time, closed_late = counts[t]
                seen = (after + 1) / (on_time + after + 2)
                share = (closed_late + 50 * seen) / (closed_on_time + closed_late + 50)
                if example.kind != CLOSING:
                    expected = {"fnw": 1.0, "none": 0.0, "es_dfm": share}[correction]
                if value > 0:
                    counts[t][2 * (example.kind == CLOSING) + ((example.key, t) in late)] += 1
            assert block.late_share[i, t] == pytest.approx(expected, abs=1e-6)


@given(EVENTS, RANDOMS, WAITS, WAITS, CORRECTIONS, CORRECTIONS, st.booleans())
@settings(max_examples=150, deadline=None)
@pytest.mark.timeout(600)  # bounds hangs only
def test_waits_may_change_at_a_restart(  # type: ignore[no-untyped-def] # plain data
    events, random, wait, other_wait, correction, other_correction, in_order
):
    """Every impression is still trained on, and every positive once at most; what closes has its final labels."""
    impressions, feedback = with_order(events, in_order)
    waits = joined(impressions, feedback, random, whole_join := join_of(1000, {}))
    final = {key: labels for _, key, labels in as_rows(waits)}
    join, blocks = join_of(1000, wait, correction), [ExampleBlock.empty(SCHEMA)]
    for number, (shown, outcomes) in enumerate(slices(impressions, feedback, random)):
        blocks.append(join.push(impression_block(shown), feedback_block(outcomes)))
        if random.random() < 0.2:
            state, odd = join.state(), number % 2
            join = join_of(1000, other_wait if odd else wait, other_correction if odd else correction)
            join.load_state(state)
        join.ledger.check()
    blocks.append(join.flush())
    join.ledger.check()
    block = ExampleBlock.concat(blocks)

    assert sorted(block.impression_id[block.begins].tolist()) == sorted(final)
    closed = block.take(np.isin(block.kind, (WHOLE, CLOSING)))
    assert {key: labels for _, key, labels in as_rows(closed)} == final
    assert len(closed) == len(final)
    trained = block.to_train_on()
    positives = Counter(
        (int(trained.impression_id[i]), int(t)) for i, t in zip(*np.nonzero(trained.labels > 0), strict=True)
    )
    assert max(positives.values(), default=0) <= 1
    got, expected = join.ledger, whole_join.ledger
    assert (got.emitted, got.attached + got.corrected) == (expected.emitted, expected.attached)


def test_an_impression_is_trained_on_at_once_and_corrected_by_its_click() -> None:
    join = join_of(0, {"default": "immediate"})
    join.push(impression_block([(2, 1000), (3, 1000)]), feedback_block([]))

    first = join.push(impression_block([(4, 3000), (5, 3000)]), feedback_block([(4, 3000, 1, 0.0), (5, 3000, 1, 0.0)]))
    click = join.push(
        impression_block([(6, 5000), (7, 5000)]),
        feedback_block([(2, 4000, 0, 1.0), (6, 5000, 1, 0.0), (7, 5000, 1, 0.0)]),
    )
    end = join.flush()

    assert as_examples(first) == [(1000, 2, FIRST, (0, 0, None)), (1000, 3, FIRST, (0, 0, None))]
    assert as_examples(click)[-1] == (4000, 2, FURTHER, (1, None, None))
    assert (11_000, 2, CLOSING, (1, 0, None)) in as_examples(end)
    assert click.user_id[-1] == 2
    assert click.feedback_arrival_ms[-1].tolist() == [4003, MISSING, MISSING]
    assert (join.ledger.corrected, join.ledger.attached) == (1, 4)


def test_what_was_trained_on_before_waits_changed_is_corrected_and_not_trained_on_again() -> None:
    join = join_of(0, {"default": "immediate"})
    join.push(impression_block([(2, 1000), (3, 1000)]), feedback_block([]))
    first = join.push(impression_block([(4, 3000), (5, 3000)]), feedback_block([(4, 3000, 1, 0.0), (5, 3000, 1, 0.0)]))
    state = join.state()
    join = join_of(0, {})
    join.load_state(state)

    join.push(impression_block([]), feedback_block([(2, 4000, 0, 1.0)]))
    end = join.flush()

    assert first.impression_id.tolist() == [2, 3]
    of_two = end.take(end.impression_id == 2)
    assert as_examples(of_two) == [(11_000, 2, FURTHER, (1, None, None)), (11_000, 2, CLOSING, (1, 0, None))]
    assert end.take(end.impression_id == 4).kind.tolist() == [WHOLE]
    assert join.ledger.corrected == 1


def test_features_are_kept_until_the_window_closes_and_no_longer() -> None:
    join = join_of(0, {"default": "immediate"})
    join.push(impression_block([(2, 1000), (3, 1000)]), feedback_block([]))
    join.flush()

    assert sum(len(a) for name, a in join.state().items() if name.endswith("waiting.impression_id")) == 0
    assert join.ledger.emitted == 2


@pytest.mark.parametrize(
    ("wait", "message"),
    [
        ({"clicks": "immediate"}, r"stream\.join\.wait: unknown tasks \['clicks'\], expected 'default' or names among"),
    ],
)
def test_refuses_a_task_that_does_not_exist(wait: dict[str, Wait], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        join_of(0, wait)


@pytest.mark.parametrize("wait", [{"click": "never"}, {"click": 0.0}, {"click": -1.0}])
def test_refuses_a_wait_that_is_none(wait: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"JoinConfig\.wait: .*expected each one of immediate, window or more than 0"):
        JoinConfig(wait=wait)
