"""Figures of the routing: against loops over sets, and of routers whose behaviour is known."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch

from smes.events import ExampleBlock
from smes.model.config import ModelConfig, OptimizerConfig
from smes.model.learner import Learner
from smes.rankers.ranker import ExpertLimits
from smes.schema import Feature, Schema, Task
from tests.smes.plain_smes import plain
from trainer.report import RoutingSummary
from trainer.routing_figures import drift, overlap, routing_report, routing_summary
from trainer.routing_history import RoutingHistory, RoutingHistoryConfig

SCHEMA = Schema(
    "ids",
    tasks=tuple(Task(name) for name in ("click", "like", "share")),
    # Never there: its indicator is a constant, through which a bias-free router on the raw input can be given a bias.
    features=(Feature("tab"), Feature("nothing", kind="numeric")),
)
T, E = 3, 8
TASKS = [task.name for task in SCHEMA.tasks]
STILL = OptimizerConfig(learning_rate=1e-30, embedding_learning_rate=1e-30)


SHORT = RoutingHistoryConfig(first_steps=4)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def distance(one: set[int], other: set[int]) -> float:
    return 1 - len(one & other) / len(one | other)


@pytest.mark.parametrize("K", [1, 2, 4])
def test_overlap_and_drift_are_those_of_sets(K: int) -> None:
    rng = np.random.default_rng(K)
    P = 11
    before, after = (
        np.array([[rng.choice(E, K, replace=False) for _ in range(T)] for _ in range(P)], np.int32) for _ in range(2)
    )
    for t, other in np.ndindex(T, T):
        expected = np.mean([1 - distance(set(after[p, t]), set(after[p, other])) for p in range(P)])
        assert overlap(after)[t, other] == pytest.approx(expected)
    for t in range(T):
        expected = np.mean([distance(set(before[p, t]), set(after[p, t])) for p in range(P)])
        assert drift(before, after)[t] == pytest.approx(expected)
    shuffled = rng.permuted(after, axis=2)
    assert not drift(after, shuffled).any(), "sets have no order"


def history_of(load: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> RoutingHistory:
    history = RoutingHistory(SHORT)
    history.add(ExampleBlock.empty(SCHEMA, 9), load)
    return history


def test_the_report_is_what_loops_count() -> None:
    """Two own pools of three beside two experts that always run; the first pool is click's alone."""
    limits = ExpertLimits(bound=8, num_experts=E, num_fixed=2, num_pools=2)
    load = np.array([[9, 9, 5, 4, 0, 0, 0, 0], [9, 9, 0, 0, 0, 9, 0, 0], [9, 9, 0, 0, 0, 3, 6, 0]])
    report = routing_report(history_of(load), limits, TASKS)
    assert (report["num_experts"], report["always_on"], report["pools"], report["tasks"]) == (8, 2, 2, TASKS)
    (segment,) = report["segments"]
    assert (segment["steps"], segment["instances"], segment["load"]) == (1, 9, load.tolist())
    assert segment["dead"] == [4, 7]
    assert segment["load_skew"] == pytest.approx(12 / (27 / 6))
    assert segment["load_skew_of_pools"] == pytest.approx([5 / 3, 12 / 6])
    assert segment["load_skew_of_tasks"] == pytest.approx([5 / 3, 9 / 3, 6 / 3])
    assert segment["pools_of_tasks"] == [[0], [1], [1]]
    assert (segment["overlap"], segment["drift"]) == (None, None), "it has not ended"
    load[2, 3] = 7
    (segment,) = routing_report(history_of(load), limits, TASKS)["segments"]
    assert segment["pools_of_tasks"] == [[0], [1], [0, 1]]
    assert segment["load_skew_of_tasks"] == pytest.approx([5 / 3, 9 / 3, 7 / (16 / 6)]), "of all experts that it reads"


