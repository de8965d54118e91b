"""The requests that wait to be scored: so many at most, each for so long at most, and none whose caller has left.

A thread that becomes free takes the requests that wait at that moment together, so many as may: one call of the model
costs much less than one for each. Nothing waits for others to come, so a request that comes alone is not delayed.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from smes.errors import SmesError

Done = Callable[[int, bytes | Exception], None]
"""Takes the answer to the request of a number, or what was raised instead of it."""

Work = Callable[[Sequence[bytes], Done], None]
"""Answers requests, given by their bodies. It says of each when it is done, in any order, each once."""

_MOST_BYTES = 64 * 1024
"""Of the bodies that are taken together, unless it is one alone."""


class Busy(SmesError):
    """As many requests wait already as may, so this one was not taken."""


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
    """A request, and what becomes of it."""

    work: Work
    body: bytes
    answer: "Future[bytes]" = field(default_factory=Future)


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
            Busy: ``max_waiting`` requests wait already.
            Dropped: The request waited too long, or its caller left while it waited.
        """
        if self._inside >= self._workers + self._max_waiting and len(self._jobs) >= self._max_waiting:
            raise Busy(f"{self.depth} requests wait, expected at most {self._max_waiting} (max_waiting)")
        self._inside += 1
        job = _Job(work, body)
        with self._changed:
            self._jobs.append(job)
            self._changed.notify()
        answer, leaving = asyncio.wrap_future(job.answer), asyncio.ensure_future(left())
        try:
            await asyncio.wait((answer, leaving), timeout=self._max_age_s, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done() and job.answer.cancel():  # a job that has begun cannot be cancelled
                if leaving.done():
                    raise Dropped("the caller left", left=True)
                raise Dropped(f"waited for {self._max_age_s:g} s (max_age_s)", left=False)
            return await answer
        finally:
            leaving.cancel()
            self._forget(job)  # if nobody waits for it any more
            self._inside -= 1

    def close(self) -> None:
        """Forget the requests that wait and wait for those that are being scored."""
        with self._changed:
            self._closed = True
            waiting = list(self._jobs)
            self._changed.notify_all()
        for job in waiting:
            self._forget(job)
        for thread in self._threads:
            thread.join()

    def _forget(self, job: _Job) -> None:
        """Give up a job that has not begun, and its place."""
        job.answer.cancel()
        if job.answer.cancelled():
            with self._changed:
                if job in self._jobs:
                    self._jobs.remove(job)

    def _serve(self) -> None:
        while jobs := self._taken():
            done = _Answers(jobs)
            try:
                jobs[0].work([job.body for job in jobs], done)
            except Exception as error:  # noqa: BLE001 - no job may be left without an end
                done.fail(error)
            else:
                done.fail(SmesError("a request was not answered"))

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
                    self._jobs.popleft()
                    if job.answer.set_running_or_notify_cancel():
                        jobs.append(job)
        return jobs


class _Answers:
    """Ends each job once."""

    def __init__(self, jobs: list[_Job]) -> None:
        self._left = dict(enumerate(jobs))

    def __call__(self, number: int, answer: bytes | Exception) -> None:
        job = self._left.pop(number)
        if isinstance(answer, Exception):
            job.answer.set_exception(answer)
        else:
            job.answer.set_result(answer)

    def fail(self, error: Exception) -> None:
        """Of the jobs that have not ended."""
        for number in list(self._left):
            self(number, error)


def one_by_one(answer: Callable[[bytes], bytes]) -> Work:
    """Work that answers each request by itself."""

    def work(bodies: Sequence[bytes], done: Done) -> None:
        for number, body in enumerate(bodies):
            try:
                answered: bytes | Exception = answer(body)
            except Exception as error:  # noqa: BLE001 - raised where the request waits
                answered = error
            done(number, answered)

    return work
