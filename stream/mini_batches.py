"""From decoded events to mini-batches: join → batch → a queue that the trainer takes from. No log, no clock.

Where a batch ends depends on the examples alone, not on how they were read. The queue belongs to the state: a
checkpoint between two steps holds the impressions that wait, the half-filled batch and the batches not yet trained on,
all of one moment.
"""

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from smes.arrays import Arrays
from smes.events import ExampleBlock, FeedbackBlock, ImpressionBlock
from smes.ranges import PositiveFloat, PositiveInt, check_ranges
from smes.schema import Schema
from stream.join.joiner import JoinConfig, Joiner, join_sources
from stream.join.ledgers import StreamLedger
from stream.log.event_log import TopicPartition, UnreadableRecord
from stream.partition_state import load_rows, save_rows, state_name
from stream.topics import FEEDBACK, IMPRESSIONS


@dataclass(frozen=True)
class MiniBatchConfig:
    """Bounds of a mini-batch.

    Attributes:
        size: Most examples in a batch.
        max_age_s: Most event time between the first and the last example of a batch, seconds. A batch that the stream
            has left behind by this much is handed out however small, so that sparse traffic does not wait for a full
            one. This is event time: live traffic needs seconds; a log replayed a thousand times as fast needs the hour
            of the default, or its batches are tiny.
    """

    size: PositiveInt = 256
    max_age_s: PositiveFloat = 3600.0

    def __post_init__(self) -> None:
        check_ranges(self)


