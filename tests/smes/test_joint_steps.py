"""N ranks with a part of a batch each take the step that one rank takes with the whole: in all that a step learns."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import smes.model.borrowing
import smes.model.learner
import smes.rankers.sparse.router
from smes.derive import Derivations
from smes.derived import Derived
from smes.events import FIRST, FURTHER, ExampleBlock
from smes.joint_batch import JointBatch
from smes.model.carry_over import carry_over
from smes.model.config import ModelConfig, OptimizerConfig
from smes.model.devices import HostDevice
from smes.model.learner import Learner
from smes.model.numeric_moments import NumericMoments
from smes.quantiles import StreamQuantiles
from smes.rankers.config import HomeConfig, MmoeConfig, PleConfig, SharedBottomConfig
from smes.rankers.sparse.config import SmesConfig
from smes.schema import Schema
from smes.schema_change import SchemaChange
from smes.world import ALONE, World
from tests.smes.plain_smes import changed, plain
from tests.smes.streams import RICH_SCHEMA, stream
from tests.worlds import on_ranks

_SCHEMA = replace(RICH_SCHEMA, derived=(Derived("band", "bucket", ("score",), quantiles=4, settle=150),))
_OF_TASKS = ("labels", "label_mask", "served_scores", "feedback_arrival_ms", "late_share")
_GROUPS: dict[str, tuple[str, ...]] = {"rare": ("like", "watch")}
_SMALL = {"experts.num": 8, "encoder_dims": (16,), "experts.dims": (8,), "balance.weight": 0.1}
_DEFAULT = changed(SmesConfig(), {**_SMALL, "trunk_dims": (8,), "num_group": 2, "groups.declared": _GROUPS})
_FOUND = {"groups.declared": {}, "groups.found": 2, "groups.found_until": 200}
_NORMS = {"router.input": "both", "router.norm": "batch", "router.rank": 4}
_REQUEST_48 = np.repeat(np.arange(8), [2, 10, 5, 7, 1, 11, 6, 6])
_YOUNG = "found groups, more experts at first"
_FORMS: dict[str, ModelConfig] = {
    "default": ModelConfig(smes=_DEFAULT),
    _YOUNG: ModelConfig(smes=changed(_DEFAULT, {**_FOUND, "num_group": 1, "early.num_group": 4, "early.until": 60})),
    "low-rank experts": ModelConfig(smes=changed(_DEFAULT, {"experts.form": "low_rank", "balance.loss": "per_gate"})),
    "common pools": ModelConfig(smes=plain(_SMALL)),
    "budget": ModelConfig(smes=plain({**_SMALL, **_NORMS, "max_active": 4, "balance.loss": "mutual_information"})),
    "always on": ModelConfig(smes=plain({**_SMALL, "shared_experts": "always_on", "balance.loss": "none"})),
    "home": ModelConfig("home", home=HomeConfig(encoder_dims=(16,), expert_dims=(8,))),
    "home by mini-batches": ModelConfig("home", home=HomeConfig(encoder_dims=(16,), expert_dims=(8,), norm="batch")),
    "linear": ModelConfig("linear"),
    "mmoe": ModelConfig("mmoe", mmoe=MmoeConfig(4, (16,), (8,))),
    "ple": ModelConfig("ple", ple=PleConfig(encoder_dims=(16,), expert_dims=(8,))),
    "shared bottom": ModelConfig("shared_bottom", shared_bottom=SharedBottomConfig((16,))),
}


def _learner(world: World, model: ModelConfig, schema: Schema = _SCHEMA) -> Learner:
    """A learner in which nothing is 0: a gradient that is 0 but for rounding would make steps of any direction."""
    config = replace(model, embedding_dim=8, embedding_scale=1.0)
    learner = Learner(schema, config, OptimizerConfig(), device=torch.device("cpu"), world=world)
    state, generator = learner.serving_state(), torch.Generator().manual_seed(5)
    for name, weight in state.items():
        if name.endswith(("experts.differences", "experts.up", "feature_gates.up")):
            weight.uniform_(-0.5, 0.5, generator=generator)
    learner.load_serving_state(state, 0)
    return learner


def _blocks(batches: int = 7) -> list[ExampleBlock]:
    """Requests, heavy weights, feedback that is late (in some batches, of some impressions), a feature that leaps."""
    blocks = []
    for number, block in enumerate(stream(RICH_SCHEMA, batches=batches, size=48)):
        ids, numerics = block.ids.copy(), block.numerics.copy()
        ids[:, 0] = ids[_REQUEST_48, 0]
        numerics[::7, 1] *= 10.0**number
        block = replace(block, ids=ids, numerics=numerics, request_id=_REQUEST_48, weight=block.weight * 1.5)
        if number % 3 == 1:
            kind, late_share = block.kind.copy(), block.late_share.copy()
            kind[24:], late_share[24:, ::2] = FIRST, 0.3
            kind[-5:] = FURTHER
            block = replace(block, kind=kind, late_share=late_share)
        blocks.append(block)
    return blocks


def _part(world: World, block: ExampleBlock, empty: int | None = None) -> ExampleBlock:
    """What a rank has of a batch; one rank has nothing."""
    others = [rank for rank in range(world.size) if world.size == 1 or rank != empty]
    if world.rank not in others:
        return block.take(slice(0))
    ends = [len(block) * (place + 1) // len(others) for place in range(len(others))]
    place = others.index(world.rank)
    return block.take(slice(ends[place - 1] if place else 0, ends[place]))


def _train(world: World, learner: Learner, blocks: list[ExampleBlock]) -> list[Tensor]:
    """Train; the scores of each step."""
    scores = []
    for number, block in enumerate(blocks):
        part = _part(world, block, number % 5 - 2)
        result = learner.step(learner.prepare(part))
        assert result.taken
        scores.append(result.scores)
        if number % 3 == 1:
            learner.observe_closed(_part(world, block.take(slice(5)), 0))
    return scores


def _shared(learner: Learner) -> dict[str, Tensor]:
    """What every rank has the same of: all but rows."""
    return {name: t for name, t in learner.state().items() if not name.startswith(("table.", "rows."))}


def _by_key(learners: Sequence[Learner]) -> dict[int, Tensor]:
    rows: dict[int, Tensor] = {}
    for learner in learners:
        state = learner.serving_state()
        values = torch.cat(
            [state[f"table.{name}"] for name in ("embedding", "wide") if f"table.{name}" in state], dim=1
        )
        rows |= dict(zip(state["table.keys"].tolist(), values, strict=True))
    return rows


def _check_shared(wanted: dict[str, Tensor], of_ranks: Sequence[dict[str, Tensor]]) -> None:
    first, *others = of_ranks
    for name, expected in wanted.items():
        assert all(torch.equal(other[name], first[name]) for other in others), name
        assert torch.allclose(first[name].double(), expected.double(), rtol=1e-5, atol=1e-5), name


def _check(one: Learner, ranks: Sequence[Learner]) -> None:
    """The ranks have the same bits of what all have, and together what one learner has, but for rounding."""
    _check_shared(_shared(one), [_shared(learner) for learner in ranks])
    rows, found = _by_key([one]), _by_key(ranks)
    assert rows.keys() == found.keys()
    for key, expected in rows.items():
        torch.testing.assert_close(found[key], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("form", "size", "at_once"), [*((form, 2, True) for form in _FORMS), ("default", 4, True), (_YOUNG, 2, False)]
)
def test_ranks_learn_what_one_rank_learns_from_the_whole_batch(
    form: str, size: int, at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HostDevice, "tells_at_once", at_once)
    for module in (smes.model.borrowing, smes.rankers.sparse.router):
        monkeypatch.setattr(module, "_HORIZON", 100.0)  # what was seen earlier fades within the test
    blocks = _blocks()

    def work(world: World) -> tuple[Learner, list[Tensor]]:
        learner = _learner(world, _FORMS[form])
        return learner, _train(world, learner, blocks)

    ((one, scores),), ranks = on_ranks(1, work), on_ranks(size, work)
    for number, expected in enumerate(scores):
        torch.testing.assert_close(torch.cat([parts[number] for _, parts in ranks]), expected, rtol=1e-5, atol=1e-5)
    _check(one, [learner for learner, _ in ranks])
    assert np.abs(one.serving_state()["dense.tasks.borrowing.weight_TT"].numpy()).max() > 0.01  # a rare task borrows


@pytest.mark.parametrize("form", [_YOUNG, "budget", "home by mini-batches"])
def test_ranks_learn_the_same_by_the_operators_of_a_gpu(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without compiled loops, and where the host learns of a step later. No GPU runs this."""
    monkeypatch.setattr(HostDevice, "tells_at_once", False)
    for name, module in list(sys.modules.items()):
        if name.startswith("smes.") and hasattr(module, "on_host"):
            monkeypatch.setattr(module, "on_host", lambda x: False)
    blocks = _blocks(5)

    def work(world: World) -> Learner:
        learner = _learner(world, _FORMS[form])
        _train(world, learner, blocks)
        return learner

    (one,) = on_ranks(1, work)
    _check(one, on_ranks(2, work))


