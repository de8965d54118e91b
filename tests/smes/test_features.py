"""The feature layer and the running moments compared with NumPy."""

import numpy as np
import pytest
import torch

from smes.model.features import FeatureInputs, FeatureLayer
from smes.model.numeric_moments import NumericMoments
from smes.rankers.ranker import RunningMoments
from smes.schema import Feature, Schema, Task

_SCHEMA = Schema(
    "features",
    tasks=(Task("click"), Task("like")),
    features=(
        Feature("tags", kind="bag", max_length=2, dim=3),
        Feature("city", dim=2),
        Feature("views", kind="numeric", transform="log1p"),
        Feature("price", kind="numeric"),
    ),
)


def test_the_layer_concatenates_what_the_schema_says() -> None:
    generator = torch.Generator().manual_seed(0)
    embedding_BWD = torch.randn(2, 5, 4, generator=generator)
    wide_BWT = torch.randn(2, 5, 2, generator=generator)
    pool_BW = torch.tensor([[1, 1, 0.5, 0.5, 1], [1, 1, 1, 0, 1]])
    numerics_BF = torch.tensor([[3.0, 1.0], [float("nan"), -20.0]])
    layer = FeatureLayer(_SCHEMA, 4, wide=True)
    assert layer.wide_numerics is not None
    with torch.no_grad():
        layer.wide_numerics.copy_(torch.arange(8.0).view(4, 2))
    x_BI, wide_BT = layer(FeatureInputs(embedding_BWD, wide_BWT, pool_BW, numerics_BF))
    assert wide_BT is not None
    for b in range(2):
        e, p = embedding_BWD[b].numpy(), pool_BW[b].numpy()
        # Nothing was seen yet: mean 0 and deviation 1; -20 is cut at -8.
        numerics = [[np.log(4.0), 1.0, 0.0, 0.0], [0.0, -8.0, 1.0, 0.0]][b]
        bag = (e[2, :3] * p[2]) + (e[3, :3] * p[3])
        np.testing.assert_allclose(x_BI[b].detach(), [*e[0], *e[1], *bag, *e[4, :2], *numerics], rtol=1e-5)
        expected = (wide_BWT[b].numpy() * p[:, None]).sum(0) + np.array(numerics) @ np.arange(8.0).reshape(4, 2)
        np.testing.assert_allclose(wide_BT[b].detach(), expected, rtol=1e-5)
    assert layer.output_dim == x_BI.shape[1]


def test_a_dimension_over_the_tables_is_refused() -> None:
    with pytest.raises(ValueError, match="'tags': dim 3, expected at most embedding_dim 2"):
        FeatureLayer(_SCHEMA, 2, wide=False)


