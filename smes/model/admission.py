"""How often ids without a row were seen, counted in bounded memory.

A count-min sketch (Cormode and Muthukrishnan, "An improved data stream summary", J. Algorithms 2005, section 3) with
conservative update (Estan and Varghese, SIGCOMM 2002, section 3.3): of an id's four counters only the smallest grow. A
count is never too small, and seldom too large: with as many ids as are remembered, each seen once, 1 in 50 counts more.
So that it does not fill up, there are two generations: when the present one has counted enough, it becomes the one
before, and what that one had counted is forgotten.

Letters: N keys.
"""

import numpy as np
from numba import njit
from numpy.typing import NDArray

from smes.arrays import I64, Arrays
from smes.hashing import GOLDEN
from smes.scatter import scatter

_ROWS = 4
_MOST = 255

Counters = NDArray[np.uint8]


class Sightings:
    """Counts up to 255 for each key.

    Args:
        remembered: So many sightings at least are counted before the oldest are forgotten, ≥ 1. Takes 16 to 32 bytes
            for each.
    """

    def __init__(self, remembered: int) -> None:
        self._remembered = remembered
        width = 1 << max(4, (2 * remembered - 1).bit_length())
        self._counters: Counters = np.zeros((2, _ROWS, width), np.uint8)  # this generation, the one before
        self._counted = 0

    def add(self, keys_N: I64, times_N: I64) -> I64:
        """Count sightings of keys, and return how often each was seen by now, at most 255.

        Args:
            keys_N: int64 [N], distinct.
            times_N: int64 [N], how often each was seen now, ≥ 1.
        """
        if self._counted >= self._remembered:
            self._counters[1] = self._counters[0]
            self._counters[0] = 0
            self._counted = 0
        self._counted += int(times_N.sum())
        counts: I64 = _count(self._counters, keys_N, times_N)
        return counts

    def state(self) -> Arrays:
        """Copies from which :meth:`load_state` continues."""
        return {"counters": self._counters.copy(), "counted": np.array([self._counted])}

    def load_state(self, state: Arrays) -> None:
        """The inverse of :meth:`state`. What was counted for another number of remembered sightings is forgotten."""
        if state["counters"].shape == self._counters.shape:
            self._counters = state["counters"].copy()
            self._counted = int(state["counted"][0])


@njit(cache=True, nogil=True)
def _count(counters: Counters, keys_N: I64, times_N: I64) -> I64:  # pragma: no cover - compiled
    mask = np.uint64(counters.shape[2] - 1)
    slots = np.empty(_ROWS, np.int64)
    counts = np.empty(len(keys_N), np.int64)
    for n in range(len(keys_N)):
        key = np.uint64(keys_N[n])
        now, before = np.int64(_MOST), np.int64(_MOST)
        for row in range(_ROWS):
            slot = np.int64(scatter(key + np.uint64(row + 1) * GOLDEN) & mask)
            slots[row] = slot
            now = min(now, np.int64(counters[0, row, slot]))
            before = min(before, np.int64(counters[1, row, slot]))
        now = min(now + times_N[n], np.int64(_MOST))
        for row in range(_ROWS):
            if counters[0, row, slots[row]] < now:
                counters[0, row, slots[row]] = now
        counts[n] = min(now + before, np.int64(_MOST))
    return counts
