"""Task groups found from the stream: the statistic against loops, what it finds, and what the ranker then does."""

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from smes.events import ExampleBlock
from smes.model.config import ModelConfig, OptimizerConfig
from smes.model.learner import Learner
from smes.model.serving import ServingModel
from smes.rankers.sparse.config import SmesConfig
from smes.rankers.sparse.groups import GroupFinder, clusters, likeness
from smes.rankers.sparse.ranker import SMES
from smes.rankers.sparse.reads import FoundReads
from smes.schema import Feature, Schema, Task
from tests.smes.dense_reference import dense_smes
from tests.smes.plain_smes import changed

_INPUT, T = 12, 4
_TRUTH = ((0, 3, 4), (1, 2))
"""Tasks that follow the first kind of regime, and those that follow the second."""


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _config(changes: Mapping[str, Any]) -> SmesConfig:
    shape: dict[str, Any] = {
        "experts.num": 8,
        "num_group": 2,
        "encoder_dims": (16,),
        "trunk_dims": (8,),
        "experts.dims": (8,),
        "experts.narrow_dim": 8,
        "router.rank": 4,
        "balance.weight": 0.1,
        "groups.found": 2,
    }
    return changed(SmesConfig(), {**shape, **changes})


def _found(num_tasks: int = T, changes: Mapping[str, Any] | None = None) -> SMES:
    torch.manual_seed(0)
    ranker = SMES(_INPUT, num_tasks, _config(changes or {}))
    with torch.no_grad():  # differences start at zero, and all experts of a pool alike
        for parameter in ranker.experts.parameters():
            parameter.normal_(std=0.3)
    return ranker


def test_a_profile_is_what_pairs_of_batches_say_together() -> None:
    C, batches = 3, 5
    finder = GroupFinder(2, C, 2, until=10_000)
    x_NBC = _random(batches, 7, C) * torch.tensor([1.0, 5.0, 0.1]) + 2
    r_NBT = _random(batches, 7, 2, seed=1)
    parts: list[np.ndarray] = []
    scale, noise = np.zeros((C, C)), np.zeros(2)
    for n in range(batches):
        seen = x_NBC[:n].reshape(-1, C).double()
        mean, deviation = (seen.mean(dim=0), seen.std(dim=0, correction=0)) if n else (0.0, 1.0)
        z = ((x_NBC[n].double() - mean) / deviation).clamp(-8, 8).numpy()
        r = r_NBT[n].numpy()
        parts.append(np.einsum("bt,bc,bk->tck", r, z, z))
        scale += np.einsum("bc,bk->ck", z**2, z**2)
        noise += (r**2).sum(axis=0)
        assert finder.observe(x_NBC[n], r_NBT[n]) is None
    # Of every two different batches; a batch with itself would count the noise.
    energy = 2 * sum((one * other for one, other in combinations(parts, 2)), start=np.zeros((2, C, C)))
    energy /= noise[:, None, None] / (7 * batches) * scale
    expected = energy.sum(axis=2) - np.einsum("tcc->tc", energy)
    np.testing.assert_allclose(finder.profiles().numpy(), expected, rtol=1e-3, atol=1e-3)


def test_noise_has_no_profile_however_rare_and_skewed() -> None:
    """The mean over many streams without any rule; with squares of batches counted it would be 3 a column."""
    rng = np.random.default_rng(0)
    sums = np.zeros((2, 4))
    for _ in range(100):
        finder = GroupFinder(2, 4, 2, until=10_000)
        for _ in range(8):
            x_BC = torch.from_numpy(np.exp(1.5 * rng.normal(size=(64, 4)))).float()
            labels_BT = (rng.random((64, 2)) < [0.5, 0.02]) - np.array([0.5, 0.02])
            finder.observe(x_BC, torch.from_numpy(labels_BT).float())
        sums += finder.profiles().numpy()
    assert np.abs(sums / 100).max() < 1.0


