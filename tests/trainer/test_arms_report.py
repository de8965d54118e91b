"""Figures of the scorer's arms: right values, intervals that cover, each impression once, the same after a restart."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score

from smes.arm_names import arm_column
from smes.events import CLOSING, FIRST, FURTHER, ExampleBlock
from smes.schema import Schema, Task
from stream.codec.codec import encode_feedback, encode_impressions
from stream.log.memory_log import InMemoryLog
from stream.topics import FEEDBACK, IMPRESSIONS
from tests.trainer.small_world import SCHEMA as WORLD
from tests.trainer.small_world import events, make_trainer, open_log, train_to_the_end
from trainer.arms_report import MAX_ARMS, ArmTallies
from trainer.observers import StepFigures
from trainer.run_report import training_report

SCHEMA = Schema("arms", tasks=(Task("click"), Task("watch", kind="regression", max_value=100)), features=())
NOTHING = StepFigures(np.zeros((0, 2), np.float32))


def served(n: int, arms: Sequence[str | None], seed: int = 0, *, users: int = 200) -> ExampleBlock:
    """``n`` examples, each served by one of the arms; a user's clicks have much in common. Some cells have no label."""
    rng = np.random.default_rng(seed)
    block = ExampleBlock.empty(SCHEMA, n)
    block.impression_id[:] = np.arange(n)
    block.ids[:, 0] = rng.integers(0, users, n)
    arm_of_user = rng.integers(0, len(arms), users)
    of_user = rng.normal(0, 1.5, users)[block.ids[:, 0]]
    known = rng.normal(0, 1, n)
    logit = known + of_user - 1
    block.labels[:, 0] = rng.random(n) < 1 / (1 + np.exp(-logit))
    block.labels[:, 1] = np.minimum(rng.exponential(9, n) * np.exp(of_user / 2), 100)
    block.served_scores[:, 0] = 1 / (1 + np.exp(1 - known))
    block.served_scores[:, 1] = 9
    block.served_version[:] = 3
    block.served_arm[:] = arm_column([arms[i] for i in arm_of_user[block.ids[:, 0]]])
    block.label_mask[:, 1] = rng.random(n) < 0.7
    return block


def known(value: float | None) -> float:
    """A value that must be there."""
    assert value is not None
    return value


def tallies_of(*blocks: ExampleBlock) -> ArmTallies:
    tallies = ArmTallies(SCHEMA)
    for block in blocks:
        tallies.after_step(block, NOTHING)
    return tallies


def test_the_figures_are_those_of_scikit_learn() -> None:
    block = served(5000, ["main", "b"])
    report = tallies_of(*(block.take(slice(i, i + 700)) for i in range(0, 5000, 700))).report()

    assert list(report) == ["main", "b"]
    for arm, figures in report.items():
        rows = (block.served_arm == arm_column([arm])).all(axis=1)
        labels, scores = block.labels[rows, 0], block.served_scores[rows, 0].astype(np.float64)
        click = figures.tasks["click"]
        assert figures.impressions == click.examples == click.scored == rows.sum()
        assert click.positives == labels.sum()
        rate = labels.mean()
        entropy = log_loss(labels, np.full(len(labels), rate))
        assert click.auc is not None
        assert click.ne is not None
        assert click.mae is None
        assert click.auc.value == pytest.approx(roc_auc_score(labels, scores), abs=5e-4)
        assert click.ne.value == pytest.approx(log_loss(labels, scores) / entropy, rel=1e-6)
        assert click.calibration.value == pytest.approx(scores.mean() / rate, rel=1e-6)
        assert click.mean_label.value == pytest.approx(rate, rel=1e-6)
        watch, labelled = figures.tasks["watch"], rows & block.label_mask[:, 1]
        assert watch.auc is watch.ne is None
        assert watch.mae is not None
        assert watch.examples == labelled.sum()
        assert watch.mean_label.value == pytest.approx(block.labels[labelled, 1].mean(), rel=1e-6)
        assert watch.mae.value == pytest.approx(np.abs(block.labels[labelled, 1] - 9).mean(), rel=1e-6)


def test_the_difference_is_to_the_main_arm() -> None:
    report = tallies_of(served(5000, ["main", "b"])).report()

    main, b = report["main"].tasks["click"].mean_label, report["b"].tasks["click"].mean_label
    assert (main.over_main, main.over_main_low, main.over_main_high) == (None, None, None)
    assert b.over_main == pytest.approx(known(b.value) - known(main.value))


def test_the_intervals_cover_though_a_users_clicks_have_much_in_common() -> None:
    """Arms of equal models: the interval of a difference has to hold 0 in about 95 of 100 worlds.

    Intervals over examples hold it in about 70: the test can tell.
    """
    worlds, covered = 120, {"auc": 0, "mean_label": 0, "naive": 0}
    for seed in range(worlds):
        block = served(2000, ["main", "b"], seed=seed, users=150)
        click = tallies_of(block).report()["b"].tasks["click"]
        for name, figure in (("auc", click.auc), ("mean_label", click.mean_label)):
            assert figure is not None
            covered[name] += known(figure.over_main_low) <= 0 <= known(figure.over_main_high)
        of_b = (block.served_arm == arm_column(["b"])).all(axis=1)
        ours, theirs = block.labels[of_b, 0], block.labels[~of_b, 0]
        error = np.sqrt(ours.var() / len(ours) + theirs.var() / len(theirs))
        covered["naive"] += abs(ours.mean() - theirs.mean()) <= 1.96 * error

    expected, deviation = 0.95 * worlds, np.sqrt(0.95 * 0.05 * worlds)
    for name in ("auc", "mean_label"):
        assert covered[name] >= expected - 4 * deviation, covered
    assert covered["naive"] < expected - 4 * deviation, covered
    assert covered["mean_label"] < worlds, covered  # nor does it hold 0 always


