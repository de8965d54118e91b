"""The versions that were put into service and have not answered yet, with the feedback that they were trained on.

Freshness is the time from a feedback's arrival in the event log to the first answer by a version trained on it. It is
the sum of seven spans, one for each of :data:`STAGES`. Only versions that this process loads after its first snapshot
count: another process may have answered with the earlier ones already.

Letters: A rows of feedback with the same times, S stages.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from feature_store.feedback_times import FeedbackTimes
from feature_store.manifest import Manifest
from feature_store.snapshots import SnapshotStore
from smes.arrays import I64
from smes.errors import SmesError
from smes_io.clock import wall_clock_ms

_MAX_WAITING = 1_000_000  # rows
_logger = logging.getLogger(__name__)

STAGES = ("joined", "batched", "trained", "cut", "published", "in_service", "answered")
"""What feedback passes after its arrival in the event log, in this order: its example came out of the join; the
mini-batch was complete; the step on it was done; the weights were cut; the snapshot was in the store; this scorer had
put it into service; it gave its first answer.
"""


@dataclass(frozen=True, slots=True)
class Arrivals:
    """Feedback by the times of its stages.

    Attributes:
        count: int64 [A], feedback events with these times.
        times_ms: int64 [A, 6], Unix milliseconds: it arrived, and was joined, batched, trained on, cut and published.
    """

    count: I64
    times_ms: I64

    @classmethod
    def of(cls, manifests: Sequence[Manifest]) -> "Arrivals":
        """The feedback that these manifests list."""
        counts, times = [np.zeros(0, np.int64)], [np.zeros((0, 6), np.int64)]
        for manifest in manifests:
            rows = FeedbackTimes.of_rows(manifest.feedback_arrivals)
            of_version = np.broadcast_to(np.array([manifest.created_ms, manifest.published_ms]), (len(rows), 2))
            of_rows = np.stack([rows.arrived_ms, rows.joined_ms, rows.batched_ms, rows.trained_ms], axis=1)
            counts.append(rows.count)
            times.append(np.concatenate([of_rows, of_version], axis=1))
        return cls(np.concatenate(counts), np.concatenate(times))


@dataclass(frozen=True, slots=True)
class FirstAnswer:
    """A version's first answer, and the feedback that no version in service had known before.

    Attributes:
        count: int64 [A], feedback events.
        freshness_ms: int64 [A], from their arrival to this answer.
        stages_ms: int64 [A, S], how long each stage took; where clocks disagree, not below 0.
    """

    count: I64
    freshness_ms: I64
    stages_ms: I64


class FirstAnswers:
    """Keeps the loaded versions that have not answered yet, with their new feedback. Safe to share between threads.

    Args:
        now_ms: Wall clock, Unix milliseconds.
    """

    def __init__(self, now_ms: Callable[[], int] = wall_clock_ms) -> None:
        self._now_ms = now_ms
        self._lock = threading.Lock()
        self._waiting: deque[tuple[tuple[str, int], Arrivals, int]] = deque()  # with the time of its swap
        self._latest: tuple[str, int] | None = None

    def loaded(self, key: tuple[str, int], arrivals: Arrivals) -> int:
        """Note a version that is about to serve.

        Args:
            key: Its lineage and version.
            arrivals: The feedback it was trained on since the version that was loaded before it.

        Returns:
            How many rows were dropped because too many wait for a first answer.
        """
        dropped = 0
        with self._lock:
            if self._waiting and self._waiting[-1][0][0] != key[0]:
                self._waiting.clear()  # another lineage's weights were not trained on that feedback
            self._waiting.append((key, arrivals, self._now_ms()))
            waiting = sum(len(a.count) for _, a, _ in self._waiting)
            while waiting > _MAX_WAITING and len(self._waiting) > 1:
                oldest = len(self._waiting.popleft()[1].count)
                waiting -= oldest
                dropped += oldest
        return dropped

    def answered(self, key: tuple[str, int], now_ms: int) -> FirstAnswer | None:
        """Note an answer; returns a :class:`FirstAnswer` if it is the first of its version, else None.

        The feedback of earlier versions that never answered counts with it.

        Args:
            key: Lineage and version of the model that answered.
            now_ms: Unix milliseconds.
        """
        if key == self._latest:  # the common case, without the lock
            return None
        with self._lock:
            if all(key != waiting for waiting, _, _ in self._waiting):
                return None  # a request that began before the last swap
            answered = []
            while self._waiting:
                waiting, arrivals, in_service_ms = self._waiting.popleft()
                answered.append((arrivals, in_service_ms))
                if waiting == key:
                    break
            self._latest = key
        return _first_answer(answered, now_ms)


def new_arrivals(store: SnapshotStore, newest: tuple[str, int] | None, manifest: Manifest) -> tuple[Arrivals, int]:
    """The feedback trained on since the newest version that served, and how many versions between have no manifest.

    Args:
        store: Has the manifests.
        newest: Lineage and version that served; None: nothing did.
        manifest: Of a version that is about to serve.
    """
    if newest is None or newest[0] != manifest.lineage:
        return Arrivals.of(()), 0
    before = newest[1]
    try:
        between = store.manifests_between(manifest.lineage, before, manifest.version - 1)
    except SmesError as error:  # freshness is left out, and the swap goes on
        _logger.warning("freshness leaves out what was published before %s: %s", manifest.version, error)
        between = ()
    manifests = [*between, manifest]
    parents = [before, *(m.version for m in manifests)]
    gaps = sum(m.parent != parent for m, parent in zip(manifests, parents, strict=False))
    return Arrivals.of(manifests), gaps


def _first_answer(answered: Sequence[tuple[Arrivals, int]], now_ms: int) -> FirstAnswer:
    here = [np.broadcast_to(np.array([in_service_ms, now_ms]), (len(a.count), 2)) for a, in_service_ms in answered]
    times_ms = np.concatenate([np.concatenate([a.times_ms for a, _ in answered]), np.concatenate(here)], axis=1)
    return FirstAnswer(
        count=np.concatenate([a.count for a, _ in answered]),
        freshness_ms=np.maximum(times_ms[:, -1] - times_ms[:, 0], 0),
        stages_ms=np.maximum(np.diff(times_ms, axis=1), 0),
    )
