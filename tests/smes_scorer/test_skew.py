"""When served and trained on differ: said where they do, silent where they do not."""

import re
from collections.abc import Callable

import numpy as np
import pytest
import redis

from feature_store.entities import EntityStore
from feature_store.snapshots import SnapshotStore, SnapshotWatcher
from smes.arrays import F32, I64
from smes.feature_figures import HOUR_MS, FeatureSums, plain_figures
from smes.schema import MISSING, Schema
from smes_scorer.answer import Answerer
from smes_scorer.config import ScorerConfig, SkewConfig
from smes_scorer.feature_lookup import FeatureLookup
from smes_scorer.first_answers import FirstAnswers
from smes_scorer.hot_swap import HotSwap
from smes_scorer.interface import Interfaces
from smes_scorer.loading import Load
from smes_scorer.skew import ServedFeatures
from smes_scorer.telemetry import Telemetry

HOUR = 490_000


def drawn(
    schema: Schema, rng: np.random.Generator, n: int, *, fill: float = 0.9, shift: float = 0.0
) -> tuple[I64, F32]:
    """Instances of users who are alike in themselves: with an age in a share ``fill``, batteries around ``shift``."""
    users = rng.integers(0, 300, n)
    of_user = np.random.default_rng(7).random(300)
    ids = np.full((n, schema.id_width), MISSING)
    ids[:, 0], ids[:, 1], ids[:, 2], ids[:, 3] = users, rng.integers(0, 50, n), 5, 3
    numerics = np.full((n, schema.num_numerics), np.nan, np.float32)
    numerics[:, 0] = np.where(of_user[users] < fill, 30, np.nan)
    numerics[:, 1] = of_user[users] + rng.normal(shift, 1, n)
    return ids, numerics


def trained(schema: Schema, ids: I64, numerics: F32) -> dict[str, object]:
    """A manifest's metrics of one hour."""
    sums = FeatureSums(schema)
    sums.add(ids, numerics, np.ones(ids.shape, np.bool_))
    return {"features": plain_figures({HOUR: (sums.rows, sums.figures())}, 1 << 16)}


class Served:
    """One hour of requests, and what comes of the comparison."""

    def __init__(self, schema: Schema, config: SkewConfig | None = None) -> None:
        self.telemetry = Telemetry()
        later = (HOUR + 1) * HOUR_MS
        self.features = ServedFeatures(schema, config or SkewConfig(), self.telemetry, now_ms=lambda: later)

    def add(self, ids: I64, numerics: F32, unknown: float = 0.0, items: int = 1) -> None:
        rng = np.random.default_rng(1)
        for row in range(len(ids)):
            rows = np.repeat(ids[row : row + 1], items, axis=0)
            known = rng.random(rows.shape) >= unknown
            self.features.add(rows, np.repeat(numerics[row : row + 1], items, axis=0), HOUR * HOUR_MS + row, known)

    def found(self) -> set[tuple[str, str]]:
        """(feature, figure) that counted."""
        [family] = [f for f in self.telemetry.registry.collect() if f.name == "smes_scorer_skew"]
        samples = [s for s in family.samples if s.name.endswith("_total") and s.value]
        return {(s.labels["feature"], s.labels["figure"]) for s in samples}


@pytest.mark.parametrize(
    ("served", "unknown", "expected"),
    [
        ({"fill": 0.7}, 0.0, {("age", "fill")}),
        ({"shift": 1.0}, 0.0, {("battery", "mean")}),
        ({}, 0.3, {("user_id", "unknown"), ("hour", "unknown")}),
        ({"fill": 0.87}, 0.0, set()),  # certain, but small
        ({}, 0.0, set()),
    ],
    ids=["fill", "mean", "unknown", "small", "alike"],
)
def test_what_differs_is_named_and_counted(
    schema: Schema, served: dict[str, float], unknown: float, expected: set[tuple[str, str]]
) -> None:
    rng = np.random.default_rng(0)
    one = Served(schema)
    one.add(*drawn(schema, rng, 2000, **served), unknown=unknown)
    metrics = trained(schema, *drawn(schema, rng, 20_000))
    one.features.compare(metrics)
    one.features.compare(metrics)  # every manifest has the hour again

    assert one.found() == expected
    assert one.telemetry.value("skew_comparisons_total") == 1
    assert (one.features.problem is None) == (not expected)
    for feature, figure in expected:
        assert re.search(rf"{feature} {figure} \S+ served, \S+ trained on", one.features.problem or "")


