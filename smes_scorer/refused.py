"""What the scorer refused, by reason: counted for ``/metrics``, the last of each named in ``/health/ready``."""

import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import get_args

from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from feature_store.damage import Reason

_LONGEST = 1000


class Refused(Collector):
    """Counts what was refused. The same message several times in a row, for one reason, counts once.

    Safe to share between threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[Reason, int] = dict.fromkeys(get_args(Reason), 0)
        self._last: dict[Reason, tuple[str, str]] = {}

    def note(self, reason: Reason, message: str) -> None:
        """Note that something was refused, with a message that names it."""
        message = message[:_LONGEST]
        with self._lock:
            if self._last.get(reason, ("", ""))[0] == message:
                return
            self._last[reason] = message, datetime.now(UTC).isoformat(timespec="milliseconds")
            self._counts[reason] += 1

    def summary(self) -> dict[str, dict[str, object]]:
        """Reason → how many there were, the last one and when it was first refused, for the reasons that occurred."""
        with self._lock:
            return {
                reason: {"count": self._counts[reason], "last": message, "at": at}
                for reason, (message, at) in self._last.items()
            }

    def collect(self) -> Iterator[CounterMetricFamily]:
        """The counter of every reason."""
        family = CounterMetricFamily(
            "smes_scorer_refusals",
            "Refused snapshots, and junk and forgeries beside them, by reason",
            labels=["reason"],
        )
        with self._lock:
            for reason, count in self._counts.items():
                family.add_metric([reason], count)
        yield family
