"""Turns logged outcomes into feedback events that happen after random delays.

A delay is a pure function of (seed, impression id, task name). So it does not change with a restart, the number of
impressions, the block size or the order of the tasks.

Letters: N impressions, T tasks, M feedback events of one task.
"""

from dataclasses import dataclass

import numpy as np

from simulators.logs.reader import LogBlock
from smes.arrays import F64, I64
from smes.events import FeedbackBlock
from smes.hashing import splitmix64, stable_id
from smes.ranges import Share, check_ranges
from smes.schema import MISSING, Schema, Task
from smes_io.log_spec import Delay, LogSpec


@dataclass(frozen=True)
class FeedbackTimes:
    """Decides when the feedback to each impression happens.

    Every positive binary outcome and every regression value becomes one event. Negative outcomes send nothing.

    An outcome with a logged time keeps that time. For the others, a delay is drawn from a lognormal distribution and
    cut just below the end of the task's attribution window. It is at least 1 ms and at least the value of the task that
    the delay's ``at_least`` names. If that value is longer than the window, the feedback is late, as in real life.

    Attributes:
        schema: Tasks and their windows.
        spec: The delay of each task.
        seed: Seed of all draws.
        late_share: Share of the drawn delays that are made longer than their window, to test late feedback.

    Raises:
        ValueError: ``late_share`` is not a share.
    """

    schema: Schema
    spec: LogSpec
    seed: int = 0
    late_share: Share = 0.0

    def __post_init__(self) -> None:
        check_ranges(self)

    def feedback(self, block: LogBlock) -> FeedbackBlock:
        """Make the feedback to a block's impressions, in event-time order."""
        return self.events(block, self.times(block))

    def times(self, block: LogBlock) -> I64:
        """Draw when the feedback to each impression happens, by task; ``MISSING`` for no feedback. int64 [N, T]."""
        times_NT = np.full(block.outcomes.shape, MISSING, np.int64)
        for index, task in enumerate(self.schema.tasks):
            outcomes = block.outcomes[:, index]
            rows = np.flatnonzero(outcomes > 0 if task.kind == "binary" else ~np.isnan(outcomes))
            times_NT[rows, index] = self._times(block, index, task, rows)
        return times_NT

    def events(self, block: LogBlock, times_NT: I64) -> FeedbackBlock:
        """Make the feedback to a block's impressions that happens at the given :meth:`times`, in event-time order."""
        tasks, rows = np.nonzero(times_NT.T != MISSING)  # equal times: in the order of the tasks
        event_time_ms = times_NT[rows, tasks]
        order = np.argsort(event_time_ms, kind="stable")
        rows, tasks = rows[order], tasks[order]
        zeros = np.zeros(len(order), np.int64)
        return FeedbackBlock(
            impression_id=block.impressions.impression_id[rows],
            event_time_ms=event_time_ms[order],
            task=tasks.astype(np.int32),
            value=block.outcomes[rows, tasks],
            partition=zeros.astype(np.int32),
            offset=zeros,
            arrival_ms=zeros,
        )

    def _times(self, block: LogBlock, index: int, task: Task, rows: I64) -> I64:
        """Event times of a task's feedback to the impressions ``rows``. int64 [M] → int64 [M]."""
        delay = self.spec.labels[task.name].delay
        floor_ms = np.ones(len(rows))
        if delay.at_least is not None:
            floor_s = block.outcomes[rows, self.schema.task_index[delay.at_least]]
            floor_ms = np.maximum(np.ceil(np.nan_to_num(floor_s.astype(np.float64)) * 1000), 1)
        drawn = block.impressions.event_time_ms[rows] + self._delay_ms(
            block.impressions.impression_id[rows], task, delay, floor_ms
        )
        if block.outcome_time_ms is None:
            return drawn
        logged = block.outcome_time_ms[rows, index]
        return np.where(logged == MISSING, drawn, logged)

    def _delay_ms(self, impression_id: I64, task: Task, delay: Delay, floor_ms: F64) -> I64:
        drawn_ms = delay.median_s * 1000 * np.exp(delay.sigma * self._normal(impression_id, task))
        delay_ms = np.maximum(np.minimum(drawn_ms, task.window_ms - 1), floor_ms)
        if self.late_share:
            late = self._uniform(impression_id, task, "late") < self.late_share
            delay_ms = np.where(late, task.window_ms + np.maximum(drawn_ms, floor_ms), delay_ms)
        return np.rint(delay_ms).astype(np.int64)

    def _normal(self, impression_id: I64, task: Task) -> F64:
        """Standard normal draws, by the Box-Muller transform of two uniform ones."""
        radius = np.sqrt(-2 * np.log(self._uniform(impression_id, task, "radius")))
        normal: F64 = radius * np.cos(2 * np.pi * self._uniform(impression_id, task, "angle"))
        return normal

    def _uniform(self, impression_id: I64, task: Task, purpose: str) -> F64:
        return counter_uniform(impression_id, f"{self.seed}/{task.name}/{purpose}")


def counter_uniform(counters: I64, stream: str) -> F64:
    """Draw uniform numbers from the open interval (0, 1). A draw depends only on its counter and the stream's name.

    Args:
        counters: int64 [N].
        stream: Name of a stream of draws. Draws of different streams are independent.

    Returns:
        float64 [N].
    """
    keyed = splitmix64(counters) ^ np.uint64(stable_id(stream))
    bits = splitmix64(keyed.view(np.int64)) >> np.uint64(11)
    uniform: F64 = (bits.astype(np.float64) + 0.5) * 2.0**-53
    return uniform
