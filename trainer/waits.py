"""Waits for a server during which the trainer's thread goes on with its other duties.

An event log that is away holds a read for up to its outage bound. The thread that owns the weights must not stand still
for so long: checkpoints are due, and a stop may be asked for. So the read runs in a thread of its own, and the
trainer's thread looks after its duties until the read returns.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from smes.errors import Stopped
from stream.log.event_log import EventLog, Fetch, OutRecord, Positions, TopicPartition

_T = TypeVar("_T")
_LOOK_S = 0.05  # between two looks at the stop and at the duties
_QUICK_S = 0.5  # a read that waits for the next event takes less: only in an outage do the duties come first
_STOP_S = 2.0  # the log itself hears the stop within a second; this is for what does not


def nothing() -> None:
    """No duties."""


class Waits:
    """Runs calls that may have to wait for a server.

    Args:
        should_stop: Ends a wait early.

    Attributes:
        meanwhile: The duties: called again and again in the caller's thread while a call waits for longer than usual.
            What it raises ends the wait.
    """

    def __init__(self, should_stop: Callable[[], bool]) -> None:
        self._should_stop = should_stop
        self.meanwhile: Callable[[], None] = nothing
        self._nested = False
        self._left: list[threading.Thread] = []

    def run(self, what: str, call: Callable[[], _T]) -> _T:
        """The call's result, or its error.

        Raises:
            Stopped: A stop was asked for, and there was no answer within two seconds. The call may still take effect.
        """
        results: list[_T] = []
        errors: list[BaseException] = []
        done = threading.Event()

        def work() -> None:
            try:
                results.append(call())
            except BaseException as error:  # noqa: BLE001 - raised in the caller's thread
                errors.append(error)
            done.set()

        thread = threading.Thread(target=work, name="waiting-call", daemon=True)
        thread.start()
        try:
            self._await(what, done)
        except BaseException:
            self._left.append(thread)
            raise
        if errors:
            raise errors[0]
        return results[0]

    def settled(self, timeout_s: float) -> bool:
        """Whether no call that was left alone still runs; waits for them so long."""
        deadline_s = time.monotonic() + timeout_s
        for thread in self._left:
            thread.join(max(0.0, deadline_s - time.monotonic()))
        self._left = [thread for thread in self._left if thread.is_alive()]
        return not self._left

    def _await(self, what: str, done: threading.Event) -> None:
        began_s = time.monotonic()
        stopped_s: float | None = None
        while not done.wait(_LOOK_S):
            now_s = time.monotonic()
            if stopped_s is None and self._should_stop():
                stopped_s = now_s
            if stopped_s is not None and now_s - stopped_s > _STOP_S:
                raise Stopped(f"{what}: no answer yet when a stop was asked for")
            if now_s - began_s > _QUICK_S and not self._nested and stopped_s is None:
                self._nested = True  # a duty that waits for the same server has no duties of its own
                try:
                    self.meanwhile()
                finally:
                    self._nested = False


class WaitingLog:
    """An :class:`stream.log.event_log.EventLog` each of whose calls is run by :class:`Waits`.

    Args:
        log: The log; closing this closes it.
        waits: Runs the calls.
    """

    def __init__(self, log: EventLog, waits: Waits) -> None:
        self._log, self._waits = log, waits

    def ensure_topic(self, topic: str, partitions: int, *, exact: bool = True) -> None:
        """See :meth:`stream.log.event_log.EventLog.ensure_topic`."""
        self._waits.run(f"topic {topic}", lambda: self._log.ensure_topic(topic, partitions, exact=exact))

    def partitions(self, topic: str) -> int:
        """See :meth:`stream.log.event_log.EventLog.partitions`."""
        return self._waits.run(f"partitions of {topic}", lambda: self._log.partitions(topic))

    def incarnations(self, topic: str) -> dict[TopicPartition, str]:
        """See :meth:`stream.log.event_log.EventLog.incarnations`."""
        return self._waits.run(f"incarnations of {topic}", lambda: self._log.incarnations(topic))

    def append(self, topic: str, records: Sequence[OutRecord]) -> None:
        """See :meth:`stream.log.event_log.EventLog.append`."""
        self._waits.run(f"append to {topic}", lambda: self._log.append(topic, records))

    def read(self, positions: Mapping[TopicPartition, int], *, max_records: int, timeout_s: float) -> Fetch:
        """See :meth:`stream.log.event_log.EventLog.read`."""
        at = dict(positions)  # of this moment: the call may outlive the wait
        return self._waits.run("read", lambda: self._log.read(at, max_records=max_records, timeout_s=timeout_s))

    def begin(self, topic: str) -> Positions:
        """See :meth:`stream.log.event_log.EventLog.begin`."""
        return self._waits.run(f"begin of {topic}", lambda: self._log.begin(topic))

    def end(self, topic: str) -> Positions:
        """See :meth:`stream.log.event_log.EventLog.end`."""
        return self._waits.run(f"end of {topic}", lambda: self._log.end(topic))

    def at_time(self, topic: str, time_ms: int) -> Positions:
        """See :meth:`stream.log.event_log.EventLog.at_time`."""
        return self._waits.run(f"positions of {topic} at a time", lambda: self._log.at_time(topic, time_ms))

    def set_stop(self, event: threading.Event | None) -> None:
        """See :meth:`stream.log.event_log.EventLog.set_stop`."""
        self._log.set_stop(event)

    def close(self) -> None:
        """Close the log, unless a call that was left alone still uses it: then the process's end closes it."""
        if self._waits.settled(_LOOK_S):
            self._log.close()
