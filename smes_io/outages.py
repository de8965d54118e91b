"""What a process says of a server that is away: when that begins, once a minute, and when it is over.

Several threads and retry loops of a process notice the same outage. It is one outage, so they share what was said.
"""

import logging
import threading
import time
from collections.abc import Callable

_AGAIN_S = 60.0


class Outages:
    """Outages by name, of one process. Thread-safe.

    Args:
        logger: Where warnings go.
        monotonic_s: A monotonic clock in seconds.
    """

    def __init__(self, logger: logging.Logger, monotonic_s: Callable[[], float] = time.monotonic) -> None:
        self._logger, self._now_s = logger, monotonic_s
        self._lock = threading.Lock()
        self._began: dict[str, tuple[float, float, int]] = {}  # when it began, was said last, tries since then

    def failed(self, name: str, message: str) -> None:
        """Say that something failed, unless that was said of this name within the last minute.

        Args:
            name: What is away: a server, as a rule.
            message: What failed, and what is done about it.
        """
        now_s = self._now_s()
        with self._lock:
            began_s, said_s, more = self._began.get(name, (now_s, -_AGAIN_S + now_s, 0))
            due = now_s - said_s >= _AGAIN_S
            self._began[name] = (began_s, now_s, 0) if due else (began_s, said_s, more + 1)
        if not due:
            return
        since = f" ({now_s - began_s:.0f} s by now, {more} more tries failed)" if now_s > began_s else ""
        self._logger.warning("%s%s", message, since)

    def answered(self, name: str) -> None:
        """Say that an outage is over, if one was told."""
        if name not in self._began:  # nearly always, and without the lock
            return
        with self._lock:
            told = self._began.pop(name, None)
        if told is not None:
            self._logger.warning("%s: answers again after %.0f s", name, self._now_s() - told[0])
