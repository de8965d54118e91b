"""Schedules only raise flags: APScheduler starts them, the training loop takes the flags between two steps.

An interval is a duration on the monotonic clock. APScheduler goes by the wall clock, by which it would raise nothing
for half a minute where that clock is set back by half a minute. So APScheduler starts each schedule once, in a thread
of its pool, and the schedule itself counts its intervals.
"""

import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from types import TracebackType

from apscheduler.executors.pool import ThreadPoolExecutor
from apscheduler.schedulers.background import BackgroundScheduler

_LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)  # due at once, whatever the wall clock says


class Flags:
    """Named flags: any thread raises them, one thread takes them."""

    def __init__(self) -> None:
        self._raised: set[str] = set()
        self._lock = threading.Lock()

    def request(self, name: str) -> None:
        """Raise a flag; raising it again before it is taken changes nothing."""
        with self._lock:
            self._raised.add(name)

    def take(self, name: str) -> bool:
        """Whether the flag was raised since it was last taken; lowers it."""
        with self._lock:
            raised = name in self._raised
            self._raised.discard(name)
            return raised


class Schedule:
    """Raises each flag at its own interval, from entering the context to leaving it.

    Args:
        flags: The flags to raise.
        intervals_s: Flag name → seconds from one raise to the next.
        first_s: Flag name → seconds to the first raise, where it comes earlier. Each later one comes after twice as
            long, until the interval is reached.
    """

    def __init__(
        self, flags: Flags, intervals_s: Mapping[str, float], *, first_s: Mapping[str, float] | None = None
    ) -> None:
        self._flags = flags
        self._closed = threading.Event()
        self._scheduler = BackgroundScheduler(
            timezone="UTC",
            executors={"default": ThreadPoolExecutor(max(1, len(intervals_s)))},
            job_defaults={"max_instances": 1, "coalesce": True, "misfire_grace_time": None},
        )
        for name, interval_s in intervals_s.items():
            first = min((first_s or {}).get(name, interval_s), interval_s)
            self._scheduler.add_job(self._raise, "date", run_date=_LONG_AGO, args=[name, first, interval_s], id=name)

    def __enter__(self) -> "Schedule":
        self._scheduler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._scheduler.shutdown(wait=False)

    def _raise(self, name: str, interval_s: float, longest_s: float) -> None:
        """Raise a flag again and again until the schedule is closed. Raises that were missed are not made up for."""
        due_s = time.monotonic() + interval_s
        while not self._closed.wait(max(0.0, due_s - time.monotonic())):
            self._flags.request(name)
            interval_s = min(2 * interval_s, longest_s)
            due_s = max(due_s + interval_s, time.monotonic())
