"""Schedules that only raise flags: APScheduler says when, the training loop does it between two steps."""

import threading
from collections.abc import Mapping
from types import TracebackType

from apscheduler.schedulers.background import BackgroundScheduler


class Flags:
    """Named flags, raised by any thread and taken by one."""

    def __init__(self) -> None:
        self._raised: set[str] = set()
        self._lock = threading.Lock()

    def put_up(self, name: str) -> None:
        """Ask for something; asking twice before it is done is asking once."""
        with self._lock:
            self._raised.add(name)

    def take(self, name: str) -> bool:
        """Whether it was asked for since it was last taken."""
        with self._lock:
            raised = name in self._raised
            self._raised.discard(name)
            return raised


class Schedule:
    """Raises each flag every so many seconds while it is open.

    Args:
        flags: What to raise.
        intervals_s: Flag name → seconds between two raises.
    """

    def __init__(self, flags: Flags, intervals_s: Mapping[str, float]) -> None:
        self._scheduler = BackgroundScheduler(
            timezone="UTC",
            job_defaults={"max_instances": 1, "coalesce": True, "misfire_grace_time": None},
        )
        for name, interval_s in intervals_s.items():
            self._scheduler.add_job(flags.put_up, "interval", seconds=interval_s, args=[name], id=name)

    def __enter__(self) -> "Schedule":
        self._scheduler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._scheduler.shutdown(wait=False)
