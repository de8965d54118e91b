"""Impressions and their delayed feedback as one stream in event-time order."""

import heapq
from collections.abc import Iterable, Iterator

import numpy as np

from simulators.delays import FeedbackTimes
from simulators.history import HistoryBuilder
from simulators.logs.reader import LogBlock, LogReader, row_bytes
from smes.events import FeedbackBlock, ImpressionBlock
from smes.schema import Schema


class PendingFeedback:
    """Feedback that is later than the impressions so far: a heap of runs, each in event-time order.

    It holds the feedback on the impressions of the last attribution window. Its size is therefore bounded by the
    window, or by the longest delay in the log's own feedback times, and not by the length of the log.
    """

    def __init__(self) -> None:
        self._runs: list[tuple[int, int, FeedbackBlock]] = []  # (time of its first event, tie-break, run)
        self._pushed = 0
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def add(self, run: FeedbackBlock) -> None:
        """Add events that are in event-time order."""
        if len(run):
            heapq.heappush(self._runs, (int(run.event_time_ms[0]), self._pushed, run))
            self._pushed += 1
            self._size += len(run)

    def due(self, until_ms: int) -> FeedbackBlock:
        """Remove and return all events up to and including ``until_ms``, in event-time order."""
        due = [FeedbackBlock.empty()]
        while self._runs and self._runs[0][0] <= until_ms:
            _, _, run = heapq.heappop(self._runs)
            count = int(np.searchsorted(run.event_time_ms, until_ms, side="right"))
            due.append(run.take(slice(0, count)))
            self._size -= len(run)
            self.add(run.take(slice(count, None)))
        events = FeedbackBlock.concat(due)
        return events.take(np.argsort(events.event_time_ms, kind="stable"))


def merge(
    blocks: Iterable[LogBlock], times: FeedbackTimes, schema: Schema
) -> Iterator[tuple[ImpressionBlock, FeedbackBlock]]:
    """Merge blocks of impressions with their feedback.

    Each pair covers one segment of event time. The segment ends with its last impression, and feedback of exactly that
    time belongs to it. Both parts are in event-time order. The last pair has no impressions, only the feedback that
    was still pending. If the schema has a history, it is written into the impressions.

    Args:
        blocks: Impressions with their outcomes, in event-time order.
        times: Draws or reads the time of each feedback.
        schema: Of the events.
    """
    pending = PendingFeedback()
    history = HistoryBuilder(schema) if schema.history is not None else None
    for block in blocks:
        times_NT = times.times(block)
        if history is not None:
            history.fill(block.impressions, times_NT)
        pending.add(times.events(block, times_NT))
        yield block.impressions, pending.due(int(block.impressions.event_time_ms[-1]))
    if len(pending):
        yield ImpressionBlock.empty(schema), pending.due(np.iinfo(np.int64).max)


MAX_BLOCK_BYTES = 32 * 2**20
"""Most bytes of the impressions of one pair: what bounds the memory of everything that goes through the pairs."""


def replay_blocks(
    reader: LogReader, seed: int = 0, *, rows_per_block: int = 8192, late_share: float = 0.0
) -> Iterator[tuple[ImpressionBlock, FeedbackBlock]]:
    """The events of a log in the order in which the stream delivers them; see :func:`merge`.

    Args:
        reader: The log.
        seed: Seed of the feedback delays. The same seed gives the same delays in :class:`simulators.replay.Replayer`.
        rows_per_block: Impressions of each pair; fewer where they would be more than ``MAX_BLOCK_BYTES``.
        late_share: Share of the feedback that misses its attribution window on purpose.
    """
    times = FeedbackTimes(reader.schema, reader.spec, seed, late_share)
    rows = max(min(rows_per_block, MAX_BLOCK_BYTES // row_bytes(reader.schema)), 1)
    return merge(reader.blocks(rows), times, reader.schema)