def test_ranks_compute_once_what_the_examples_of_a_request_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smes.model.learner, "LEAST_SAVED_IN_TRAINING", 10)
    blocks = []
    for block in _blocks():
        ids, numerics = block.ids[_REQUEST_48], block.numerics[_REQUEST_48]
        ids[:, 1], numerics[:, 1] = block.ids[:, 1], block.numerics[:, 1]
        blocks.append(replace(block, ids=ids, numerics=numerics))

    def work(world: World) -> tuple[Learner, bool]:
        learner = _learner(world, _FORMS["default"])
        _train(world, learner, blocks)
        return learner, learner.prepare(_part(world, blocks[0], 1)).requests is not None

    ((one, splits),), ranks = on_ranks(1, work), on_ranks(2, work)
    assert [splits, *(of_rank for _, of_rank in ranks)] == [True, True, False]
    _check(one, [learner for learner, _ in ranks])


def test_ranks_that_go_on_from_their_states_have_the_same_bits() -> None:
    blocks = _blocks()

    def work(world: World, *, killed: bool) -> dict[str, Tensor]:
        model = _FORMS[_YOUNG]
        learner = _learner(world, model)
        _train(world, learner, blocks[:4])
        if killed:
            state, learner = learner.state(), _learner(world, model)
            learner.load_state(state)
        _train(world, learner, blocks[4:])
        return learner.state()

    for kept, again in zip(*(on_ranks(2, partial(work, killed=killed)) for killed in (False, True)), strict=True):
        assert kept.keys() == again.keys()
        assert all(torch.equal(again[name], tensor) for name, tensor in kept.items())


