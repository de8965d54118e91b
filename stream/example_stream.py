"""From the event log to mini-batches: read by position → decode → dead-letter → join → batch.

Everything between the log and the trainer is one object with one state, so that a checkpoint holds positions, waiting
impressions, the half-filled batch and the batches not yet trained on, all of one moment.
"""

import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smes.events import ExampleBlock
from smes.schema import Schema
from stream.codec import decode
from stream.dead_letters import DeadLetterWriter
from stream.join import JoinConfig, Joiner, join_sources
from stream.log import EventLog, Positions, TopicPartition
from stream.mini_batch import MiniBatchConfig, MiniBatcher
from stream.topics import FEEDBACK, IMPRESSIONS

_FIRST_READ_RECORDS = 64


@dataclass(frozen=True)
class StreamConfig:
    """How events become mini-batches.

    Attributes:
        join: Waiting and remembering.
        batch: Bounds of a mini-batch.
        events_per_read: About how many events one read brings, ≥ 1; bounds memory when catching up.
        idle_after_s: A partition without news for this long (wall clock) no longer holds the watermark back, > 0.
        max_future_s: An event this much later than its arrival in the log is refused, seconds, ≥ 0.
    """

    join: JoinConfig = field(default_factory=JoinConfig)
    batch: MiniBatchConfig = field(default_factory=MiniBatchConfig)
    events_per_read: int = 16_384
    idle_after_s: float = 10.0
    max_future_s: float = 300.0

    def __post_init__(self) -> None:
        if self.events_per_read < 1:
            raise ValueError(f"events_per_read {self.events_per_read}, expected at least 1")
        if not self.idle_after_s > 0:
            raise ValueError(f"idle_after_s {self.idle_after_s}, expected more than 0 seconds")
        if self.max_future_s < 0:
            raise ValueError(f"max_future_s {self.max_future_s}, expected at least 0 seconds")


@dataclass(frozen=True, slots=True)
class StreamLedger:
    """Where every event read is now; both equations of the design hold, ``trained`` being the trainer's count.

    impressions read = trained + waiting + late + duplicate + dead-lettered
    feedback read = attached + waiting + late + orphaned + duplicate + dead-lettered
    """

    impressions: int
    handed_out: int
    waiting: int
    late: int
    duplicate: int
    dead_lettered: int
    feedback: int
    attached: int
    feedback_waiting: int
    feedback_late: int
    orphaned: int
    feedback_duplicate: int
    feedback_dead_lettered: int
    unknown_fields: int


