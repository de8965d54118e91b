"""Replay a log into the event log: impressions and delayed feedback, in event-time order, at a chosen pace."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from simulators.config import ReplayConfig
from simulators.logs.reader import LogReader, row_bytes
from simulators.merge import replay_blocks
from smes.arrays import I64
from smes.errors import Stopped
from smes.events import FeedbackBlock, ImpressionBlock
from stream.codec.codec import encode_feedback, encode_impressions
from stream.log.event_log import EventLog, OutRecord
from stream.topics import FEEDBACK, IMPRESSIONS

MAX_WAIT_S = 0.2  # between two calls of `stop`, so that Ctrl-C is answered promptly
_CLOCK_STEP_S = 1e-6  # events due within this are due now: a shorter wait may not change a clock with a large value


@dataclass(frozen=True)
class ReplayReport:
    """Progress or result of a replay.

    Attributes:
        impressions, feedback: Events appended, with those before the place where the replay went on.
        total_impressions: Impressions of the log, within its limit.
        duplicates: Rows of the log that were dropped as exact duplicates.
        rejected: Rows of the log that could not be used. The reader has the reasons.
        bytes: Payload appended.
        event_time_ms: Event time reached in the log; None before the first event.
        elapsed_s: Wall time in seconds.
        finished: Whether the whole log was appended.
    """

    impressions: int
    feedback: int
    total_impressions: int
    duplicates: int
    rejected: int
    bytes: int
    event_time_ms: int | None
    elapsed_s: float
    finished: bool


class Replayer:
    """Append a log to the topics ``impressions`` and ``feedback``, which must exist.

    Each append covers a short slice of event time in both topics and all partitions. No partition's event time runs
    ahead of another's by more than that, so the watermark of the join advances evenly.

    Args:
        reader: The log. Its schema is the events' schema.
        log: The event log to append to.
        config: Pace, seed and codec.
        begin: How many impressions and how many feedback events an earlier replay has appended; this one goes on there.
        monotonic_s: A monotonic clock in seconds.
        sleep: Waits for the given number of seconds.
    """

    def __init__(
        self,
        reader: LogReader,
        log: EventLog,
        config: ReplayConfig,
        *,
        begin: tuple[int, int] = (0, 0),
        monotonic_s: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._reader = reader
        self._log = log
        self._config = config
        self._now_s = monotonic_s
        self._sleep = sleep
        self._impressions, self._feedback = begin
        self._begin, self._bytes = sum(begin), 0
        self._event_time_ms: int | None = None
        self._start_s: float | None = None
        self._finished = False

    def run(
        self,
        *,
        on_progress: Callable[[ReplayReport], None] = lambda report: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> ReplayReport:
        """Replay until the end, or until ``stop()`` is true. Events appended before the stop stay appended.

        Args:
            on_progress: Called after every append.
            stop: Called before every append, and at least every ``MAX_WAIT_S`` seconds while waiting.

        Raises:
            LogError: The log cannot be read.
            EventLogError, EventLogUnavailable: An append failed. Its events may or may not have been appended;
                :meth:`report` does not count them.
        """
        partitions = {topic: self._log.partitions(topic) for topic in (IMPRESSIONS, FEEDBACK)}
        pairs = replay_blocks(self._reader, self._config.seed, late_share=self._config.late_share)
        pace: _Pace | None = None
        most = self._most_events()
        passed = 0
        for impressions, feedback in pairs:
            merged = _Merged(impressions, feedback)
            passed += merged.skip(self._begin - passed)
            if not merged.left:
                continue
            pace = pace or self._pace(merged, most)
            while merged.left:
                count = self._wait(pace, merged, stop)
                if count is None:
                    return self.report()
                try:
                    self._append(*merged.next(count), partitions)
                except Stopped:
                    return self.report()
                on_progress(self.report())
        self._finished = True
        return self.report()

    def _most_events(self) -> int:
        """Most events of one append: both limits of the configuration, whichever is reached first."""
        schema, config = self._reader.schema, self._config
        return max(min(config.max_slice_events, config.max_slice_bytes // row_bytes(schema)), 1)

    def _pace(self, first: "_Merged", most: int) -> "_Pace":
        # The clock starts when the first block is ready: the time to sort the log does not count.
        self._start_s = self._now_s()
        return _Pace(self._config, self._start_s, int(first.remaining_times[0]), most)

    def _wait(self, pace: "_Pace", merged: "_Merged", stop: Callable[[], bool]) -> int | None:
        """Wait until the next append is due.

        Returns:
            Its number of events; None if ``stop()`` is true.
        """
        while not stop():
            sent = self._impressions + self._feedback - self._begin
            count, wait_s = pace.due(merged.remaining_times, sent, self._now_s())
            if count:
                return count
            self._sleep(min(wait_s, MAX_WAIT_S))
        return None

    def _append(self, impressions: ImpressionBlock, feedback: FeedbackBlock, partitions: dict[str, int]) -> None:
        config, schema = self._config, self._reader.schema
        if len(impressions):
            count, by_request = partitions[IMPRESSIONS], config.by_request
            records = encode_impressions(impressions, schema, config.codec, count, by_request=by_request)
            self._send(IMPRESSIONS, records)
            self._impressions += len(impressions)
            self._event_time_ms = int(impressions.event_time_ms[-1])
        if len(feedback):
            self._send(FEEDBACK, encode_feedback(feedback, schema, config.codec, partitions[FEEDBACK]))
            self._feedback += len(feedback)
            self._event_time_ms = max(int(feedback.event_time_ms[-1]), self._event_time_ms or 0)

    def _send(self, topic: str, records: list[OutRecord]) -> None:
        self._log.append(topic, records)
        self._bytes += sum(len(record.value) for record in records)

    def report(self) -> ReplayReport:
        """What has been appended so far."""
        return ReplayReport(
            impressions=self._impressions,
            feedback=self._feedback,
            total_impressions=self._reader.total,
            duplicates=self._reader.duplicates,
            rejected=sum(self._reader.rejected.values()),
            bytes=self._bytes,
            event_time_ms=self._event_time_ms,
            elapsed_s=0.0 if self._start_s is None else self._now_s() - self._start_s,
            finished=self._finished,
        )


class _Merged:
    """A pair of impressions and feedback as one queue in event-time order."""

    def __init__(self, impressions: ImpressionBlock, feedback: FeedbackBlock) -> None:
        times = np.concatenate([impressions.event_time_ms, feedback.event_time_ms])
        order = np.argsort(times, kind="stable")  # an impression before feedback of the same time
        self.times: I64 = times[order]
        self._impressions = impressions
        self._feedback = feedback
        self._before = np.concatenate([[0], np.cumsum(order < len(impressions))])  # impressions among the first k
        self._taken = 0

    @property
    def left(self) -> int:
        return len(self.times) - self._taken

    @property
    def remaining_times(self) -> I64:
        return self.times[self._taken :]

    def skip(self, count: int) -> int:
        """Leave out the next ``count`` events, or all that are left; how many."""
        skipped = min(count, self.left)
        self._taken += skipped
        return skipped

    def next(self, count: int) -> tuple[ImpressionBlock, FeedbackBlock]:
        """Take the next ``count`` events: their impressions and their feedback."""
        start, stop = self._taken, self._taken + count
        self._taken = stop
        first, last = int(self._before[start]), int(self._before[stop])
        return self._impressions.take(slice(first, last)), self._feedback.take(slice(start - first, stop - last))


class _Pace:
    """Computes how many events are due at a given wall time."""

    def __init__(self, config: ReplayConfig, start_s: float, first_event_ms: int, most: int) -> None:
        self._config, self._most = config, most
        self._start_s = start_s
        self._first_event_ms = first_event_ms
        self._not_before_s = start_s

    def due(self, times: I64, sent: int, now_s: float) -> tuple[int, float]:
        """Count the events that are due.

        An append follows ``slice_s`` after the previous one, or later if the log has a gap. A late append takes
        everything that has become due.

        Args:
            times: int64 [N ≥ 1], event times of the waiting events, ascending.
            sent: Events appended so far, since the pace began.
            now_s: Wall time now.

        Returns:
            The number of events due, and the seconds to wait if it is 0.
        """
        config, elapsed_s = self._config, now_s - self._start_s
        most = min(len(times), self._most)
        if config.rate is not None:
            wanted = min(max(int(config.rate * config.slice_s), 1), most)
            # The slice is due when its last event is.
            wait_s = (sent + wanted) / config.rate - elapsed_s
            if wait_s > _CLOCK_STEP_S:
                return 0, wait_s
            return min(int(config.rate * elapsed_s) - sent, most) or wanted, 0.0
        if config.speed == "max":
            return most, 0.0
        next_s = self._start_s + (int(times[0]) - self._first_event_ms) / 1000 / config.speed
        wait_s = max(next_s, self._not_before_s) - now_s
        if wait_s > _CLOCK_STEP_S:
            return 0, wait_s
        reached_ms = self._first_event_ms + elapsed_s * 1000 * config.speed
        count = max(int(np.searchsorted(times[:most], reached_ms, side="right")), 1)
        if count < self._most:  # otherwise there is a backlog: append again at once
            self._not_before_s = now_s + config.slice_s
        return count, 0.0
