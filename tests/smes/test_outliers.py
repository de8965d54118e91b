"""One record's influence is bounded: AUC of a feature that decides clicks, with and without extreme records."""

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from smes.arrays import F64, Bool
from smes.events import ExampleBlock
from smes.model.config import ModelConfig, OptimizerConfig
from smes.model.learner import Learner
from smes.model.task_outputs import TaskOutputs
from smes.schema import Feature, Schema, Task
from tests.smes.plain_smes import plain
from tests.smes.streams import history_stream

_N, _PART = 40_000, 5000
_MODEL = ModelConfig(
    embedding_dim=8,
    smes=plain({"experts.num": 8, "num_shared": 1, "num_adaptive": 1, "encoder_dims": (16,), "experts.dims": (8,)}),
)
_Z: F64 = np.random.default_rng(0).normal(size=_N)
_PRICE: F64 = 20 + 5 * _Z


def _aucs(price: F64, transform: str = "none", counts: Bool | None = None) -> NDArray[np.float64]:
    """AUC of each eighth of a stream whose clicks the price decides, of the rows that count."""
    counts = np.ones(_N, np.bool_) if counts is None else counts
    features = (Feature("price", kind="numeric", transform=transform),)  # type: ignore[arg-type]
    schema = Schema("prices", (Task("click"),), features)
    learner = Learner(schema, _MODEL, OptimizerConfig(), device=torch.device("cpu"))
    rng = np.random.default_rng(1)
    examples = ExampleBlock.empty(schema, _N)
    examples.ids[:] = rng.integers(0, 300, (_N, 2))
    examples.numerics[:, 0] = price
    examples.labels[:, 0] = rng.random(_N) < 1 / (1 + np.exp(-1.7 * _Z))
    results = [learner.step(learner.prepare(examples.take(slice(s, s + 256)))) for s in range(0, _N, 256)]
    scores = np.concatenate([result.scores.numpy()[:, 0] for result in results])
    parts = (slice(start, start + _PART) for start in range(0, _N, _PART))
    labels = examples.labels[:, 0]
    return np.array([roc_auc_score(labels[part][counts[part]], scores[part][counts[part]]) for part in parts])


@cache
def _control(transform: str = "none") -> NDArray[np.float64]:
    return _aucs(np.exp(_PRICE / 5) if transform == "log1p" else _PRICE, transform)


def _with(rows: int | slice, value: float) -> F64:
    price = _PRICE.copy()
    price[rows] = value
    return price


@pytest.mark.parametrize(
    ("price", "first"),
    [
        (_with(10_000, 1e9), 10_000),
        (_with(10_000, 1e30), 10_000),
        (_with(10_000, -1e30), 10_000),
        (_with(0, 1e9), 0),
        (_with(slice(0, None, 500), -1e9), 0),
    ],
    ids=["one of 1e9", "one of 1e30", "one of -1e30", "the first", "one in 500"],
)
def test_extreme_prices_cost_no_auc_from_the_next_eighth_on(price: F64, first: int) -> None:
    since = first // _PART + 1

    assert _control()[since:].min() > 0.72
    np.testing.assert_allclose(_aucs(price)[since:], _control()[since:], atol=0.005)


@pytest.mark.parametrize("transform", ["none", "log1p"])
@pytest.mark.parametrize(
    ("share", "rows"),
    [(0.05, slice(0, _N)), (0.05, slice(_N // 4, _N)), (0.2, slice(0, _N)), (0.2, slice(_N // 4, _N))],
    ids=["1 in 20", "1 in 20 later", "1 in 5", "1 in 5 later"],
)
def test_prices_that_nothing_measures_cost_the_other_rows_no_auc(share: float, rows: slice, transform: str) -> None:
    """However many: what clipping lets each add would grow with those before it."""
    bad = np.zeros(_N, np.bool_)
    bad[rows] = np.random.default_rng(5).random(rows.stop - rows.start) < share
    price = np.where(bad, 1e30, np.exp(_PRICE / 5) if transform == "log1p" else _PRICE)

    difference = _control(transform)[2:] - _aucs(price, transform, ~bad)[2:]

    assert difference.max() < 0.025
    assert difference[-2:].mean() < 0.006


def test_an_extreme_value_of_a_logarithmic_feature() -> None:
    price = np.exp(_PRICE / 5)
    price[10_000] = 1e30

    np.testing.assert_allclose(_aucs(price, "log1p")[3:], _control("log1p")[3:], atol=0.005)


@pytest.mark.parametrize(
    "change", [lambda x: x * 1000, lambda x: x / 1000, lambda x: x + 20_000], ids=["larger", "smaller", "moved"]
)
def test_a_scale_that_changes_for_good_is_followed(change: Callable[[F64], F64]) -> None:
    price = _PRICE.copy()
    price[_N // 2 :] = change(price[_N // 2 :])

    late = _aucs(price)[5:]

    assert late.min() > 0.74
    np.testing.assert_allclose(late, _control()[5:], atol=0.05)


def test_a_burst_of_positives_moves_a_base_rate_by_its_share() -> None:
    tasks = TaskOutputs(Schema("rates", (Task("click"), Task("watch", kind="regression", max_value=600.0))))
    mask, ones = torch.ones(256, 2, dtype=torch.bool), torch.ones(256)
    ordinary = torch.stack([(torch.arange(256) % 50 == 0).float(), torch.full((256,), 9.0)], dim=1)
    for _ in range(100):
        tasks.observe(ordinary, mask, ones)
    before = tasks.base_logits()

    tasks.observe(torch.tensor([[1.0, 600.0]]).expand(256, 2), mask, ones)

    moved = (tasks.base_logits() - before).tolist()
    assert moved[0] == pytest.approx(np.log(856 / 600), abs=0.01)  # 256 positives beside 600 of 25,600
    assert moved[1] == pytest.approx((np.log1p(600) - np.log1p(9)) / 101, abs=0.01)


def test_a_history_of_one_item_only_trains_like_any_other() -> None:
    """Full sequences of one id, for one user, in every row of some batches."""
    schema, blocks = history_stream(batches=30, size=64)
    learner = Learner(schema, _MODEL, OptimizerConfig(), device=torch.device("cpu"))
    for index, block in enumerate(blocks):
        if 10 <= index < 15:
            block.ids[:] = 1
        assert learner.step(learner.prepare(block)).taken
    state = learner.state()
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
    assert float(learner.serving_state()["table.embedding"].abs().max()) < 1.0
