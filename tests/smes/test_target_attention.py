"""Target attention and the sequences of the feature layer, compared with loops in NumPy."""

import numpy as np
import pytest
import torch

from smes.model.config import ModelConfig, OptimizerConfig, RankerName
from smes.model.features import FeatureInputs, FeatureLayer, TargetAttention
from smes.model.ids import pool_weights
from smes.model.learner import Learner
from smes.model.serving import ServingModel
from smes.schema import MISSING, Feature, Schema, Task
from tests.smes.streams import history_stream, loss_of

SCHEMA = Schema(
    "sequences",
    tasks=(Task("click"), Task("like")),
    features=(
        Feature("recent", kind="sequence", max_length=3, vocabulary="item_id", query="item_id"),
        Feature("city", dim=2),
        Feature("outcomes", kind="sequence", max_length=3, accompanies="recent"),
        Feature("places", kind="sequence", max_length=3, accompanies="recent"),
    ),
)
# columns: user_id, item_id, recent × 3, city, outcomes × 3, places × 3
IDS = np.array(
    [
        [1, 2, 8, 9, 7, 5, 1, 0, 3, 4, 4, 6],
        [1, 3, 8, MISSING, MISSING, 5, 0, MISSING, MISSING, 4, MISSING, MISSING],
        [2, 3, MISSING, MISSING, MISSING, 5, *[MISSING] * 6],
    ],
    np.int64,
)
D = 4


def unit(v: np.ndarray) -> np.ndarray:
    """Scaled to a mean square of 1."""
    scaled: np.ndarray = v / np.sqrt(np.mean(v**2) + 1e-6)
    return scaled


def attended(attention: TargetAttention, target: np.ndarray, entries: np.ndarray) -> np.ndarray:
    """The documented formula for one instance, entry by entry."""
    if len(entries) == 0:
        return np.zeros(2 * len(target))
    weights = {name: tensor.detach().double().numpy() for name, tensor in attention.named_parameters()}
    query = weights["query.weight"] @ unit(target) + weights["query.bias"]
    scores = [query @ (weights["key.weight"] @ unit(entry)) / np.sqrt(len(query)) for entry in entries]
    exps = [np.exp(score - max(scores)) for score in scores]
    mean = sum(e * entry for e, entry in zip(exps, entries, strict=True)) / sum(exps)
    return np.concatenate([mean, mean * target])


def test_sequences_are_pooled_and_attended() -> None:
    torch.manual_seed(0)
    layer = FeatureLayer(SCHEMA, D, wide=True)
    assert layer.wide_numerics is not None
    generator = torch.Generator().manual_seed(1)
    embedding_BWD = torch.randn(3, 12, D, generator=generator)
    wide_BWT = torch.randn(3, 12, 2, generator=generator)
    pool = pool_weights(SCHEMA, IDS)
    assert pool is not None
    x_BI, wide_BT = layer(FeatureInputs(embedding_BWD, wide_BWT, torch.from_numpy(pool), torch.zeros(3, 0)))
    assert wide_BT is not None
    (attention,) = layer.attention
    assert isinstance(attention, TargetAttention)
    for b, length in enumerate([3, 1, 0]):
        e = embedding_BWD[b].double().numpy()
        entries = np.stack([e[2 + i] + e[6 + i] + e[9 + i] for i in range(length)]) if length else np.zeros((0, D))
        rows = max(length, 1)  # a companion of an empty sequence reads the default row of its vocabulary
        outcomes, places = e[6 : 6 + rows].mean(axis=0), e[9 : 9 + rows].mean(axis=0)
        recent = e[2 : 2 + length].mean(axis=0) if length else np.zeros(D)
        expected = [*e[0], *e[1], *recent, *e[5, :2], *outcomes, *places, *attended(attention, e[1], entries)]
        np.testing.assert_allclose(x_BI[b].detach(), expected, rtol=1e-4, atol=1e-5)
        w = wide_BWT[b].numpy()
        # Without the weights of the recent items: those belong to the same items as targets.
        linear = w[0] + w[1] + w[5] + w[6 : 6 + rows].mean(axis=0) + w[9 : 9 + rows].mean(axis=0)
        np.testing.assert_allclose(wide_BT[b].detach(), linear, rtol=1e-4, atol=1e-5)
    assert layer.output_dim == x_BI.shape[1]


def test_an_empty_history_has_finite_gradients() -> None:
    attention = TargetAttention(D, D)
    target, entries = torch.zeros(2, D, requires_grad=True), torch.zeros(2, 3, D, requires_grad=True)
    attention(target, entries, torch.zeros(2, 3, dtype=torch.bool)).sum().backward()
    for tensor in (target, entries, *attention.parameters()):
        assert tensor.grad is not None
        assert torch.isfinite(tensor.grad).all()


def test_places_without_an_entry_change_nothing() -> None:
    torch.manual_seed(0)
    attention, target = TargetAttention(D, D), torch.randn(5, D)
    entries, present = torch.randn(5, 3, D), torch.tensor([[True, True, False]]).expand(5, 3)
    other = entries.clone()
    other[:, 2] = 1e4
    torch.testing.assert_close(attention(target, other, present), attention(target, entries, present))


def learner_of_histories(schema: Schema, ranker: RankerName) -> Learner:
    return Learner(schema, ModelConfig(ranker=ranker, embedding_dim=8), OptimizerConfig(), device=torch.device("cpu"))


@pytest.mark.parametrize(("ranker", "least", "most"), [("smes", 0.0, 0.6), ("linear", 0.9, 1.1)])
def test_only_a_model_with_attention_learns_from_the_history(ranker: RankerName, least: float, most: float) -> None:
    schema, blocks = history_stream(batches=120, size=256)
    learner = learner_of_histories(schema, ranker)

    losses = [loss_of(schema, learner.step(learner.prepare(block)).scores, block) for block in blocks]

    chance = np.log(2)
    assert np.mean(losses[:5]) > 0.95 * chance
    assert least * chance < np.mean(losses[-20:]) < most * chance


@pytest.mark.parametrize("ranker", ["smes", "linear"])
def test_a_history_is_served_as_it_is_trained(ranker: RankerName) -> None:
    schema, blocks = history_stream(batches=20, size=256)
    learner = learner_of_histories(schema, ranker)
    for block in blocks:
        learner.step(learner.prepare(block))

    serving = ServingModel.from_state(schema, learner.config, learner.serving_state())
    served = serving.score(blocks[0].ids, blocks[0].numerics)

    own = learner.step(learner.prepare(blocks[0])).scores.numpy()
    np.testing.assert_allclose(served, own, rtol=1e-5, atol=1e-6)
