"""The learner: restarts, the serving model made from it, and what it learns."""

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from smes.events import ExampleBlock
from smes.model.config import ModelConfig, OptimizerConfig, RankerName, RareTasksConfig
from smes.model.learner import Learner
from smes.model.rank_model import RANKERS
from smes.model.serving import ServingModel
from smes.rankers.config import HomeConfig, MmoeConfig, PleConfig
from smes.rankers.sparse.config import SmesConfig
from smes.schema import MISSING, Schema
from tests.smes.plain_smes import changed, plain
from tests.smes.streams import RICH_SCHEMA, loss_of, stream

_CPU = torch.device("cpu")
_SMALL = plain({"experts.num": 8, "num_shared": 1, "num_adaptive": 1, "encoder_dims": (16,), "experts.dims": (8,)})
_DEEP = changed(
    _SMALL, {"num_shared": 0, "num_adaptive": 2, "encoder_dims": (16, 16), "experts.dims": (8, 8), "router.rank": 4}
)
_MODELS = {
    "smes-default": ModelConfig(
        embedding_dim=8, smes=changed(SmesConfig(), {"groups.declared": {"rare": ("like", "watch")}})
    ),
    "smes": ModelConfig(embedding_dim=8, head_dim=0, smes=_SMALL),
    "smes-found-groups": ModelConfig(
        embedding_dim=8, smes=changed(SmesConfig(), {"groups.found": 2, "groups.found_until": 8 * 64})
    ),
    "smes-low-rank-no-wide": ModelConfig(embedding_dim=8, head_dim=8, wide=False, smes=_DEEP),
    "smes-residual": ModelConfig(
        embedding_dim=8,
        rare=RareTasksConfig(gradient_power=1.0, gradient_limit=2.0, linear_prior=300.0),
        smes=changed(_SMALL, {"experts.form": "residual", "experts.narrow_dim": 8}),
    ),
    "smes-bounded-raw": ModelConfig(
        embedding_dim=8,
        smes=changed(
            _SMALL, {"router.input": "raw", "router.rank": 4, "max_active": 3, "balance.loss": "mutual_information"}
        ),
    ),
    "smes-own-pools": ModelConfig(
        embedding_dim=8,
        smes=changed(
            _SMALL,
            {
                "experts.num": 9,
                "num_group": 1,
                "groups.pools": "own",
                "groups.declared": {"rare": ("like", "watch")},
                "shared_experts": "always_on",
                "router.rank": 4,
                "router.maps": "own",
                "router.input": "both",
                "router.norm": "batch",
                "trunk_dims": (16, 8),
            },
        ),
    ),
    "smes-group-routers": ModelConfig(
        embedding_dim=8,
        smes=changed(
            _SMALL,
            {
                "num_adaptive": 0,
                "num_group": 2,
                "router.per": "group",
                "router.norm": "layer",
                "router.scale": 3.0,
                "max_active": 4,
                "encoder_dims": (),
                "experts.form": "low_rank",
                "experts.norm": "rms",
            },
        ),
    ),
    "linear": ModelConfig(ranker="linear"),
    "shared_bottom": ModelConfig(ranker="shared_bottom", embedding_dim=8),
    "mmoe": ModelConfig(
        ranker="mmoe",
        embedding_dim=8,
        rare=RareTasksConfig(gradient_power=0.0, linear_prior=0.0, borrow_ratio=0.0),
        mmoe=MmoeConfig(4, (16,), (16, 8)),
    ),
    "ple": ModelConfig(ranker="ple", embedding_dim=8, ple=PleConfig(2, 2, 1, (), (8,))),
    "home": ModelConfig(ranker="home", embedding_dim=8, home=HomeConfig({"a": ("like",)}, 2, encoder_dims=(16,))),
}


def _learner(model: ModelConfig, schema: Schema = RICH_SCHEMA, seed: int = 0, **optimizer: Any) -> Learner:
    return Learner(schema, model, OptimizerConfig(**optimizer), device=_CPU, seed=seed)


