"""Properties of the random delays between impressions and their feedback."""

from dataclasses import replace

import numpy as np
import pytest

from simulators.delays import FeedbackTimes, counter_uniform
from simulators.logs.reader import LogBlock
from smes.events import ImpressionBlock
from smes.schema import MISSING, Schema, Task
from smes_io.log_spec import Delay, LabelSource, LogSpec

SCHEMA = Schema("s", (Task("click", window_s=60), Task("watch", "regression", window_s=30), Task("like", window_s=100)))
SPEC = LogSpec(
    user_id="u",
    item_id="i",
    event_time="t",
    labels={
        "click": LabelSource("click", delay=Delay(2.0, 0.7)),
        "watch": LabelSource("watch", delay=Delay(1.0, 0.5, at_least="watch")),
        "like": LabelSource("like", delay=Delay(10.0, 1.0, at_least="watch")),
    },
)


def make_block(n: int = 20_000, seed: int = 0) -> LogBlock:
    rng = np.random.default_rng(seed)
    impressions = ImpressionBlock.empty(SCHEMA, n)
    impressions.impression_id[:] = rng.permutation(n) + 7
    impressions.event_time_ms[:] = np.sort(rng.integers(0, 10**6, n))
    watch = rng.exponential(15, n)
    watch[rng.random(n) < 0.1] = np.nan
    outcomes = np.stack([rng.random(n) < 0.4, watch, rng.random(n) < 0.05], axis=1).astype(np.float32)
    outcomes[rng.random(n) < 0.01, 0] = np.nan
    return LogBlock(impressions, outcomes, None)


def delays(times: FeedbackTimes, block: LogBlock) -> dict[tuple[int, int], int]:
    """(impression id, task) → delay in ms."""
    shown = dict(zip(block.impressions.impression_id.tolist(), block.impressions.event_time_ms.tolist(), strict=True))
    feedback = times.feedback(block)
    events = zip(feedback.impression_id.tolist(), feedback.task.tolist(), feedback.event_time_ms.tolist(), strict=True)
    return {(impression, task): at - shown[impression] for impression, task, at in events}


def test_one_event_for_each_positive_and_each_value() -> None:
    block = make_block()
    feedback = FeedbackTimes(SCHEMA, SPEC).feedback(block)
    expected = {}
    for row, impression in enumerate(block.impressions.impression_id.tolist()):
        for task, value in enumerate(block.outcomes[row].tolist()):
            if not np.isnan(value) and (task == 1 or value == 1):
                expected[impression, task] = value
    got = {
        (i, t): v
        for i, t, v in zip(
            feedback.impression_id.tolist(), feedback.task.tolist(), feedback.value.tolist(), strict=True
        )
    }
    assert got == expected
    assert len(feedback) == len(expected)
    assert (np.diff(feedback.event_time_ms) >= 0).all()


def test_within_the_window_and_not_before_the_play_has_ended() -> None:
    block = make_block()
    watch = dict(zip(block.impressions.impression_id.tolist(), block.outcomes[:, 1].tolist(), strict=True))
    over = 0
    for (impression, task), delay_ms in delays(FeedbackTimes(SCHEMA, SPEC), block).items():
        floor_ms = 0.0 if task == 0 or np.isnan(watch[impression]) else watch[impression] * 1000
        assert delay_ms >= max(floor_ms, 1)
        if floor_ms < SCHEMA.tasks[task].window_ms - 1:
            assert delay_ms < SCHEMA.tasks[task].window_ms
        else:
            over += 1
    assert over > 0  # who watches longer than the window is late


def test_the_draws_follow_the_lognormal() -> None:
    n = 200_000
    impressions = ImpressionBlock.empty(SCHEMA, n)
    impressions.impression_id[:] = np.arange(n)
    outcomes = np.tile(np.array([1, np.nan, 0], np.float32), (n, 1))
    wide = replace(SCHEMA, tasks=(replace(SCHEMA.tasks[0], window_s=1e6), *SCHEMA.tasks[1:]))
    drawn = FeedbackTimes(wide, SPEC, seed=3).feedback(LogBlock(impressions, outcomes, None)).event_time_ms
    logs = np.log(drawn / 1000)
    assert abs(logs.mean() - np.log(2.0)) < 5 * 0.7 / np.sqrt(n)
    assert abs(logs.std() - 0.7) < 0.01
    assert abs(np.mean(logs < np.log(2.0) - 0.7) - 0.158655) < 0.005  # one standard deviation below


def test_a_draw_depends_on_seed_impression_and_task_name_only() -> None:
    block = make_block()
    whole = delays(FeedbackTimes(SCHEMA, SPEC, seed=5), block)
    parts: dict[tuple[int, int], int] = {}
    for rows in (slice(0, 37), slice(37, 9_000), slice(9_000, None)):
        part = LogBlock(block.impressions.take(rows), block.outcomes[rows], None)
        parts |= delays(FeedbackTimes(SCHEMA, SPEC, seed=5), part)
    assert parts == whole
    turned = replace(SCHEMA, tasks=SCHEMA.tasks[::-1])
    other = delays(FeedbackTimes(turned, SPEC, seed=5), LogBlock(block.impressions, block.outcomes[:, ::-1], None))
    assert {(i, 2 - t): d for (i, t), d in other.items()} == whole
    assert delays(FeedbackTimes(SCHEMA, SPEC, seed=6), block) != whole


def test_logged_times_are_kept() -> None:
    block = make_block(100)
    times = np.full(block.outcomes.shape, MISSING)
    times[::2, 0] = 123
    feedback = FeedbackTimes(SCHEMA, SPEC).feedback(LogBlock(block.impressions, block.outcomes, times))
    positives = set(block.impressions.impression_id[::2][block.outcomes[::2, 0] == 1].tolist())
    assert positives
    assert set(feedback.impression_id[feedback.event_time_ms == 123].tolist()) == positives


def test_a_share_can_be_made_late() -> None:
    block = make_block()
    late = [
        delay_ms > SCHEMA.tasks[task].window_ms
        for (_, task), delay_ms in delays(FeedbackTimes(SCHEMA, SPEC, late_share=0.3), block).items()
        if task == 0
    ]
    assert abs(np.mean(late) - 0.3) < 0.03
    with pytest.raises(ValueError, match="late_share: 2, expected at least 0, at most 1"):
        FeedbackTimes(SCHEMA, SPEC, late_share=2)


def test_uniform_counters_are_uniform_and_independent() -> None:
    counters = np.arange(100_000)
    a, b = counter_uniform(counters, "a"), counter_uniform(counters, "b")
    assert a.min() > 0
    assert a.max() < 1
    assert np.histogram(a, 20, (0, 1))[0].std() < 4 * np.sqrt(5000)
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.02
    assert abs(np.corrcoef(a[:-1], a[1:])[0, 1]) < 0.02
