"""When the feedback of each cut passed the stages from the event log into the weights: what freshness is counted by."""

import time
from collections import deque
from collections.abc import Callable

import numpy as np

from feature_store.feedback_times import FeedbackTimes
from smes.arrays import F64, I64
from smes.events import ExampleBlock
from smes_io.clock import wall_clock_ms
from stream.batch_queue import BatchTimes
from trainer.observers import Observer, StepFigures

_MAX_ROWS = 16_384  # kept between two cuts; then neighbours are merged


class FeedbackArrivals(Observer):
    """Notes the feedback events trained on since the last cut, by the times at which they passed each stage.

    Args:
        taken_times: Times of the batch that was taken from the stream last, in seconds of ``monotonic``.
        monotonic: The stream's clock.
        now_ms: Wall clock, Unix milliseconds.
    """

    def __init__(
        self,
        taken_times: Callable[[], BatchTimes | None],
        *,
        monotonic: Callable[[], float] = time.monotonic,
        now_ms: Callable[[], int] = wall_clock_ms,
    ) -> None:
        self._taken_times, self._monotonic, self._now_ms = taken_times, monotonic, now_ms
        self._taken: deque[tuple[ExampleBlock, BatchTimes | None]] = deque()
        self._noted: list[FeedbackTimes] = []

    def before_step(self, examples: ExampleBlock) -> None:
        """Note when the batch came."""
        self._taken.append((examples, self._taken_times()))

    def after_step(self, examples: ExampleBlock, figures: StepFigures) -> None:
        """Note the batch's feedback events: they are in the weights."""
        times = self._times_of(examples)
        has_arrived = examples.feedback_arrival_ms > 0  # neither MISSING nor of a log in files, from before the start
        rows, tasks = np.nonzero(has_arrived & examples.label_mask)
        if times is None or len(rows) == 0:
            return
        of_feedback = np.ones(len(rows), np.int64)
        self._noted.append(
            FeedbackTimes(
                count=of_feedback,
                arrived_ms=examples.feedback_arrival_ms[rows, tasks],
                joined_ms=self._wall_ms(times.joined_s[rows]),
                batched_ms=of_feedback * self._wall_ms(np.array([times.batched_s])),
                trained_ms=of_feedback * self._now_ms(),
            )
        )
        if sum(map(len, self._noted)) > _MAX_ROWS:
            self._noted = [FeedbackTimes.concat(self._noted).merged()]

    def after_failed_step(self, examples: ExampleBlock) -> None:
        """Forget the batch: nothing was learned from it."""
        self._times_of(examples)

    def take(self) -> FeedbackTimes:
        """What was noted since the last call."""
        noted, self._noted = self._noted, []
        return FeedbackTimes.concat(noted).merged()

    def _times_of(self, examples: ExampleBlock) -> BatchTimes | None:
        """Times of the oldest batch without a result; None if its step began before this object watched."""
        if not self._taken or self._taken[0][0] is not examples:
            return None
        return self._taken.popleft()[1]

    def _wall_ms(self, seconds: F64) -> I64:
        """Wall time of moments in the past of the stream's clock."""
        past_s = self._monotonic() - seconds
        return self._now_ms() - np.rint(1000 * past_s).astype(np.int64)
