"""The scoring requests of the last seconds: how many, and how long they took."""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(slots=True)
class _Second:
    number: int
    outcomes: Counter[str] = field(default_factory=Counter)
    latency_ms: list[float] = field(default_factory=list)


class RecentRequests:
    """Counts in whole seconds, of which the newest, which is not over, does not count. Safe to share between threads.

    Args:
        outcomes: Names of all outcomes.
        over_s: How far back it looks.
        monotonic_s: A clock in seconds that never goes back.
    """

    def __init__(
        self, outcomes: Collection[str], over_s: int = 10, monotonic_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._outcomes, self._over_s, self._monotonic_s = tuple(outcomes), over_s, monotonic_s
        self._seconds: deque[_Second] = deque()
        self._lock = threading.Lock()
        self._began = int(monotonic_s())

    def add(self, outcome: str, latency_ms: float | None = None) -> None:
        """Count a request.

        Args:
            outcome: What became of it.
            latency_ms: From its arrival to its answer; None for one that was not scored because of the load.
        """
        with self._lock:
            now = self._forget()
            if not self._seconds or self._seconds[-1].number != now:
                self._seconds.append(_Second(now))
            self._seconds[-1].outcomes[outcome] += 1
            if latency_ms is not None:
                self._seconds[-1].latency_ms.append(latency_ms)

    def summary(self) -> dict[str, object]:
        """``rates``: per second, of all requests and of each outcome; ``recent_latency_ms``: ``p50``, ``p99``,
        ``count``. Rates are None in the first second, quantiles without requests.
        """
        with self._lock:
            now = self._forget()
            over = [second for second in self._seconds if second.number < now]
            counts = sum((second.outcomes for second in over), Counter[str]())
            latency_ms = [value for second in over for value in second.latency_ms]
        seconds = min(self._over_s, now - self._began)
        found = {"requests": counts.total(), **{outcome: counts[outcome] for outcome in self._outcomes}}
        p50, p99 = np.quantile(latency_ms, (0.5, 0.99)).tolist() if latency_ms else (None, None)
        return {
            "rates": {name: count / seconds if seconds else None for name, count in found.items()},
            "recent_latency_ms": {"p50": p50, "p99": p99, "count": len(latency_ms)},
        }

    def state(self) -> dict[str, Any]:
        """What was counted, as JSON may hold it, for :meth:`add_state` of another process on the same machine."""
        with self._lock:
            self._forget()
            seconds = [(second.number, dict(second.outcomes), list(second.latency_ms)) for second in self._seconds]
        return {"began": self._began, "seconds": seconds}

    def add_state(self, state: Mapping[str, Any]) -> None:
        """Count what was counted elsewhere by the same clock."""
        with self._lock:
            by_number = {second.number: second for second in self._seconds}
            for number, outcomes, latency_ms in state["seconds"]:
                second = by_number.setdefault(number, _Second(number))
                second.outcomes.update(outcomes)
                second.latency_ms.extend(latency_ms)
            self._seconds = deque(by_number[number] for number in sorted(by_number))
            self._began = min(self._began, state["began"])

    def _forget(self) -> int:
        """Forget what is too long ago; the number of the second now."""
        now = int(self._monotonic_s())
        while self._seconds and self._seconds[0].number < now - self._over_s:
            self._seconds.popleft()
        return now
