"""Schedules only raise flags: APScheduler raises them on time, the training loop takes them between two steps."""

import threading
from collections.abc import Mapping
from types import TracebackType

from apscheduler.schedulers.background import BackgroundScheduler


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
    """

    def __init__(self, flags: Flags, intervals_s: Mapping[str, float]) -> None:
        self._scheduler = BackgroundScheduler(
            timezone="UTC",
            job_defaults={"max_instances": 1, "coalesce": True, "misfire_grace_time": None},
        )
        for name, interval_s in intervals_s.items():
            self._scheduler.add_job(flags.request, "interval", seconds=interval_s, args=[name], id=name)

    def __enter__(self) -> "Schedule":
        self._scheduler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._scheduler.shutdown(wait=False)
