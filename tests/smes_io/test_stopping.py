"""Calls that block in a client's library, ended early by a stop."""

import threading
import time

import pytest

from smes.errors import Stopped
from smes_io.stopping import StoppableCalls

HANG_S = 30.0  # longer than any load makes these waits, shorter than what would end them otherwise


def test_without_a_stop_event_a_call_runs_in_the_callers_thread() -> None:
    assert StoppableCalls().run("x", threading.current_thread) is threading.current_thread()


def test_results_and_errors_come_back_from_the_helper_thread() -> None:
    calls = StoppableCalls()
    calls.set_stop(threading.Event())

    assert calls.run("x", lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        calls.run("x", lambda: 1 / 0)
    assert calls.run("x", threading.current_thread) is not threading.current_thread()

    calls.close()


def test_a_stop_leaves_a_call_alone_that_does_not_end() -> None:
    calls, stop, never = StoppableCalls(), threading.Event(), threading.Event()
    calls.set_stop(stop)
    threading.Timer(0.1, stop.set).start()
    started = time.monotonic()

    with pytest.raises(Stopped, match="asking a server: no answer yet when a stop was asked for"):
        calls.run("asking a server", lambda: never.wait(10 * HANG_S))
    assert time.monotonic() - started < HANG_S

    never.set()


def test_while_a_stop_is_set_a_call_that_ends_soon_has_its_result() -> None:
    calls, stop = StoppableCalls(), threading.Event()
    stop.set()
    calls.set_stop(stop)

    assert calls.run("x", lambda: 3) == 3
    assert calls.retry("x", lambda: 4, timeout_s=1000, retriable=OSError) == 4

    calls.close()


def test_a_stop_ends_the_tries_and_names_the_last_error() -> None:
    calls, stop = StoppableCalls(), threading.Event()
    calls.set_stop(stop)
    threading.Timer(0.1, stop.set).start()

    def away() -> None:
        raise OSError("no route")

    with pytest.raises(Stopped, match="asking: given up, because a stop was asked for: no route"):
        calls.retry("asking", away, timeout_s=1000, retriable=OSError)

    calls.close()


def test_an_outage_is_warned_of_once_and_a_short_one_not_at_all(caplog: pytest.LogCaptureFixture) -> None:
    calls, started = StoppableCalls(), time.monotonic()

    def away_for_a_moment() -> None:
        if time.monotonic() - started < 0.1:
            raise OSError("no route")

    calls.retry("asking", away_for_a_moment, timeout_s=1000, retriable=OSError)

    assert caplog.messages == []

    tries_since_warning = 0

    def away_beyond_the_warning() -> None:
        nonlocal tries_since_warning
        tries_since_warning += bool(caplog.messages)
        if tries_since_warning < 3:
            raise OSError("no route")

    calls.retry("asking", away_beyond_the_warning, timeout_s=1000, retriable=OSError)

    begin, end = caplog.messages
    assert begin == "asking: no route; trying again for up to 1000 s"
    assert end.startswith("asking: answers again after ")
