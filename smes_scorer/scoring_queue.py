"""The requests that wait to be scored: so many at most, each for so long at most, and none whose caller has left.

A thread that becomes free takes the requests that wait at that moment together, so many as may: one call of the model
costs much less than one for each. Nothing waits for others to come, so a request that comes alone is not delayed.

Their answers go to the event loop together, too: a thread wakes it once for all, and not for each while it writes the
next one.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from smes.errors import SmesError


class Done(Protocol):
    """Takes what became of requests that are answered together."""

    def __call__(self, number: int, answer: bytes | Exception) -> None:
        """The answer to the request of a number, or what was raised instead of it."""
        ...

    def flush(self) -> None:
        """Send off what was taken. For work that goes on for long after an answer; its end does it, too."""
        ...


Work = Callable[[Sequence[bytes], Done], None]
"""Answers requests, given by their bodies. It says of each when it is done, in any order, each once."""

_MOST_BYTES = 64 * 1024
"""Of the bodies that are taken together, unless it is one alone."""

_NEWEST_SHARE = 0.2
"""Of the time that the last requests took, in what requests take by expectation."""


class Busy(SmesError):
    """As many requests wait already as may, or as can be answered in time, so this one was not taken."""


class Dropped(SmesError):
    """A request waited too long, or its caller left while it waited. It was not scored.

    Attributes:
        left: Whether nobody is there to be answered.
    """

    def __init__(self, message: str, *, left: bool) -> None:
        super().__init__(message)
        self.left = left


@dataclass(eq=False, slots=True)
class _Job:
    """A request, and what becomes of it; the future belongs to the loop."""

    work: Work
    body: bytes
    loop: asyncio.AbstractEventLoop
    answer: asyncio.Future[bytes]


class ScoringQueue:
    """A few threads that score requests in the order of their arrival. :meth:`run` is for the event loop's thread.

    A request that is being scored is finished, whoever left; before that it costs nothing but its place.

    Args:
        workers: Threads. Few: more would only compete for the processor with each other and with the trainer.
        max_waiting: Most requests that wait for a thread.
        max_age_s: Longest wait for a thread.
        max_together: Most requests that a thread takes at once.
    """

    def __init__(self, workers: int, max_waiting: int, max_age_s: float, max_together: int = 1) -> None:
        self._workers, self._max_waiting, self._max_age_s = workers, max_waiting, max_age_s
        self._max_together = max_together
        self._inside = 0
        self._each_s = 0.0  # what a request takes of a thread, from the last ones
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._threads = [threading.Thread(target=self._serve, name=f"score_{i}", daemon=True) for i in range(workers)]
        for thread in self._threads:
            thread.start()

    @property
    def depth(self) -> int:
        """Requests that wait for a thread."""
        return max(0, min(len(self._jobs), self._inside - self._workers))

    async def run(self, work: Work, body: bytes, left: Callable[[], Awaitable[object]]) -> bytes:
        """Have a request answered in a thread, perhaps together with others of the same work.

        Args:
            work: Answers it.
            body: The request.
            left: Awaits the moment at which the caller leaves.

        Raises:
            Busy: ``max_waiting`` requests wait already, or so many that this one would wait for more than
                ``max_age_s``, as long as requests took lately.
            Dropped: The request waited too long, or its caller left while it waited.
        """
        self._check_room()
        loop = asyncio.get_running_loop()
        job = _Job(work, body, loop, loop.create_future())
        self._inside += 1
        with self._changed:
            self._jobs.append(job)
            self._changed.notify()
        leaving = asyncio.ensure_future(left())
        try:
            await asyncio.wait((job.answer, leaving), timeout=self._max_age_s, return_when=asyncio.FIRST_COMPLETED)
            if not job.answer.done() and self._forget(job):
                if leaving.done():
                    raise Dropped("the caller left", left=True)
                raise Dropped(f"waited for {self._max_age_s:g} s (max_age_s)", left=False)
            return await job.answer
        finally:
            leaving.cancel()
            self._forget(job)  # if nobody waits for it any more
            job.answer.cancel()
            self._inside -= 1

    def _check_room(self) -> None:
        waiting = len(self._jobs)
        if self._inside >= self._workers + self._max_waiting and waiting >= self._max_waiting:
            raise Busy(f"{self.depth} requests wait, expected at most {self._max_waiting} (max_waiting)")
        expected_s = waiting * self._each_s / self._workers
        if expected_s > self._max_age_s:
            took = f"{waiting} requests wait, for about {expected_s:.2g} s"
            raise Busy(f"{took}, expected at most {self._max_age_s:g} s (max_age_s)")

    def close(self) -> None:
        """Forget the requests that wait and wait for those that are being scored."""
        with self._changed:
            self._closed = True
            waiting = list(self._jobs)
            self._jobs.clear()
            self._changed.notify_all()
        for job in waiting:
            with suppress(RuntimeError):  # the loop is closed, so nobody waits
                job.loop.call_soon_threadsafe(job.answer.cancel)
        for thread in self._threads:
            thread.join()

    def _forget(self, job: _Job) -> bool:
        """Give up a job, and its place; whether it had not begun."""
        with self._changed:
            if job not in self._jobs:
                return False
            self._jobs.remove(job)
            return True

    def _serve(self) -> None:
        while jobs := self._taken():
            done = _Answers(jobs)
            began_s = time.monotonic()
            try:
                jobs[0].work([job.body for job in jobs], done)
            except Exception as error:  # noqa: BLE001 - no job may be left without an end
                done.fail(error)
            else:
                done.fail(SmesError("a request was not answered"))
            each_s = (time.monotonic() - began_s) / len(jobs)
            with self._changed:
                self._each_s += (_NEWEST_SHARE if self._each_s else 1.0) * (each_s - self._each_s)

    def _taken(self) -> list[_Job]:
        """The jobs to do next, at least one; none when there will be no more."""
        jobs: list[_Job] = []
        size = 0
        with self._changed:
            while not jobs:
                while not self._jobs and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return []
                while self._jobs and len(jobs) < self._max_together:
                    job = self._jobs[0]
                    size += len(job.body)
                    if jobs and (job.work != jobs[0].work or size > _MOST_BYTES):
                        break
                    jobs.append(self._jobs.popleft())
        return jobs


class _Answers:
    """Ends each job once."""

    def __init__(self, jobs: list[_Job]) -> None:
        self._left = dict(enumerate(jobs))
        self._loop = jobs[0].loop
        self._ended: list[tuple[_Job, bytes | Exception]] = []

    def __call__(self, number: int, answer: bytes | Exception) -> None:
        self._ended.append((self._left.pop(number), answer))

    def flush(self) -> None:
        ended, self._ended = self._ended, []
        if ended:
            with suppress(RuntimeError):  # the loop is closed, so nobody waits
                self._loop.call_soon_threadsafe(_end, ended)

    def fail(self, error: Exception) -> None:
        """End the jobs that have not ended."""
        for number in list(self._left):
            self(number, error)
        self.flush()


def _end(ended: list[tuple[_Job, bytes | Exception]]) -> None:
    for job, answer in ended:
        if job.answer.done():  # nobody waits for it any more
            continue
        if isinstance(answer, Exception):
            job.answer.set_exception(answer)
        else:
            job.answer.set_result(answer)


def one_by_one(answer: Callable[[bytes], bytes]) -> Work:
    """Work that answers each request by itself."""

    def work(bodies: Sequence[bytes], done: Done) -> None:
        for number, body in enumerate(bodies):
            try:
                answered: bytes | Exception = answer(body)
            except Exception as error:  # noqa: BLE001 - raised where the request waits
                answered = error
            done(number, answered)
            done.flush()

    return work
