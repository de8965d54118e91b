"""From decoded events to mini-batches: join → batch → a queue that the trainer takes from. No log, no clock.

Where a batch ends depends on the examples alone, not on how they were read, unless the caller ends it because of its
clock (:meth:`Assembler.end_batch`). After a restart such batches end where they ended before, if the caller says where
that was (:meth:`Assembler.repeat`).

The queue belongs to the state: a checkpoint between two steps holds the impressions that wait, the half-filled batch
and the batches not yet trained on, all of one moment.
"""

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from smes.arrays import F64, Arrays
from smes.events import CLOSING, DROPPED, ExampleBlock, FeedbackBlock, ImpressionBlock
from smes.schema import Schema
from stream.config import JoinConfig, MiniBatchConfig
from stream.join.joiner import Joiner, join_sources
from stream.join.ledgers import StreamLedger
from stream.left_out_features import FeatureTally
from stream.log.event_log import TopicPartition, UnreadableRecord
from stream.partition_state import load_rows, save_rows, state_name
from stream.sources import refused_in
from stream.topics import FEEDBACK, IMPRESSIONS


@dataclass(frozen=True, slots=True)
class BatchTimes:
    """When the examples of a batch came so far, in seconds of the clock of :meth:`Assembler.push`. In no state.

    Attributes:
        joined_s: float64 [N], when each example came out of the join; of those to train on.
        batched_s: When the batch ended.
    """

    joined_s: F64
    batched_s: float