def test_moments_and_boundaries_have_the_bits_of_one_rank() -> None:
    """Longer than a sample of a quantile bucket; with more ranks than features, and ranks that have nothing."""
    schema = replace(RICH_SCHEMA, derived=(Derived("band", "bucket", ("score",), quantiles=4, settle=30_000),))
    batches = np.random.default_rng(0).lognormal(size=(6, 6_000, 2)).astype(np.float32)
    batches[:, ::9] = np.nan
    batches[2:, :, 0] *= 1e4

    def work(world: World) -> list[np.ndarray[Any, Any]]:
        moments, quantiles = NumericMoments(schema), StreamQuantiles(Derivations(schema))
        for number, batch in enumerate(batches):
            ends = {1: [0, 6_000], 3: [0, 6_000 if number == 3 else 100 + 900 * number, 6_000, 6_000]}[world.size]
            part = batch[ends[world.rank] : ends[world.rank + 1]]
            joint = None
            if world.size > 1:
                joint = JointBatch.of(world, instances=len(part), observed=len(part), weight=1.0, delayed=False)
            moments.observe(part, joint)
            quantiles.observe(part[:, 1:], joint)
        return [*moments.moments.values(), *moments.state().values(), *quantiles.state().values(), quantiles.boundaries]

    (one,) = on_ranks(1, work)
    for arrays in on_ranks(3, work):
        for array, expected in zip(arrays, one, strict=True):
            np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize(("form", "column"), [(_YOUNG, "weight"), ("home by mini-batches", "labels")])
