"""When feedback passed each stage on its way into the weights: what a manifest says of it, and freshness is counted by.

A row stands for feedback events with the same times. In a manifest it is five integers: when they arrived in the event
log (Unix milliseconds), how many they are, and the milliseconds from arrived to joined, from joined to batched, and
from batched to trained. Clocks of two machines may disagree, so a span that would be negative is 0.

Letters: A rows.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np

from smes.arrays import I64

FeedbackRow = tuple[int, int, int, int, int]
"""As a manifest has it: arrived, count, and three spans."""

MAX_ROWS = 512
"""Of a manifest. If there are more, neighbours by arrival are merged to one with their mean times."""


@dataclass(frozen=True, slots=True)
class FeedbackTimes:
    """Feedback by the times of its stages. Every array is int64 [A]; times are Unix milliseconds.

    Attributes:
        count: Feedback events with these times.
        arrived_ms: They reached the event log.
        joined_ms: They came out of the join as labels of an example.
        batched_ms: The mini-batch of that example ended.
        trained_ms: The step on that batch was done.
    """

    count: I64
    arrived_ms: I64
    joined_ms: I64
    batched_ms: I64
    trained_ms: I64

    def __len__(self) -> int:
        return len(self.count)

    @classmethod
    def concat(cls, several: Iterable["FeedbackTimes"]) -> "FeedbackTimes":
        """The rows of all, in the given order; none of none."""
        all_of_them = [_NONE, *several]
        return cls(*(np.concatenate([getattr(one, f.name) for one in all_of_them]) for f in fields(cls)))

    @classmethod
    def of_rows(cls, rows: Sequence[FeedbackRow]) -> "FeedbackTimes":
        """From the rows of a manifest."""
        columns = np.array(rows, np.int64).reshape(-1, 5).T
        joined_ms, batched_ms, trained_ms = columns[0] + np.cumsum(columns[2:], axis=0)
        return cls(columns[1].copy(), columns[0].copy(), joined_ms, batched_ms, trained_ms)

    def rows(self) -> tuple[FeedbackRow, ...]:
        """The rows of a manifest, by arrival."""
        times = np.stack([self.arrived_ms, self.joined_ms, self.batched_ms, self.trained_ms])
        spans = np.maximum(np.diff(times, axis=0), 0)
        columns = np.concatenate([self.arrived_ms[None], self.count[None], spans])
        return tuple(map(tuple, columns[:, np.lexsort(times[::-1])].T.tolist()))

    def merged(self, most: int = MAX_ROWS) -> "FeedbackTimes":
        """At most so many rows: equal ones are one, then neighbours by arrival are merged to one with their mean."""
        times, where = np.unique(
            np.stack([self.arrived_ms, self.joined_ms, self.batched_ms, self.trained_ms], axis=1),
            axis=0,
            return_inverse=True,
        )
        count = np.bincount(where.ravel(), self.count, len(times)).astype(np.int64)
        if len(times) > most:
            part = np.arange(len(times)) * most // len(times)
            first = times[np.searchsorted(part, np.arange(most))]
            sums = np.stack([np.bincount(part, count * column) for column in (times - first[part]).T], axis=1)
            count = np.bincount(part, count).astype(np.int64)
            times = first + np.rint(sums / np.maximum(count, 1)[:, None]).astype(np.int64)
        return FeedbackTimes(count, *times.T)


_NONE = FeedbackTimes(*(np.zeros(0, np.int64) for _ in fields(FeedbackTimes)))
