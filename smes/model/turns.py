"""A lock for two sides that take turns: whoever waits gets it next, however soon the other side wants it again."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock


class Turns:
    """A lock of one writer and one reader at a time, neither of which can starve the other.

    A thread that unlocks an ordinary lock and takes it again at once is nearly always faster than the one that waits.
    Here it first has to pass a gate, which the waiting one holds.
    """

    def __init__(self) -> None:
        self._gate = Lock()
        self._lock = Lock()

    @property
    def waiting(self) -> bool:
        """Whether somebody waits who will get the lock next, or takes it just now."""
        return self._gate.locked()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Hold the lock."""
        with self._gate:
            self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()