def _assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("name", _MODELS)
def test_a_restart_continues_bit_for_bit_also_when_the_table_grows(name: str) -> None:
    blocks = stream(RICH_SCHEMA, batches=12, size=64, items=4000)
    whole, first = _learner(_MODELS[name]), _learner(_MODELS[name])
    results = [whole.step(whole.prepare(block)) for block in blocks]
    for block in blocks[:5]:
        first.step(first.prepare(block))
    # This batch is prepared but not trained on. Its new ids are in the state already; that must make no difference.
    first.prepare(blocks[5])
    state = first.state()
    rows = first.num_rows
    second = _learner(_MODELS[name])  # with the same seed, as after a restart: it decides the first weights of new ids
    second.step(second.prepare(blocks[-1]))
    second.load_state(state)
    assert second.step_number == 5
    for block, expected in zip(blocks[5:], results[5:], strict=True):
        result = second.step(second.prepare(block))
        assert torch.equal(result.scores, expected.scores)
    assert second.num_rows > rows + 300, "the table grew after the restart"
    _assert_equal(second.state(), whole.state())


@pytest.mark.parametrize("name", _MODELS)
def test_the_serving_model_scores_as_the_next_step_does(name: str) -> None:
    blocks = stream(RICH_SCHEMA, batches=6, size=64, items=50)
    learner = _learner(_MODELS[name])
    for block in blocks[:5]:
        learner.step(learner.prepare(block))
    serving = ServingModel.from_state(RICH_SCHEMA, _MODELS[name], learner.serving_state())
    seen = np.isin(blocks[5].ids[:, 1], np.concatenate([b.ids[:, 1] for b in blocks[:5]]))
    known = blocks[5].take(np.flatnonzero(seen))
    assert len(known) > 10
    expected = learner.step(learner.prepare(known)).scores.numpy()
    np.testing.assert_allclose(serving.score(known.ids, known.numerics), expected, rtol=1e-5, atol=1e-6)


def test_the_routers_running_moments_are_in_the_snapshot() -> None:
    blocks = stream(RICH_SCHEMA, batches=6, size=64, items=50)
    learner = _learner(_MODELS["smes-default"])
    for block in blocks[:5]:
        learner.step(learner.prepare(block))
    tensors = learner.serving_state()
    assert int(tensors["dense.ranker.router.moments.count_C"].min()) == 5 * 64
    serving = ServingModel.from_state(RICH_SCHEMA, _MODELS["smes-default"], tensors)
    served = serving.score(blocks[4].ids, blocks[4].numerics)
    expected = learner.step(learner.prepare(blocks[4])).scores.numpy()
    np.testing.assert_allclose(served, expected, rtol=1e-5, atol=1e-6)
    tensors["dense.ranker.router.moments.mean_C"] += 1
    changed = ServingModel.from_state(RICH_SCHEMA, _MODELS["smes-default"], tensors)
    other = changed.score(blocks[4].ids, blocks[4].numerics)
    assert not np.allclose(other, served, rtol=1e-5, atol=1e-6), "they change the routing"


def test_a_step_changes_the_learner_but_no_copy_taken_before() -> None:
    blocks = stream(RICH_SCHEMA, batches=3, size=64)
    learner = _learner(_MODELS["smes"])
    learner.step(learner.prepare(blocks[0]))
    serving_state = learner.serving_state()
    serving = ServingModel.from_state(RICH_SCHEMA, _MODELS["smes"], serving_state)
    kept = {name: tensor.clone() for name, tensor in serving_state.items()}
    before = serving.score(blocks[1].ids, blocks[1].numerics)
    learner.step(learner.prepare(blocks[1]))
    _assert_equal(serving_state, kept)
    assert np.array_equal(serving.score(blocks[1].ids, blocks[1].numerics), before)
    after = learner.serving_state()
    for name in ("dense.ranker.encoder.layers.0.0.weight", "table.embedding", "table.wide"):
        assert not torch.equal(after[name][: len(kept[name])], kept[name]), name


def test_scores_come_from_before_the_step() -> None:
    block = stream(RICH_SCHEMA, batches=1, size=256)[0]
    learner = _learner(_MODELS["smes"])

    first = learner.step(learner.prepare(block))

    assert first.scores[:, 0].tolist() == pytest.approx([0.5] * 256, abs=0.2)