class ExampleStream:
    """Mini-batches out of an event log, in a reproducible order, with resumable state.

    Args:
        schema: Features and tasks.
        config: Join, batch and read bounds.
        log: Where impressions and feedback are read; both topics must exist with the same number of partitions.
        dead_letters: Where refused events go.
        monotonic: Seconds of a clock that never goes back; only decides which partitions are idle.
    """

    def __init__(
        self,
        schema: Schema,
        config: StreamConfig,
        log: EventLog,
        dead_letters: DeadLetterWriter,
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._schema, self._config, self._log, self._dead_letters = schema, config, log, dead_letters
        self._monotonic = monotonic
        partitions = log.partitions(IMPRESSIONS)
        if (got := log.partitions(FEEDBACK)) != partitions:
            raise ValueError(f"topic {FEEDBACK!r} has {got} partitions, expected {partitions} as {IMPRESSIONS!r}")
        self._join = Joiner(schema, config.join, join_sources(partitions))
        self._batcher = MiniBatcher(schema, config.batch)
        self.positions: Positions = {**log.begin(IMPRESSIONS), **log.begin(FEEDBACK)}
        self._last_news_s = dict.fromkeys(self._join.sources, monotonic())
        self._events_per_record = config.events_per_read / _FIRST_READ_RECORDS
        self._counts: Counter[str] = Counter()
        self.ready: deque[ExampleBlock] = deque()
        """Batches in order; the trainer removes one with :meth:`taken` once it has trained on it."""

    @property
    def watermark_ms(self) -> int:
        """Event time that the join has passed, Unix milliseconds (far in the past before the first event)."""
        return self._join.watermark_ms

    def poll(self, timeout_s: float) -> int:
        """Read once and turn what came into batches in :attr:`ready`; the number of events read.

        Refused events are in the dead-letter topic before the positions move past them.

        Args:
            timeout_s: Longest wait for the first record, seconds.

        Raises:
            EventLogUnavailable, PositionOutOfRange: As the log raises them; the state is as before the call.
        """
        max_records = max(1, round(self._config.events_per_read / self._events_per_record))
        fetch = self._log.read(self.positions, max_records=max_records, timeout_s=timeout_s)
        decoded = decode(fetch.records, self._schema, max_future_ms=round(self._config.max_future_s * 1000))
        self._dead_letters.write(decoded.dead)
        self._counts["dead_impressions"] += decoded.dead_impressions
        self._counts["dead_feedback"] += decoded.dead_feedback
        self._counts["unknown_fields"] += decoded.unknown_fields
        events = len(decoded.impressions) + len(decoded.feedback)
        if fetch.records:
            self._events_per_record = max(1.0, events / len(fetch.records))
        idle = self._idle({TopicPartition(r.topic, r.partition) for r in fetch.records} | self._behind(fetch.at_end))
        examples = self._join.push(decoded.impressions, decoded.feedback, idle)
        self.ready.extend(self._batcher.push(examples, self._join.watermark_ms))
        self.positions = dict(fetch.positions)
        return events

    def taken(self) -> None:
        """The first of :attr:`ready` has been trained on."""
        self.ready.popleft()

    def flush(self) -> None:
        """The stream is over: everything that waits goes into :attr:`ready`."""
        examples = self._join.flush()
        self.ready.extend(self._batcher.push(examples, self._join.watermark_ms))
        self.ready.extend(self._batcher.flush())

    def _behind(self, at_end: frozenset[TopicPartition]) -> set[TopicPartition]:
        return set(self._join.sources) - at_end

    def _idle(self, news: set[TopicPartition]) -> list[TopicPartition]:
        now_s = self._monotonic()
        self._last_news_s.update(dict.fromkeys(news, now_s))
        return [s for s, last_s in self._last_news_s.items() if now_s - last_s > self._config.idle_after_s]

    def ledger(self) -> StreamLedger:
        """Where every event read so far is now."""
        join = self._join.ledger
        join.check()
        queued = len(self._batcher) + sum(len(batch) for batch in self.ready)
        return StreamLedger(
            impressions=join.impressions + self._counts["dead_impressions"],
            handed_out=join.emitted - queued,
            waiting=join.impressions_waiting + queued,
            late=join.impressions_late,
            duplicate=join.impressions_duplicate,
            dead_lettered=self._counts["dead_impressions"],
            feedback=join.feedback + self._counts["dead_feedback"],
            attached=join.attached,
            feedback_waiting=join.feedback_waiting,
            feedback_late=join.feedback_late,
            orphaned=join.orphaned,
            feedback_duplicate=join.feedback_duplicate,
            feedback_dead_lettered=self._counts["dead_feedback"],
            unknown_fields=self._counts["unknown_fields"],
        )

    def state(self) -> dict[str, NDArray[Any]]:
        """Arrays from which :meth:`load_state` goes on: positions, join, half-filled and ready batches, counts."""
        empty = ExampleBlock.empty(self._schema)
        state = {f"join.{name}": array for name, array in self._join.state().items()}
        state |= {f"batch.{name}": array for name, array in self._batcher.state().items()}
        state |= {f"ready.{name}": array for name, array in ExampleBlock.concat([empty, *self.ready]).arrays().items()}
        state["ready_sizes"] = np.array([len(batch) for batch in self.ready], np.int64)
        state["positions"] = np.array([self.positions[s] for s in self._join.sources], np.int64)
        state["counts"] = np.array([self._counts[name] for name in _COUNTS], np.int64)
        return state

    def load_state(self, state: dict[str, NDArray[Any]]) -> None:
        """The inverse of :meth:`state`.

        Raises:
            ValueError: The topics' number of partitions changed since.
        """

        def part(prefix: str) -> dict[str, NDArray[Any]]:
            return {name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)}

        self._join.load_state(part("join."))
        self._batcher.load_state(part("batch."))
        ready, start = ExampleBlock(**part("ready.")), 0
        self.ready.clear()
        for size in state["ready_sizes"]:
            self.ready.append(ready.take(slice(start, start + int(size))))
            start += int(size)
        self.positions = {s: int(p) for s, p in zip(self._join.sources, state["positions"], strict=True)}
        self._counts = Counter(dict(zip(_COUNTS, state["counts"].tolist(), strict=True)))


_COUNTS = ("dead_impressions", "dead_feedback", "unknown_fields")
