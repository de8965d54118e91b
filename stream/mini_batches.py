"""From decoded events to mini-batches: join → batch → a queue that the trainer takes from. No log, no clock.

Where a batch ends depends on the examples alone, not on how they were read, unless the caller ends it because of its
clock (:meth:`Assembler.end_batch`). After a restart such batches end where they ended before, if the caller says where
that was (:meth:`Assembler.repeat`).

The queue belongs to the state: a checkpoint between two steps holds the impressions that wait, the half-filled batch
and the batches not yet trained on, all of one moment.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from smes.arrays import Arrays
from smes.events import DROPPED, ExampleBlock, FeedbackBlock, ImpressionBlock
from smes.schema import Schema
from stream.batch_queue import BatchQueue, BatchTimes, MiniBatcher
from stream.config import JoinConfig, MiniBatchConfig
from stream.join.joiner import Joiner, join_sources
from stream.join.ledgers import StreamLedger
from stream.left_out_features import FeatureTally
from stream.log.event_log import TopicPartition, UnreadableRecord
from stream.partition_state import state_name
from stream.sources import refused_in
from stream.topics import FEEDBACK, IMPRESSIONS


class Assembler:
    """Join and mini-batcher as one resumable whole.

    Args:
        schema: Features and tasks.
        join: How long to wait and to remember.
        batch: Bounds of a mini-batch.
        partitions: Partitions of the impressions and of the feedback topic, by number where both have as many.
        batcher: Says where batches end; None: one that keeps the bounds of ``batch``.
    """

    def __init__(
        self,
        schema: Schema,
        join: JoinConfig,
        batch: MiniBatchConfig,
        partitions: int | Iterable[TopicPartition],
        batcher: MiniBatcher | None = None,
    ) -> None:
        self._schema = schema
        self._join = Joiner(schema, join, join_sources(partitions) if isinstance(partitions, int) else partitions)
        self._batches = BatchQueue(MiniBatcher(schema, batch) if batcher is None else batcher)  # an empty one is false
        self._dead: Counter[TopicPartition] = Counter()
        self._unknown_fields: Counter[TopicPartition] = Counter()
        self._gaps: Counter[TopicPartition] = Counter()
        self._unreadable: Counter[TopicPartition] = Counter()
        self._dropped: Counter[TopicPartition] = Counter()
        self.features = FeatureTally()
        """Look-ups of features that impressions left out."""

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
        return self._batches.ended

    @property
    def taken(self) -> int:
        """How many examples were in the batches that were taken out of the queue, since the history began."""
        return self._batches.taken

    @property
    def oldest_s(self) -> float | None:
        """Since when the first example of the half-filled batch has waited; None if there is none."""
        return self._batches.oldest_s

    @property
    def is_repeating(self) -> bool:
        """Whether batches still end where they ended before a restart."""
        return self._batches.is_repeating

    @property
    def taken_times(self) -> BatchTimes | None:
        """Times of the batch that was taken last; None before the first."""
        return self._batches.taken_times

    def repeat(self, ends: Sequence[int]) -> None:
        """End the next batches where they ended before a restart: at these values of :attr:`ended`, in order."""
        self._batches.repeat(ends)

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
        self._batches.push(self._join.push(impressions, feedback, idle), self._join.watermark_ms, now_s)

    @property
    def is_ahead(self) -> bool:
        """See :attr:`stream.join.joiner.Joiner.is_ahead`."""
        return self._join.is_ahead

    def advance_to(self, watermark_ms: int, now_s: float = 0.0) -> None:
        """Move the watermark on (see :meth:`stream.join.joiner.Joiner.advance_to`)."""
        self._batches.push(self._join.advance_to(watermark_ms), self._join.watermark_ms, now_s)

    def end_batch(self, now_s: float) -> None:
        """End the half-filled batch as it is; it joins the queue."""
        self._batches.end(now_s)

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
        self._batches.push(self._join.flush(), self._join.watermark_ms, now_s)
        self.end_batch(now_s)
        self._join.watermark_ms = watermark_ms

    def next_batch(self) -> ExampleBlock | None:
        """Take the next complete batch out of the queue; None when none is ready."""
        return self._batches.take()

    def upcoming(self) -> ExampleBlock | None:
        """Look at the next complete batch without taking it: the object that :meth:`next_batch` will return."""
        return self._batches.upcoming()

    def ledger(self) -> StreamLedger:
        """Where every event read so far is now."""
        join = self._join.ledger
        join.check()
        queued = self._batches.num_impressions
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
        partitions = sorted({source.partition for source in self.sources})
        return state | self._batches.state(IMPRESSIONS, partitions)

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
        self._batches.load_state(IMPRESSIONS, state, now_s)


def _by_topic(counts: Counter[TopicPartition]) -> Counter[str]:
    """The counts of all partitions of a topic together."""
    totals: Counter[str] = Counter()
    for source, count in counts.items():
        totals[source.topic] += count
    return totals