def test_the_loss_falls() -> None:
    block = stream(RICH_SCHEMA, batches=1, size=256)[0]
    clicks_only = replace(block, label_mask=block.label_mask & np.array([True, False, False]))
    learner = _learner(_MODELS["smes"])

    scores = [learner.step(learner.prepare(block)).scores for _ in range(41)]

    for examples in (block, clicks_only):
        first, last = (loss_of(RICH_SCHEMA, result, examples) for result in (scores[0], scores[-1]))
        assert last < 0.8 * first


@cache
def _late_click_auc(ranker: RankerName) -> float:
    shape = plain({"experts.num": 8, "num_shared": 1, "num_adaptive": 1, "encoder_dims": (32,), "experts.dims": (16,)})
    model = ModelConfig(ranker=ranker, embedding_dim=8, embedding_scale=0.5, head_dim=0, smes=shape)
    learner = _learner(model, learning_rate=1e-2, embedding_learning_rate=0.2)
    blocks = stream(RICH_SCHEMA, batches=100, size=128)
    scores = [learner.step(learner.prepare(block)).scores.numpy()[:, 0] for block in blocks]
    clicks = np.concatenate([block.labels[:, 0] for block in blocks[60:]])
    return float(roc_auc_score(clicks, np.concatenate(scores[60:])))


def test_a_linear_model_learns_what_adds_up() -> None:
    assert _late_click_auc("linear") > 0.64, "from the tags and the number"


@pytest.mark.parametrize("ranker", sorted(RANKERS.keys() - {"linear"}))
def test_it_learns_tastes_that_a_linear_model_cannot(ranker: RankerName) -> None:
    assert _late_click_auc(ranker) > _late_click_auc("linear") + 0.08, "from user taste times item taste"


def test_masked_rows_train_nothing() -> None:
    block = stream(RICH_SCHEMA, batches=1, size=64)[0]
    learner = _learner(ModelConfig(embedding_dim=8, smes=changed(_SMALL, {"balance.weight": 0.0})))
    learner.prepare(block)
    before = learner.serving_state()
    block.label_mask[:] = False
    learner.step(learner.prepare(block))
    after = learner.serving_state()
    for name in after:
        if "moments" not in name:
            assert torch.equal(after[name], before[name]), name


def test_only_rows_of_the_batch_move() -> None:
    blocks = stream(RICH_SCHEMA, batches=2, size=64, items=500)
    learner = _learner(_MODELS["smes"])
    learner.step(learner.prepare(blocks[0]))
    batch = learner.prepare(blocks[1])
    before = learner.serving_state()
    learner.step(batch)
    after = learner.serving_state()
    untouched = torch.ones(learner.num_rows, dtype=torch.bool)
    untouched[batch.rows_U] = False
    assert untouched.any()
    for table in ("table.embedding", "table.wide"):
        assert torch.equal(after[table][untouched], before[table][untouched])
        assert not torch.equal(after[table][~untouched], before[table][~untouched])


def test_unknown_ids_are_scored_as_absent_ones() -> None:
    learner = _learner(_MODELS["smes"])
    for block in stream(RICH_SCHEMA, batches=3, size=64):
        learner.step(learner.prepare(block))
    serving = ServingModel.from_state(RICH_SCHEMA, _MODELS["smes"], learner.serving_state())
    ids = block.ids[:2].copy()
    ids[0, 1], ids[1, 1] = 10**12, MISSING
    ids[1, [0, 2, 3, 4, 5]] = ids[0, [0, 2, 3, 4, 5]]
    scores = serving.score(ids, np.repeat(block.numerics[:1], 2, axis=0))
    assert np.array_equal(scores[0], scores[1])
    assert np.isfinite(scores).all()


