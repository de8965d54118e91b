"""A stop signal as an event: set whatever the interrupted thread is doing."""

import os
import signal

import pytest

from smes_cli.command_line import StopRequest, stop_signals

DEADLINE_S = 60.0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_heard_at_once_and_sets_the_event(number: signal.Signals) -> None:
    with stop_signals() as stop:
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop()
        assert stop.wait(DEADLINE_S)


def test_a_signal_within_the_wait_of_the_same_event_does_not_wait_for_itself() -> None:
    """The event's own ``wait`` holds its lock for a moment; a handler that took it would never get it."""
    with stop_signals() as stop:
        with stop._cond:  # type: ignore[attr-defined]  # what wait holds
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wait(DEADLINE_S)


def test_a_second_interrupt_interrupts() -> None:
    with stop_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_it_can_be_asked_without_a_signal() -> None:
    stop = StopRequest()
    stop.set()
    assert stop()