def trained(
    optimizer: OptimizerConfig, *, biased: int | None = None, bias: float = 0.0, steps: int = 13
) -> tuple[Learner, RoutingHistory]:
    """A learner on ids at random, its routing's history kept as the trainer does, one expert's logits biased."""
    smes = plain(
        {
            "experts.num": E,
            "num_shared": 0,
            "num_adaptive": 1,
            "encoder_dims": (8,),
            "experts.dims": (8,),
            "router.input": "raw",
        }
    )
    model = ModelConfig(embedding_dim=8, embedding_scale=1.0, smes=smes)
    learner = Learner(SCHEMA, model, optimizer, device=torch.device("cpu"))
    if biased is not None:
        state = learner.state()
        state["dense.ranker.router.up.weight"].view(T, E, -1)[:, biased, -1] = bias
        learner.load_state(state)
    rng = np.random.default_rng(0)
    history = RoutingHistory(SHORT)
    for _ in range(steps):
        if history.is_full(pending=False):
            choices = learner.choices(*history.probe)
            assert choices is not None
            history.close(choices.numpy())
        labels = (rng.random((64, T)) < 0.3).astype(np.float32)
        block = ExampleBlock.empty(SCHEMA, 64)
        numerics = np.full_like(block.numerics, np.nan)
        ids = rng.integers(0, 50, block.ids.shape)
        examples = replace(block, ids=ids, numerics=numerics, labels=labels, label_mask=labels >= 0)
        result = learner.step(learner.prepare(examples))
        assert result.expert_load is not None
        history.add(examples, result.expert_load.numpy())
    return learner, history


def test_a_frozen_router_does_not_drift_and_one_that_learns_does() -> None:
    fast = OptimizerConfig(learning_rate=0.05, embedding_learning_rate=0.1)
    for optimizer, moves in ((STILL, False), (fast, True)):
        learner, history = trained(optimizer)
        report = routing_report(history, learner.expert_limits, TASKS)
        drifts = [segment["drift"] for segment in report["segments"]]
        assert len(drifts) == 4
        assert drifts[0] is None, "there is no version before the first"
        assert drifts[3] is None, "the open segment has no version of its own"
        for of_tasks in drifts[1:3]:
            assert len(of_tasks) == T
            assert all((value > 0.02) == moves for value in of_tasks)
        summary = routing_summary(history, learner.expert_limits)
        assert summary.drift == pytest.approx(np.mean(drifts[2]), abs=1e-5)
        overlaps = report["segments"][2]["overlap"]
        pairs = [overlaps[t][other] for t, other in combinations(range(T), 2)]
        assert summary.overlap == pytest.approx(np.mean(pairs), abs=1e-5)
        assert summary.overlap is not None
        assert 0 < summary.overlap < 1


def test_a_dead_expert_is_named() -> None:
    learner, history = trained(STILL, biased=5, bias=-1000.0)
    report = routing_report(history, learner.expert_limits, TASKS)
    assert [segment["dead"] for segment in report["segments"][:3]] == [[5]] * 3
    assert routing_summary(history, learner.expert_limits).dead == 1


def test_a_captured_router_is_all_skew_and_overlap() -> None:
    learner, history = trained(OptimizerConfig(), biased=2, bias=1000.0)
    summary = routing_summary(history, learner.expert_limits)
    assert summary == RoutingSummary(segment_steps=4, dead=E - 1, load_skew=E, drift=0.0, overlap=1.0)
    for segment in routing_report(history, learner.expert_limits, TASKS)["segments"]:
        assert segment["dead"] == [0, 1, 3, 4, 5, 6, 7]
        assert segment["load_skew_of_tasks"] == [E] * T


def test_a_ranker_without_experts_has_no_segments() -> None:
    learner = Learner(SCHEMA, ModelConfig(ranker="mmoe"), OptimizerConfig(), device=torch.device("cpu"))
    assert learner.choices(np.zeros((2, 3), np.int64), np.zeros((2, 1), np.float32)) is None
    report = routing_report(RoutingHistory(SHORT), learner.expert_limits, TASKS)
    assert (report["segments"], report["num_experts"]) == ([], None)
    assert routing_summary(RoutingHistory(SHORT), learner.expert_limits) == RoutingSummary()