def test_where_one_rank_finds_no_number_no_rank_takes_the_step(
    form: str, column: str, at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HostDevice, "tells_at_once", at_once)  # a GPU's host does not wait to know
    *seen, block = _blocks(3)
    values = getattr(block, column).copy()
    values[3] = np.inf
    spoiled = replace(block, label_mask=np.ones_like(block.label_mask), **{column: values})

    def work(world: World) -> tuple[bool, list[str], int]:
        learner = _learner(world, _FORMS[form])
        _train(world, learner, seen)
        batch, before = learner.prepare(_part(world, spoiled)), learner.state()
        taken, after = learner.step(batch).taken, learner.state()
        moved = [name for name, tensor in before.items() if not torch.equal(after[name], tensor)]
        on_host = (
            "numerics.",
            "dense.features.moments.",
            "quantiles.",
            "dense.boundaries_Q",
        )  # these count it all the same
        return taken, [n for n in moved if at_once or not n.startswith(on_host)], learner.step_number

    assert on_ranks(2, work) == [(False, [], 2)] * 2


def test_a_step_of_all_ranks_needs_an_example() -> None:
    def work(world: World) -> None:
        _learner(world, _FORMS["linear"]).prepare(ExampleBlock.empty(_SCHEMA))

    with pytest.raises(ValueError, match="examples: 0 rows on every rank, expected at least 1 on one of them"):
        on_ranks(2, work)


def test_a_task_that_comes_later_is_probed_and_gets_its_experts_on_all_ranks() -> None:
    before = replace(_SCHEMA, tasks=_SCHEMA.tasks[:2])
    model = _FORMS["low-rank experts"]
    model = replace(model, smes=changed(model.smes, {"groups.declared": {}, "groups.probe_until": 240}))
    was, blocks = _learner(ALONE, model, before), _blocks()
    for block in blocks[:2]:
        was.step(was.prepare(replace(block, **{n: getattr(block, n)[:, :2] for n in _OF_TASKS})))
    config = replace(model, embedding_dim=8, embedding_scale=1.0)
    carried = carry_over(was.state(), SchemaChange(before, _SCHEMA), config, OptimizerConfig(), 0)
    whole = _learner(ALONE, model)
    whole.load_state(carried)
    serving = whole.serving_state()  # with the model of the schema before, whose scores come first
    on_probe = {name: tensor for name, tensor in carried.items() if name.startswith("probe.")}
    assert on_probe["probe.tasks"].tolist() == [2]

    def work(world: World) -> tuple[Learner, list[Tensor], dict[str, Tensor]]:
        learner = _learner(world, model)
        learner.load_serving_state(serving, 2)
        learner.load_state(learner.state() | on_probe)
        scores = _train(world, learner, blocks[2:5])
        learner.give_own_experts([2])
        scores += _train(world, learner, blocks[5:6])
        found = _shared(learner)
        return learner, [*scores, *_train(world, learner, blocks[6:])], found

    ((one, scores, wanted),), ranks = on_ranks(1, work), on_ranks(2, work)
    for number, expected in enumerate(scores):
        torch.testing.assert_close(torch.cat([of[number] for _, of, _ in ranks]), expected, rtol=1e-5, atol=1e-5)
    _check(one, [learner for learner, _, _ in ranks])
    _check_shared(wanted, [found for _, _, found in ranks])
    assert "probe.corrections.learning.shape" in wanted
    assert not any(learner.probe_findings for learner in (one, ranks[0][0], ranks[1][0]))  # the probe has ended
    assert one.own_experts == ranks[1][0].own_experts == {"like": 4}
