"""A changed schema: what the learner's state carries over, and what right after it no score may show."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smes.arrays import under
from smes.model.carry_over import carry_over, carry_over_problems
from smes.model.config import ModelConfig, OptimizerConfig
from smes.model.corrections import CorrectionSums
from smes.model.export import export_dense
from smes.model.frozen_model import FrozenModel
from smes.model.ids import ids_of, keys_of
from smes.model.learner import Learner
from smes.model.probing import probe_findings
from smes.model.rows_config import RowsConfig
from smes.model.serving import ServingModel
from smes.schema import MISSING, Derived, Feature, Schema, Task
from smes.schema_change import NEW, Renames, SchemaChange
from tests.smes.plain_smes import changed
from tests.smes.schema_changes import examples, random_change, with_new_values, with_tasks_of
from tests.smes.test_learner import _MODELS

_CPU = torch.device("cpu")
_OPTIMIZER = OptimizerConfig()
_FORMS = {
    **_MODELS,
    "smes-both-raw": replace(
        _MODELS["smes"],
        smes=changed(
            _MODELS["smes"].smes,
            {"router.input": "both", "router.norm": "batch", "trunk_dims": (8,), "trunk_input": "raw"},
        ),
    ),
    "ple-raw": replace(_MODELS["ple"], ple=replace(_MODELS["ple"].ple, encoder_dims=())),
    "home-raw": replace(_MODELS["home"], home=replace(_MODELS["home"].home, encoder_dims=(), norm="batch")),
}
_INPUTS_NORMALISED = ("smes-group-routers",)
"""New inputs of weight 0 still count for the norm of an instance's raw input."""
_ROUNDING = 1e-5


class _Changed:
    """A learner of a random schema, trained a little, and one that its state was carried over to."""

    def __init__(self, form: str, seed: int, *, removes: bool = False) -> None:
        self.rng = np.random.default_rng([seed, removes])
        self.change = random_change(self.rng, removes=removes)
        self.models = [with_tasks_of(_FORMS[form], s) for s in (self.change.was, self.change.now)]
        self.was = Learner(self.change.was, self.models[0], _OPTIMIZER, device=_CPU, seed=1)
        self.block = examples(self.rng, self.change.was, int(self.rng.integers(1, 100)))
        for block in (*(examples(self.rng, self.change.was, 64) for _ in range(3)), self.block):
            self.was.step(self.was.prepare(block))
        assert not self.change.problems
        self.state = carry_over(self.was.state(), self.change, self.models[1], _OPTIMIZER, 1, was_model=self.models[0])
        self.now = self.loaded(self.state)

    def loaded(self, state: dict[str, torch.Tensor]) -> Learner:
        learner = Learner(self.change.now, self.models[1], _OPTIMIZER, device=_CPU, seed=1)
        learner.load_state(state)
        return learner


@pytest.mark.parametrize("form", _FORMS)
@pytest.mark.parametrize("seed", [0, 1])
def test_no_score_of_a_task_changes_by_a_bit(form: str, seed: int) -> None:
    c = _Changed(form, seed)
    block = with_new_values(c.rng, c.change, c.block)
    now_P = np.flatnonzero(c.change.tasks != NEW)
    was_P = c.change.tasks[now_P]

    before = ServingModel.from_state(c.change.was, c.models[0], c.was.serving_state())
    after = ServingModel.from_state(c.change.now, c.models[1], c.now.serving_state())
    expected = before.score(c.block.ids, c.block.numerics)[:, was_P]
    np.testing.assert_array_equal(after.score(block.ids, block.numerics)[:, now_P], expected)
    frozen = FrozenModel.freeze(c.now)
    np.testing.assert_array_equal(frozen.score(block.ids, block.numerics)[:, now_P], expected)

    own = {n: t for n, t in c.now.serving_state().items() if not n.startswith("dense.before.")}
    of_new_weights = ServingModel.from_state(c.change.now, c.models[1], own).score(block.ids, block.numerics)[:, now_P]
    assert np.allclose(of_new_weights, expected, atol=_ROUNDING) or form in _INPUTS_NORMALISED

    steps = [learner.step(learner.prepare(b)) for learner, b in ((c.was, c.block), (c.now, block))]
    np.testing.assert_array_equal(steps[1].scores[:, now_P], steps[0].scores[:, was_P])
    assert not any(n.startswith("dense.before.") for n in c.now.serving_state())


