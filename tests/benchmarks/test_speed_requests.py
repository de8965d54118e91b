"""The benchmark of request-level compute: what it says is shared is shared, and both sides are timed in each round."""

import numpy as np

from benchmarks.speed_requests import HISTORY, SHARED_FIELDS, instances, measure, schema_of
from benchmarks.speed_setting import Setting
from smes.rankers.sparse.config import SmesConfig

SMALL = Setting(
    num_fields=23, embedding_dim=8, num_tasks=2, batch_size=64, candidates=120, vocabulary=50, num_batches=2
)


def test_the_instances_share_what_the_benchmark_says() -> None:
    for history in (0, HISTORY):
        schema = schema_of(SMALL, history)
        ids = instances(schema, SMALL, rows=64, per_request=8, seed=0).reshape(8, 8, -1)
        shared = (ids == ids[:, :1]).all(axis=(0, 1))
        assert shared.sum() == SHARED_FIELDS + history
        assert shared[0]
        assert not shared[1]


def test_every_figure_has_a_value_for_each_round() -> None:
    rounds = measure(SMALL, SmesConfig(), repeats=2, calls=1)
    kinds = [f"request_level{history}{train}" for history in ("", "_history") for train in ("", "_train")]
    assert set(rounds) == {f"{kind}_{part}" for kind in kinds for part in ("ms", "apart_ms", "speedup")}
    for kind in kinds:
        ratios = np.array(rounds[f"{kind}_apart_ms"]) / np.array(rounds[f"{kind}_ms"])
        np.testing.assert_allclose(rounds[f"{kind}_speedup"], ratios)
        assert len(ratios) == 2
