"""When the feedback in each cut arrived: the scorer measures freshness by it."""

from collections import Counter

import numpy as np

from smes.arrays import I64
from smes.events import ExampleBlock
from smes.schema import MISSING
from trainer.observers import Observer, StepFigures

_MAX_ARRIVALS = 512


class FeedbackArrivals(Observer):
    """Counts the feedback events trained on since the last cut, by their arrival time."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def after_step(self, examples: ExampleBlock, figures: StepFigures) -> None:
        """Count the batch's feedback events."""
        arrival_ms = examples.feedback_arrival_ms
        self._counts.update(count_arrivals(arrival_ms[arrival_ms != MISSING]))

    def take(self) -> Counter[int]:
        """The counts since the last call: arrival (Unix milliseconds) → feedback events."""
        counts, self._counts = self._counts, Counter()
        return counts


def count_arrivals(arrival_ms: I64) -> Counter[int]:
    """How many feedback events arrived at each millisecond. int64, any shape, no ``MISSING``."""
    values, counts = np.unique(arrival_ms, return_counts=True)
    return Counter(dict(zip(values.tolist(), counts.tolist(), strict=True)))


def summarise_arrivals(arrivals: Counter[int]) -> tuple[tuple[int, int], ...]:
    """(arrival in Unix milliseconds, count) pairs, at most 512; if there are more, neighbours are merged by mean."""
    pairs = sorted(arrivals.items())
    if len(pairs) <= _MAX_ARRIVALS:
        return tuple(pairs)
    summary = []
    for part in np.array_split(np.array(pairs, np.int64), _MAX_ARRIVALS):
        count = int(part[:, 1].sum())
        offset = (part[:, 0] - part[0, 0]) * part[:, 1]
        summary.append((int(part[0, 0]) + round(int(offset.sum()) / count), count))
    return tuple(summary)