@pytest.mark.parametrize("form", ["smes-default", "smes-found-groups", "smes-own-pools", "ple", "home-raw"])
def test_a_learner_that_was_killed_after_the_change_goes_on_bit_for_bit(form: str) -> None:
    c = _Changed(form, 21, removes=True)
    blocks = [examples(c.rng, c.change.now, 32) for _ in range(3)]
    again = c.loaded(c.now.state())
    for block in blocks[:2]:
        steps = [learner.step(learner.prepare(block)) for learner in (c.now, again)]
        assert steps[0].taken
        torch.testing.assert_close(steps[1].scores, steps[0].scores, rtol=0, atol=0)
    later = c.loaded(again.state())
    states = [learner.state() for learner in (c.now, later) if learner.step(learner.prepare(blocks[2])).taken]
    assert states[0].keys() == states[1].keys()
    assert ("probe.corrections.learning.shape" in states[0]) == form.startswith("smes")
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=0, atol=0, equal_nan=True)


def test_two_changes_without_a_step_between_leave_the_scores_of_the_first_model() -> None:
    c = _Changed("smes-default", 5)
    more = Schema("shop", (*c.change.now.tasks, Task("last")), (*c.change.now.features, Feature("n", "numeric")))
    state = carry_over(c.now.state(), SchemaChange(c.change.now, more), c.models[1], _OPTIMIZER, 1)
    learner = Learner(more, c.models[1], _OPTIMIZER, device=_CPU, seed=1)
    learner.load_state(state)
    block = SchemaChange(c.change.now, more).examples(c.change.examples(c.block))
    was = ServingModel.from_state(c.change.was, c.models[0], c.was.serving_state())
    now = ServingModel.from_state(more, c.models[1], learner.serving_state())
    known = np.flatnonzero(c.change.tasks != NEW)
    np.testing.assert_array_equal(
        now.score(block.ids, block.numerics)[:, known],
        was.score(c.block.ids, c.block.numerics)[:, c.change.tasks[known]],
    )


@pytest.mark.parametrize("form", ["smes-default", "smes", "ple", "home", "linear"])
def test_a_new_task_begins_at_its_base_rate(form: str) -> None:
    was = Schema("s", (Task("click"), Task("like")), (Feature("price", "numeric"),))
    now = replace(was, tasks=(Task("share"), *was.tasks, Task("stay", kind="regression")))
    model, rng = with_tasks_of(_FORMS[form], was), np.random.default_rng(0)
    learner = Learner(was, model, _OPTIMIZER, device=_CPU)
    for _ in range(3):
        learner.step(learner.prepare(examples(rng, was, 64)))
    state = carry_over(learner.state(), SchemaChange(was, now), model, _OPTIMIZER, 0)
    state["dense.tasks.labels.count_C"][0], state["dense.tasks.labels.mean_C"][0] = 999.0, 0.2
    learner = Learner(now, model, _OPTIMIZER, device=_CPU)
    learner.load_state(state)
    scores = learner.step(learner.prepare(examples(rng, now, 50))).scores.numpy()
    np.testing.assert_allclose(scores[:, 0], (999 * 0.2 + 0.5) / 1000, rtol=1e-6)
    np.testing.assert_array_equal(scores[:, 3], 0)


@given(st.lists(st.integers(-(2**63), 2**63 - 1)), st.text())
def test_an_id_is_found_again_in_its_key(ids: list[int], vocabulary: str) -> None:
    array = np.array(ids, np.int64)
    np.testing.assert_array_equal(ids_of(keys_of(array, vocabulary), vocabulary), array)