def test_the_most_alike_are_joined() -> None:
    like_TT = torch.tensor(
        [
            [1.0, 0.1, 0.9, 0.2, 0.0],
            [0.1, 1.0, 0.3, 0.8, 0.7],
            [0.9, 0.3, 1.0, 0.2, 0.1],
            [0.2, 0.8, 0.2, 1.0, 0.6],
            [0.0, 0.7, 0.1, 0.6, 1.0],
        ]
    )
    assert clusters(like_TT, 2) == ((0, 2), (1, 3, 4))
    assert clusters(like_TT, 3) == ((0, 2), (1, 3), (4,))
    assert clusters(like_TT, 5) == ((0,), (1,), (2,), (3,), (4,))
    assert clusters(like_TT, 1) == ((0, 1, 2, 3, 4),)
    common = torch.tensor([[9.0, 1, 0], [9, 1, 0], [9, 0, 1]])
    assert float(likeness(common)[0, 1]) == pytest.approx(1.0)
    assert float(likeness(common)[0, 2]) < -0.9, "the mean profile is subtracted"


@pytest.mark.parametrize("swapped", [False, True])
def test_a_group_takes_the_pool_that_most_of_its_tasks_read(swapped: bool) -> None:
    reads = FoundReads(5, _config({}))

    torch.testing.assert_close(reads.share_TG, torch.full((5, 2), 0.5))
    reads.regroup(((0, 1, 2), (3, 4)))
    assert reads.share_TG.tolist() == [[1.0, 0.0]] * 3 + [[0.0, 1.0]] * 2
    if swapped:
        reads.share_TG.copy_(reads.share_TG.flip(1))
    reads.regroup(((0, 3, 4), (1, 2)))
    assert reads.share_TG.argmax(dim=1).tolist() == ([0, 1, 1, 0, 0] if swapped else [1, 0, 0, 1, 1]), (
        "task 0 alone has moved"
    )


def _gradients(ranker: SMES, loss: Tensor) -> dict[str, Tensor]:
    named = dict(ranker.named_parameters())
    gradients = torch.autograd.grad(loss, list(named.values()))
    return dict(zip(named, gradients, strict=True))


@pytest.mark.parametrize("found", [False, True])
def test_tasks_read_the_mean_of_the_pools_and_then_their_groups(found: bool) -> None:
    """Against the pools written out slowly, in values and in every gradient."""
    ranker, x_BI = _found(), _random(9, _INPUT)
    ranker(_random(64, _INPUT, seed=5))  # moments of a step before
    if found:
        ranker.regroup(((0, 2, 3), (1,)))
    shares_TG = torch.tensor([[1.0, 0], [0, 1], [1, 0], [1, 0]]) if found else torch.full((T, 2), 0.5)
    ranker.eval()
    experts_BGK = ranker.route(x_BI, ranker.encoder(x_BI)).experts_BRK
    assert torch.equal(ranker.choices(x_BI), experts_BGK[:, [0, 1, 0, 0] if found else [0] * T])
    pools_BGH, balance = dense_smes(ranker, x_BI, experts_BGK, (0, 1))
    expected_BTH = torch.einsum("tg,bgh->bth", shares_TG, pools_BGH)
    torch.testing.assert_close(ranker(x_BI).tasks_BTH, expected_BTH, rtol=1e-4, atol=1e-5)
    trained = ranker.train()(x_BI)
    probe_BTH = _random(*expected_BTH.shape, seed=7)
    got = _gradients(ranker, (trained.tasks_BTH * probe_BTH).sum() + trained.auxiliary_loss)
    expected = _gradients(ranker, (expected_BTH * probe_BTH).sum() + balance)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-3, atol=1e-4, msg=name)
    load_TE = trained.stats.load_TE
    used_TE = (shares_TG > 0).float() @ torch.tensor([[1.0] * 4 + [0] * 4, [0] * 4 + [1.0] * 4])
    assert ((load_TE > 0) <= (used_TE > 0)).all(), "no task sends to a pool that it does not read"
    assert load_TE.sum(dim=1).tolist() == (9 * 2 * (shares_TG > 0).sum(dim=1)).tolist()


def _schema() -> Schema:
    numerics = [Feature(f"n{c}", kind="numeric", indicator=False) for c in range(2 * 4 + 4)]
    return Schema("regimes", tuple(Task(f"t{t}") for t in range(5)), (Feature("id", dim=1), *numerics))


