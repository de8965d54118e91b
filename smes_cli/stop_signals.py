"""SIGINT and SIGTERM as an answer to "should I stop?"."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from signal import SIGINT, SIGTERM, signal
from types import FrameType


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Turns SIGINT and SIGTERM into an answer to "should I stop?"; a second SIGINT interrupts as usual."""
    stopped = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        if stopped.is_set() and number == SIGINT:
            raise KeyboardInterrupt
        stopped.set()

    before = {number: signal(number, stop) for number in (SIGINT, SIGTERM)}
    try:
        yield stopped.is_set
    finally:
        for number, handler in before.items():
            signal(number, handler)
