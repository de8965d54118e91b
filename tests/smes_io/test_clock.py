"""The one retry loop, with a clock that only its own waits move."""

import threading
from collections.abc import Callable
from itertools import repeat

import pytest

from smes_io.clock import retry, wait_until


class Away(Exception):
    """Worth another try."""


class Denied(Away):
    """Not worth another try."""


class FakeClock:
    """Seconds that pass while somebody waits, and how long each wait was."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.waits_s: list[float] = []

    def monotonic(self) -> float:
        return self.now_s

    def wait(self, seconds: float) -> None:
        self.waits_s.append(seconds)
        self.now_s += seconds


def fails(times: int, error: Exception) -> Callable[[], str]:
    """A call that fails so many times, then answers."""
    errors = repeat(error, times)

    def call() -> str:
        for each in errors:
            raise each
        return "answer"

    return call


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def test_a_call_that_succeeds_is_made_once_without_a_wait(clock: FakeClock) -> None:
    answer = retry(fails(0, Away()), timeout_s=0, retriable=Away, monotonic=clock.monotonic, wait=clock.wait)

    assert (answer, clock.waits_s) == ("answer", [])


def test_pauses_grow_and_the_last_one_repeats(clock: FakeClock) -> None:
    answer = retry(
        fails(5, Away()),
        timeout_s=60,
        retriable=Away,
        pauses_s=(1, 2, 4),
        monotonic=clock.monotonic,
        wait=clock.wait,
    )

    assert (answer, clock.waits_s) == ("answer", [1, 2, 4, 4, 4])


def test_the_last_try_is_at_the_deadline_and_its_error_is_raised(clock: FakeClock) -> None:
    tries: list[float] = []

    def call() -> None:
        tries.append(clock.now_s)
        raise Away(f"try {len(tries)}")

    with pytest.raises(Away, match="try 4"):
        retry(
            call,
            timeout_s=5,
            retriable=Away,
            pauses_s=(2,),
            monotonic=clock.monotonic,
            wait=clock.wait,
        )

    assert tries == [100, 102, 104, 105]


@pytest.mark.parametrize("error", [Denied(), OSError()])
def test_any_other_error_is_raised_at_once(clock: FakeClock, error: Exception) -> None:
    with pytest.raises(type(error)):
        retry(
            fails(1, error),
            timeout_s=60,
            retriable=Away,
            fatal=Denied,
            monotonic=clock.monotonic,
            wait=clock.wait,
        )

    assert clock.waits_s == []


def test_an_event_ends_the_tries_early() -> None:
    stop = threading.Event()
    stop.set()

    with pytest.raises(Away):
        retry(fails(10**9, Away()), timeout_s=3600, retriable=Away, wait=stop.wait)


def test_waiting_ends_with_the_first_true_answer(clock: FakeClock) -> None:
    answers = iter(["", "", "yes", "too late"])

    answer = wait_until(lambda: next(answers), timeout_s=60, pauses_s=(1,), monotonic=clock.monotonic, wait=clock.wait)

    assert (answer, clock.waits_s) == ("yes", [1, 1])


def test_waiting_ends_at_the_deadline_with_the_last_answer(clock: FakeClock) -> None:
    answer = wait_until(lambda: None, timeout_s=5, pauses_s=(2,), monotonic=clock.monotonic, wait=clock.wait)

    assert (answer, clock.now_s) == (None, 105)


def test_an_error_ends_the_waiting(clock: FakeClock) -> None:
    with pytest.raises(Denied):
        wait_until(fails(1, Denied()), timeout_s=60, monotonic=clock.monotonic, wait=clock.wait)

    assert clock.waits_s == []
