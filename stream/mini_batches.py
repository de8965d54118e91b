"""From decoded events to mini-batches: join → batch → a queue that the trainer takes from. No log, no clock.

The queue belongs to the state: a checkpoint between two steps holds waiting impressions, the half-filled batch and the
batches not yet trained on, all of one moment.
"""

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smes.events import ExampleBlock, FeedbackBlock, ImpressionBlock
from smes.schema import Schema
from stream.join.joiner import JoinConfig, Joiner, join_sources
from stream.join.ledgers import StreamLedger
from stream.log.event_log import TopicPartition

# TODO(merge) was stream.mini_batch: Mini-batches bounded by size and by age. Where a batch ends


@dataclass(frozen=True)
class MiniBatchConfig:
    """Bounds of a mini-batch.

    Attributes:
        size: Most examples in a batch.
        max_age_s: Most event time between its first and last example, seconds; a batch that the stream has left behind
            by this much is handed out however small, so that sparse traffic does not wait for a full one. It is event
            time: live traffic wants seconds; a log replayed a thousand times as fast wants the hour of the default,
            or its batches are tiny.
    """

    size: int = 256
    max_age_s: float = 3600.0

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size {self.size}, expected at least 1")
        if not self.max_age_s > 0:
            raise ValueError(f"max_age_s {self.max_age_s}, expected more than 0 seconds")


class MiniBatcher:
    """Cuts the joined stream into batches; the half-filled one is its state."""

    def __init__(self, schema: Schema, config: MiniBatchConfig) -> None:
        self._config = config
        self._max_age_ms = round(config.max_age_s * 1000)
        self._max_window_ms = schema.max_window_ms
        self._pending: list[ExampleBlock] = []
        self._empty = ExampleBlock.empty(schema)

    def __len__(self) -> int:
        """Examples waiting in the half-filled batch."""
        return sum(len(block) for block in self._pending)

    def push(self, examples: ExampleBlock, watermark_ms: int) -> list[ExampleBlock]:
        """Take what the join emitted, in its order, and give the batches that are complete.

        Args:
            examples: As :meth:`stream.join.joiner.Joiner.push` returned them.
            watermark_ms: The join's watermark after that push: every example yet to come is younger than
                ``watermark_ms - max_window_ms``.
        """
        if len(examples):
            self._pending.append(examples)
        if not self._pending:
            return []
        if len(self) < self._config.size and not self._is_old(watermark_ms):
            return []
        pending = ExampleBlock.concat(self._pending)
        batches, start = [], 0
        while start < len(pending):
            # Ordered by event time, so the age bound is a prefix too.
            until_ms = pending.event_time_ms[start] + self._max_age_ms
            aged = int(np.searchsorted(pending.event_time_ms, until_ms, side="right"))
            stop = min(start + self._config.size, aged)
            complete = stop - start == self._config.size or aged < len(pending)
            if not complete and until_ms >= watermark_ms - self._max_window_ms:
                break
            batches.append(pending.take(slice(start, stop)))
            start = stop
        self._pending = [pending.take(slice(start, None))] if start < len(pending) else []
        return batches

    def flush(self) -> list[ExampleBlock]:
        """The stream is over: what is left, as one last batch (none if nothing is left)."""
        pending, self._pending = self._pending, []
        return [ExampleBlock.concat(pending)] if pending else []

    def _is_old(self, watermark_ms: int) -> bool:
        first, last = self._pending[0].event_time_ms[0], self._pending[-1].event_time_ms[-1]
        return bool(first + self._max_age_ms < max(last, watermark_ms - self._max_window_ms))

    def state(self) -> dict[str, NDArray[Any]]:
        """Arrays from which :meth:`load_state` goes on."""
        return ExampleBlock.concat([self._empty, *self._pending]).arrays()

    def load_state(self, state: dict[str, NDArray[Any]]) -> None:
        """The inverse of :meth:`state`."""
        block = ExampleBlock(**state)
        self._pending = [block] if len(block) else []


