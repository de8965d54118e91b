"""Training before the windows close: restarts bit for bit, what is counted, and what the closing examples teach."""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from smes.events import CLOSING, FIRST, FURTHER, WHOLE, ExampleBlock
from smes.model.learner import Learner
from stream.config import JoinConfig
from stream.dead_letters import DeadLetterWriter
from stream.example_stream import ExampleStream
from stream.join.waits import Correction, Wait
from stream.log.memory_log import InMemoryLog
from tests.trainer.small_world import SCHEMA, STREAM, events, fill, make_learner, make_trainer, open_log
from trainer.loop import Trainer
from trainer.observers import Observer, StepFigures
from trainer.report import conservation_errors
from trainer.run_report import training_report

AT_ONCE: dict[str, Wait] = {"default": "immediate"}
MIXED: dict[str, Wait] = {"default": "immediate", "like": 2.0, "watch": "window"}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def trainer_of(
    log: InMemoryLog,
    checkpoints: Path | None,
    wait: dict[str, Wait],
    correction: Correction = "es_dfm",
    *,
    prefetch: bool | None = None,
    learner: Learner | None = None,
) -> Trainer:
    join = JoinConfig(allowed_lateness_s=0.5, wait=wait, correction=correction)
    stream = ExampleStream(SCHEMA, replace(STREAM, join=join), log, DeadLetterWriter(log))
    return make_trainer(log, checkpoints, prefetch=prefetch, learner=learner, stream=stream)


def train(trainer: Trainer) -> Trainer:
    """Train on everything in the log, and close every window."""
    while trainer.step() or trainer.stream.poll(0):
        pass
    return close(trainer)


def close(trainer: Trainer) -> Trainer:
    trainer.stream.flush()
    while trainer.step():
        pass
    trainer.settle()
    return trainer


def assert_same(one: Trainer, other: Trainer) -> None:
    state, expected = one.learner.state(), other.learner.state()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name
    report, wanted = (training_report(t, seconds=1, trained=1).to_dict() for t in (one, other))
    assert {**report, "lineage": None} == {**wanted, "lineage": None}
    assert conservation_errors(report) == []


@pytest.fixture(scope="module")
def log() -> InMemoryLog:
    log = open_log()
    fill(log, 2000)
    return log


@pytest.mark.parametrize("wait", [AT_ONCE, MIXED], ids=["at once", "mixed"])
@pytest.mark.parametrize("seed", range(2))
def test_killed_anywhere_it_goes_on_bit_for_bit(
    wait: dict[str, Wait], seed: int, log: InMemoryLog, tmp_path: Path
) -> None:
    never_killed = train(trainer_of(log, None, wait))
    assert never_killed.learner.step_number > 20

    chance = random.Random(seed)
    lives, killed = 0, True
    while killed:
        lives, killed = lives + 1, False
        trainer = trainer_of(log, tmp_path, wait)
        trainer.restore()
        while not killed and (trainer.step() or trainer.stream.poll(0)):
            if chance.random() < 0.3:
                trainer.checkpoint()
            killed = chance.random() < 0.08  # everything since the checkpoint is lost
    assert lives > 1
    assert_same(close(trainer), never_killed)


def test_batches_sent_ahead_change_nothing(log: InMemoryLog) -> None:
    assert_same(train(trainer_of(log, None, MIXED, prefetch=True)), train(trainer_of(log, None, MIXED)))


class _Seen(Observer):
    """What the observers are given, in order."""

    def __init__(self) -> None:
        self.steps: list[ExampleBlock] = []
        self.closed: list[ExampleBlock] = []
        self.begun: set[int] = set()

    def before_step(self, examples: ExampleBlock) -> None:
        self.steps.append(examples)

    def after_step(self, examples: ExampleBlock, figures: StepFigures) -> None:
        assert len(figures.scores) == len(examples)
        self.begun.update(examples.impression_id[examples.begins].tolist())

    def after_closing(self, examples: ExampleBlock) -> None:
        assert self.begun.issuperset(examples.impression_id.tolist()), "an impression closes after its first step"
        self.closed.append(examples)


