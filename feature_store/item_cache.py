"""Stored rows of items, kept in this process as long as nobody has written rows of items.

Whoever writes rows of items writes a *mark* in the same atomic step: random bytes, which no other write has. A reader
asks for the mark with every read, in the same round trip. If it is the one that the kept rows came with, they are what
the store has; if not, the reader asks for these rows, too, and begins anew.

Where writes come between any two reads, kept rows are of no use and would cost a second round trip. So they are used
only once two reads in a row have found the same mark.

Letters: N items, V and G id and numeric columns of items, M of the items.
"""

import threading
import time
from collections.abc import Callable, Sequence
from itertools import repeat
from typing import NamedTuple

import numpy as np

from feature_store.entity_versions import HEADER
from smes.arrays import F32, I64, Bool, grown

_ABSENT = -1
_PLACE_BYTES = 150
"""Of an item's place in the dictionary, at most. Its columns count twice: arrays grow to twice as many rows."""


class Kept(NamedTuple):
    """What is kept of N items.

    Attributes:
        mark: With which the rows came; None where nothing is kept.
        places_M: int64, which of the N items are kept.
        ids_MV, numerics_MG: int64 and float32, their columns.
        known_M: bool, whether the store has the item.
    """

    mark: bytes | None
    places_M: I64
    ids_MV: I64
    numerics_MG: F32
    known_M: Bool


class ItemCache:
    """Keeps rows of items for one schema. Safe to share between threads.

    Args:
        most_bytes: About how much memory rows take at most; when it is used up, it begins anew.
        longest_s: How long rows are kept at most, seconds: who writes without a mark is noticed after that.
        monotonic_s: Clock of that.
    """

    def __init__(self, most_bytes: int, longest_s: float, monotonic_s: Callable[[], float] = time.monotonic) -> None:
        self._most_bytes, self._longest_s, self._monotonic_s = most_bytes, longest_s, monotonic_s
        self._lock = threading.Lock()
        self._calm = False
        self._known: Bool = np.zeros(0, np.bool_)
        self._latest_ms = 0
        self._begin(None)

    def find(self, ids_N: I64, now_ms: int) -> Kept:
        """What is kept of items, as it holds at a time (Unix milliseconds)."""
        with self._lock:
            if self._monotonic_s() >= self._until_s:
                self._begin(None)
            if not self._calm or not self._places or now_ms < self._latest_ms:
                return NOTHING_KEPT
            found_N = np.fromiter(map(self._places.get, ids_N.tolist(), repeat(_ABSENT)), np.int64, len(ids_N))
            places_M = np.flatnonzero(found_N != _ABSENT)
            rows_M = found_N[places_M]
            return Kept(self._mark, places_M, self._ids[rows_M], self._numerics[rows_M], self._known[rows_M])

    def holds(self, kept: Kept, mark: bytes | None) -> bool:
        """Whether what was found is what the store had when a read found this mark there."""
        with self._lock:
            if mark is None or mark != self._mark:
                self._calm = False
                self._begin(mark)
            else:
                self._calm = True
            return len(kept.places_M) == 0 or (mark is not None and mark == kept.mark)

    def add(
        self,
        mark: bytes | None,
        now_ms: int,
        ids_M: I64,
        values_M: Sequence[bytes | None],
        columns: tuple[I64, F32],
        known_M: Bool,
    ) -> None:
        """Keep rows that were read.

        Args:
            mark: What the same read found.
            now_ms: As of when, Unix milliseconds.
            ids_M: int64, the items.
            values_M: What is stored of each.
            columns: Their id and numeric columns, int64 [M, V] and float32 [M, G].
            known_M: bool, whether the store has the item.
        """
        starts_M = [_always_from(value, now_ms) for value in values_M]
        good_M = np.flatnonzero([start is not None for start in starts_M])
        most = self._most_bytes // (2 * sum(each.itemsize * each.shape[1] for each in columns) + _PLACE_BYTES)
        if mark is None or not 0 < len(good_M) <= most:
            return
        with self._lock:
            if mark != self._mark:
                return
            if len(self._places) + len(good_M) > most:
                self._begin(mark)
            places = self._places
            rows_M = np.array([places.setdefault(i, len(places)) for i in ids_M[good_M].tolist()], np.int64)
            if not len(self._known):
                self._ids, self._numerics = columns[0][:0], columns[1][:0]  # of as many columns
            self._ids, self._numerics = grown(self._ids, len(places)), grown(self._numerics, len(places))
            self._known = grown(self._known, len(places))
            self._ids[rows_M], self._numerics[rows_M] = columns[0][good_M], columns[1][good_M]
            self._known[rows_M] = known_M[good_M]
            self._latest_ms = max(self._latest_ms, *(start for start in starts_M if start is not None))

    def _begin(self, mark: bytes | None) -> None:
        self._mark, self._until_s = mark, self._monotonic_s() + self._longest_s
        self._places: dict[int, int] = {}
        _, self._ids, self._numerics, self._known = _NOTHING
        self._latest_ms = 0


def _always_from(value: bytes | None, now_ms: int) -> int | None:
    """From when a stored value gives the same row as now, whatever the time; None where that ends at some time."""
    if value is None:
        return 0
    start = int.from_bytes(value[:8], "little", signed=True)
    return start if len(value) >= HEADER.itemsize and start <= now_ms else None


_NOTHING = (np.zeros(0, np.int64), np.zeros((0, 0), np.int64), np.zeros((0, 0), np.float32), np.zeros(0, np.bool_))
NOTHING_KEPT = Kept(None, *_NOTHING)
