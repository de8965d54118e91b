"""The sketch against exact quantiles."""

import numpy as np
import pytest

from smes_scorer.telemetry import QuantileSketch


@pytest.mark.parametrize("q", [0.0, 0.01, 0.5, 0.9, 0.99, 1.0])
def test_quantiles_are_within_half_a_percent(q: float) -> None:
    values = np.random.default_rng(5).lognormal(3.0, 2.0, 20_000)
    sketch = QuantileSketch(1e-3, 1e7)

    for part in np.split(values, 10):
        sketch.add(part)

    exact = float(np.quantile(values, q, method="inverted_cdf"))
    assert sketch.count == 20_000
    assert sketch.quantile(q) == pytest.approx(exact, rel=0.0051)


def test_one_value_counts_as_an_array_of_it() -> None:
    values = [*np.random.default_rng(5).lognormal(3.0, 2.0, 500).tolist(), 0.0, 1e-3, 1e7, 1e9]
    one, many = QuantileSketch(1e-3, 1e7), QuantileSketch(1e-3, 1e7)

    many.add(np.array(values))
    for value in values:
        one.add_one(value)

    assert one.count == many.count
    assert [one.quantile(q) for q in np.linspace(0, 1, 101)] == [many.quantile(q) for q in np.linspace(0, 1, 101)]


@pytest.mark.parametrize("q", [0.5, 0.97, 0.975, 0.98, 0.99, 1.0])
def test_weights_count_as_repetitions(q: float) -> None:
    values, weights = np.array([1.0, 10.0, 100.0]), np.array([97, 2, 1])
    weighted, repeated = QuantileSketch(0.1, 1e3), QuantileSketch(0.1, 1e3)

    weighted.add(values, weights)
    repeated.add(np.repeat(values, weights))

    assert weighted.quantile(q) == repeated.quantile(q)


def test_a_weighted_quantile() -> None:
    sketch = QuantileSketch(0.1, 1e3)

    sketch.add(np.array([1.0, 10.0, 100.0]), np.array([97, 2, 1]))

    assert sketch.quantile(0.975) == pytest.approx(10.0, rel=0.0051)


def test_an_empty_sketch_has_no_quantiles() -> None:
    assert QuantileSketch(1.0, 100.0).quantile(0.5) is None


def test_values_out_of_bounds_count_as_the_bounds() -> None:
    sketch = QuantileSketch(1.0, 100.0)

    sketch.add(np.array([0.0, 1e9]))

    assert sketch.quantile(0.5) == pytest.approx(1.0, rel=0.0051)
    assert sketch.quantile(1.0) == pytest.approx(100.0, rel=0.0101)


def test_wrong_bounds_are_refused() -> None:
    with pytest.raises(ValueError, match="bounds"):
        QuantileSketch(0.0, 1.0)