@pytest.mark.parametrize("wait", [AT_ONCE, MIXED, {}], ids=["at once", "mixed", "window"])
def test_every_impression_is_counted_once_and_closing_examples_are_not_trained_on(
    wait: dict[str, Wait], log: InMemoryLog
) -> None:
    seen, trainer = _Seen(), trainer_of(log, None, wait)
    trainer.observe(seen)
    train(trainer)
    report = training_report(trainer, seconds=1, trained=1).to_dict()

    trained = ExampleBlock.concat(seen.steps)
    kinds = set(trained.kind.tolist())
    assert kinds == ({FIRST, FURTHER} if wait else {WHOLE})
    assert (report["events"]["trained"], report["events"]["waiting"]) == (2000, 0)
    assert len(trained) == 2000 + (trained.kind == FURTHER).sum()
    assert conservation_errors(report) == []
    if wait == AT_ONCE:
        assert report["feedback"]["corrected"] == trained.label_mask[trained.kind == FURTHER].sum()
    assert (report["feedback"]["corrected"] > 0) == bool(wait)
    assert sum(map(len, seen.closed)) == (2000 if wait else 0)
    assert all((block.kind == CLOSING).all() for block in seen.closed)
    # The evaluation counts the final labels of each impression once, whatever was trained on when.
    _, feedback = events(2000)
    for task, name in enumerate(("click", "like")):
        assert report["tasks"][name]["positives"] == (feedback.task == task).sum()
        assert trainer.evaluation.report()[name].examples == 2000
    watched = trainer.evaluation.report()["watch"].examples
    assert watched == (feedback.task == 2).sum()


def test_it_learns_before_the_windows_close_and_is_calibrated_where_naive_negatives_are_not() -> None:
    fill(log := open_log(), 5000)

    corrections: tuple[Correction, Correction] = ("es_dfm", "none")
    click = {c: train(trainer_of(log, None, AT_ONCE, c)).evaluation.report()["click"] for c in corrections}

    weighted, naive = click["es_dfm"], click["none"]
    assert weighted.auc is not None
    assert weighted.auc > 0.56
    assert weighted.calibration == pytest.approx(1, abs=0.1)
    assert naive.calibration is not None
    assert naive.calibration < 0.8


def test_what_tasks_borrow_is_that_of_whole_examples(log: InMemoryLog) -> None:
    """Single labels do not tell which ones come together; the closing examples do, exactly."""
    at_once, waits = train(trainer_of(log, None, AT_ONCE)), train(trainer_of(log, None, {}))

    got, expected = at_once.learner.state(), waits.learner.state()

    for name in ("count_TT", "sum_TT", "product_TT"):
        torch.testing.assert_close(
            got[f"dense.tasks.borrowing.{name}"], expected[f"dense.tasks.borrowing.{name}"], rtol=1e-9, atol=1e-9
        )


def test_numeric_moments_count_an_impression_once(log: InMemoryLog) -> None:
    at_once, waits = train(trainer_of(log, None, AT_ONCE)), train(trainer_of(log, None, {}))

    got, expected = (t.learner.state()["dense.features.moments.count_C"] for t in (at_once, waits))

    assert torch.equal(got, expected)


def whole_batches(learner: Learner, n: int) -> Iterator[ExampleBlock]:
    impressions, _ = events(n)
    block = ExampleBlock.empty(SCHEMA, n)
    shared = {name: column for name, column in impressions.arrays().items() if name in block.arrays()}
    block = replace(block, **shared)
    block.labels[:, 0] = np.arange(n) % 2
    for start in range(0, n, 64):
        yield block.take(slice(start, start + 64))


def test_without_late_positives_the_weights_are_those_of_whole_examples() -> None:
    """Examples that are called first ones but have all their labels: the loss is the same, bit for bit."""
    whole, first = make_learner(), make_learner()
    first_state = first.state()
    for name, tensor in whole.state().items():
        assert torch.equal(first_state[name], tensor)
    for batch in whole_batches(whole, 640):
        whole.step(whole.prepare(batch))
        first.step(first.prepare(replace(batch, kind=np.full(len(batch), FIRST, np.int8))))
        first.observe_closed(replace(batch, kind=np.full(len(batch), CLOSING, np.int8)))

    got = first.state()
    for name, tensor in whole.state().items():
        assert torch.equal(got[name], tensor), name
