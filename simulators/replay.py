"""Replays a log into the event log: impressions and delayed feedback, in event-time order, at a chosen pace."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from simulators.logs.reader import LogReader
from simulators.merge import replay_blocks
from smes.arrays import I64
from smes.events import FeedbackBlock, ImpressionBlock
from stream.codec.codec import encode_feedback, encode_impressions
from stream.log.event_log import EventLog, OutRecord
from stream.topics import FEEDBACK, IMPRESSIONS

MAX_WAIT_S = 0.2  # between two looks at `stop`, so that Ctrl-C is answered promptly
_CLOCK_STEP_S = 1e-6  # what is due within this is due: a shorter wait may not move a clock of large numbers at all


@dataclass(frozen=True)
class ReplayConfig:
    """How a log is replayed.

    Attributes:
        speed: Event time per wall time: 1 is real time, 60 an hour a minute; ``max`` is flat out.
        rate: Instead of ``speed``, events (impressions and feedback) per second of wall time, evenly.
        seed: Of the feedback delays.
        late_share: Share of the feedback, 0 … 1, that misses its window on purpose.
        codec: Wire form of the events.
        slice_s: Wall time that one append covers when paced: arrivals are smooth down to this.
        max_slice_events: Most events of one append, whatever the pace.
    """

    speed: float | Literal["max"] = "max"
    rate: float | None = None
    seed: int = 0
    late_share: float = 0.0
    codec: Literal["json", "arrow"] = "arrow"
    slice_s: float = 0.05
    max_slice_events: int = 8192

    def __post_init__(self) -> None:
        if self.speed != "max" and not self.speed > 0:
            raise ValueError(f"replay speed {self.speed}, expected more than 0, or max")
        if self.rate is not None and not self.rate > 0:
            raise ValueError(f"replay rate {self.rate}, expected more than 0 events per second")
        if self.rate is not None and self.speed != "max":
            raise ValueError(f"replay rate {self.rate} and speed {self.speed}: expected one of them")
        if not 0 < self.slice_s <= 1:
            raise ValueError(f"replay slice_s {self.slice_s}, expected more than 0 and at most 1 second")
        if self.max_slice_events < 1:
            raise ValueError(f"replay max_slice_events {self.max_slice_events}, expected at least 1")


@dataclass(frozen=True)
class ReplayReport:
    """What a replay has done so far.

    Attributes:
        impressions, feedback: Events appended.
        total_impressions: Impressions that the log has within its limit.
        duplicates: Rows of the log dropped as exact duplicates.
        rejected: Rows of the log that could not be used; the reader names the reasons.
        bytes: Payload appended.
        event_time_ms: Time reached in the log, ``None`` before the first event.
        elapsed_s: Wall time.
        finished: Everything was appended, nothing stopped it.
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
    """Appends a log to the topics ``impressions`` and ``feedback``, which must exist.

    Each append covers a short stretch of event time in both topics and all partitions, so that no partition's event
    time runs ahead of another's by more than that, and a joined watermark advances evenly.

    Args:
        reader: The log; its schema is the events' schema.
        log: Where to.
        config: Pace, seed, codec.
        monotonic_s: A clock in seconds.
        sleep: Waits for so many seconds.
    """

    def __init__(
        self,
        reader: LogReader,
        log: EventLog,
        config: ReplayConfig,
        *,
        monotonic_s: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._reader = reader
        self._log = log
        self._config = config
        self._now_s = monotonic_s
        self._sleep = sleep
        self._impressions = self._feedback = self._bytes = 0
        self._event_time_ms: int | None = None
        self._start_s = 0.0

    def run(
        self,
        *,
        on_progress: Callable[[ReplayReport], None] = lambda report: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> ReplayReport:
        """Replay until the end, or until ``stop()`` is true; what was appended by then stays appended.

        Args:
            on_progress: Called after every append.
            stop: Asked before every append and at least every ``MAX_WAIT_S`` seconds while waiting.

        Raises:
            LogError: The log cannot be read.
            EventLogError, EventLogUnavailable: An append failed; what it held may or may not have been appended.
        """
        partitions = {topic: self._log.partitions(topic) for topic in (IMPRESSIONS, FEEDBACK)}
        pairs = replay_blocks(self._reader, self._config.seed, late_share=self._config.late_share)
        pace: _Pace | None = None
        for impressions, feedback in pairs:
            merged = _Merged(impressions, feedback)
            pace = pace or self._pace(merged)
            while merged.left:
                count = self._wait(pace, merged, stop)
                if count is None:
                    return self._report(finished=False)
                self._append(*merged.next(count), partitions)
                on_progress(self._report(finished=False))
        return self._report(finished=True)

    def _pace(self, first: "_Merged") -> "_Pace":
        # The clock starts with the first event at hand: sorting the log before it is no part of the pace.
        self._start_s = self._now_s()
        return _Pace(self._config, self._start_s, int(first.times[0]))

    def _wait(self, pace: "_Pace", merged: "_Merged", stop: Callable[[], bool]) -> int | None:
        """Wait until the next append is due; its number of events, or ``None`` when told to stop."""
        while not stop():
            count, wait_s = pace.due(merged.remaining_times, self._impressions + self._feedback, self._now_s())
            if count:
                return count
            self._sleep(min(wait_s, MAX_WAIT_S))
        return None

    def _append(self, impressions: ImpressionBlock, feedback: FeedbackBlock, partitions: dict[str, int]) -> None:
        config, schema = self._config, self._reader.schema
        if len(impressions):
            self._send(IMPRESSIONS, encode_impressions(impressions, schema, config.codec, partitions[IMPRESSIONS]))
            self._impressions += len(impressions)
            self._event_time_ms = int(impressions.event_time_ms[-1])
        if len(feedback):
            self._send(FEEDBACK, encode_feedback(feedback, schema, config.codec, partitions[FEEDBACK]))
            self._feedback += len(feedback)
            self._event_time_ms = max(int(feedback.event_time_ms[-1]), self._event_time_ms or 0)

    def _send(self, topic: str, records: list[OutRecord]) -> None:
        self._log.append(topic, records)
        self._bytes += sum(len(record.value) for record in records)

    def _report(self, *, finished: bool) -> ReplayReport:
        return ReplayReport(
            impressions=self._impressions,
            feedback=self._feedback,
            total_impressions=self._reader.total,
            duplicates=self._reader.duplicates,
            rejected=sum(self._reader.rejected.values()),
            bytes=self._bytes,
            event_time_ms=self._event_time_ms,
            elapsed_s=self._now_s() - self._start_s,
            finished=finished,
        )


class _Merged:
    """A pair of impressions and feedback as one sequence in event-time order, taken off from the front."""

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

    def next(self, count: int) -> tuple[ImpressionBlock, FeedbackBlock]:
        """The next ``count`` events."""
        start, stop = self._taken, self._taken + count
        self._taken = stop
        first, last = int(self._before[start]), int(self._before[stop])
        return self._impressions.take(slice(first, last)), self._feedback.take(slice(start - first, stop - last))


class _Pace:
    """How many events are due at a moment of wall time."""

    def __init__(self, config: ReplayConfig, start_s: float, first_event_ms: int) -> None:
        self._config = config
        self._start_s = start_s
        self._first_event_ms = first_event_ms
        self._not_before_s = start_s

    def due(self, times: I64, sent: int, now_s: float) -> tuple[int, float]:
        """Events due of those with ``times`` (in order, at least one), and how long to wait if there are none.

        An append comes ``slice_s`` after the one before it, or later where the log has a gap; one that is late
        brings everything that has become due.
        """
        config, elapsed_s = self._config, now_s - self._start_s
        most = min(len(times), config.max_slice_events)
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
        if count < config.max_slice_events:  # else there is a backlog: go on at once
            self._not_before_s = now_s + config.slice_s
        return count, 0.0
