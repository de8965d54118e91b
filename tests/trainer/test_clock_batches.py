"""Batches that the wall clock ended: a killed trainer that is started again repeats them bit for bit."""

import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from smes.model.learner import Learner
from stream.batch_journal import NAME, BatchJournal
from stream.config import MiniBatchConfig
from stream.dead_letters import DeadLetterWriter
from stream.example_stream import ExampleStream
from stream.log.memory_log import InMemoryLog
from tests.trainer.small_world import SCHEMA, STREAM, fill, make_trainer, open_log
from trainer.loop import Trainer


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class Clock:
    """Seconds that a test moves on."""

    now_s = 50.0

    def __call__(self) -> float:
        return self.now_s


def trainer_of(log: InMemoryLog, folder: Path, clock: Clock, *, events_per_read: int = 300) -> Trainer:
    config = replace(STREAM, batch=MiniBatchConfig(size=64, max_wait_s=0.5), events_per_read=events_per_read)
    journal = BatchJournal(folder / NAME, keep=2)
    stream = ExampleStream(SCHEMA, config, log, DeadLetterWriter(log), journal=journal, monotonic=clock)
    return make_trainer(log, folder, stream=stream)


def assert_same(one: Learner, other: Learner) -> None:
    state, expected = one.state(), other.state()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("seed", range(3))
def test_a_restart_repeats_batches_that_the_clock_ended(seed: int, tmp_path: Path) -> None:
    log, clock, chance = open_log(), Clock(), random.Random(seed)
    first = trainer_of(log, tmp_path / "folder", clock)
    sizes: list[int] = []
    for i in range(70):  # traffic that fills a batch now and then
        fill(log, 40, seed=i, first=40 * i)
        clock.now_s += chance.uniform(0, 0.7)
        first.stream.poll(0)
        before = first.trained
        while first.step():
            sizes.append(first.trained - before)
            before = first.trained
        if i == 40:
            first.checkpoint()
    assert len(set(sizes)) > 3
    at_checkpoint = tmp_path / "died"
    shutil.copytree(tmp_path / "folder", at_checkpoint)

    second = trainer_of(log, at_checkpoint, clock, events_per_read=64)
    resumed = second.restore()
    assert resumed is not None
    assert resumed < first.learner.step_number - 5
    while second.learner.step_number < first.learner.step_number:
        clock.now_s += 0.6  # the clock would end every batch now
        if not second.step():
            assert second.stream.poll(0) or second.stream.upcoming() is not None

    assert second.trained == first.trained
    assert_same(second.learner, first.learner)


def test_without_the_journal_it_would_not(tmp_path: Path) -> None:
    log, clock = open_log(), Clock()
    first = trainer_of(log, tmp_path, clock)
    first.checkpoint()
    for i in range(50):
        fill(log, 40, seed=i, first=40 * i)
        clock.now_s += 0.6
        first.stream.poll(0)
        while first.step():
            pass
    (tmp_path / NAME).unlink()
    second = trainer_of(log, tmp_path, clock)
    second.restore()
    while second.trained < first.trained and (second.step() or second.stream.poll(0)):
        pass

    assert second.learner.step_number < first.learner.step_number