@pytest.mark.parametrize("rows", [None, RowsConfig(budget=60, expire_after_s=1e6, shared_rows=3)])
def test_rows_go_on_by_vocabulary(rows: RowsConfig | None) -> None:
    """One vocabulary is renamed, two become one, and one goes."""
    features = (Feature("author"), Feature("brand"), Feature("maker"), Feature("gone"))
    was = Schema("s", (Task("click"), Task("like")), features)
    now = Schema(
        "s",
        (Task("like"), Task("new"), Task("click")),
        (Feature("writer"), Feature("maker", vocabulary="firm"), Feature("brand", vocabulary="firm"), Feature("more")),
    )
    change = SchemaChange(was, now, Renames({"writer": "author"}))
    model, rng = ModelConfig(embedding_dim=8), np.random.default_rng(0)
    learner = Learner(was, model, _OPTIMIZER, rows, device=_CPU)
    for _ in range(4):
        block = examples(rng, was, 16)
        block.ids[:] = np.where(block.ids == MISSING, MISSING, block.ids % 6)
        block.ids[:, 4] = np.where(block.ids[:, 4] == MISSING, MISSING, block.ids[:, 4] + 3)  # maker: 3 … 8
        learner.step(learner.prepare(block))
    after = Learner(now, model, _OPTIMIZER, rows, device=_CPU)
    after.load_state(carry_over(learner.state(), change, model, _OPTIMIZER, 0, rows=rows))
    of_was, of_now = (_rows_by_key(one) for one in (learner, after))

    def same(ids: np.ndarray, old: str, new: str) -> None:
        for one, other in zip(keys_of(ids, old).tolist(), keys_of(ids, new).tolist(), strict=True):
            wide, embedding = of_was[one]
            np.testing.assert_array_equal(of_now[other][1], embedding)
            np.testing.assert_array_equal(of_now[other][0], [wide[1], 0, wide[0]])

    every = np.array([*range(6), MISSING])
    same(every, "user_id", "user_id")
    same(every, "author", "writer")
    same(every, "brand", "firm")  # the first of the two that became one, in the order of the schema before
    same(np.arange(6, 9), "maker", "firm")
    assert not of_now.keys() & {*keys_of(every, "gone").tolist(), *keys_of(every, "author").tolist()}
    assert after.row_counts.in_use == learner.row_counts.in_use - 6 - 3
    taken = [after.step(after.prepare(examples(rng, now, 64))).taken for _ in range(3)]
    assert all(taken)
    if rows is not None:
        assert after.row_counts.in_use <= 60


def test_boundaries_of_quantile_buckets_go_on_by_name() -> None:
    """A bucket that has kept its name keeps its boundaries, though the file says what another one was renamed from."""
    features = (Feature("price", "numeric"), Feature("age", "numeric"))
    band, stage = Derived("band", "bucket", ("price",), quantiles=4), Derived("stage", "bucket", ("age",), quantiles=3)
    was = Schema("s", (Task("click"),), features, derived=(band, stage))
    more = Derived("more", "bucket", ("age",), quantiles=5)
    model, rng = ModelConfig(ranker="linear"), np.random.default_rng(0)
    learner = Learner(was, model, _OPTIMIZER, device=_CPU)
    learner.step(learner.prepare(examples(rng, was, 64)))
    state = learner.state()
    fresh = Learner(was, model, _OPTIMIZER, device=_CPU).state()["dense.boundaries_Q"]
    renamed = replace(stage, name="phase")
    for derived, renames, places in (
        ((stage, more, band), {"stage": "band"}, (1, None, 0)),
        ((renamed, more, band), {"phase": "stage"}, (1, None, 0)),
        ((renamed, band), {}, (None, 0)),
    ):
        change = SchemaChange(was, replace(was, derived=derived), Renames(renames))
        carried = carry_over(state, change, model, _OPTIMIZER, 0)
        after = Learner(change.now, model, _OPTIMIZER, device=_CPU)
        after.load_state(carried)
        old = torch.split(state["dense.boundaries_Q"], [3, 2])
        new = torch.split(carried["dense.boundaries_Q"], [d.quantiles - 1 for d in derived if d.quantiles])
        for i, (place, boundaries) in enumerate(zip(places, new, strict=True)):
            assert torch.equal(boundaries, fresh[:1].expand(len(boundaries)) if place is None else old[place])
            for name in ("values", "places", "seen", "moved_at"):
                had = state[f"quantiles.{name}"]
                expected = torch.zeros_like(had[0]) if place is None else had[place]
                assert torch.equal(carried[f"quantiles.{name}"][i], expected)


def _rows_by_key(learner: Learner) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    state = under("table.", learner.serving_state())
    keys = state["keys"].tolist()
    return {k: (w.numpy(), e.numpy()) for k, w, e in zip(keys, state["wide"], state["embedding"], strict=True)}


