"""Freshness: from a feedback's arrival in the event log to the first answer by a version trained on it.

Only versions that this process loads after its first snapshot count: another process may have answered with the earlier
ones already.

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

_MAX_WAITING = 1_000_000  # arrival times


@dataclass(frozen=True, slots=True)
class Arrivals:
    """When feedback reached the event log: int64 [A] Unix milliseconds, and int64 [A] how many events at that time."""

    arrival_ms: I64
    count: I64

    @classmethod
    def of(cls, manifests: Sequence[Manifest]) -> "Arrivals":
        """The arrivals that these manifests list."""
        pairs = np.array([pair for m in manifests for pair in m.feedback_arrivals], np.int64).reshape(-1, 2)
        return cls(pairs[:, 0], pairs[:, 1])


@dataclass(frozen=True, slots=True)
class FirstAnswer:
    """A version's first answer: int64 [A] freshness in milliseconds of its new feedback, int64 [A] how many events."""

    freshness_ms: I64
    count: I64


class FirstAnswers:
    """Keeps the loaded versions that have not answered yet, with their new feedback. Safe to share between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[tuple[tuple[str, int], Arrivals]] = deque()
        self._latest: tuple[str, int] | None = None

    def loaded(self, key: tuple[str, int], arrivals: Arrivals) -> int:
        """Note a version that is about to serve.

        Args:
            key: Its lineage and version.
            arrivals: The feedback it was trained on since the version that was loaded before it.

        Returns:
            How many arrival times were dropped because too many wait for a first answer.
        """
        dropped = 0
        with self._lock:
            if self._waiting and self._waiting[-1][0][0] != key[0]:
                self._waiting.clear()  # another lineage's weights were not trained on that feedback
            self._waiting.append((key, arrivals))
            waiting = sum(len(a.count) for _, a in self._waiting)
            while waiting > _MAX_WAITING and len(self._waiting) > 1:
                oldest = len(self._waiting.popleft()[1].count)
                waiting -= oldest
                dropped += oldest
        return dropped

    def answered(self, served: ServedModel, now_ms: int) -> FirstAnswer | None:
        """Note an answer; returns a :class:`FirstAnswer` if it is the first of its version, else None.

        The feedback of earlier versions that never answered counts with it.
        """
        key = served.key
        if key == self._latest:  # the common case, without the lock
            return None
        with self._lock:
            if all(key != waiting for waiting, _ in self._waiting):
                return None  # a request that began before the last swap
            answered = []
            while self._waiting:
                waiting, arrivals = self._waiting.popleft()
                answered.append(arrivals)
                if waiting == key:
                    break
            self._latest = key
        arrival_ms = np.concatenate([a.arrival_ms for a in answered])
        return FirstAnswer(np.maximum(now_ms - arrival_ms, 0), np.concatenate([a.count for a in answered]))
