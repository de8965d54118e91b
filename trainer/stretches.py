"""The metrics of stretches of the stream, one after the other: learning curves.

A stretch ends when a window of the evaluation has closed, and also after a number of impressions or by the clock, if
that is configured. Its metrics are differences of running sums, so all stretches together have the metrics of the run.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from smes.arrays import Arrays
from smes.events import ExampleBlock
from smes.schema import MISSING
from trainer.evaluation import ProgressiveEvaluation, TaskMetrics
from trainer.observers import Observer, StepFigures


@dataclass(frozen=True, slots=True)
class Stretch:
    """A part of the stream that is over.

    Attributes:
        number: How many ended before, with those before a restart.
        step: Steps taken by its end.
        trained: Impressions trained on by its end.
        impressions: Those of them in the stretch.
        windows: Windows of the evaluation that closed in it: its GAUC is over these.
        event_time_ms: Event time of the newest example by its end; None before the first.
        tasks: Task name → metrics of what was scored, with its final labels, in the stretch.
        ranked: Task name → impressions behind the windowed GAUC, its weight in an average.
    """

    number: int
    step: int
    trained: int
    impressions: int
    windows: int
    event_time_ms: int | None
    tasks: dict[str, TaskMetrics]
    ranked: dict[str, float]


@dataclass(slots=True)
class _Marks:
    """Where the observer is: whole numbers, in the order in which a checkpoint has them."""

    step: int = 0
    trained: int = 0
    event_time_ms: int = MISSING
    ended_at: int = 0  # impressions trained on by the end of the last stretch
    windows: int = 0  # closed by then
    number: int = 0  # of the stretch that has not ended


Now = tuple[int, int, int | None]
"""Steps, impressions trained on, and newest event time."""


class Stretches(Observer):
    """Ends stretches. Steps are counted when their results come: the last step taken may not be in the sums yet.

    Attributes:
        last: The stretch that ended last in this process.

    Args:
        evaluation: Whose running sums; it has to be told of each step before this observer.
        every_examples: Impressions after which a stretch ends at the latest; None: any number.
        every_s: Seconds after which one ends at the latest, if it has any; None: never by the clock.
        monotonic: Seconds of a clock that never goes back.
    """

    def __init__(
        self,
        evaluation: ProgressiveEvaluation,
        *,
        every_examples: int | None = None,
        every_s: float | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._evaluation, self._every_examples, self._every_s = evaluation, every_examples, every_s
        self._monotonic = monotonic
        self._listeners: list[Callable[[Stretch], None]] = []
        self._now: Callable[[], Now] = lambda: (0, 0, None)
        self._base: Arrays | None = None  # the sums by the end of the last stretch
        self._marks = _Marks()
        self._pending = 0  # steps taken whose results have not come yet
        self._is_due = False
        self._ended_s = monotonic()
        self.last: Stretch | None = None

    @property
    def number(self) -> int | None:
        """Of the stretch that has not ended; None before it has begun."""
        return None if self._base is None else self._marks.number

    def follow(self, now: Callable[[], Now]) -> None:
        """Say how far the training is, for a beginning without a state."""
        self._now = now

    def listen(self, listener: Callable[[Stretch], None]) -> None:
        """Call a listener with every stretch that ends from now on."""
        self._listeners.append(listener)

    def before_step(self, examples: ExampleBlock) -> None:
        """End the stretch if the evaluation has just closed a window; the step to come belongs to the next one."""
        self._begin()
        self._pending += 1
        if self._has_closed_window():
            self._is_due = self._pending > 1
            if not self._is_due:
                self._end()

    def after_step(self, examples: ExampleBlock, figures: StepFigures) -> None:
        """Count a step, and end the stretch if it is time to."""
        marks = self._marks
        self._pending -= 1
        marks.step += 1
        marks.trained += examples.num_impressions
        marks.event_time_ms = max(marks.event_time_ms, int(examples.event_time_ms.max()))
        self._end_if_due()

    def after_failed_step(self, examples: ExampleBlock) -> None:
        """Count nothing: the step changed nothing."""
        self._pending -= 1
        self._end_if_due()

    def after_closing(self, examples: ExampleBlock) -> None:
        """End the stretch if the last labels of a window have come."""
        self._begin()
        if self._has_closed_window():
            self._end()

    def after_read(self) -> None:
        """End the stretch if it is time to by the clock."""
        if self._base is not None and self._pending == 0 and self._is_late():
            self._end()

    def end(self) -> None:
        """End the last stretch of a run that does not go on, windows that are not closed included."""
        if self._base is None:
            return
        tasks, ranked = self._evaluation.since(self._base, with_open=True)
        has_labels = any(metrics.examples for metrics in tasks.values())  # they come after the last step, too
        if has_labels or any(ranked.values()) or self._marks.trained > self._marks.ended_at:
            self._end(with_open=True)

    def _begin(self) -> None:
        if self._base is None:
            step, trained, event_time_ms = self._now()
            newest_ms = MISSING if event_time_ms is None else event_time_ms
            self._marks = _Marks(step, trained, newest_ms, trained, self._evaluation.windows_closed)
            self._base = self._evaluation.totals()

    def _has_closed_window(self) -> bool:
        return self._evaluation.windows_closed > self._marks.windows

    def _is_late(self) -> bool:
        if self._every_s is None or self._marks.trained == self._marks.ended_at:
            return False
        return self._monotonic() - self._ended_s >= self._every_s

    def _end_if_due(self) -> None:
        every, marks = self._every_examples, self._marks
        is_full = every is not None and marks.trained - marks.ended_at >= every
        if self._is_due or is_full or self._is_late():
            self._end()

    def _end(self, *, with_open: bool = False) -> None:
        assert self._base is not None, "a stretch has begun"
        marks, evaluation = self._marks, self._evaluation
        tasks, ranked = evaluation.since(self._base, with_open=with_open)
        self.last = stretch = Stretch(
            number=marks.number,
            step=marks.step,
            trained=marks.trained,
            impressions=marks.trained - marks.ended_at,
            windows=evaluation.windows_closed - marks.windows,
            event_time_ms=None if marks.event_time_ms == MISSING else marks.event_time_ms,
            tasks=tasks,
            ranked=ranked,
        )
        self._base, self._is_due, self._ended_s = evaluation.totals(), False, self._monotonic()
        marks.number += 1
        marks.ended_at, marks.windows = marks.trained, evaluation.windows_closed
        for listener in self._listeners:
            listener(stretch)

    def state(self) -> Arrays:
        """Arrays from which :meth:`load_state` goes on, when every result was delivered; empty before the first step.

        A checkpoint has them under a prefix of their own: one without them is good, too.
        """
        if self._base is None:
            return {}
        marks = self._marks
        values = [marks.step, marks.trained, marks.event_time_ms, marks.ended_at, marks.windows, marks.number]
        return {"marks": np.array(values, np.int64), **{f"base.{name}": array for name, array in self._base.items()}}

    def load_state(self, state: Arrays) -> None:
        """The inverse of :meth:`state`."""
        self._marks = _Marks(*state["marks"].tolist())
        self._base = {name.removeprefix("base."): array for name, array in state.items() if name != "marks"}
