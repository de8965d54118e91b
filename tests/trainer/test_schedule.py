"""Schedules only raise flags, and only while they are open; only one thread uses the learner."""

import importlib
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta, tzinfo
from pathlib import Path

import numpy as np
import pytest
import torch

from smes.events import ExampleBlock
from smes.model.config import OptimizerConfig
from smes.model.deltas import StateView
from smes.model.devices import RankBatch
from smes.model.learner import Learner
from smes.model.step_result import StepResult
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


class Clock(datetime):
    """What APScheduler takes for the time: the wall clock, moved."""

    moved = timedelta()

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
        return datetime.now(tz) + cls.moved


@pytest.mark.parametrize("moved", [timedelta(seconds=-30), timedelta(hours=-1), timedelta(seconds=30)])
def test_the_wall_clock_may_move_while_flags_are_raised(moved: timedelta, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("base", "background"):
        name = f"apscheduler.schedulers.{module}"
        if hasattr(importlib.import_module(name), "datetime"):
            monkeypatch.setattr(f"{name}.datetime", Clock)
    flags = Flags()
    interval_s = 0.05
    with Schedule(flags, {"often": interval_s}):
        before_s = seconds_for(flags, "often", raises=20)
        monkeypatch.setattr(Clock, "moved", moved)
        after_s = seconds_for(flags, "often", raises=20)

    # At the pace of the interval: no pause of half a minute, and no burst to make up for one.
    for seconds in (before_s, after_s):
        assert 18 * interval_s <= seconds < 20


def seconds_for(flags: Flags, name: str, raises: int) -> float:
    began_s = time.monotonic()
    for _ in range(raises):
        assert comes_true(lambda: flags.take(name))
    return time.monotonic() - began_s


def test_the_first_raises_come_sooner_and_each_later_one_after_twice_as_long() -> None:
    flags = Flags()
    with Schedule(flags, {"checkpoint": 0.8}, first_s={"checkpoint": 0.1}):
        gaps_s = [seconds_for(flags, "checkpoint", raises=1) for _ in range(6)]

    due_s = np.cumsum([0.1, 0.2, 0.4, 0.8, 0.8, 0.8])
    assert (np.cumsum(gaps_s) > due_s - 0.02).all(), gaps_s


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

    def state_view(self) -> StateView:
        self._note("state_view")
        return super().state_view()

    def _note(self, method: str) -> None:
        self.callers.setdefault(method, set()).add(threading.get_ident())


def test_no_second_thread_calls_the_learner(tmp_path: Path) -> None:
    log, learner, flags = open_log(), RecordingLearner(), Flags()
    fill(log, 3000)
    trainer = make_trainer(log, tmp_path, learner=learner, flags=flags)
    end = trainer.stream.end()
    deadline = time.monotonic() + DEADLINE_S

    def done() -> bool:
        assert time.monotonic() < deadline
        checkpointed = len(list(tmp_path.glob("*.safetensors"))) == 2
        return trainer.stream.has_reached(end) and trainer.stream.upcoming() is None and checkpointed

    with Schedule(flags, {SNAPSHOT: 0.01, CHECKPOINT: 0.01}):
        trainer.run(done)

    assert learner.step_number > 20
    assert learner.callers.keys() == {"prepare", "step", "state_view"}
    assert set().union(*learner.callers.values()) == {threading.get_ident()}
