"""Times of feedback in a manifest: what is written is what is read, and merging loses neither count nor mean."""

import numpy as np
import pytest

from feature_store.feedback_times import FeedbackTimes

NOW_MS = 1_700_000_000_000


def times(count: int, seed: int = 0) -> FeedbackTimes:
    """Events whose stages follow each other by up to 100 s."""
    rng = np.random.default_rng(seed)
    arrived = NOW_MS + rng.integers(0, 100_000, count)
    spans = rng.integers(0, 100_000, (3, count)).cumsum(axis=0)
    return FeedbackTimes(rng.integers(1, 4, count), arrived, *(arrived + spans))


def by_arrival(one: FeedbackTimes) -> list[tuple[int, ...]]:
    columns = (one.arrived_ms, one.count, one.joined_ms, one.batched_ms, one.trained_ms)
    return sorted(zip(*(c.tolist() for c in columns), strict=True))


def test_rows_are_arrival_count_and_spans() -> None:
    one = FeedbackTimes(*(np.array(c) for c in ([2, 1], [1000, 500], [1300, 500], [1350, 507], [1351, 507])))

    assert one.rows() == ((500, 1, 0, 7, 0), (1000, 2, 300, 50, 1))


def test_what_is_written_is_what_is_read() -> None:
    given = times(300)

    assert by_arrival(FeedbackTimes.of_rows(given.rows())) == by_arrival(given)
    assert len(FeedbackTimes.of_rows(())) == 0
    assert FeedbackTimes.of_rows(()).rows() == ()


def test_a_span_that_clocks_make_negative_is_zero() -> None:
    one = FeedbackTimes(*(np.array([c]) for c in (1, 1000, 990, 995, 1001)))

    assert one.rows() == ((1000, 1, 0, 5, 6),)


def test_equal_times_are_one_row() -> None:
    merged = FeedbackTimes.concat([times(100, seed=1), times(80, seed=2), times(100, seed=1)]).merged()

    assert len(merged) == 180
    twice = {row[0] for row in by_arrival(times(100, seed=1))}
    doubled = {arrived: count for arrived, count, *_ in by_arrival(merged) if arrived in twice}
    assert doubled == {arrived: 2 * count for arrived, count, *_ in by_arrival(times(100, seed=1))}


@pytest.mark.parametrize("count", [513, 5000, 40_000])
def test_many_are_merged_without_losing_count_or_mean(count: int) -> None:
    given = times(count)

    merged = given.merged()

    assert len(merged) <= 512
    assert merged.count.sum() == given.count.sum()
    for name in ("arrived_ms", "joined_ms", "batched_ms", "trained_ms"):
        before, after = getattr(given, name) - NOW_MS, getattr(merged, name) - NOW_MS
        mean = (before * given.count).sum() / given.count.sum()
        assert (after * merged.count).sum() / merged.count.sum() == pytest.approx(mean, abs=1)
    for q in (0.01, 0.5, 0.99):
        exact = np.quantile(np.repeat(given.arrived_ms, given.count), q)
        assert np.quantile(np.repeat(merged.arrived_ms, merged.count), q) == pytest.approx(exact, abs=600)


def test_nothing_is_merged_to_nothing() -> None:
    assert len(FeedbackTimes.concat([]).merged()) == 0
