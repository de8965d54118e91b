"""Schedules only raise flags, and only while they are open; only one thread uses the learner."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from smes.events import ExampleBlock
from smes.model.config import OptimizerConfig
from smes.model.devices import RankBatch
from smes.model.learner import Learner, StepResult
from tests.trainer.small_world import MODEL, SCHEMA, fill, make_trainer, open_log
from trainer.loop import CHECKPOINT, SNAPSHOT
from trainer.schedule import Flags, Schedule

DEADLINE_S = 60.0


def comes_true(condition: Callable[[], bool], within_s: float = DEADLINE_S) -> bool:
    pause, deadline = threading.Event(), time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        pause.wait(0.005)
    return True


def test_asking_twice_is_asking_once() -> None:
    flags = Flags()
    flags.request("snapshot")
    flags.request("snapshot")
    assert [flags.take("snapshot"), flags.take("snapshot"), flags.take("checkpoint")] == [True, False, False]


def test_flags_are_raised_again_and_again_while_open_and_not_after() -> None:
    flags = Flags()
    threads_before = set(threading.enumerate())
    with Schedule(flags, {"often": 0.02, "seldom": 3600.0}):
        for _ in range(3):
            assert comes_true(lambda: flags.take("often"))
        assert not flags.take("seldom")
    assert comes_true(lambda: set(threading.enumerate()) <= threads_before)
    flags.take("often")
    assert not comes_true(lambda: flags.take("often"), within_s=0.3)  # fifteen intervals


def test_a_flag_raised_many_times_is_taken_once() -> None:
    flags, other = Flags(), Flags()
    with Schedule(flags, {"cut": 0.01}), Schedule(other, {"clock": 0.01}):
        for _ in range(10):
            assert comes_true(lambda: other.take("clock"))
    assert flags.take("cut")
    assert not flags.take("cut")


class RecordingLearner(Learner):
    """Notes which threads call it."""

    def __init__(self) -> None:
        super().__init__(SCHEMA, MODEL, OptimizerConfig(), device=torch.device("cpu"), seed=1)
        self.callers: dict[str, set[int]] = {}

    def prepare(self, examples: ExampleBlock) -> RankBatch:
        self._note("prepare")
        return super().prepare(examples)

    def step(self, batch: RankBatch) -> StepResult:
        self._note("step")
        return super().step(batch)

    def serving_state(self) -> dict[str, torch.Tensor]:
        self._note("serving_state")
        return super().serving_state()

    def state(self) -> dict[str, torch.Tensor]:
        self._note("state")
        return super().state()

    def _note(self, method: str) -> None:
        self.callers.setdefault(method, set()).add(threading.get_ident())


def test_no_second_thread_uses_the_learner(tmp_path: Path) -> None:
    log, learner, flags = open_log(), RecordingLearner(), Flags()
    fill(log, 3000)
    trainer = make_trainer(log, tmp_path, learner=learner, flags=flags)
    end = trainer.stream.end()
    deadline = time.monotonic() + DEADLINE_S

    def done() -> bool:
        assert time.monotonic() < deadline
        checkpointed = len(list(tmp_path.iterdir())) == 2
        return trainer.stream.has_reached(end) and trainer.stream.upcoming() is None and checkpointed

    with Schedule(flags, {SNAPSHOT: 0.01, CHECKPOINT: 0.01}):
        trainer.run(done)

    assert learner.step_number > 20
    assert learner.callers.keys() == {"prepare", "step", "serving_state", "state"}
    assert set().union(*learner.callers.values()) == {threading.get_ident()}
