"""Schedules only raise flags, and only while they are open; the learner is touched by one thread alone."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.trainer.small_world import fill, make_trainer, open_log
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
    flags.put_up("snapshot")
    flags.put_up("snapshot")
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


def test_a_flag_that_nobody_takes_is_one_flag() -> None:
    flags, other = Flags(), Flags()
    with Schedule(flags, {"cut": 0.01}), Schedule(other, {"clock": 0.01}):
        for _ in range(10):
            assert comes_true(lambda: other.take("clock"))
    assert flags.take("cut")
    assert not flags.take("cut")


def test_no_second_thread_touches_the_learner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = open_log()
    fill(log, 3000)
    trainer = make_trainer(log, tmp_path)
    callers: dict[str, set[int]] = {}

    def recorded(name: str) -> None:
        method = getattr(trainer.learner, name)

        def call(*arguments: object) -> object:
            callers.setdefault(name, set()).add(threading.get_ident())
            return method(*arguments)

        monkeypatch.setattr(trainer.learner, name, call)

    for name in ("prepare", "step", "serving_state", "state"):
        recorded(name)
    end = trainer.stream.end()
    deadline = time.monotonic() + DEADLINE_S

    def done() -> bool:
        assert time.monotonic() < deadline
        checkpointed = len(list(tmp_path.iterdir())) == 2
        return trainer.stream.has_reached(end) and not trainer.stream.assembler.ready and checkpointed

    with Schedule(trainer._flags, {"snapshot": 0.01, "checkpoint": 0.01}):
        trainer.run(done)
    assert trainer.learner.step_number > 20
    assert callers.keys() == {"prepare", "step", "serving_state", "state"}
    assert set().union(*callers.values()) == {threading.get_ident()}