def _stream(schema: Schema, count: int, size: int) -> list[ExampleBlock]:
    """Labels follow four numbers, read in another way under each of 4 regimes of two kinds; 50 % to 7 % positives."""
    rng = np.random.default_rng(5)
    weights_TRL = rng.normal(size=(5, 4, 4)) * 1.5
    blocks = []
    for _ in range(count):
        v_BL, regime_2B = rng.normal(size=(size, 4)), rng.integers(4, size=(2, size))
        block = ExampleBlock.empty(schema, size)
        block.ids[:] = 0
        indicators = [np.eye(4)[regime_B] for regime_B in regime_2B]
        block.numerics[:] = np.concatenate([v_BL, *indicators], axis=1)
        for t in range(5):
            kind = int(t in _TRUTH[1])
            logit_B = (weights_TRL[t][regime_2B[kind]] * v_BL).sum(axis=1) - t
            block.labels[:, t] = rng.random(size) < 1 / (1 + np.exp(-logit_B))
        block.label_mask[:] = True
        block.weight[:] = 1
        blocks.append(block)
    return blocks


def test_a_learner_finds_the_groups_and_says_so_in_its_snapshots() -> None:
    schema = _schema()
    blocks = _stream(schema, count=20, size=512)
    model = ModelConfig(embedding_dim=8, smes=_config({"groups.found_until": 16 * 512}))
    learner = Learner(schema, model, OptimizerConfig(learning_rate=5e-3), device=torch.device("cpu"))
    for number, block in enumerate(blocks, start=1):  # before the step of that number
        if number in (16, 17):
            kept = "groups.sum_TCC" in learner.state()
            assert kept == (number == 16), "sums are kept no longer than they are of use"
        learner.step(learner.prepare(block))
    share_TG = learner.serving_state()["dense.ranker.reads.share_TG"]
    of_task = share_TG.argmax(dim=1).tolist()
    assert share_TG.max(dim=1).values.tolist() == [1.0] * 5
    assert {tuple(t for t in range(5) if of_task[t] == g) for g in range(2)} == set(_TRUTH)
    served = ServingModel.from_state(schema, model, learner.serving_state()).score(blocks[0].ids, blocks[0].numerics)
    expected = learner.step(learner.prepare(blocks[0])).scores.numpy()
    np.testing.assert_allclose(served, expected, rtol=1e-5, atol=1e-6)


def test_a_learner_goes_back_to_before_and_after_the_search() -> None:
    schema = _schema()
    blocks = _stream(schema, count=6, size=64)
    model = ModelConfig(embedding_dim=8, smes=_config({"groups.found_until": 4 * 64}))

    def learner(steps: int) -> Learner:
        new = Learner(schema, model, OptimizerConfig(), device=torch.device("cpu"))
        for block in blocks[:steps]:
            new.step(new.prepare(block))
        return new

    early, late = learner(2).state(), learner(5).state()
    went_back, went_on = learner(5), learner(0)
    went_back.load_state(early)
    went_on.load_state(late)
    for block in blocks[2:5]:
        went_back.step(went_back.prepare(block))
    for name, tensor in went_back.state().items():
        assert torch.equal(tensor, late[name]), name
    assert went_on.state().keys() == late.keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups.found": 1}, r"GroupsConfig\.found: 1, expected 0 or at least 2"),
        ({"groups.found_until": 0}, r"GroupsConfig\.found_until: 0, expected at least 1"),
        ({"groups.declared": {"a": ("t0",)}}, r"GroupsConfig\.declared: .*expected {} where groups are found"),
        ({"groups.pools": "common"}, r"GroupsConfig\.pools: 'common', expected 'own' where groups are found"),
        ({"router.per": "task"}, r"SmesConfig\.router\.per: 'task', expected 'group' where groups are found"),
        ({"stage_one_weights": (1.0,)}, r"SmesConfig\.stage_one_weights: .*expected null where groups are found"),
        ({"groups.found": 3}, r"SmesConfig\.experts\.num: 8 to choose from, expected a multiple"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _config(changes)


def test_more_groups_than_tasks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"GroupsConfig\.found: 4, expected at most the number of tasks \(3\)"):
        _found(3, {"groups.found": 4})