def test_an_ignored_feature_and_few_users_do_not_count(schema: Schema) -> None:
    rng = np.random.default_rng(0)
    metrics = trained(schema, *drawn(schema, rng, 20_000))
    ignoring, few = Served(schema, SkewConfig(ignored=("age",))), Served(schema)
    ignoring.add(*drawn(schema, rng, 2000, fill=0.2))
    ids, numerics = drawn(schema, rng, 2000, fill=0.2)
    ids[:, 0] %= 10
    few.add(ids, numerics)
    for one in (ignoring, few):
        one.features.compare(metrics)
        assert one.found() == set()


def test_of_items_that_are_chosen_among_only_the_fill_rate_counts(schema: Schema) -> None:
    rng = np.random.default_rng(0)
    ids, numerics = drawn(schema, rng, 20_000)
    numerics[:, 2] = rng.normal(10, 3, len(ids))  # days_out: the newest are shown
    metrics = trained(schema, ids, numerics)
    asked, with_others = drawn(schema, rng, 2000)
    with_others[:, 2] = rng.normal(100, 30, len(asked))
    alike, gone = Served(schema), Served(schema)
    alike.add(asked, with_others, items=3)
    gone.add(asked, np.where(np.arange(3) == 2, np.float32(np.nan), with_others), items=3)
    for one in (alike, gone):
        one.features.compare(metrics)

    assert alike.found() == set()
    assert gone.found() == {("days_out", "fill")}


def test_equal_worlds_raise_no_alarm(schema: Schema) -> None:
    """40 hours of few requests, without a least size: by the errors alone."""
    config = SkewConfig(share=1e-9, mean=1e-9)
    rng = np.random.default_rng(3)
    found = 0
    for _ in range(40):
        one = Served(schema, config)
        one.add(*drawn(schema, rng, 200))
        one.features.compare(trained(schema, *drawn(schema, rng, 2000)))
        found += len(one.found())
    assert found == 0


def test_figures_that_are_none_change_nothing(schema: Schema) -> None:
    one = Served(schema)
    one.add(*drawn(schema, np.random.default_rng(0), 10))
    for junk in ({}, {"features": 3}, {"features": {"hours": [{"hour": HOUR, "figures": {"age": ["x"]}}]}}):
        one.features.compare(junk)
    assert (one.features.problem, one.telemetry.value("skew_comparisons_total")) == (None, 0)


def test_requests_are_measured_and_compared_when_a_version_comes(
    client: redis.Redis,
    namespace: str,
    schema: Schema,
    store: SnapshotStore,
    publish: Callable[..., object],
    load: Load,
) -> None:
    telemetry, first_answers = Telemetry(), FirstAnswers()
    lookup = FeatureLookup(telemetry, retry_s=1.0)
    config = ScorerConfig()
    interfaces = Interfaces(config, lambda of: EntityStore(client, of, namespace), lookup, telemetry)
    swap = HotSwap(
        store,
        SnapshotWatcher(client, namespace, 0.05),
        schema,
        load,
        first_answers,
        telemetry,
        poll_s=0.05,
        on_served=lambda served: interfaces.of(served.schema).served.compare(served.manifest.metrics),
    )
    now = [HOUR * HOUR_MS]
    answerer = Answerer(interfaces, swap, first_answers, telemetry, now_ms=lambda: now[0])
    interface = interfaces.of(schema)
    interface.served = ServedFeatures(
        schema, config.skew, telemetry, now_ms=lambda: now[0], monotonic_s=iter(range(10_000)).__next__
    )
    publish(store, 1)
    swap.refresh()
    for user in range(300):
        answerer.answer(b'{"user_id": %d, "items": [1, 2], "context": {"hour": 3}}' % user)

    rng = np.random.default_rng(0)
    for version, problems in ((2, 0), (3, 1)):  # the hour must be over
        publish(store, version, metrics=trained(schema, *drawn(schema, rng, 20_000)))
        swap.refresh()
        assert len(re.findall("age fill 0 served, 0.[89]", str(interface.served.problem))) == problems
        now[0] += HOUR_MS
