"""Scores for which what a request shares is computed once are those of each instance by itself."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from smes.arrays import F32, I64
from smes.events import ExampleBlock
from smes.model.config import ModelConfig, OptimizerConfig, RankerName
from smes.model.deltas import RowDelta
from smes.model.learner import Learner
from smes.model.request_kernels import equal_in_requests
from smes.model.request_split import LEAST_SAVED, Splits, features_shared
from smes.model.serving import RowReader, ServingModel, TensorRows, group_columns
from smes.model.serving_rows import ServingTable, Shadow, TableRows
from smes.rankers.ranker_input import RequestRows
from smes.schema import MISSING, Feature, Schema, Task

SCHEMA = Schema(
    "requests",
    tasks=(Task("click"), Task("watch", kind="regression", max_value=600.0)),
    features=(
        Feature("age", kind="numeric"),
        Feature("recent", kind="sequence", max_length=4, vocabulary="item_id", query="item_id"),
        Feature("city", dim=2),
        Feature("price", kind="numeric", transform="log1p"),
        Feature("outcomes", kind="sequence", max_length=4, accompanies="recent"),
        Feature("tags", kind="bag", max_length=3),
        Feature("hour", kind="numeric", indicator=False),
    ),
)
IDS, NUMBERS = [f.name for f in SCHEMA.id_features], [f.name for f in SCHEMA.numeric_features]
COUNTS = (9, 1, 30, 6)
N = sum(COUNTS)
STARTS = np.cumsum((0, *COUNTS[:-1]))
HISTORY = {"recent", "outcomes"}
SHARED = {
    "items differ": ({"user_id", "city", "age", "hour", *HISTORY}, {"user_id", "city", "age", "hour", *HISTORY}),
    "all but one": ({*IDS, *NUMBERS} - {"tags"}, {*IDS, *NUMBERS} - {"tags"}),
    # Entries and their target, or entries and their companions, go with the items if one of them does.
    "histories differ": ({*IDS, "price"} - HISTORY, {"user_id", "city", "tags", "price"}),
    "outcomes differ": ({*IDS, "hour"} - {"outcomes"}, {"user_id", "city", "tags", "hour"}),
}
"""What is equal within a request, and what is therefore computed once."""


def rows(shared: set[str], starts: I64 = STARTS, seed: int = 0, n: int = N) -> tuple[I64, F32]:
    """n instances whose requests have these features in common; ids and numbers are missing here and there."""
    rng = np.random.default_rng(seed)
    request_N = np.searchsorted(starts, np.arange(n), side="right") - 1
    ids = rng.integers(0, 12, (n, SCHEMA.id_width))
    ids[rng.random(ids.shape) < 0.3] = MISSING
    ids[:, :2] = np.abs(ids[:, :2])
    numerics = rng.normal(size=(n, SCHEMA.num_numerics)).astype(np.float32) * 30
    numerics[rng.random(numerics.shape) < 0.2] = np.nan
    numerics[3, 1] = 1e30  # which nothing measures
    for name in shared & {*IDS}:
        ids[:, SCHEMA.id_slices[name]] = ids[starts[request_N], SCHEMA.id_slices[name]]
    for i, name in enumerate(NUMBERS):
        if name in shared:
            numerics[:, i] = numerics[starts[request_N], i]
    return ids, numerics


def trained(ranker: RankerName) -> Learner:
    """A learner after a few steps."""
    learner = Learner(SCHEMA, ModelConfig(ranker), OptimizerConfig(), device=torch.device("cpu"))
    rng = np.random.default_rng(1)
    for seed in range(8):
        ids, numerics = rows(set(), seed=seed)
        labels = (rng.random((N, 2)) < 0.5) * np.array([1, 40])
        block = replace(ExampleBlock.empty(SCHEMA, N), ids=ids, numerics=numerics, labels=labels.astype(np.float32))
        learner.step(learner.prepare(replace(block, label_mask=np.ones((N, 2), np.bool_))))
    return learner


@pytest.fixture(scope="module")
def models() -> dict[RankerName, ServingModel]:
    """Models of several rankers."""
    names: tuple[RankerName, ...] = ("smes", "mmoe", "linear")
    learners = [trained(name) for name in names]
    return {name: model_of(one, one.serving_state()) for name, one in zip(names, learners, strict=True)}


def model_of(learner: Learner, state: dict[str, Tensor]) -> ServingModel:
    """A serving model that takes every split, however little that spares."""
    model = ServingModel.from_state(SCHEMA, learner.config, state)
    model._splits = every_split(model)
    return model


def every_split(model: ServingModel) -> Splits:
    """That has found none yet."""
    return Splits(SCHEMA, model._splits._embedding_dim, least_saved=1)


@pytest.mark.parametrize("ranker", ["smes", "mmoe", "linear"])
@pytest.mark.parametrize("case", SHARED)
@pytest.mark.parametrize("starts", [STARTS, STARTS[:1], np.arange(0, N, 23)], ids=["uneven", "one", "even"])
def test_scores_are_those_of_each_instance_by_itself(
    models: dict[RankerName, ServingModel], ranker: RankerName, case: str, starts: I64
) -> None:
    model = models[ranker]
    model._splits = every_split(model)  # no other case's will do
    equal, computed_once = SHARED[case]
    ids, numerics = rows(equal, starts)
    alone = model.score(ids, numerics, requests=np.arange(N))
    together = model.score(ids, numerics, requests=starts)
    np.testing.assert_allclose(together, alone, rtol=2e-6, atol=1e-6)
    again = model.score(ids, numerics, requests=starts)  # with what was kept of the weights
    np.testing.assert_array_equal(together, again)
    used = model._splits.of(model._derive(ids, numerics, None, np.zeros(0, np.float32)), starts)
    assert used is not None
    assert {name for name, once in zip([*IDS, *NUMBERS], used.shared, strict=True) if once} == computed_once


@pytest.mark.parametrize("outlier", [30.0, 1e5])
def test_what_the_router_clips_is_clipped(models: dict[RankerName, ServingModel], outlier: float) -> None:
    """Its norm is folded into its weights, as long as nothing lies so far out that rounding would show."""
    learner = trained("smes")
    state = learner.serving_state()
    state["table.embedding"][::3] *= outlier
    model = model_of(learner, state)
    ids, numerics = rows(SHARED["items differ"][0])
    alone = model.score(ids, numerics, requests=np.arange(N))
    assert np.abs(alone - models["smes"].score(ids, numerics)).max() > 1e-3
    together = model.score(ids, numerics, requests=STARTS)
    np.testing.assert_allclose(together, alone, rtol=2e-6, atol=2e-6)


def test_one_request_is_the_default_and_a_split_that_spares_little_is_not_made(
    models: dict[RankerName, ServingModel],
) -> None:
    model = models["smes"]
    ids, numerics = rows(SHARED["items differ"][0], STARTS[:1])
    np.testing.assert_array_equal(model.score(ids, numerics), model.score(ids, numerics, requests=STARTS[:1]))
    read = model._derive(ids, numerics, None, np.zeros(0, np.float32))
    spared = 12 * (N - 1)  # 2 numbers, user, city and 2 × 4 entries
    dim = model._splits._embedding_dim
    assert Splits(SCHEMA, dim, least_saved=spared).of(read, STARTS[:1]) is not None
    for least_saved, starts in ((spared + 1, STARTS[:1]), (LEAST_SAVED, STARTS[:1]), (1, np.arange(N))):
        assert Splits(SCHEMA, dim, least_saved=least_saved).of(read, starts) is None
    ids, numerics = rows(set(), STARTS[:1])
    assert (
        Splits(SCHEMA, dim, least_saved=1).of(model._derive(ids, numerics, None, np.zeros(0, np.float32)), STARTS[:1])
        is None
    )


def test_what_is_scored_may_have_any_precision_and_rows_are_read_as_compiled_loops_know_them(
    models: dict[RankerName, ServingModel],
) -> None:
    model, (ids, numerics) = models["smes"], rows(SHARED["items differ"][0])
    reader = Noting(model._rows)
    np.testing.assert_array_equal(
        model.reading(reader).score(ids, numerics.astype(np.float64), requests=STARTS),
        model.score(ids, numerics, requests=STARTS),
    )
    assert [len(ids) for ids in reader.read_ids] == [len(COUNTS), N]
    assert all(ids.flags.c_contiguous for ids in reader.read_ids), "else a loop is compiled anew in a request"


class Noting(RowReader):
    """Notes the ids that it reads."""

    def __init__(self, rows: RowReader) -> None:
        self._rows = rows
        self.read_ids: list[I64] = []

    def read(self, ids_NW: I64, columns_W: I64 | None = None) -> dict[str, Tensor]:
        self.read_ids.append(ids_NW)
        return self._rows.read(ids_NW, columns_W)


@pytest.mark.parametrize("requests", [[], [1], [0, N], [0, 4, 4], [0, 5, 3]])
def test_requests_that_are_no_rising_rows_are_refused(
    models: dict[RankerName, ServingModel], requests: list[int]
) -> None:
    with pytest.raises(ValueError, match="requests: expected rising numbers from 0"):
        models["linear"].score(*rows(set()), requests=np.array(requests, np.int64))


def test_chance_makes_no_split_of_its_own(models: dict[RankerName, ServingModel]) -> None:
    model = models["smes"]
    for extra in (set(), {"tags"}, {"price"}):  # the history alone has most columns
        ids, numerics = rows(SHARED["items differ"][0] | extra, STARTS[:1])
        model.score(ids, numerics)
        read = model._derive(ids, numerics, None, np.zeros(0, np.float32))
        splits = {id(model._splits.of(read, STARTS[:1])) for _ in range(2)}
        assert len(splits) == 1


def test_of_many_patterns_the_last_splits_alone_are_kept(models: dict[RankerName, ServingModel]) -> None:
    splits, rng = every_split(models["smes"]), np.random.default_rng(0)
    for seed in range(60):
        read = models["smes"].derived(*rows({*rng.choice([*IDS, *NUMBERS], 3)}, STARTS[:1], seed))
        splits.of(read, STARTS[:1])
    assert len({id(split) for split in (*splits._known, *splits._found.values())}) == 8


def test_equal_columns_are_found_within_requests() -> None:
    ids, _ = rows({"user_id", "tags"})
    equal = equal_in_requests(ids, STARTS)
    ends = [*STARTS[1:], N]
    expected = [all(len(set(ids[a:b, c])) == 1 for a, b in zip(STARTS, ends, strict=True)) for c in range(len(ids.T))]
    np.testing.assert_array_equal(equal, expected)
    assert equal.sum() >= 4
    assert not features_shared(SCHEMA, np.zeros(SCHEMA.id_width, np.bool_), np.zeros(3, np.bool_)).any()


def test_every_reader_reads_some_columns_as_it_reads_all() -> None:
    learner = trained("linear")
    state = learner.serving_state()
    ids, _ = rows(set(), seed=3)
    ids[0, 0] = 777  # never seen: it reads the row of its vocabulary
    columns = np.array([0, 3, 7])
    groups = group_columns(SCHEMA, learner.config)
    keys, weights = state["table.keys"].numpy(), {name: state[f"table.{name}"].numpy() for name in groups}
    table, tensors = ServingTable(groups), TensorRows(SCHEMA, learner.config, state)
    table.add(keys[1:], {name: array[1:] for name, array in weights.items()})
    delta = RowDelta(keys[:1], {name: array[:1] for name, array in weights.items()}, np.zeros(0, np.int64))
    for reader in (tensors, TableRows(tensors._keys, table, (Shadow(delta, 2, groups),)), learner.freeze().rows):
        every, some = reader.read(ids), reader.read(ids[:, columns], columns)
        assert set(every) == set(groups)
        for name, values in every.items():
            assert torch.equal(some[name], values[:, columns]), name


@pytest.mark.parametrize("counts", [(7,), (4, 4, 4), (5, 1, 3), (1,) * 9 + (40,)])
def test_products_with_what_requests_have(counts: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    n, starts = sum(counts), torch.tensor(np.cumsum((0, *counts[:-1])))
    request_rows = RequestRows(starts, n)
    x_NA = torch.randn(n, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    y_RAC = torch.randn(len(counts), 3, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    request_N = [r for r, count in enumerate(counts) for _ in range(count)]
    assert request_rows.spread(starts).tolist() == [int(starts[r]) for r in request_N]
    expected = torch.stack([x_NA[i] @ y_RAC[r] for i, r in enumerate(request_N)])
    torch.testing.assert_close(request_rows.product(x_NA, y_RAC), expected)
    z_RC = torch.randn(len(counts), 2, generator=generator, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(request_rows.product(x_NA, y_RAC, z_RC), expected + z_RC[request_N])
    torch.autograd.gradcheck(request_rows.product, (x_NA, y_RAC, z_RC))
