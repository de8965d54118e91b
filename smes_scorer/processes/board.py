"""What the processes of a service know of each other: a few numbers in memory that all of them have.

A number has one writer. The process that starts the others says which of them live; each that answers says which
generation of weights it still reads. A generation is a number that grows, whichever process loads.
"""

import mmap
import time

import numpy as np
from numpy.typing import NDArray

LOADER = -1
"""The process that loads, where the number of a worker is expected."""

_INCARNATION, _ALIVE, _BEAT_MS, _FIRST_TRACK = range(4)
_OLDEST, _TAKEN = range(2)  # of each track
_LINE = 8  # numbers of a cache line: no two processes write to one


class Board:
    """The numbers. Made before the processes that share it.

    Args:
        workers: How many processes answer.
        tracks: How many models are loaded: the one in service, and one for each arm.

    Attributes:
        workers, tracks: As given.
    """

    def __init__(self, workers: int, tracks: int = 1) -> None:
        self.workers, self.tracks = workers, tracks
        columns = -(-(_FIRST_TRACK + 2 * tracks) // _LINE) * _LINE
        shared = mmap.mmap(-1, (workers + 1) * columns * 8)  # inherited by fork, and not copied
        self._cells: NDArray[np.int64] = np.frombuffer(shared, np.int64).reshape(workers + 1, columns)

    def born(self, worker: int) -> int:
        """Note that a process is about to start. Returns its incarnation, from 1 on."""
        row = self._cells[worker]
        row[_FIRST_TRACK:] = 0
        row[_BEAT_MS] = _now_ms()
        row[_INCARNATION] += 1
        row[_ALIVE] = 1
        return int(row[_INCARNATION])

    def died(self, worker: int) -> None:
        """Note that a process has ended, so that it reads nothing any more."""
        self._cells[worker, _ALIVE] = 0

    def beat(self, worker: int) -> None:
        """Note that a process works."""
        self._cells[worker, _BEAT_MS] = _now_ms()

    def silent_s(self, worker: int) -> float:
        """For how long it has not said that it works."""
        return (_now_ms() - int(self._cells[worker, _BEAT_MS])) / 1000

    def alive(self, worker: int) -> bool:
        """Whether a process lives."""
        return bool(self._cells[worker, _ALIVE])

    def incarnation(self, worker: int) -> int:
        """How often it was started."""
        return int(self._cells[worker, _INCARNATION])

    @property
    def restarts(self) -> int:
        """How often processes were started again."""
        return int(np.maximum(self._cells[:, _INCARNATION] - 1, 0).sum())

    def reads(self, worker: int, track: int, oldest: int, taken: int) -> None:
        """Note the generation that a worker took last, and the oldest that it reads or may begin to read."""
        first = _FIRST_TRACK + 2 * track
        self._cells[worker, first + _TAKEN] = taken
        self._cells[worker, first + _OLDEST] = oldest

    def oldest(self, worker: int, track: int) -> int:
        """The oldest generation that a worker reads or may begin to read; 0: it has taken none."""
        return int(self._cells[worker, _FIRST_TRACK + 2 * track + _OLDEST])

    def taken(self, worker: int, track: int) -> int:
        """The generation that a worker took last; 0: none."""
        return int(self._cells[worker, _FIRST_TRACK + 2 * track + _TAKEN])


def _now_ms() -> int:
    return int(time.monotonic() * 1000)  # one clock for all processes of a machine
