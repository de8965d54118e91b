"""Segments against sums made step by step: equal, bounded in number, the same after a restart at any step."""

from dataclasses import replace

import numpy as np
import pytest

from smes.arrays import I64
from smes.events import ExampleBlock
from tests.trainer.small_world import SCHEMA
from trainer.routing_history import RoutingHistory, RoutingHistoryConfig

T, E, K, BATCH = 3, 5, 2, 10


SHORT = RoutingHistoryConfig(first_steps=2, most_segments=4, probe=8)


def batch(step: int) -> ExampleBlock:
    """Ten examples that differ from all others."""
    block = ExampleBlock.empty(SCHEMA, BATCH)
    ids = np.broadcast_to(np.arange(BATCH)[:, None] + 100 * step, block.ids.shape).copy()
    return replace(block, ids=ids, numerics=(ids[:, :1] / 2).astype(np.float32))


def load(step: int) -> I64:
    return np.random.default_rng(step).integers(0, BATCH, (T, E))


def choices(step: int) -> I64:
    """What the weights choose for the probe after a step."""
    return np.random.default_rng(step).integers(0, E, (8, T, K))


def run(steps: int, *, restart_at: int | None = None) -> RoutingHistory:
    """As the trainer does it: a full segment ends before the next step."""
    history = RoutingHistory(SHORT)
    for step in range(steps):
        if step == restart_at:
            saved, history = history.state(), RoutingHistory(SHORT)
            history.load_state(saved)
        if history.is_full(pending=False):
            history.close(choices(step))
        history.add(batch(step), load(step))
    return history


# Merged when there are 4: after steps 8, 16 (2 of 4 + 2 of 4), 32 …
@pytest.mark.parametrize(
    ("steps", "ends"),
    [(1, []), (2, []), (3, [2]), (7, [2, 4, 6]), (9, [4, 8]), (13, [4, 8, 12]), (17, [8, 16]), (40, [16, 32])],
)
def test_segments_are_equal_few_and_hold_every_step(steps: int, ends: list[int]) -> None:
    history = run(steps)
    starts = [0, *ends]
    assert len(history.closed) == len(ends)
    for start, end, segment in zip(starts, ends, history.closed, strict=False):
        assert (segment.steps, segment.instances) == (end - start, BATCH * (end - start))
        assert np.array_equal(segment.load_TE, sum(load(step) for step in range(start, end)))
        assert segment.choices_PTK is not None
        assert np.array_equal(segment.choices_PTK, choices(end)), "of the weights at the segment's end"
    rest = history.segments[len(ends) :]
    assert len(rest) == 1
    assert np.array_equal(rest[0].load_TE, sum(load(step) for step in range(starts[-1], steps)))
    assert rest[0].choices_PTK is None


def test_the_probe_is_spread_over_the_first_segment() -> None:
    ids, numerics, _ = run(30).probe
    assert ids[:, 0].tolist() == [0, 2, 5, 7, 100, 102, 105, 107]
    assert numerics[:, 0].tolist() == [value / 2 for value in ids[:, 0]]


@pytest.mark.parametrize("restart_at", range(14))
def test_a_restart_at_any_step_changes_nothing(restart_at: int) -> None:
    plain, restarted = (run(14, restart_at=at).state() for at in (None, restart_at))
    assert plain.keys() == restarted.keys()
    for name, array in plain.items():
        assert np.array_equal(array, restarted[name], equal_nan=array.dtype.kind == "f"), name


def test_a_segment_is_full_with_a_step_whose_result_is_pending() -> None:
    history = RoutingHistory(SHORT)
    assert not history.is_full(pending=True), "the first step's load says whether there are experts at all"
    history.add(batch(0), load(0))
    assert not history.is_full(pending=False)
    assert history.is_full(pending=True)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"first_steps": 0}, "RoutingHistoryConfig.first_steps: 0, expected at least 1"),
        ({"most_segments": 5}, "RoutingHistoryConfig.most_segments: 5, expected at least 2, a multiple of 2"),
        ({"probe": 31}, r"RoutingHistoryConfig.probe: 31, expected at least first_steps \(32\)"),
    ],
)
def test_bounds_out_of_range_are_refused(bounds: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RoutingHistoryConfig(**bounds)
