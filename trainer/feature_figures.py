"""How the features of what is trained on are distributed, by hour of event time, for the scorer to compare.

A scorer measures its requests in the same way (:mod:`smes.feature_figures`). Batches are a sample, four a second at
most, so a fast replay is not held up.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from smes.events import ExampleBlock
from smes.feature_figures import HOUR_MS, HourlySums, plain_figures
from smes.model.ids import IdKeys
from smes.model.learner import Learner

_EVERY_S = 0.25
_KEPT_HOURS = 2
_LARGEST = 64 * 1024  # characters in a manifest


class SampledFeatures:
    """Measures batches just before their new ids get rows. Use it on the training thread.

    An hour is complete when an impression of a later one is trained on: they come in the order of their times. What
    comes of an hour after that does not count. A restart begins the hour anew. Of several ranks each measures its own
    part of the stream, and how many ids are unknown is not known.

    Args:
        learner: Knows ids.
        monotonic_s: Clock of the four a second.
    """

    def __init__(self, learner: Learner, *, monotonic_s: Callable[[], float] = time.monotonic) -> None:
        self._learner, self._monotonic_s = learner, monotonic_s
        self._keys = IdKeys(replace(learner.schema, derived=()))  # of the ids of events
        self._hours = HourlySums(learner.schema, _KEPT_HOURS)
        self._next_s = float("inf")

    def start(self) -> None:
        """Measure from now on: somebody reads it."""
        self._next_s = float("-inf")

    def see(self, examples: ExampleBlock) -> None:
        """A batch that is trained on next. Each impression counts once, of the two newest hours of the batch."""
        now_s = self._monotonic_s()
        begins = np.flatnonzero(examples.begins)
        if now_s < self._next_s or len(begins) == 0:
            return
        self._next_s = now_s + _EVERY_S
        ids, numerics, hour = examples.ids[begins], examples.numerics[begins], examples.event_time_ms[begins] // HOUR_MS
        has_row = self._learner.has_rows(self._keys.own(ids))
        known = None if has_row is None else has_row.reshape(ids.shape)
        for each in np.unique(hour)[-2:].tolist():
            if (sums := self._hours.of(each)) is not None:
                rows = hour == each
                sums.add(ids[rows], numerics[rows], None if known is None else known[rows])

    def summary(self) -> dict[str, Any]:
        """The last complete hours, as :func:`smes.feature_figures.plain_figures` has them; empty before the first."""
        return plain_figures(self._hours.done, _LARGEST) if self._hours.done else {}