class MiniBatcher:
    """Cuts the joined stream into batches; its state is the half-filled one, and how many examples came before it.

    Attributes:
        ended: Examples in the batches that have ended.
        ends: Values of ``ended`` at which batches ended before a restart, in order: they end there again.

    Args:
        schema: Features and tasks.
        config: Bounds of a mini-batch.
    """

    def __init__(self, schema: Schema, config: MiniBatchConfig) -> None:
        self._config = config
        self._max_age_ms = round(config.max_age_s * 1000)
        self._empty = ExampleBlock.empty(schema)
        self._pending: list[ExampleBlock] = []
        self.ended = 0
        self.ends: deque[int] = deque()

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
            watermark_ms: The join's watermark after that push: no example yet to come is due before it.
        """
        if len(examples):
            self._pending.append(examples)
        if not self._pending:
            return []
        if len(self) < min(self._config.size, self._to_next_end(0)) and not self._is_old(watermark_ms):
            return []
        pending = ExampleBlock.concat(self._pending)
        closings = np.concatenate([[0], np.cumsum(pending.kind == CLOSING)])  # before each row, and in all
        to_train_on = np.arange(len(closings)) - closings
        batches, start = [], 0
        while start < len(pending):
            # Ordered by the times at which they were due, so the age bound is a prefix too.
            until_ms = pending.due_ms[start] + self._max_age_ms
            aged = int(np.searchsorted(pending.due_ms, until_ms, side="right"))
            full = min(int(np.searchsorted(c, c[start] + self._config.size)) for c in (to_train_on, closings))
            full = min(full, start + self._to_next_end(start))
            stop = min(full, aged)
            complete = stop == full or aged < len(pending)
            if not complete and until_ms >= watermark_ms:
                break
            batches.append(pending.take(slice(start, stop)))
            start = stop
        self._pending = [pending.take(slice(start, None))] if start < len(pending) else []
        self.ended += start
        return batches

    def flush(self) -> list[ExampleBlock]:
        """End the half-filled batch as it is; none if it is empty."""
        self.ended += len(self)
        pending, self._pending = self._pending, []
        return [ExampleBlock.concat(pending)] if pending else []

    def _to_next_end(self, start: int) -> int:
        """How many examples after the first ``start`` of the half-filled batch the next end to repeat lies."""
        while self.ends and self.ends[0] <= self.ended + start:
            self.ends.popleft()
        return self.ends[0] - self.ended - start if self.ends else 2 * self._config.size

    def _is_old(self, watermark_ms: int) -> bool:
        first, last = self._pending[0].due_ms[0], self._pending[-1].due_ms[-1]
        return bool(first + self._max_age_ms < max(last, watermark_ms))


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
        self._dropped: Counter[TopicPartition] = Counter()
        self.features = FeatureTally()
        """Look-ups of features that impressions left out."""
        self._ready: deque[ExampleBlock] = deque()
        self._times: deque[BatchTimes] = deque()  # of the ready batches
        self._joined: deque[tuple[int, float]] = deque()  # examples of the half-filled batch, and when they came
        self.taken_times: BatchTimes | None = None
        """Times of the batch that was taken last."""

    @property
    def _counts_refused(self) -> tuple[Counter[TopicPartition], ...]:
        """The counts of a :class:`stream.sources.Refused`, in its order."""
        return self._dead, self._unknown_fields, self._gaps, self._unreadable, self._dropped

    @property
    def sources(self) -> tuple[TopicPartition, ...]:
        """The partitions that events come from, sorted."""
        return self._join.sources

    @property
    def join_nbytes(self) -> int:
        """Bytes of memory that the join takes."""
        return self._join.nbytes

    @property
    def watermark_ms(self) -> int:
        """Event time that the join has passed, Unix milliseconds (far in the past before the first event)."""
        return self._join.watermark_ms

    @property
    def ended(self) -> int:
        """How many examples were in the batches that have ended, since the history began; part of the state."""
        return self._batcher.ended

    @property
    def taken(self) -> int:
        """How many examples were in the batches that were taken out of the queue, since the history began."""
        return self.ended - sum(map(len, self._ready))

    @property
    def oldest_s(self) -> float | None:
        """Since when the first example of the half-filled batch has waited; None if there is none."""
        return self._joined[0][1] if self._joined else None

    @property
    def is_repeating(self) -> bool:
        """Whether batches still end where they ended before a restart."""
        return bool(self._batcher.ends)

    def repeat(self, ends: Sequence[int]) -> None:
        """End the next batches where they ended before a restart: at these values of :attr:`ended`, in order."""
        self._batcher.ends = deque(ends)

    def push(
        self,
        impressions: ImpressionBlock,
        feedback: FeedbackBlock,
        idle: Iterable[TopicPartition] = (),
        *,
        now_s: float = 0.0,
    ) -> None:
        """Take what was read (see :meth:`stream.join.joiner.Joiner.push`); batches that are complete join the queue.

        ``now_s`` is the time by the caller's clock, for :class:`BatchTimes`; no batch depends on it.
        """
        for partition in feedback.partition[feedback.task == DROPPED].tolist():
            self._dropped[TopicPartition(FEEDBACK, partition)] += 1
        self._batch(self._join.push(impressions, feedback, idle), now_s)

    def end_batch(self, now_s: float) -> None:
        """End the half-filled batch as it is; it joins the queue."""
        self._queue(self._batcher.flush(), now_s)

    def _batch(self, examples: ExampleBlock, now_s: float) -> None:
        if len(examples):
            self._joined.append((len(examples), now_s))
        self._queue(self._batcher.push(examples, self._join.watermark_ms), now_s)

    def _queue(self, batches: Sequence[ExampleBlock], now_s: float) -> None:
        for batch in batches:
            self._ready.append(batch)
            joined_s = self._take_joined(len(batch))
            self._times.append(BatchTimes(joined_s[batch.kind != CLOSING], now_s))

    def _take_joined(self, examples: int) -> F64:
        """When the first ones of the half-filled batch came; they are in a batch now."""
        counts, times = [], []
        while examples:
            count, joined_s = self._joined.popleft()
            if count > examples:
                self._joined.appendleft((count - examples, joined_s))
            counts.append(min(count, examples))
            times.append(joined_s)
            examples -= counts[-1]
        return np.repeat(np.array(times, np.float64), counts)

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

    def flush(self, now_s: float = 0.0) -> None:
        """End the stream: everything that waits joins the queue.

        Should more come, it is judged by the watermark from before: the end of the stream makes nothing late.
        """
        watermark_ms = self._join.watermark_ms
        self._batch(self._join.flush(), now_s)
        self.end_batch(now_s)
        self._join.watermark_ms = watermark_ms

    def next_batch(self) -> ExampleBlock | None:
        """Take the next complete batch out of the queue; None when none is ready."""
        if not self._ready:
            return None
        self.taken_times = self._times.popleft()
        return self._ready.popleft()

    def upcoming(self) -> ExampleBlock | None:
        """Look at the next complete batch without taking it: the object that :meth:`next_batch` will return."""
        return self._ready[0] if self._ready else None

    def ledger(self) -> StreamLedger:
        """Where every event read so far is now."""
        join = self._join.ledger
        join.check()
        queued = sum(block.num_impressions for block in (self._batcher.pending, *self._ready))
        dead, gaps, unreadable = (_by_topic(c) for c in (self._dead, self._gaps, self._unreadable))
        return StreamLedger(
            impressions=join.impressions + dead[IMPRESSIONS],
            handed_out=join.emitted - queued,
            waiting=join.impressions_waiting + queued,
            late=join.impressions_late,
            duplicate=join.impressions_duplicate,
            dead_lettered=dead[IMPRESSIONS],
            feedback=join.feedback + dead[FEEDBACK] + self._dropped.total(),
            attached=join.attached,
            corrected=join.corrected,
            feedback_waiting=join.feedback_waiting,
            feedback_late=join.feedback_late,
            orphaned=join.orphaned,
            feedback_duplicate=join.feedback_duplicate,
            feedback_dead_lettered=dead[FEEDBACK],
            feedback_dropped=self._dropped.total(),
            unknown_fields=self._unknown_fields.total(),
            gaps=gaps[IMPRESSIONS],
            feedback_gaps=gaps[FEEDBACK],
            unreadable=unreadable[IMPRESSIONS],
            feedback_unreadable=unreadable[FEEDBACK],
            features=self.features.counts(),
        )

    def state(self) -> Arrays:
        """Arrays from which :meth:`load_state` goes on: join, half-filled and ready batches, counts.

        Their names are those of :mod:`stream.partition_state`.
        """
        state = self._join.state() | self.features.state(self.sources)
        for source in self.sources:
            refused = [counts[source] for counts in self._counts_refused]
            state[state_name(source.topic, source.partition, "refused")] = np.array(refused, np.int64)
        queued = ExampleBlock.concat([*self._ready, self._batcher.pending]).arrays()
        queued["order"] = np.arange(len(queued["partition"]))
        state["ready_sizes"] = np.array([len(batch) for batch in self._ready], np.int64)
        state["ended"] = np.array([self._batcher.ended], np.int64)
        partitions = sorted({source.partition for source in self.sources})
        return state | save_rows(IMPRESSIONS, "queued", queued, partitions)

    def load_state(self, state: Arrays, *, now_s: float = 0.0) -> None:
        """The inverse of :meth:`state`; partitions that the state does not have start with nothing read.

        What waits has waited since ``now_s``.

        Raises:
            ValueError: The state has more partitions than this assembler.
        """
        self._join.load_state(state)
        self.features.load_state(state, self.sources)
        for source in self.sources:
            for counts, count in zip(self._counts_refused, refused_in(state, source), strict=True):
                counts[source] = count
        columns = load_rows(IMPRESSIONS, "queued", state)
        order = np.argsort(columns.pop("order"))
        queued, start = ExampleBlock(**columns).take(order), 0
        self._ready.clear()
        self._times.clear()
        self._joined = deque([(len(queued), now_s)] if len(queued) else [])
        for size in state["ready_sizes"].tolist():
            self._queue([queued.take(slice(start, start + size))], now_s)
            start += size
        self._batcher.pending = queued.take(slice(start, None))
        self._batcher.ended, self._batcher.ends = ended_in(state), deque()


def ended_in(state: Arrays) -> int:
    """:attr:`Assembler.ended` of a state."""
    return int(state["ended"][0])


def _by_topic(counts: Counter[TopicPartition]) -> Counter[str]:
    """The counts of all partitions of a topic together."""
    totals: Counter[str] = Counter()
    for source, count in counts.items():
        totals[source.topic] += count
    return totals
