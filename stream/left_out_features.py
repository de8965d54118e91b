"""Impressions that leave features out: what fills them between decode and join, and how often it could.

Letters: N impressions; 2 kinds of entity, the user and the item, in this order.
"""

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from smes.arrays import I8, I32, I64, Arrays
from smes.events import ImpressionBlock
from stream.log.event_log import TopicPartition
from stream.partition_state import state_name
from stream.topics import IMPRESSIONS

CARRIED, FROM_STORE, NOT_IN_STORE, WRITTEN_LATER = range(4)
"""What became of the features of one entity of one impression: it has some of its own, or the schema has none; the
store had a row; it had none; all of the rows that it keeps hold from later on.
"""


@dataclass(frozen=True, slots=True)
class Filled:
    """Impressions with what the store had.

    Attributes:
        impressions: The block, or a copy of it.
        outcome: int8 [N, 2], one of ``CARRIED, FROM_STORE, NOT_IN_STORE, WRITTEN_LATER``.
    """

    impressions: ImpressionBlock
    outcome: I8


class FeatureSource(Protocol):
    """Fills features that impressions leave out, and nothing else; either all that are there, or it raises."""

    def fill(self, impressions: ImpressionBlock) -> Filled:
        """The impressions with what the features were at their times."""


@dataclass(frozen=True, slots=True)
class LookUps:
    """How often features were looked up, since the history began.

    Attributes:
        from_store: Found.
        not_in_store: Not found, so that the impression is trained on without.
        written_later: Those of ``not_in_store`` for which every row that is kept holds from later on: the features were
            written too late, or the older rows are gone.
    """

    from_store: int = 0
    not_in_store: int = 0
    written_later: int = 0


@dataclass(frozen=True, slots=True)
class FeatureCounts:
    """The look-ups of users and of items for impressions that left out all features of that entity."""

    user: LookUps = field(default_factory=LookUps)
    item: LookUps = field(default_factory=LookUps)


class FeatureTally:
    """Counts look-ups by the partition of the impressions."""

    def __init__(self) -> None:
        self._counts: dict[int, I64] = {}  # int64 [2, 3] of each partition

    def add(self, partition_N: I32, outcome_N2: I8) -> None:
        """Count what became of the impressions of these partitions."""
        for partition in np.unique(partition_N[(outcome_N2 != CARRIED).any(axis=1)]).tolist():
            outcome = outcome_N2[partition_N == partition]
            counts = [(outcome == kind).sum(axis=0) for kind in (FROM_STORE, NOT_IN_STORE, WRITTEN_LATER)]
            self._counts[partition] = self._of(partition) + np.stack(counts, axis=1)

    def _of(self, partition: int) -> I64:
        return self._counts.get(partition, np.zeros((2, 3), np.int64))

    def counts(self) -> FeatureCounts:
        """All partitions together."""
        total = sum(self._counts.values(), np.zeros((2, 3), np.int64)).tolist()
        return FeatureCounts(*(LookUps(found, gone + later, later) for found, gone, later in total))

    def state(self, sources: tuple[TopicPartition, ...]) -> Arrays:
        """The counts of these partitions' impressions, by the names of :mod:`stream.partition_state`."""
        return {
            state_name(IMPRESSIONS, source.partition, "features"): self._of(source.partition)
            for source in sources
            if source.topic == IMPRESSIONS
        }

    def load_state(self, state: Arrays, sources: tuple[TopicPartition, ...]) -> None:
        """The inverse of :meth:`state`; nothing was counted where the state has nothing."""
        self._counts = {}
        for source in sources:
            counts = state.get(state_name(IMPRESSIONS, source.partition, "features"))
            if source.topic == IMPRESSIONS and counts is not None:
                self._counts[source.partition] = counts.astype(np.int64)
