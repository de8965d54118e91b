"""The benchmark of swaps tells an answer of one version from a mixture."""

import numpy as np
import pytest

from benchmarks.swap_world import ITEMS, REQUESTS, SwapWorld
from benchmarks.swaps import Answers
from feature_store.payload import read_payload
from feature_store.pieces import Payload
from smes.arrays import F32
from smes_scorer.loading import TableModel, load_table_model


@pytest.fixture(scope="module")
def world() -> SwapWorld:
    return SwapWorld(4000)


def loaded(world: SwapWorld, payload: Payload, before: TableModel | None = None) -> TableModel:
    return load_table_model([read_payload(payload.pieces(), payload.total_bytes)], world.schema, before)


def scores_of(model: TableModel, world: SwapWorld) -> F32:
    numerics = np.zeros((ITEMS, 0), np.float32)
    return np.stack([model.score(world.ids(request), numerics) for request in range(REQUESTS)])


def test_its_versions_score_as_it_says(world: SwapWorld) -> None:
    first = loaded(world, world.full("a", 1))
    assert first.rows.table.num_rows == 4000
    second = loaded(world, world.delta("a", 2, 1500), first)

    np.testing.assert_allclose(scores_of(first, world), world.scores(1), atol=1e-6)
    np.testing.assert_allclose(scores_of(second, world), world.scores(2), atol=1e-6)
    assert len(second.rows.shadows[0]) == 1500


def test_a_mixture_of_two_versions_is_counted(world: SwapWorld) -> None:
    one, other = world.scores(1), world.scores(2)
    mixed = np.where(np.arange(ITEMS)[:, None] < ITEMS - 1, other[0], one[0])  # one item of the version before
    answers = Answers(
        seconds=np.zeros(4),
        request=np.array([0, 3, 0, 0]),
        version=np.array([1, 2, 2, -1]),
        scores=np.stack([one[0], other[3], mixed, np.zeros_like(mixed)]),
    )

    assert answers.mixed(world.scores) == 1
    assert answers.errors == 1
