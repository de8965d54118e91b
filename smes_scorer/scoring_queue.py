"""The requests that wait to be scored: so many at most, each for so long at most, and none whose caller has left."""

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

from smes.errors import SmesError


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


class ScoringQueue:
    """A few threads that score requests in the order of their arrival. Its methods are for the event loop's thread.

    A request that is being scored is finished, whoever left; before that it costs nothing but its place.

    Args:
        workers: Threads. Few: more would only compete for the processor with each other and with the trainer.
        max_waiting: Most requests that wait for a thread.
        max_age_s: Longest wait for a thread.
    """

    def __init__(self, workers: int, max_waiting: int, max_age_s: float) -> None:
        self._workers, self._max_waiting, self._max_age_s = workers, max_waiting, max_age_s
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="score")
        self._inside = 0

    @property
    def depth(self) -> int:
        """Requests that wait for a thread."""
        return max(0, self._inside - self._workers)

    async def run(self, work: Callable[[], bytes], left: Callable[[], Awaitable[object]]) -> bytes:
        """Do the work in a thread and give its result.

        Args:
            work: Scores the request.
            left: Awaits the moment at which the caller leaves.

        Raises:
            Busy: ``max_waiting`` requests wait already.
            Dropped: The request waited too long, or its caller left while it waited.
        """
        if self._inside >= self._workers + self._max_waiting:
            raise Busy(f"{self.depth} requests wait, expected at most {self._max_waiting} (max_waiting)")
        self._inside += 1
        job = self._pool.submit(work)
        answer, leaving = asyncio.wrap_future(job), asyncio.ensure_future(left())
        try:
            await asyncio.wait((answer, leaving), timeout=self._max_age_s, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done() and job.cancel():  # a job that has begun cannot be cancelled
                if leaving.done():
                    raise Dropped("the caller left", left=True)
                raise Dropped(f"waited for {self._max_age_s:g} s (max_age_s)", left=False)
            return await answer
        finally:
            leaving.cancel()
            job.cancel()  # if nobody waits for it any more
            self._inside -= 1

    def close(self) -> None:
        """Forget the requests that wait and wait for those that are being scored."""
        self._pool.shutdown(cancel_futures=True)
