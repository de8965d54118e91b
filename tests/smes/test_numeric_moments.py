"""Moments of numeric features: NumPy's for an ordinary stream; one value hardly moves them, a lasting change does."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from smes.arrays import F64
from smes.model.numeric_moments import NumericMoments
from smes.schema import Feature, Schema, Task

_N = 40_000
_HALF = _N // 2


def _schema(columns: int = 1, transform: str = "none") -> Schema:
    def numeric(name: str) -> Feature:
        return Feature(name, kind="numeric", transform=transform)  # type: ignore[arg-type]

    features = tuple(numeric(f"v{i}") for i in range(columns))
    return Schema("moments", (Task("t"),), features)


def _observed(values: NDArray[np.float64], size: int = 256, transform: str = "none") -> NumericMoments:
    columns = np.atleast_2d(values.T).T
    moments = NumericMoments(_schema(columns.shape[1], transform))
    for start in range(0, len(columns), size):
        moments.observe(np.ascontiguousarray(columns[start : start + size], np.float32))
    return moments


def _mean_and_deviation(moments: NumericMoments) -> tuple[float, float]:
    return float(moments.moments["mean"][0]), float(moments.moments["variance"][0] ** 0.5)


def _prices(seed: int = 0) -> F64:
    return np.random.default_rng(seed).normal(20, 5, _N)


@pytest.mark.parametrize("size", [1, 37, 256, 5000])
def test_moments_are_numpys_however_the_stream_is_cut(size: int) -> None:
    values = np.random.default_rng(1).normal(20, 5, (6000, 3))
    values[np.random.default_rng(2).random(values.shape) < 0.3] = np.nan
    values[:, 2] = np.nan

    moments = _observed(values, size).moments

    present = values[:, :2].astype(np.float32).astype(np.float64)
    np.testing.assert_array_equal(moments["count"], [*(~np.isnan(present)).sum(axis=0), 0])
    np.testing.assert_allclose(moments["mean"], [*np.nanmean(present, axis=0), 0], rtol=1e-9)
    np.testing.assert_allclose(moments["variance"], [*np.nanvar(present, axis=0), 1], rtol=1e-9)
    whole = _observed(values, len(values)).moments
    for name, array in moments.items():
        assert np.array_equal(array, whole[name]), f"{name}: other bits if the stream is cut otherwise"


@pytest.mark.parametrize("value", [1e9, -1e9, 1e30, -1e30, np.inf, 40.0])
@pytest.mark.parametrize("at", [100, 300, 10_000])
def test_one_value_hardly_moves_the_moments(value: float, at: int) -> None:
    values = _prices()
    values[at] = value

    mean, deviation = _mean_and_deviation(_observed(values))

    assert mean == pytest.approx(20, abs=0.1)
    assert deviation == pytest.approx(5, rel=0.02)


@pytest.mark.parametrize("at", range(0, 60, 7))
@pytest.mark.parametrize("size", [1, 50])
def test_an_outlier_among_the_first_values_is_left_out_once_there_are_others(at: int, size: int) -> None:
    values = _prices()[:5000]
    values[at] = 1e9

    mean, deviation = _mean_and_deviation(_observed(values[:200], size))
    assert mean == pytest.approx(20, abs=1.5)
    assert deviation == pytest.approx(5, abs=2)
    mean, deviation = _mean_and_deviation(_observed(values, size))
    assert mean == pytest.approx(20, abs=0.3)
    assert deviation == pytest.approx(5, rel=0.05)


@pytest.mark.parametrize(
    ("rows", "deviation"),
    [(np.arange(5, _N, 400), 5.6), (np.arange(5, _N, 100), 8.5), (np.arange(10_000, 10_100), 6.5)],
    ids=["one in 400", "one in 100", "a hundred in a row"],
)
def test_several_outliers_leave_a_feature_usable(rows: NDArray[np.int64], deviation: float) -> None:
    values = _prices()
    values[rows] = 1e9

    mean, seen = _mean_and_deviation(_observed(values))

    assert mean == pytest.approx(20, abs=1)
    assert 5 < seen < deviation


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("since", [0, 100, 10_000])
@pytest.mark.parametrize("transform", ["none", "log1p"])
def test_values_that_nothing_measures_count_for_nothing(share: float, since: int, transform: str) -> None:
    values = np.abs(_prices())
    bad = np.random.default_rng(7).random(_N) < share
    bad[:since] = False
    values[bad] = np.where(np.random.default_rng(8).random(bad.sum()) < 0.5, 1e30, -1e30)
    seen = np.log1p(values[~bad]) if transform == "log1p" else values[~bad]

    for count in (4000, 12_000, _N):
        mean, deviation = _mean_and_deviation(_observed(values[:count], transform=transform))
        assert mean == pytest.approx(seen.mean(), abs=0.25 * seen.std())
        assert deviation == pytest.approx(seen.std(), rel=0.25)
    assert mean == pytest.approx(seen.mean(), abs=0.03 * seen.std())
    assert deviation == pytest.approx(seen.std(), rel=0.03)


def test_a_feature_of_two_scales_is_not_taken_for_one_with_values_that_nothing_measures() -> None:
    """A saturated probability: most are 10⁻¹², a third near 1. And zeros beside times in nanoseconds."""
    rng = np.random.default_rng(9)
    large = rng.random(_N) < 0.3
    saturated = np.where(large, rng.uniform(0.1, 1, _N), 1e-12 * rng.random(_N))
    stamped = np.where(large, 1.7e18, 0.0)

    for values in (saturated, stamped):
        mean, deviation = _mean_and_deviation(_observed(values))
        assert mean == pytest.approx(values.mean(), rel=0.02)
        assert deviation == pytest.approx(values.std(), rel=0.02)


_CHANGES: dict[str, Callable[[F64], F64]] = {
    "thousandfold": lambda x: x * 1000,
    "a thousandth": lambda x: x / 1000,
    "fiftyfold": lambda x: x * 50,
    "huge": lambda x: x * 1e20,
    "tiny": lambda x: x * 1e-12,
    "moved far": lambda x: x + 20_000,
    "moved": lambda x: x + 60,
}


@pytest.mark.parametrize("change", _CHANGES)
@pytest.mark.parametrize("draw", ["normal", "exponential"])
def test_a_lasting_change_is_followed_within_some_thousands(change: str, draw: str) -> None:
    values = _prices() if draw == "normal" else np.random.default_rng(3).exponential(5.0, _N)
    values[_HALF:] = target = _CHANGES[change](values[_HALF:])

    mean, deviation = _mean_and_deviation(_observed(values[: _HALF + 6000]))

    assert abs(mean - target.mean()) < 0.3 * target.std()
    assert 0.7 < deviation / target.std() < 1.8


@pytest.mark.parametrize("outlier", [False, True])
def test_a_constant_that_starts_to_vary_is_followed(outlier: bool) -> None:
    values = np.concatenate([np.full(_HALF, 7.0), np.random.default_rng(4).normal(3, 2, 4000)])
    if outlier:
        values[10_000] = 1e9
        assert _mean_and_deviation(_observed(values[:_HALF])) == (7, 0)

    mean, deviation = _mean_and_deviation(_observed(values))

    assert mean == pytest.approx(3, abs=0.4)
    assert deviation == pytest.approx(2, abs=0.4)


def test_a_rare_feature_whose_first_value_is_an_outlier() -> None:
    rng = np.random.default_rng(5)
    values = np.where(rng.random(_N) < 0.02, _prices(), np.nan)
    values[np.flatnonzero(~np.isnan(values))[0]] = 1e9

    mean, deviation = _mean_and_deviation(_observed(values[:6000]))

    assert mean == pytest.approx(20, abs=2)
    assert deviation == pytest.approx(5, abs=2.5)


@pytest.mark.parametrize("share", [0.03, 0.1, 0.5])
def test_a_feature_that_is_mostly_zero_keeps_its_deviation(share: float) -> None:
    rng = np.random.default_rng(6)
    values = (rng.random(_N) < share) * rng.exponential(1, _N)

    _, deviation = _mean_and_deviation(_observed(values))

    assert 0.6 * values.std() < deviation < 1.05 * values.std()


@pytest.mark.parametrize(
    "values",
    [
        np.arange(_N) / _N * 24 * 6 % 24,
        np.arange(_N) / _N * 24,
        np.arange(_N) / 1000,
        np.arange(_N) // (_N // 21) % 7 * 1.0,
    ],
    ids=["hour, six days", "hour, one day", "trend", "day of the week"],
)
def test_what_stands_still_for_a_while_keeps_its_moments(values: F64) -> None:
    mean, deviation = _mean_and_deviation(_observed(values))

    assert mean == pytest.approx(values.mean(), abs=0.2 * values.std())
    assert deviation == pytest.approx(values.std(), rel=0.15)


def test_the_logarithm_is_taken_before() -> None:
    values = np.random.default_rng(7).lognormal(1, 1, 5000) * np.where(np.arange(5000) % 2, 1, -1)

    moments = _observed(values, transform="log1p")

    expected = np.sign(values) * np.log1p(np.abs(values))
    mean, deviation = _mean_and_deviation(moments)
    assert mean == pytest.approx(expected.mean(), abs=1e-6)
    assert deviation == pytest.approx(expected.std(), rel=1e-6)


@pytest.mark.parametrize("at", [10, 200, 20_300, 21_000])
def test_a_state_continues_bit_for_bit(at: int) -> None:
    values = _prices()
    values[[3, 10_000]] = 1e9
    values[_HALF:] *= 1000
    whole, restarted = _observed(values, 50), NumericMoments(_schema())
    first = _observed(values[:at], 50)

    restarted.load({name: array.copy() for name, array in first.moments.items()}, first.state())
    for start in range(at, _N, 50):
        restarted.observe(values[start : start + 50, None].astype(np.float32))

    for name, array in (whole.moments | whole.state()).items():
        assert np.array_equal((restarted.moments | restarted.state())[name], array), name


def test_moments_alone_are_gone_on_from() -> None:
    values = _prices()
    values[_HALF:] *= 1000
    first, restarted = _observed(values[:_HALF]), NumericMoments(_schema())

    restarted.load(first.moments, {})
    restarted.observe(values[_HALF : _HALF + 4000, None].astype(np.float32))

    mean, deviation = _mean_and_deviation(restarted)
    assert mean == pytest.approx(20_000, rel=0.15)
    assert deviation == pytest.approx(5000, rel=0.8)


def test_arrays_of_other_features_are_refused() -> None:
    one, two = NumericMoments(_schema()), NumericMoments(_schema(2))

    with pytest.raises(RuntimeError, match=r"numerics\.count: shape \[2\], expected \[1\]"):
        one.load(two.moments, {})
    with pytest.raises(KeyError, match="seen"):
        one.load(one.moments, {"values": one.state()["values"]})