def test_threads_score_alike() -> None:
    learner = _learner(_MODELS["smes"])
    block = stream(RICH_SCHEMA, batches=1, size=64)[0]
    learner.step(learner.prepare(block))
    serving = ServingModel.from_state(RICH_SCHEMA, _MODELS["smes"], learner.serving_state())
    expected = serving.score(block.ids, block.numerics)
    different: list[int] = []

    def work() -> None:
        different.append(sum(not np.array_equal(serving.score(block.ids, block.numerics), expected) for _ in range(20)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert different == [0, 0, 0, 0]


def test_results_report_the_routing() -> None:
    block = stream(RICH_SCHEMA, batches=1, size=64)[0]
    learner = _learner(_MODELS["smes"])

    result = learner.step(learner.prepare(block))

    assert result.active_experts is not None
    assert result.expert_load is not None
    assert result.expert_load.sum(dim=1).tolist() == [2 * 64] * RICH_SCHEMA.num_tasks
    assert 2 <= int(result.active_experts.min()) <= int(result.active_experts.max()) <= 1 + RICH_SCHEMA.num_tasks


def test_a_ranker_without_experts_reports_no_routing() -> None:
    block = stream(RICH_SCHEMA, batches=1, size=64)[0]
    learner = _learner(_MODELS["linear"])

    result = learner.step(learner.prepare(block))

    assert result.active_experts is None
    assert result.expert_load is None


def test_making_a_learner_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)

    _learner(_MODELS["smes"], seed=1)

    assert torch.equal(torch.rand(3), expected)


def test_the_seed_decides_the_first_weights() -> None:
    a, b, c = (_learner(_MODELS["smes"], seed=s).serving_state() for s in (1, 1, 2))

    _assert_equal(a, b)
    assert not torch.equal(a["dense.ranker.router.up.weight"], c["dense.ranker.router.up.weight"])


_NARROW = ModelConfig(embedding_dim=4, smes=_SMALL)


@pytest.mark.parametrize(
    ("other", "expected"),
    [(_MODELS["linear"], "another schema or model"), (_NARROW, "11.*, expected .*15.*another schema or model")],
)
def test_the_state_of_another_model_is_refused(other: ModelConfig, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        _learner(_MODELS["smes"]).load_state(_learner(other).state())


def test_a_serving_model_refuses_the_tensors_of_another_model() -> None:
    with pytest.raises(ValueError, match=r"expected \[3, 8\]"):
        ServingModel.from_state(RICH_SCHEMA, _MODELS["smes"], _learner(_NARROW).serving_state())


def test_a_serving_model_refuses_the_columns_of_another_schema() -> None:
    serving = ServingModel.from_state(RICH_SCHEMA, _MODELS["smes"], _learner(_MODELS["smes"]).serving_state())

    with pytest.raises(ValueError, match=r"ids: shape \[2, 3\]"):
        serving.score(np.zeros((2, 3), np.int64), np.zeros((2, 2), np.float32))


def test_a_serving_model_scores_no_instances() -> None:
    serving = ServingModel.from_state(RICH_SCHEMA, _MODELS["smes"], _learner(_MODELS["smes"]).serving_state())

    assert serving.score(np.zeros((0, 6), np.int64), np.zeros((0, 2), np.float32)).shape == (0, 3)


def test_a_batch_without_examples_is_refused() -> None:
    with pytest.raises(ValueError, match="examples: 0 rows, expected at least 1"):
        _learner(_MODELS["smes"]).prepare(ExampleBlock.empty(RICH_SCHEMA))


def test_read_only_columns_are_accepted() -> None:
    block = stream(RICH_SCHEMA, batches=1, size=64)[0]
    for array in block.arrays().values():
        array.flags.writeable = False
    learner = _learner(_MODELS["smes"])
    learner.step(learner.prepare(block))


@pytest.mark.parametrize("name", _MODELS)
def test_a_configuration_survives_a_trip_through_plain_data(name: str) -> None:
    plain_data = json.loads(json.dumps(_MODELS[name].to_dict()))

    assert ModelConfig.from_dict(plain_data) == _MODELS[name]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: ModelConfig.from_dict({"rankr": "smes"}), r"ModelConfig\.rankr: unknown key, expected one of ranker,"),
        (lambda: ModelConfig.from_dict({"smes": {"depth": 3}}), r"smes\.depth: unknown key"),
        (lambda: ModelConfig(ranker="tree"), "'tree', expected one of smes, home"),  # type: ignore[arg-type]
        (lambda: ModelConfig(ranker="linear", wide=False), "wide: false, expected true for the linear ranker"),
        (lambda: OptimizerConfig(learning_rate=0), "learning_rate: 0, expected more than 0"),
    ],
)
def test_wrong_configurations_are_refused(make: Callable[[], object], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        make()
