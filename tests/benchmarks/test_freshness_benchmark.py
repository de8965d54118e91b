"""The freshness benchmark: copies answer with the weights of their time, traffic has its rates, figures their signs.

Scores of copies are compared with serving models that are built, at the moment of the copy, from the learner's whole
state.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.bootstrap import Paired
from benchmarks.freshness_runs import AGES, ValueRun, _AgedScores, value_runs
from benchmarks.freshness_traffic import FEEDBACK_PER_IMPRESSION, Population, Traffic
from benchmarks.freshness_value import FRESHEST, ValueFigures, plot_value, value_figures, value_json, value_table
from benchmarks.run_cache import RunCache, RunResult
from smes.arrays import F32
from smes.events import ExampleBlock
from smes.model.learner import Learner
from smes.model.serving import ServingModel
from smes_io.schema_file import load_builtin
from tests.trainer.small_world import MODEL, SCHEMA, make_learner

BINARY = [0, 1]


def batch(number: int, seconds: float) -> ExampleBlock:
    """Sixteen examples of one moment."""
    rng = np.random.default_rng(number)
    examples = ExampleBlock.empty(SCHEMA, 16)
    examples.event_time_ms[:] = 1_700_000_000_000 + round(1000 * seconds)
    examples.ids[:, :3] = rng.integers(0, 20, (16, 3))
    examples.numerics[:] = rng.normal(size=(16, 1))
    examples.labels[:, :2] = rng.integers(0, 2, (16, 2))
    return examples


def reference_scores(learner: Learner, examples: ExampleBlock) -> F32:
    model = ServingModel.from_state(SCHEMA, MODEL, learner.serving_state())
    scores: F32 = model.score(examples.ids, examples.numerics)[:, BINARY]
    return scores


def test_each_age_answers_with_the_weights_of_its_time() -> None:
    torch.set_num_threads(1)
    times_s = [0, 30, 100, 130, 165, 400, 730, 790, 4000, 90_000]  # the warm-up is over at 100
    scored, learner = _AgedScores(make_learner(), 100_000), make_learner()
    # By hand, since the warm-up: the first batch of each period of 60 s, 600 s, 1 h and a day.
    replaced_at = {
        "never": [2],
        "1 day": [2, 9],
        "1 h": [2, 8, 9],
        "10 min": [2, 6, 8, 9],
        "1 min": [2, 4, 5, 6, 7, 8, 9],
        "every cut": [2, 3, 4, 5, 6, 7, 8, 9],
    }
    expected: dict[str, list[F32]] = {name: [] for name in AGES}
    states: dict[str, ServingModel] = {}
    for number, seconds in enumerate(times_s):
        examples = batch(number, seconds)
        for name, when in replaced_at.items():
            if number in when:
                states[name] = ServingModel.from_state(SCHEMA, MODEL, learner.serving_state())
            if number >= 2:
                expected[name].append(states[name].score(examples.ids, examples.numerics)[:, BINARY])
        learner.step(learner.prepare(examples))
        scored.step(examples)

    arrays = scored.arrays()

    assert arrays["scores"].shape == (len(AGES), 8 * 16, 2)
    for scores, name in zip(arrays["scores"], AGES, strict=True):
        np.testing.assert_allclose(scores, np.concatenate(expected[name]), rtol=2e-4, atol=2e-5, err_msg=name)
    assert scored.replaced() == {name: len(when) for name, when in replaced_at.items()}
    assert arrays["labels"].shape == arrays["mask"].shape == (8 * 16, 2)
    assert not np.allclose(arrays["scores"][0], arrays["scores"][-1], atol=1e-3)


def test_traffic_has_its_rates_and_feedback_follows_its_impression() -> None:
    schema = load_builtin("synthetic").schema
    traffic = Traffic(schema, Population(60, 40), first_id=1000, seed=0)
    shown: dict[int, int] = {}
    came, first_task = 0, []
    for tick in range(2000):
        impressions = traffic.impressions(5 if tick < 1500 else 0, tick, 20 * tick)
        shown |= dict.fromkeys(impressions.impression_id.tolist(), 20 * tick)
        feedback = traffic.feedback(tick, 20 * tick)
        delays = np.array([20 * tick - shown[i] for i in feedback.impression_id.tolist()])
        assert ((delays > 0) & (delays <= 4600)).all()
        came += len(feedback)
        first_task += feedback.task.tolist()
        assert impressions.ids[:, 1].max(initial=0) < 40

    assert len(shown) == 7500
    assert came / 7500 == pytest.approx(FEEDBACK_PER_IMPRESSION, rel=0.05)
    assert first_task.count(schema.task_index["click"]) / 7500 == pytest.approx(0.35, rel=0.1)


class _Fixed(RunCache):
    """Results that a test has made up: each age's scores are the truth with more and more noise, the freshest none."""

    def load(self, run: ValueRun) -> RunResult:  # type: ignore[override]  # of any run
        rng = np.random.default_rng(run.seed)
        truth = rng.random((4000, 2)).astype(np.float32)
        noise = rng.normal(size=truth.shape) * np.arange(len(AGES))[::-1, None, None] * 0.1
        arrays: dict[str, Any] = {
            "scores": np.clip(truth + noise, 0.01, 0.99).astype(np.float32),
            "labels": (rng.random(truth.shape) < truth).astype(np.uint8),
            "mask": np.ones(truth.shape, np.bool_),
            "user": rng.integers(0, 300, 4000),
        }
        return RunResult(arrays, {"tasks": ["click", "like"], "days": 3.0})


def test_older_weights_are_shown_to_lose_what_they_lose(tmp_path: Path) -> None:
    figures = value_figures(value_runs(None, 2, 1.0), _Fixed(tmp_path), resamples=80)

    auc, ne = ([paired.mean(age) for age in AGES] for paired in (figures.auc, figures.ne))
    assert auc == sorted(auc)
    assert ne == sorted(ne, reverse=True)
    never = figures.auc.difference("never", FRESHEST)
    assert never.low < never.value < never.high < 0
    text, flat = value_table([figures]), value_json([figures])
    assert text.startswith("drifting world: 8,000 scored examples over 3.0 days, mean of click, like")
    assert f"| never | {auc[0]:.4f} | {never.value:+.4f} ({never.low:+.4f} … {never.high:+.4f}) | {ne[0]:.4f} |" in text
    assert f"| every cut | {auc[-1]:.4f} | | {ne[-1]:.4f} | |" in text
    assert flat["value_drifting_world_auc_never_loss"] == never.value
    assert flat["value_drifting_world_ne_every_cut_loss"] == 0


def test_the_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="only in the bench extra")
    rng = np.random.default_rng(0)
    paired = Paired(tuple(AGES), rng.random((len(AGES), 2)), rng.random((50, len(AGES), 2)))
    figures = ValueFigures("KuaiRand", 10, 1.0, ("click", "like"), paired, paired)

    plot_value([figures, figures], tmp_path / "freshness.png")

    assert (tmp_path / "freshness.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