def test_a_better_arm_shows() -> None:
    block = served(8000, ["main", "b"], users=400)
    of_b = (block.served_arm == arm_column(["b"])).all(axis=1)
    block.served_scores[of_b, 0] = np.clip(
        block.served_scores[of_b, 0] + 0.3 * (block.labels[of_b, 0] - 0.5), 0.01, 0.99
    )

    auc = tallies_of(block).report()["b"].tasks["click"].auc

    assert auc is not None
    assert known(auc.over_main_low) > 0.02


def test_few_users_have_figures_without_intervals() -> None:
    figure = tallies_of(served(500, ["main"], users=10)).report()["main"].tasks["click"].auc

    assert figure is not None
    assert figure.value is not None
    assert (figure.low, figure.high) == (None, None)


def test_each_impression_counts_once_with_its_final_labels() -> None:
    block = served(900, ["main", "b"])
    early, further, final = (block.take(np.arange(900)) for _ in range(3))
    early.labels[:, 0] = further.labels[:, 0] = 0
    early.kind[:], further.kind[:], final.kind[:] = FIRST, FURTHER, CLOSING
    tallies = tallies_of(early, further)
    assert tallies.report() == {}

    tallies.after_failed_step(early)
    tallies.after_closing(final)

    assert tallies.report() == tallies_of(block).report()


def test_an_impression_whose_step_failed_was_served_all_the_same() -> None:
    block, tallies = served(900, ["main", "b"]), ArmTallies(SCHEMA)

    tallies.after_failed_step(block)

    assert tallies.report() == tallies_of(block).report()


def test_what_was_not_served_does_not_count_and_without_an_arm_it_was_the_main_one() -> None:
    block, unserved = served(900, ["main", None]), served(300, [None])
    unserved.served_scores[:] = np.nan
    unserved.served_version[:] = ExampleBlock.empty(SCHEMA, 1).served_version[0]

    report = tallies_of(block, unserved).report()

    assert {arm: figures.impressions for arm, figures in report.items()} == {"main": 900}


def test_examples_without_a_score_count_for_the_mean_label_alone() -> None:
    block = served(2000, ["main"])
    block.served_scores[:500, 0] = np.nan

    click = tallies_of(block).report()["main"].tasks["click"]

    assert (click.examples, click.scored) == (2000, 1500)
    assert click.mean_label.value == pytest.approx(block.labels[:, 0].mean())
    assert click.auc is not None
    assert click.auc.value == pytest.approx(
        roc_auc_score(block.labels[500:, 0], block.served_scores[500:, 0]), abs=1e-3
    )


def test_a_producer_that_makes_up_arms_takes_no_more_memory() -> None:
    made_up, ours = served(4000, [f"arm-{i}" for i in range(30)], users=3000), served(500, ["main"])
    tallies = tallies_of(made_up, ours)

    report = tallies.report()

    assert len(report) == MAX_ARMS
    assert report["main"].impressions == 500
    assert sum(figures.impressions for figures in report.values()) + tallies.left_out == 4500


def test_a_state_goes_on_as_if_there_had_been_no_end() -> None:
    first, second = served(900, ["main", "b"]), served(900, ["main", "b", "c"], seed=1)
    tallies = tallies_of(first)
    again = ArmTallies(SCHEMA)
    again.load_state(tallies.state())

    for each in (tallies, again):
        each.after_step(second, NOTHING)

    assert again.report() == tallies.report()
    fresh = ArmTallies(SCHEMA)
    fresh.load_state(ArmTallies(SCHEMA).state())
    assert fresh.report() == {}


def arms_log() -> InMemoryLog:
    """A log whose impressions were served by two arms, by a stable split, with scores."""
    log = open_log()
    impressions, feedback = events(2000)
    rng = np.random.default_rng(1)
    impressions.served_version[:] = 9
    impressions.served_scores[:] = rng.random(impressions.served_scores.shape)
    impressions.served_arm[:] = arm_column([("main", "b")[user % 2] for user in impressions.user_id.tolist()])
    log.append(IMPRESSIONS, encode_impressions(impressions, WORLD, "arrow", 2))
    log.append(FEEDBACK, encode_feedback(feedback, WORLD, "json", 2))
    return log


def test_a_restarted_trainer_reports_the_same_of_the_arms(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    log = arms_log()
    whole = make_trainer(log, None)
    train_to_the_end(whole)
    first = make_trainer(log, tmp_path)
    for _ in range(10):
        while not first.step():
            first.stream.poll(0)
    first.checkpoint()

    second = make_trainer(log, tmp_path)
    assert second.restore() == 10
    train_to_the_end(second)

    report, expected = (training_report(t, seconds=1, trained=1).to_dict() for t in (second, whole))
    assert report["arms"] == expected["arms"]
    assert set(report["arms"]) == {"main", "b"}
    assert sum(arm["impressions"] for arm in report["arms"].values()) == report["events"]["trained"]
    assert report["arms_left_out"] == 0