class MiniBatcher:
    """Cuts the joined stream into batches; its state is the half-filled one.

    Args:
        schema: Features and tasks.
        config: Bounds of a mini-batch.
    """

    def __init__(self, schema: Schema, config: MiniBatchConfig) -> None:
        self._config = config
        self._max_age_ms = round(config.max_age_s * 1000)
        self._max_window_ms = schema.max_window_ms
        self._empty = ExampleBlock.empty(schema)
        self._pending: list[ExampleBlock] = []

    def __len__(self) -> int:
        """Examples in the half-filled batch."""
        return sum(len(block) for block in self._pending)

    @property
    def pending(self) -> ExampleBlock:
        """The half-filled batch."""
        return ExampleBlock.concat([self._empty, *self._pending])

    @pending.setter
    def pending(self, examples: ExampleBlock) -> None:
        self._pending = [examples] if len(examples) else []

    def push(self, examples: ExampleBlock, watermark_ms: int) -> list[ExampleBlock]:
        """Take what the join emitted, in its order, and return the batches that are complete.

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
        """End the stream: what is left is the last batch; none if nothing is left."""
        pending, self._pending = self._pending, []
        return [ExampleBlock.concat(pending)] if pending else []

    def _is_old(self, watermark_ms: int) -> bool:
        first, last = self._pending[0].event_time_ms[0], self._pending[-1].event_time_ms[-1]
        return bool(first + self._max_age_ms < max(last, watermark_ms - self._max_window_ms))


class Assembler:
    """Join and mini-batcher as one resumable whole.

    Args:
        schema: Features and tasks.
        join: How long to wait and to remember.
        batch: Bounds of a mini-batch.
        partitions: Partitions of the impressions and of the feedback topic, by number where both have as many.
    """

    def __init__(
        self, schema: Schema, join: JoinConfig, batch: MiniBatchConfig, partitions: int | Iterable[TopicPartition]
    ) -> None:
        self._schema = schema
        self._join = Joiner(schema, join, join_sources(partitions) if isinstance(partitions, int) else partitions)
        self._batcher = MiniBatcher(schema, batch)
        self._dead: Counter[TopicPartition] = Counter()
        self._unknown_fields: Counter[TopicPartition] = Counter()
        self._gaps: Counter[TopicPartition] = Counter()
        self._unreadable: Counter[TopicPartition] = Counter()
        self._ready: deque[ExampleBlock] = deque()

    @property
    def _counts_refused(self) -> tuple[Counter[TopicPartition], ...]:
        """The counts of the array ``refused``, in its order."""
        return self._dead, self._unknown_fields, self._gaps, self._unreadable

    @property
    def sources(self) -> tuple[TopicPartition, ...]:
        """The partitions that events come from, sorted."""
        return self._join.sources

    @property
    def watermark_ms(self) -> int:
        """Event time that the join has passed, Unix milliseconds (far in the past before the first event)."""
        return self._join.watermark_ms

    def push(self, impressions: ImpressionBlock, feedback: FeedbackBlock, idle: Iterable[TopicPartition] = ()) -> None:
        """Take what was read (see :meth:`stream.join.joiner.Joiner.push`); batches that are complete join the queue."""
        examples = self._join.push(impressions, feedback, idle)
        self._ready.extend(self._batcher.push(examples, self._join.watermark_ms))

    def count_refused(self, dead: Mapping[TopicPartition, int], unknown_fields: Mapping[TopicPartition, int]) -> None:
        """Count events that were read but could not be used, and fields of the others that were kept out."""
        self._dead.update(dead)
        self._unknown_fields.update(unknown_fields)

    def count_passed(self, gaps: Mapping[TopicPartition, int], unreadable: Iterable[UnreadableRecord]) -> None:
        """Count records that are no longer in the log, and those in it that are no records of ours: dead letters."""
        self._gaps.update(gaps)
        for record in unreadable:
            source = TopicPartition(record.topic, record.partition)
            self._dead[source] += record.records
            self._unreadable[source] += record.records

    def add_partitions(self, sources: Iterable[TopicPartition]) -> None:
        """Take events from these, too, from now on (see :meth:`stream.join.joiner.Joiner.add_partitions`)."""
        self._join.add_partitions(sources)

    def flush(self) -> None:
        """End the stream: everything that waits joins the queue.

        Should more come, it is judged by the watermark from before: the end of the stream makes nothing late.
        """
        watermark_ms = self._join.watermark_ms
        examples = self._join.flush()
        self._ready.extend(self._batcher.push(examples, self._join.watermark_ms))
        self._ready.extend(self._batcher.flush())
        self._join.watermark_ms = watermark_ms

    def next_batch(self) -> ExampleBlock | None:
        """Take the next complete batch out of the queue; None when none is ready."""
        return self._ready.popleft() if self._ready else None

    def upcoming(self) -> ExampleBlock | None:
        """Look at the next complete batch without taking it: the object that :meth:`next_batch` will return."""
        return self._ready[0] if self._ready else None

    def ledger(self) -> StreamLedger:
        """Where every event read so far is now."""
        join = self._join.ledger
        join.check()
        queued = len(self._batcher) + sum(len(batch) for batch in self._ready)
        dead, gaps, unreadable = (_by_topic(c) for c in (self._dead, self._gaps, self._unreadable))
        return StreamLedger(
            impressions=join.impressions + dead[IMPRESSIONS],
            handed_out=join.emitted - queued,
            waiting=join.impressions_waiting + queued,
            late=join.impressions_late,
            duplicate=join.impressions_duplicate,
            dead_lettered=dead[IMPRESSIONS],
            feedback=join.feedback + dead[FEEDBACK],
            attached=join.attached,
            feedback_waiting=join.feedback_waiting,
            feedback_late=join.feedback_late,
            orphaned=join.orphaned,
            feedback_duplicate=join.feedback_duplicate,
            feedback_dead_lettered=dead[FEEDBACK],
            unknown_fields=self._unknown_fields.total(),
            gaps=gaps[IMPRESSIONS],
            feedback_gaps=gaps[FEEDBACK],
            unreadable=unreadable[IMPRESSIONS],
            feedback_unreadable=unreadable[FEEDBACK],
        )

    def state(self) -> Arrays:
        """Arrays from which :meth:`load_state` goes on: join, half-filled and ready batches, counts.

        Their names are those of :mod:`stream.partition_state`.
        """
        state = self._join.state()
        for source in self.sources:
            refused = [counts[source] for counts in self._counts_refused]
            state[state_name(source.topic, source.partition, "refused")] = np.array(refused, np.int64)
        queued = ExampleBlock.concat([*self._ready, self._batcher.pending]).arrays()
        queued["order"] = np.arange(len(queued["partition"]))
        state["ready_sizes"] = np.array([len(batch) for batch in self._ready], np.int64)
        partitions = sorted({source.partition for source in self.sources})
        return state | save_rows(IMPRESSIONS, "queued", queued, partitions)

    def load_state(self, state: Arrays) -> None:
        """The inverse of :meth:`state`; partitions that the state does not have start with nothing read.

        Raises:
            ValueError: The state has more partitions than this assembler.
        """
        self._join.load_state(state)
        for source in self.sources:
            refused = state.get(state_name(source.topic, source.partition, "refused"), np.zeros(0, np.int64)).tolist()
            for i, counts in enumerate(self._counts_refused):
                counts[source] = refused[i] if i < len(refused) else 0  # a state from before it was counted
        columns = load_rows(IMPRESSIONS, "queued", state)
        order = np.argsort(columns.pop("order"))
        queued, start = ExampleBlock(**columns).take(order), 0
        self._ready.clear()
        for size in state["ready_sizes"].tolist():
            self._ready.append(queued.take(slice(start, start + size)))
            start += size
        self._batcher.pending = queued.take(slice(start, None))


def _by_topic(counts: Counter[TopicPartition]) -> Counter[str]:
    """The counts of all partitions of a topic together."""
    totals: Counter[str] = Counter()
    for source, count in counts.items():
        totals[source.topic] += count
    return totals
