"""A checkpoint written with two partitions is continued with four: nothing is lost, and the weights are the same.

Guarantee shown: the ledger is kept and balances. The weights are, bit for bit, those of a trainer that read four
partitions from the beginning.
"""

from pathlib import Path

import pytest
import torch

from smes.errors import CheckpointError
from stream.log.memory_log import InMemoryLog
from stream.topics import FEEDBACK, IMPRESSIONS
from tests.trainer.small_world import fill, make_trainer, open_log, train_to_the_end
from trainer.loop import Trainer
from trainer.report import conservation_errors
from trainer.run_report import training_report

BEFORE, AFTER = 1500, 1000
LATER = 2500  # ids, and so 10 s after the last impression before: its feedback has come by then


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def log() -> InMemoryLog:
    """A log of two partitions a topic with the first part of the events."""
    log = open_log(2)
    fill(log, BEFORE)
    return log


@pytest.fixture
def stopped(log: InMemoryLog, tmp_path: Path) -> Trainer:
    """A trainer that read the first part and wrote a checkpoint."""
    trainer = make_trainer(log, tmp_path)
    train_to_the_end(trainer)
    trainer.checkpoint()
    return trainer


@pytest.fixture
def restarted(log: InMemoryLog, stopped: Trainer, tmp_path: Path) -> Trainer:
    """A trainer restored from that checkpoint, after the topics grew to four partitions."""
    for topic in (IMPRESSIONS, FEEDBACK):
        log.add_partitions(topic, 4)
    trainer = make_trainer(log, tmp_path)
    assert trainer.restore() == stopped.learner.step_number > 5
    return trainer


def test_the_ledger_is_kept(stopped: Trainer, restarted: Trainer) -> None:
    assert restarted.stream.ledger() == stopped.stream.ledger()
    assert restarted.stream.ledger().waiting > 0


def test_the_ledger_balances_after_the_rest(log: InMemoryLog, restarted: Trainer) -> None:
    fill(log, AFTER, seed=1, partitions=4, first=LATER)

    train_to_the_end(restarted)

    report = training_report(restarted, seconds=1, trained=1).to_dict()
    assert conservation_errors(report) == []
    assert report["events"]["impressions"] == BEFORE + AFTER
    assert (report["events"]["late"], report["feedback"]["late"], report["feedback"]["orphaned"]) == (0, 0, 0)


def test_the_weights_are_those_of_four_partitions_from_the_beginning(log: InMemoryLog, restarted: Trainer) -> None:
    fill(log, AFTER, seed=1, partitions=4, first=LATER)
    always_four = open_log(4)
    fill(always_four, BEFORE, partitions=4)
    fill(always_four, AFTER, seed=1, partitions=4, first=LATER)
    expected = make_trainer(always_four, None)

    train_to_the_end(restarted)
    train_to_the_end(expected)

    state, wanted = restarted.learner.state(), expected.learner.state()
    assert state.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(state[name], tensor), name


def test_fewer_partitions_are_refused_with_both_numbers(stopped: Trainer, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"state of 2 partitions, expected at most 1"):
        make_trainer(open_log(1), tmp_path).restore()
