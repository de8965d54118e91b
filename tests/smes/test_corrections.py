"""Corrections learn beside the model and change nothing of it; they know which tasks are short of experts."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from smes.arrays import F64
from smes.model.config import ModelConfig, OptimizerConfig, RareTasksConfig
from smes.model.corrections import Corrections, sharing_groups
from smes.model.devices import RankBatch
from smes.model.learner import Learner
from smes.model.own_experts import own_experts
from smes.model.rank_model import ModelOutput
from smes.rankers.config import HomeConfig
from smes.rankers.ranker import RankerOutput
from smes.rankers.sparse.config import SmesConfig
from smes.schema import Feature, Schema, Task
from tests.smes.plain_smes import changed
from tests.smes.streams import RICH_SCHEMA, stream

SHIFT_AND_SCALE, OWN, SHARED = range(3)
CLICK, WATCH, LIKE = range(3)
FAST = OptimizerConfig(learning_rate=0.02)
MODELS = {
    "default": ModelConfig(embedding_dim=8),
    "searching": ModelConfig(
        embedding_dim=8,
        smes=changed(SmesConfig(), {"groups.found": 2, "groups.found_until": 3 * 64, "groups.declared": {}}),
    ),
    "mmoe": ModelConfig(embedding_dim=8, ranker="mmoe"),
    "linear": ModelConfig(ranker="linear"),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def watched(model: ModelConfig, group_T: tuple[int, ...] = (0, 0, 0)) -> tuple[Learner, Corrections]:
    learner = Learner(RICH_SCHEMA, model, FAST, device=torch.device("cpu"))
    corrections = Corrections(RICH_SCHEMA, group_T, FAST)
    learner.watch(corrections)
    return learner, corrections


@pytest.mark.parametrize("name", MODELS)
def test_a_watched_learner_is_the_same_bit_for_bit(name: str) -> None:
    alone = Learner(RICH_SCHEMA, MODELS[name], FAST, device=torch.device("cpu"))
    learner, corrections = watched(MODELS[name])
    random = torch.random.get_rng_state()
    for block in stream(RICH_SCHEMA, batches=8, size=64):
        expected, result = alone.step(alone.prepare(block)), learner.step(learner.prepare(block))
        assert torch.equal(result.scores, expected.scores)
    states = learner.state(), alone.state()
    assert states[0].keys() == states[1].keys()
    for key, tensor in states[1].items():
        assert torch.equal(states[0][key], tensor), key
    assert torch.equal(torch.random.get_rng_state(), random)
    losses_SKT = corrections.sums.loss_SKT
    assert np.isfinite(losses_SKT).all()
    assert not np.array_equal(losses_SKT[:, OWN], losses_SKT[:, SHIFT_AND_SCALE]), "it has learned"


def test_at_first_all_losses_are_the_models() -> None:
    """Of the scores that the step returns, by the documented formula."""
    (block,) = stream(RICH_SCHEMA, batches=1, size=64)
    learner, corrections = watched(MODELS["default"])
    score = learner.step(learner.prepare(block)).scores.numpy().astype(np.float64)[:, [CLICK, LIKE]]
    label, mask = block.labels[:, [CLICK, LIKE]], block.label_mask[:, [CLICK, LIKE]]
    loss = -np.where(label > 0, np.log(score), np.log1p(-score))
    sums = corrections.sums
    for correction in range(3):
        of_binary_tasks = sums.loss_SKT[0, correction, [CLICK, LIKE]]
        assert of_binary_tasks == pytest.approx((loss * mask * block.weight[:, None]).sum(axis=0), rel=1e-4)
        assert sums.loss_SKT[0, correction, WATCH] == sums.loss_SKT[0, SHIFT_AND_SCALE, WATCH] > 0
    assert sums.positives_ST[0].tolist() == ((block.labels > 0) & block.label_mask).sum(axis=0).tolist()


def test_a_step_that_is_not_taken_is_not_seen() -> None:
    blocks = stream(RICH_SCHEMA, batches=2, size=64)
    learner, corrections = watched(MODELS["default"])
    learner.step(learner.prepare(blocks[0]))
    labels = blocks[1].labels.copy()
    labels[0, CLICK] = np.nan
    assert not learner.step(learner.prepare(replace(blocks[1], labels=labels))).taken
    assert len(corrections.sums.loss_SKT) == 1


def test_the_blocks_hold_everything_in_bounded_memory() -> None:
    schema, corrections = _schema(2), Corrections(_schema(2), (0, 0), FAST)
    for _ in range(300):
        _show(corrections, torch.zeros(4, 2), torch.zeros(4, 3), torch.ones(4, 2))
    positives_ST = corrections.sums.positives_ST
    assert len(positives_ST) <= 128
    assert positives_ST.sum(axis=0).tolist() == [300 * 4] * schema.num_tasks
    assert len(set(positives_ST[:-1, 0])) == 1, "blocks are of one length, but for the open one"


def _schema(num_tasks: int) -> Schema:
    return Schema("made", tuple(Task(f"t{t}") for t in range(num_tasks)), (Feature("x", kind="numeric"),))


def _show(
    corrections: Corrections, logits_BT: Tensor, x_BI: Tensor, labels_BT: Tensor, tasks_BTH: Tensor | None = None
) -> None:
    """A step of a model that is given by its outputs; a representation has the gradient that its own sum would have."""
    B = len(x_BI)
    nothing = torch.zeros(0, dtype=torch.int64)
    batch = RankBatch(
        rows_U=nothing,
        cells_BW=nothing,
        keep_U=None,
        rate_U=None,
        pool_BW=None,
        numerics_BF=x_BI,
        numerics=x_BI.numpy(),
        bucketed_BK=np.zeros((B, 0), np.float32),
        labels_BT=labels_BT,
        mask_BT=torch.ones_like(labels_BT, dtype=torch.bool),
        weight_B=torch.ones(B),
        late_share_BT=None,
        ticket=None,
    )
    output = ModelOutput(logits_BT, RankerOutput(tasks_BTH), x_BI)
    corrections.before_backward(output)
    corrections.after_backward(output, batch)


def test_the_cosine_is_that_of_the_gradients_on_the_representations() -> None:
    generator = torch.Generator().manual_seed(1)
    gradients = [torch.randn(8, 3, 5, generator=generator) for _ in range(20)]
    corrections = Corrections(_schema(3), (0, 1, 0), FAST)
    for gradient_BTH in gradients:
        tasks_BTH = torch.randn(8, 3, 5, generator=generator, requires_grad=True) * 1.0
        tasks_BTH.retain_grad()
        (tasks_BTH * gradient_BTH).sum().backward()  # type: ignore[no-untyped-call]  # torch ships no type for it
        _show(corrections, torch.zeros(8, 3), torch.randn(8, 4, generator=generator), torch.ones(8, 3), tasks_BTH)
    figures = own_experts(corrections.sums, ["t0", "t1", "t2"])
    last = torch.cat(gradients[10:]).transpose(0, 1).flatten(1)
    group = last[0] + last[2]
    expected = [
        float(torch.cosine_similarity(last[t], one, dim=0)) for t, one in ((0, group), (1, last[1]), (2, group))
    ]
    assert [figure.cosine for figure in figures] == pytest.approx(expected, rel=1e-5)


def _verdicts(missing: tuple[int, ...]) -> list[str]:
    """On a model of 8 tasks, right but for four products of columns that each ``missing`` one sees, no two the same."""
    T, schema, rng = 8, _schema(8), np.random.default_rng(3)
    corrections = Corrections(schema, (0,) * T, FAST)
    for _ in range(300):
        known_BT, x_BTP2 = rng.normal(size=(512, T)), rng.normal(size=(512, T, 4, 2))
        hidden_BT = x_BTP2.prod(axis=3).sum(axis=2)
        hidden_BT[:, [t for t in range(T) if t not in missing]] = 0
        labels_BT = rng.random((512, T)) < 1 / (1 + np.exp(-(known_BT + hidden_BT)))
        columns = (torch.tensor(a, dtype=torch.float32) for a in (known_BT, x_BTP2.reshape(512, -1), labels_BT))
        _show(corrections, *columns)
    return [figure.verdict for figure in own_experts(corrections.sums, [task.name for task in schema.tasks])]


def test_tasks_that_each_see_what_the_model_does_not_need_experts_of_their_own() -> None:
    """Six times four products are missing, and the 16 units of a shared network are at most those of four tasks."""
    verdicts = _verdicts(missing=(2, 3, 4, 5, 6, 7))
    assert verdicts[:2] == ["shared is enough"] * 2
    assert verdicts[2:].count("own experts would help") >= 2


def test_one_task_alone_that_sees_what_the_model_does_not_is_served_by_shared_experts_as_well() -> None:
    assert _verdicts(missing=(7,)) == ["shared is enough"] * 7 + ["more shared experts would help"]


def test_own_networks_do_not_know_of_each_other_and_shared_ones_do() -> None:
    def losses(like_is_click: bool) -> F64:
        generator, corrections = torch.Generator().manual_seed(0), Corrections(_schema(2), (0, 0), FAST)
        for _ in range(20):
            x_BI = torch.randn(64, 4, generator=generator)
            click_B, like_B = ((torch.rand(64, generator=generator) < x_BI[:, c].sigmoid()).float() for c in (0, 1))
            labels_BT = torch.stack([click_B, click_B if like_is_click else like_B], dim=1)
            _show(corrections, torch.zeros(64, 2), x_BI, labels_BT)
        of_click_SK: F64 = corrections.sums.loss_SKT[:, :, 0]
        return of_click_SK

    one, other = losses(like_is_click=False), losses(like_is_click=True)
    assert np.allclose(one[:, :SHARED], other[:, :SHARED], rtol=1e-6)
    assert not np.allclose(one[-1, SHARED], other[-1, SHARED], rtol=1e-3)


def test_into_the_shared_network_a_rare_task_sends_its_gradient_with_the_factor_of_the_model() -> None:
    def losses(power: float) -> F64:
        generator = torch.Generator().manual_seed(0)
        corrections = Corrections(_schema(2), (0, 0), FAST, RareTasksConfig(gradient_power=power))
        for _ in range(30):
            x_BI = torch.randn(128, 4, generator=generator)
            dense_B, rare_B = (torch.rand(128, generator=generator) < (x_BI[:, c] - 4 * c).sigmoid() for c in (0, 1))
            logits_BT = torch.tensor([0.0, -4.0]).expand(128, 2)
            _show(corrections, logits_BT, x_BI, torch.stack([dense_B, rare_B], dim=1).float())
        last_KT: F64 = corrections.sums.loss_SKT[-1]
        return last_KT

    change_KT = np.abs(losses(0.5) - losses(0.0))
    assert change_KT[SHARED, 1] > 5 * change_KT[OWN, 1], "what is alone has no other gradients to be weighed with"


def test_a_batch_is_scored_before_it_is_learned() -> None:
    """Labels of pure noise: what scored them afterwards would gain."""
    generator = torch.Generator().manual_seed(0)
    corrections = Corrections(_schema(2), (0, 0), OptimizerConfig(learning_rate=0.1))
    for _ in range(200):
        labels_BT = (torch.rand(64, 2, generator=generator) < 0.5).float()
        _show(corrections, torch.zeros(64, 2), torch.randn(64, 8, generator=generator), labels_BT)
    loss_KT = corrections.sums.loss_SKT.sum(axis=0)
    assert (loss_KT > 200 * 64 * np.log(2)).all()


def test_new_groups_begin_anew_and_the_same_ones_do_not() -> None:
    corrections = Corrections(_schema(3), (0, 0, 0), FAST)
    _show(corrections, torch.zeros(4, 3), torch.zeros(4, 2), torch.ones(4, 3))
    corrections.regroup(((0, 1, 2),))
    assert len(corrections.sums.loss_SKT) == 1
    corrections.regroup(((0, 2), (1,)))
    assert (corrections.sums.group_T, len(corrections.sums.loss_SKT)) == ((0, 1, 0), 0)
    _show(corrections, torch.zeros(4, 3), torch.zeros(4, 2), torch.ones(4, 3))
    assert len(corrections.sums.loss_SKT) == 1


def test_the_groups_are_those_that_share_experts() -> None:
    declared = {"first": ("click",), "second": ("watch", "like")}
    own_pools = replace(SmesConfig(), groups=replace(SmesConfig().groups, declared=declared, pools="own"))
    common = replace(own_pools, groups=replace(own_pools.groups, pools="common"))
    for model, expected in (
        (ModelConfig(smes=own_pools), (0, 1, 1)),
        (ModelConfig(smes=common), (0, 0, 0)),
        (MODELS["searching"], (0, 0, 0)),
        (MODELS["mmoe"], (0, 0, 0)),
        (ModelConfig(ranker="home", home=HomeConfig(declared)), (0, 1, 1)),
    ):
        assert sharing_groups(RICH_SCHEMA, model) == expected