def test_own_experts_change_no_score_and_then_learn() -> None:
    was = Schema("s", (Task("click"), Task("like")), (Feature("price", "numeric"),))
    now = replace(was, tasks=(*was.tasks, Task("share")))
    rng, model = np.random.default_rng(0), ModelConfig(embedding_dim=8)
    learner = Learner(was, model, _OPTIMIZER, device=_CPU)
    learner.step(learner.prepare(examples(rng, was, 64)))
    after = Learner(now, model, _OPTIMIZER, device=_CPU)
    after.load_state(carry_over(learner.state(), SchemaChange(was, now), model, _OPTIMIZER, 0))
    for _ in range(3):
        after.step(after.prepare(examples(rng, now, 64)))
    block = examples(rng, now, 64)

    def score() -> np.ndarray:
        return ServingModel.from_state(now, model, after.serving_state()).score(block.ids, block.numerics)

    before = score()
    after.give_own_experts([2])
    np.testing.assert_array_equal(score(), before)
    assert after.own_experts == {"share": 64}
    after.step(after.prepare(block))
    own = under("dense.ranker.newcomers.own.0.", after.serving_state())
    assert own["experts.base"].abs().sum() > 0
    table = under("table.", after.serving_state())
    del table["keys"]
    export_dense(ServingModel.from_state(now, model, after.serving_state()), table)  # checks the scores itself
    again = Learner(now, model, _OPTIMIZER, device=_CPU)
    again.load_state(after.state())
    steps = [one.step(one.prepare(block)) for one in (after, again)]
    torch.testing.assert_close(steps[1].scores, steps[0].scores, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("cosine", "gain", "last", "verdict"),
    [
        (0.0, 1.0, False, "own experts"),
        (0.3, 1.0, False, "the others serve it"),
        (0.0, 0.0, False, "on probe"),
        (0.0, 0.0, True, "nothing left to gain"),
    ],
)
def test_a_probe_ends_by_what_is_left_and_by_whom_the_others_serve(
    cosine: float, gain: float, last: bool, verdict: str
) -> None:
    rng, blocks = np.random.default_rng(0), 64
    gram = np.tile(np.array([[1.0, 0.2, cosine], [0.2, 1.0, cosine], [cosine, cosine, 1.0]]), (blocks, 1, 1))
    loss = np.full((blocks, 3, 3), 100.0) + rng.normal(scale=0.01, size=(blocks, 3, 3))
    loss[:, 1, 2] -= gain
    sums = CorrectionSums((0, 0, 0), np.full((blocks, 3), 50.0), loss, gram)
    (found,) = probe_findings(sums, ["a", "b", "new"], [2], last=last)
    assert found.verdict == verdict


def test_what_cannot_be_carried_over_is_said() -> None:
    was = Schema("s", (Task("click"), Task("like")), (Feature("price", "numeric"),))
    model = ModelConfig(embedding_dim=8)
    state = Learner(was, model, _OPTIMIZER, device=_CPU).state()
    another = replace(was, tasks=(Task("share"),))
    of_kind = replace(was, features=(*was.features[:2], Feature("price", "id")))
    for now, changed_model, message in (
        (another, model, "no task goes on"),
        (of_kind, model, "price"),
        (replace(was, tasks=(Task("click"),)), replace(model, head_dim=8), "model configuration"),
    ):
        assert carry_over_problems(SchemaChange(was, now), changed_model, model)
        with pytest.raises(ValueError, match=message):
            carry_over(state, SchemaChange(was, now), changed_model, _OPTIMIZER, 0, was_model=model)
    with pytest.raises(ValueError, match="before, but for the names of tasks"):
        carry_over(
            state, SchemaChange(was, replace(was, tasks=(Task("click"),))), replace(model, head_dim=8), _OPTIMIZER, 0
        )


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("dense.before.description", torch.zeros(3, dtype=torch.uint8)),
        ("dense.before.id_columns_W", torch.full((2,), 99)),
        ("dense.before.tasks_T", torch.zeros(2)),
        ("dense.structure.router_T", torch.tensor([5, 5, 5])),
        ("dense.structure.own_T", torch.full((3,), 10**9)),
    ],
)
def test_a_scorer_refuses_wrong_tensors_of_a_change(name: str, tensor: torch.Tensor) -> None:
    was = Schema("s", (Task("click"), Task("like")))
    now = replace(was, tasks=(*was.tasks, Task("share")))
    model = ModelConfig(embedding_dim=8)
    learner = Learner(now, model, _OPTIMIZER, device=_CPU)
    old = Learner(was, model, _OPTIMIZER, device=_CPU).state()
    learner.load_state(carry_over(old, SchemaChange(was, now), model, _OPTIMIZER, 0))
    state = learner.serving_state()
    ServingModel.from_state(now, model, state)
    assert name in state
    with pytest.raises(ValueError, match=r"tensor|serving|structure|before"):
        ServingModel.from_state(now, model, state | {name: tensor})
