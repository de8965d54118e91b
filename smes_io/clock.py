"""The wall clock, and the one loop that tries something again until a deadline."""

import time
from collections.abc import Callable, Iterable
from itertools import chain, repeat
from typing import Any, TypeVar

_T = TypeVar("_T")
Errors = type[Exception] | tuple[type[Exception], ...]

PAUSES_S = (0.02, 0.05, 0.1, 0.2, 0.5)
"""Pauses between tries: short at first, because most outages are; the last one repeats."""


def wall_clock_ms() -> int:
    """Unix time in milliseconds."""
    return time.time_ns() // 1_000_000


def retry(
    call: Callable[[], _T],
    *,
    timeout_s: float,
    retriable: Errors,
    fatal: Errors = (),
    pauses_s: Iterable[float] = PAUSES_S,
    monotonic: Callable[[], float] = time.monotonic,
    wait: Callable[[float], object] = time.sleep,
) -> _T:
    """Call until it succeeds, and return its result.

    Args:
        call: Tried at least once, and a last time at the deadline.
        timeout_s: How long to try. A call that is running at the deadline is not interrupted.
        retriable: Errors after which to try again.
        fatal: Subclasses of ``retriable`` that end the tries at once.
        pauses_s: Seconds between tries, at least one; the last one repeats.
        monotonic: A clock in seconds that never goes back.
        wait: Waits so many seconds. A true result ends the tries early, so ``wait=stop.wait`` listens to a
            :class:`threading.Event`.

    Raises:
        Exception: The last retriable error when the time is over or ``wait`` returned true; any other error at once.
    """
    deadline_s = monotonic() + timeout_s
    *first, last = pauses_s
    pauses = chain(first, repeat(last))
    while True:
        try:
            return call()
        except fatal:
            raise
        except retriable:
            remaining_s = deadline_s - monotonic()
            if remaining_s <= 0 or wait(min(next(pauses), remaining_s)):
                raise


def wait_until(
    ask: Callable[[], _T],
    *,
    timeout_s: float,
    pauses_s: Iterable[float] = PAUSES_S,
    monotonic: Callable[[], float] = time.monotonic,
    wait: Callable[[float], object] = time.sleep,
) -> _T:
    """Ask until the answer is true.

    Args:
        ask: Its errors are raised at once.
        timeout_s, pauses_s, monotonic, wait: As :func:`retry`.

    Returns:
        The first true answer, or the last false one when the time is over or ``wait`` returned true.
    """

    def attempt() -> _T:
        answer = ask()
        if not answer:
            raise _NotYet(answer)
        return answer

    try:
        return retry(attempt, timeout_s=timeout_s, retriable=_NotYet, pauses_s=pauses_s, monotonic=monotonic, wait=wait)
    except _NotYet as last:
        return last.answer  # type: ignore[no-any-return]  # an exception cannot be generic


class _NotYet(Exception):
    def __init__(self, answer: Any) -> None:
        super().__init__(answer)
        self.answer = answer
