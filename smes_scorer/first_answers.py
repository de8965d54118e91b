"""Freshness: from a feedback's arrival in the event log to the first answer by a version trained on it.

What counts is what this process loaded after its first snapshot: whatever was trained before that may have been
answered by another process already.

Letters: A distinct arrival times.
"""

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from feature_store.manifest import Manifest
from smes.arrays import I64
from smes_scorer.served import ServedModel

_MOST_WAITING = 1_000_000


@dataclass(frozen=True, slots=True)
class Arrivals:
    """When feedback reached the log: int64 [A] Unix milliseconds, and int64 [A] how many then."""

    arrival_ms: I64
    count: I64

    @classmethod
    def of(cls, manifests: Sequence[Manifest]) -> "Arrivals":
        pairs = np.array([pair for m in manifests for pair in m.feedback_arrivals], np.int64).reshape(-1, 2)
        return cls(pairs[:, 0], pairs[:, 1])


@dataclass(frozen=True, slots=True)
class FirstAnswer:
    """A version answered for the first time: freshness in ms of what it brought, and how many of each."""

    freshness_ms: I64
    count: I64


class FirstAnswers:
    """Knows which loaded versions have not answered yet. Safe to share between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[tuple[tuple[str, int], Arrivals]] = deque()
        self._latest: tuple[str, int] | None = None

    def loaded(self, key: tuple[str, int], arrivals: Arrivals) -> int:
        """A version is about to serve, which brings ``arrivals`` beyond the version loaded before it.

        Returns:
            How many arrival times were given up, because too many wait for a first answer.
        """
        given_up = 0
        with self._lock:
            if self._waiting and self._waiting[-1][0][0] != key[0]:
                self._waiting.clear()  # another lineage's weights know nothing of that feedback
            self._waiting.append((key, arrivals))
            waiting = sum(len(a.count) for _, a in self._waiting)
            while waiting > _MOST_WAITING and len(self._waiting) > 1:
                dropped = len(self._waiting.popleft()[1].count)
                waiting -= dropped
                given_up += dropped
        return given_up

    def answered(self, served: ServedModel, now_ms: int) -> FirstAnswer | None:
        """A version has answered; not None the first time it did."""
        key = served.key
        if key == self._latest:  # the common case, without the lock
            return None
        with self._lock:
            if all(key != waiting for waiting, _ in self._waiting):
                return None  # a request that began before the last swap
            brought = []
            while self._waiting:
                waiting, arrivals = self._waiting.popleft()
                brought.append(arrivals)
                if waiting == key:
                    break
            self._latest = key
        arrival_ms = np.concatenate([a.arrival_ms for a in brought])
        return FirstAnswer(np.maximum(now_ms - arrival_ms, 0), np.concatenate([a.count for a in brought]))