def test_numerics_are_standardised_by_what_was_seen_before() -> None:
    schema = Schema("n", (Task("t"),), (Feature("v", kind="numeric"),))
    layer, moments = FeatureLayer(schema, 0, wide=False), NumericMoments(schema)
    rng = np.random.default_rng(0)
    seen: list[float] = []
    for _ in range(5):
        values = rng.normal(50, 3, size=(64, 1)).astype(np.float32)
        values[rng.random((64, 1)) < 0.3] = np.nan
        x_BI, _ = layer(FeatureInputs(None, None, None, torch.from_numpy(values)))
        if seen:
            expected = np.clip((values - np.mean(seen)) / np.std(seen), -8, 8)
            np.testing.assert_allclose(x_BI[:, :1], np.nan_to_num(expected), rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(x_BI[:, 1:], np.isnan(values))
        moments.observe(values)
        layer.standardise_by({name: torch.from_numpy(array) for name, array in moments.moments.items()})
        seen += values[~np.isnan(values)].tolist()


@pytest.mark.parametrize("unit", [1e-15, 1e-6, 1.0, 1e15])
def test_the_unit_of_a_feature_does_not_matter(unit: float) -> None:
    schema = Schema("n", (Task("t"),), (Feature("v", kind="numeric", indicator=False),))
    layer, moments = FeatureLayer(schema, 0, wide=False), NumericMoments(schema)
    values = np.random.default_rng(0).normal(50, 3, (500, 1))
    moments.observe((values * unit).astype(np.float32))
    layer.standardise_by({name: torch.from_numpy(array) for name, array in moments.moments.items()})

    x_BI, _ = layer(FeatureInputs(None, None, None, torch.from_numpy((values * unit).astype(np.float32))))

    np.testing.assert_allclose(x_BI, (values - values.mean()) / values.std(), rtol=1e-3, atol=1e-4)


def test_a_constant_reads_as_zero_and_what_differs_from_it_as_extreme() -> None:
    schema = Schema("n", (Task("t"),), (Feature("v", kind="numeric", indicator=False),))
    layer, moments = FeatureLayer(schema, 0, wide=False), NumericMoments(schema)
    moments.observe(np.full((3000, 1), 1234.567, np.float32))
    layer.standardise_by({name: torch.from_numpy(array) for name, array in moments.moments.items()})

    given = torch.tensor([[1234.567], [1235.0], [-1e5], [-1e30], [float("nan")]])
    x_BI, _ = layer(FeatureInputs(None, None, None, given))

    assert x_BI[:, 0].tolist() == [pytest.approx(0, abs=1e-3), 8, -8, 0, 0]


def test_a_feature_without_indicator_reads_as_the_mean_where_it_is_missing() -> None:
    features = (Feature("sure", kind="numeric", indicator=False), Feature("rare", kind="numeric"))
    layer = FeatureLayer(Schema("n", (Task("t"),), features), 0, wide=True)
    values = torch.tensor([[1.0, float("nan")], [float("nan"), 3.0]])
    ones = torch.ones(2, dtype=torch.float64)
    layer.standardise_by({"count": 2 * ones, "mean": ones, "variance": ones})  # of 0 and 2, for both
    assert layer.wide_numerics is not None
    with torch.no_grad():
        layer.wide_numerics.copy_(torch.tensor([[1.0], [10.0], [100.0]]))
    x_BI, wide_BT = layer(FeatureInputs(None, torch.zeros(2, 2, 1), None, values))
    np.testing.assert_allclose(x_BI, [[0, 0, 1], [0, 2, 0]], atol=1e-6)
    assert wide_BT is not None
    np.testing.assert_allclose(wide_BT.detach(), [[100], [20]], atol=1e-5)
    assert layer.output_dim == 3


def test_moments_equal_numpys_with_weights_and_an_unseen_column() -> None:
    rng = np.random.default_rng(1)
    x, weight = rng.normal(7, 2, size=(300, 2)), rng.random((300, 2)) * (rng.random((300, 2)) < 0.5)
    weight[:, 1] = 0
    moments = RunningMoments(2)
    for start in range(0, 300, 50):
        part = slice(start, start + 50)
        moments.observe(torch.from_numpy(x[part]), torch.from_numpy(weight[part]))
    mean = np.average(x[:, 0], weights=weight[:, 0])
    assert moments.mean_C[0].item() == pytest.approx(mean)
    assert moments.variance_C[0].item() == pytest.approx(np.average((x[:, 0] - mean) ** 2, weights=weight[:, 0]))
    assert [moments.count_C[1].item(), moments.mean_C[1].item(), moments.variance_C[1].item()] == [0, 0, 1]
    plain = RunningMoments(2)
    for start in range(0, 300, 70):
        plain.observe(torch.from_numpy(x[start : start + 70].astype(np.float32)))
    np.testing.assert_allclose(plain.mean_C, x.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(plain.variance_C, x.var(axis=0), rtol=1e-4)
    expected = (x - x.mean(axis=0)) / x.std(axis=0)
    single = plain.standardise(torch.from_numpy(x.astype(np.float32)), 8.0, torch.float32)
    np.testing.assert_allclose(single, expected, rtol=1e-3, atol=1e-4)


def test_old_values_fade_beyond_the_horizon() -> None:
    moments = RunningMoments(1, horizon=100)
    moments.observe(torch.zeros(1000, 1), torch.ones(1000, 1))
    for _ in range(20):
        moments.observe(torch.ones(50, 1), torch.ones(50, 1))
    assert moments.mean_C.item() == pytest.approx(1 - (100 / 150) ** 20)