_COUNTS = ("dead_impressions", "dead_feedback", "unknown_fields")


class Assembler:
    """Join and mini-batcher as one resumable whole.

    Args:
        schema: Features and tasks.
        join: Waiting and remembering.
        batch: Bounds of a mini-batch.
        partitions: Partitions of the impressions and of the feedback topic.
    """

    def __init__(self, schema: Schema, join: JoinConfig, batch: MiniBatchConfig, partitions: int) -> None:
        self._schema = schema
        self._join = Joiner(schema, join, join_sources(partitions))
        self._batcher = MiniBatcher(schema, batch)
        self._refused: Counter[str] = Counter()
        self.ready: deque[ExampleBlock] = deque()
        """Complete batches in order."""

    @property
    def sources(self) -> tuple[TopicPartition, ...]:
        """The partitions that events come from, sorted."""
        return self._join.sources

    @property
    def watermark_ms(self) -> int:
        """Event time that the join has passed, Unix milliseconds (far in the past before the first event)."""
        return self._join.watermark_ms

    def push(self, impressions: ImpressionBlock, feedback: FeedbackBlock, idle: Iterable[TopicPartition] = ()) -> None:
        """Take what was read (see :meth:`stream.join.joiner.Joiner.push`); complete batches go into :attr:`ready`."""
        examples = self._join.push(impressions, feedback, idle)
        self.ready.extend(self._batcher.push(examples, self._join.watermark_ms))

    def refused(self, *, impressions: int, feedback: int, unknown_fields: int) -> None:
        """Count events that were read but could not be used, and fields kept out."""
        self._refused.update(dead_impressions=impressions, dead_feedback=feedback, unknown_fields=unknown_fields)

    def flush(self) -> None:
        """The stream is over: everything that waits goes into :attr:`ready`."""
        examples = self._join.flush()
        self.ready.extend(self._batcher.push(examples, self._join.watermark_ms))
        self.ready.extend(self._batcher.flush())

    def next_batch(self) -> ExampleBlock | None:
        """Take the next complete batch out of the queue; None when none is ready."""
        return self.ready.popleft() if self.ready else None

    def upcoming(self) -> ExampleBlock | None:
        """Look at the next complete batch without taking it."""
        return self.ready[0] if self.ready else None

    def ledger(self) -> StreamLedger:
        """Where every event read so far is now."""
        join = self._join.ledger
        join.check()
        queued = len(self._batcher) + sum(len(batch) for batch in self.ready)
        return StreamLedger(
            impressions=join.impressions + self._refused["dead_impressions"],
            handed_out=join.emitted - queued,
            waiting=join.impressions_waiting + queued,
            late=join.impressions_late,
            duplicate=join.impressions_duplicate,
            dead_lettered=self._refused["dead_impressions"],
            feedback=join.feedback + self._refused["dead_feedback"],
            attached=join.attached,
            feedback_waiting=join.feedback_waiting,
            feedback_late=join.feedback_late,
            orphaned=join.orphaned,
            feedback_duplicate=join.feedback_duplicate,
            feedback_dead_lettered=self._refused["dead_feedback"],
            unknown_fields=self._refused["unknown_fields"],
        )

    def state(self) -> dict[str, NDArray[Any]]:
        """Arrays from which :meth:`load_state` goes on: join, half-filled and ready batches, counts."""
        empty = ExampleBlock.empty(self._schema)
        state = {f"join.{name}": array for name, array in self._join.state().items()}
        state |= {f"batch.{name}": array for name, array in self._batcher.state().items()}
        state |= {f"ready.{name}": array for name, array in ExampleBlock.concat([empty, *self.ready]).arrays().items()}
        state["ready_sizes"] = np.array([len(batch) for batch in self.ready], np.int64)
        state["refused"] = np.array([self._refused[name] for name in _COUNTS], np.int64)
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
        self._refused = Counter(dict(zip(_COUNTS, state["refused"].tolist(), strict=True)))
