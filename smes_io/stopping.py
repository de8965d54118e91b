"""Calls that block inside a client's library, ended early when a stop is asked for."""

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from smes.errors import Stopped
from smes_io.clock import Errors, retry
from smes_io.outages import Outages

_T = TypeVar("_T")
_log = logging.getLogger(__name__)
_outages = Outages(_log)
_LOOK_S = 0.1  # between two looks at the stop event while a call runs

_QUIET_S = 1.0  # an outage that is over sooner is not worth a warning

GRACE_S = 1.0
"""How long a call may still take when a stop is asked for, seconds: a server that is there answers in much less."""


class StoppableCalls:
    """Runs calls in the caller's thread, or, once there is a stop event, in a helper thread that can be left alone.

    A client's library cannot be interrupted while it waits for an answer. So the caller waits beside it, for the answer
    or for the stop. A call that was left alone ends by itself, when the library's own time limit is over.
    """

    def __init__(self) -> None:
        self._stop: threading.Event | None = None
        self._idle: queue.SimpleQueue[_Helper] = queue.SimpleQueue()

    def set_stop(self, event: threading.Event | None) -> None:
        """End waits early from now on when ``event`` is set; None: no longer."""
        self._stop = event

    @property
    def stopping(self) -> bool:
        """Whether a stop was asked for."""
        return self._stop is not None and self._stop.is_set()

    def wait(self, seconds: float) -> bool:
        """Wait so long, or until a stop is asked for; whether it was."""
        return (self._stop or threading.Event()).wait(seconds)

    def run(self, what: str, call: Callable[[], _T]) -> _T:
        """The call's result or error.

        Args:
            what: Names the call in the error.
            call: What to run.

        Raises:
            Stopped: It had no answer ``GRACE_S`` after the stop was asked for. It may still take effect.
        """
        stop = self._stop
        if stop is None:
            return call()
        helper = self._helper()
        task = _Task(call)
        helper.tasks.put(task)
        while not task.done.wait(_LOOK_S):
            if stop.is_set() and not task.done.wait(GRACE_S):
                helper.tasks.put(None)  # it ends after the call that it is in
                raise Stopped(f"{what}: no answer yet when a stop was asked for")
        self._idle.put(helper)
        return task.result()

    def retry(
        self, what: str, call: Callable[[], _T], *, timeout_s: float, retriable: Errors, fatal: Errors = ()
    ) -> _T:
        """:func:`smes_io.clock.retry` with every try as :meth:`run`; a warning says that it is trying again.

        An outage is told once for all calls to a server (:mod:`smes_io.outages`): what ``what`` begins with, up to the
        first ``": "``, names it.

        Raises:
            Stopped: A try failed, and a stop was asked for.
        """
        started_s, (server, _, _) = time.monotonic(), what.partition(": ")

        def attempt() -> _T:
            try:
                result = self.run(what, call)
            except fatal:
                raise
            except retriable as error:
                if self.stopping:
                    raise Stopped(f"{what}: given up, because a stop was asked for: {error}") from error
                if _QUIET_S <= time.monotonic() - started_s < timeout_s:
                    _outages.failed(server, f"{what}: {error}; trying again for up to {timeout_s:g} s")
                raise
            _outages.answered(server)
            return result

        try:
            return retry(attempt, timeout_s=timeout_s, retriable=retriable, fatal=fatal, wait=self.wait)
        except retriable as error:
            if self.stopping:
                raise Stopped(f"{what}: given up, because a stop was asked for: {error}") from error
            raise

    def close(self) -> None:
        """End the helper threads that are idle."""
        while True:
            try:
                self._idle.get_nowait().tasks.put(None)
            except queue.Empty:
                return

    def _helper(self) -> "_Helper":
        try:
            return self._idle.get_nowait()
        except queue.Empty:
            return _Helper()


class _Task(Generic[_T]):
    """A call, and later its outcome."""

    def __init__(self, call: Callable[[], _T]) -> None:
        self.done = threading.Event()
        self._call = call
        self._result: list[_T] = []
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._result.append(self._call())
        except BaseException as error:  # noqa: BLE001 - raised in the caller's thread
            self._error = error
        self.done.set()

    def result(self) -> _T:
        if self._error is not None:
            raise self._error
        return self._result[0]


class _Helper:
    """A daemon thread that runs tasks until it gets None; it does not keep the process alive."""

    def __init__(self) -> None:
        self.tasks: queue.SimpleQueue[_Task[Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="stoppable-call", daemon=True).start()

    def _work(self) -> None:
        while (task := self.tasks.get()) is not None:
            task.run()
            del task  # or its result would live until the next one
