"""What the trainer says of features, what the scorer measures of requests, and when the two differ."""

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from feature_store.manifest import storable_metrics
from smes.arrays import I64, Bool
from smes.events import ExampleBlock
from smes.feature_figures import HOUR_MS, FeatureSums, figures_of
from smes.model.config import ModelConfig, OptimizerConfig
from smes.model.learner import Learner
from smes.schema import MISSING, Derived, Feature, Schema, Task
from trainer.feature_figures import SampledFeatures

SCHEMA = Schema(
    "figures",
    tasks=(Task("click"),),
    features=(
        Feature("city", source="user"),
        Feature("price", "numeric", source="item", transform="log1p"),
        Feature("tags", "bag", max_length=3),
        Feature("battery", "numeric"),
    ),
)
HOUR = 490_000


def block(rng: np.random.Generator, hour: int, n: int = 400) -> ExampleBlock:
    """Examples of an hour: city 1 … 9, price filled in half, tags in 3 of 4, battery around 5."""
    examples = ExampleBlock.empty(SCHEMA, n)
    examples.event_time_ms[:] = hour * HOUR_MS + np.arange(n)
    examples.ids[:, 0] = rng.integers(0, 200, n)
    examples.ids[:, 1] = rng.integers(0, 50, n)
    examples.ids[:, 2] = rng.integers(1, 10, n)
    examples.ids[rng.random(n) < 0.75, 3] = 7
    examples.ids[:, 4] = np.where(examples.ids[:, 3] == MISSING, MISSING, 8)
    examples.numerics[:, 0] = np.where(rng.random(n) < 0.5, np.exp(rng.normal(size=n)), np.nan)
    examples.numerics[:, 1] = rng.normal(5, 2, n)
    examples.numerics[0, 1] = 1e30  # measures nothing
    return examples


def naive(examples: ExampleBlock, known: Bool) -> dict[str, dict[str, float]]:
    """Fill rate, mean and share of unknown ids by definition."""
    ids, numerics = examples.ids, examples.numerics.astype(np.float64)
    found: dict[str, dict[str, float]] = {}
    for name, columns in SCHEMA.id_slices.items():
        cells = [(n, w) for n in range(len(ids)) for w in range(columns.start, columns.stop)]
        present = [bool(known[cell]) for cell in cells if ids[cell] != MISSING]
        found[name] = {
            "fill": float(np.mean((ids[:, columns] != MISSING).any(axis=1))),
            "unknown": 1 - sum(present) / len(present),
        }
    for f, feature in enumerate(SCHEMA.numeric_features):
        kept = [x for x in numerics[:, f] if not math.isnan(x) and abs(x) < 1e20]
        values = [math.copysign(math.log1p(abs(x)), x) for x in kept] if feature.transform == "log1p" else kept
        found[feature.name] = {
            "fill": float(np.mean(~np.isnan(numerics[:, f]))),
            "mean": float(np.mean(values)),
            "deviation": float(np.std(values)),
        }
    return found


def test_the_trainer_says_how_its_last_complete_hours_were() -> None:
    rng = np.random.default_rng(0)
    schema = replace(SCHEMA, derived=(Derived("tag", "hash", ("item_id",), into=4),))
    learner = Learner(schema, ModelConfig(ranker="linear"), OptimizerConfig(), device=torch.device("cpu"))
    clock = iter(range(1000))
    figures = SampledFeatures(learner, monotonic_s=lambda: float(next(clock)))
    first, second = block(rng, HOUR), block(rng, HOUR)
    vocabulary_W = [0, 1, 2, 3, 3, 3]
    rows: set[tuple[int, int]] = set()
    known: list[Bool] = []

    figures.see(first)  # nobody reads it yet
    figures.start()
    for examples in (first, second):
        figures.see(examples)
        ids = [list(zip(vocabulary_W, row, strict=True)) for row in examples.ids.tolist()]
        known.append(np.array([[one in rows for one in row] for row in ids]))
        rows |= {one for row in ids for one in row}
        learner.prepare(examples)
    assert figures.summary() == {}
    figures.see(block(rng, HOUR + 1))

    said = figures_of(json.loads(json.dumps(storable_metrics({"features": figures.summary()})))["features"])
    assert list(said) == [HOUR]
    for name, values in naive(ExampleBlock.concat([first, second]), np.concatenate(known)).items():
        figure = said[HOUR][name]
        for what, value in values.items():
            got = figure.deviation if what == "deviation" else getattr(figure, what).value
            assert got == pytest.approx(value, rel=1e-4, abs=1e-6), (name, what)
    assert math.isnan(said[HOUR]["battery"].unknown.value)
    assert math.isnan(said[HOUR]["city"].mean.value)


def test_the_errors_hold_though_instances_of_a_user_are_alike() -> None:
    """Each of 300 users has the feature in all of their 20 instances or in none, and one level of the number."""

    def draw(rng: np.random.Generator) -> FeatureSums:
        users = np.repeat(rng.integers(0, 2**62, 300), 20)
        has, level = np.repeat(rng.random((2, 300)), 20, axis=1)
        ids: I64 = np.full((len(users), SCHEMA.id_width), MISSING)
        ids[:, 0], ids[:, 1], ids[:, 2] = users, 1, np.where(has < 0.3, 5, MISSING)
        numerics = np.stack([np.full(len(users), np.nan), level], axis=1).astype(np.float32)
        sums = FeatureSums(SCHEMA)
        sums.add(ids, numerics, None)
        return sums

    drawn = [draw(np.random.default_rng(seed)).figures() for seed in range(200)]
    for shares in ([figures["city"].fill for figures in drawn], [figures["battery"].mean for figures in drawn]):
        actual = np.std([share.value for share in shares], ddof=1)
        assert np.mean([share.error for share in shares]) == pytest.approx(actual, rel=0.2)


def test_what_is_no_figures_is_refused() -> None:
    bad: list[Any] = [[], {"hours": 3}, {"hours": [{"hour": 1}]}, {"hours": [{"hour": 1, "figures": {"a": [1]}}]}, "x"]
    for data in bad:
        with pytest.raises(ValueError):
            figures_of(data)
