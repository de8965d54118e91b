"""Join feedback to impressions by event time: a pure function of (state, events) → (state, examples).

Two events go in and one example comes out. With a task ``click`` whose attribution window is 60 s, ``like`` another::

    impression   id 1, user 7, item 9, at 12:00:00        (read from the topic ``impressions``)
    feedback     id 1, task click, value 1, at 12:00:20   (read from the topic ``feedback``)

    example      id 1, user 7, item 9, click = 1, like = 0

The example comes out when the stream has passed 12:01:00: only then is it known that no more feedback can belong to it.
An impression without any feedback becomes an example, too, with all binary labels 0.

How far the stream is. Event time is what counts, never the clock on the wall. The *watermark* of a partition is the
latest event time that ``vouchers`` of its last events have reached, less ``allowed_lateness_s``: one wrong clock moves
it by no more than one event (:mod:`stream.join.watermarks` has an example). The watermark of the stream is the smallest
watermark of its partitions, except for those that are idle. It never goes back.

What becomes of an impression:

- It waits until the stream's watermark has passed its event time plus the longest attribution window of all tasks. Then
  it is *emitted* as an example. With ``JoinConfig.wait``, tasks may wait shorter; see below.
- It is *late* if its own partition's watermark had already passed that time when it was read. It is dropped.

An impression whose time lies ahead of all others by a wrong clock waits, too, until the stream comes there or ends.

What becomes of feedback:

- It is *attached* to its impression if its event time lies within the attribution window of its task. If that is after
  the task's wait, the impression is *corrected* by it instead.
- It is *late* if its event time lies after the window. It is also late if its own partition's watermark had passed the
  time at which the impression is emitted.
- If its impression has not been read yet, it waits. It is *orphaned* when the stream's watermark has passed the time at
  which every impression that it could belong to would be late. It is also orphaned if it happened more than the allowed
  lateness before its impression.

Duplicates. Of several impressions with the same id, and of several feedback events with the same id and task, the first
counts, whatever became of it. The others are *duplicates*. An id is remembered for ``remember_s`` after its last
example. Of feedback whose impression never came nothing is remembered once it is orphaned.

Shorter waits. A task that does not wait for its window is trained on when its wait is over, with what is known by then.
An impression then becomes several examples, each with the labels of some tasks: a *first* one, a *further* one at the
end of each longer wait, a further one for each label that comes after its task's wait (a *correction*, at the time of
the feedback), and a *closing* one with all labels when the longest window closes, which is for evaluation and never
trained on. With ``click`` trained on ``immediate``-ly and ``like`` when its window closes, the events above make::

    12:00:00    first       click = 0
    12:00:20    further     click = 1
    12:01:00    further     like = 0
    12:01:00    closing     click = 1, like = 0

What is known by then: feedback whose event time, and whose own partition's watermark before it, are not after the end
of the wait. An impression that is read when its own partition's watermark is past the end of a wait has that watermark
for the end. A correction is due at the later of the same two times. Feedback that says 0 changes nothing after the
wait: a missing one was taken for 0. Final labels and what is late do not depend on the waits. The loss makes up for
negatives that stood for positives to come (:mod:`smes.model.delayed_feedback`).

Lateness is judged by the event's own partition, and examples come out in the order (due time, stage, impression id);
where all tasks wait for their windows, that is (event time, impression id). So which examples come out, and in which
order, depends on what the partitions hold, not on how reads interleave (except where a partition is declared idle).
Whether feedback that no example gets counts as late or as orphaned may depend on how it was read. So may one label: of
feedback that comes twice for an impression and a task, first from before the impression by more than the longest
window, and then in time: a join that has forgotten the first takes the second, and one that has not drops it.
Both ledgers balance at every moment, for each partition and in all; an impression is emitted with its first example:

    impressions read = emitted + waiting + late + duplicate
    feedback read    = attached + corrected + waiting + late + orphaned + duplicate

Labels that there cannot be. An impression of an earlier schema (:mod:`smes.schema_change`) was made by a service that
does not know the new tasks. No feedback for them means nothing, and what comes would count positives alone: its
examples have no label of these tasks, and such feedback is attached without effect.

Source: Monolith (arXiv 2209.07663) joins features with feedback before an online training step, as this does. To emit
early and correct later is what Ktena et al. (arXiv 1907.06558) and ES-DFM (arXiv 2012.03245) do.
"""

from collections.abc import Iterable, Sequence
from dataclasses import fields

import numpy as np

from smes.arrays import I64, Arrays
from smes.events import CLOSING, DROPPED, FIRST, FURTHER, WHOLE, ExampleBlock, FeedbackBlock, ImpressionBlock
from smes.schema import MISSING, Schema
from stream.config import JoinConfig
from stream.join.entries import FREE, DueTimes, EntryTable
from stream.join.kernels import (
    Emitted,
    Feedback,
    Impressions,
    Ledgers,
    admit_impressions,
    attach_feedback,
    known_labels,
    restage,
    settle_due,
)
from stream.join.late_shares import LateShares
from stream.join.ledgers import COLUMNS, CORRECTED, HELD, LATE, JoinLedger
from stream.join.waits import described, stages_of
from stream.join.watermarks import START_OF_TIME, Watermarks, longer
from stream.log.event_log import TopicPartition
from stream.partition_state import require_partitions, saved_partitions, state_name
from stream.topics import FEEDBACK, IMPRESSIONS

END_OF_TIME = int(np.iinfo(np.int64).max)
_FEATURES = {f.name for f in fields(ExampleBlock)} & {f.name for f in fields(ImpressionBlock)}


class Joiner:
    """The join's state and its two moves, :meth:`push` and :meth:`flush`.

    Attributes:
        begins_ms: Impressions up to this event time are late, whatever the watermark says: a log in files without ids
            of its own has primed the stream up to there (:mod:`stream.priming`). None: there is no such time.

    Args:
        schema: Features and tasks.
        config: How long to wait and to remember.
        sources: Every partition of the impressions and feedback topics that events will come from. The watermark stands
            still until each has brought enough events, or is declared idle.

    Raises:
        ValueError: ``config.wait`` names a task that the schema does not have.
    """

    def __init__(self, schema: Schema, config: JoinConfig, sources: Iterable[TopicPartition]) -> None:
        self.schema = schema
        self.sources = tuple(sorted(sources))
        self.watermark_ms = START_OF_TIME
        self.begins_ms: int | None = None
        self._lateness_ms = round(config.allowed_lateness_s * 1000)
        self._remember_ms = round(config.remember_s * 1000)
        self._stages = stages_of(schema, config.wait, config.correction, self._lateness_ms)
        self._late_shares = LateShares(self._stages, config.correction)
        self._watermarks = {t: Watermarks(self._lateness_ms, config.vouchers) for t in (IMPRESSIONS, FEEDBACK)}
        self._own = {topic: np.zeros(0, np.bool_) for topic in (IMPRESSIONS, FEEDBACK)}
        self._ledgers = Ledgers(*(np.zeros((0, len(COLUMNS)), np.int64) for _ in range(2)))
        self._entries = EntryTable(schema)
        self._due = DueTimes()
        self.add_partitions(self.sources)

    def add_partitions(self, sources: Iterable[TopicPartition]) -> None:
        """Take events from these partitions, too, from now on; those that it has already stay as they are.

        Nothing has been read of a new partition, so the watermark waits for it, where it is, as at the start.
        """
        self.sources = tuple(sorted({*self.sources, *sources}))
        partitions = 1 + max((source.partition for source in self.sources), default=0)
        for topic in (IMPRESSIONS, FEEDBACK):
            self._watermarks[topic].grow(partitions)
            self._own[topic] = longer(self._own[topic], partitions, False)
        self._ledgers = Ledgers(*(longer(counts, partitions, 0) for counts in self._ledgers))
        for source in self.sources:
            self._own[source.topic][source.partition] = True

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the impressions take which it remembers."""
        return self._entries.nbytes

    @property
    def ledger(self) -> JoinLedger:
        """Where every event is, in all partitions together."""
        return JoinLedger.of_counts(self._ledgers.impressions.sum(axis=0), self._ledgers.feedback.sum(axis=0))

    def partition_ledger(self, partition: int) -> JoinLedger:
        """Where every event is that was read from this partition of both topics."""
        return JoinLedger.of_counts(self._ledgers.impressions[partition], self._ledgers.feedback[partition])

    def push(
        self, impressions: ImpressionBlock, feedback: FeedbackBlock, idle: Iterable[TopicPartition] = ()
    ) -> ExampleBlock:
        """Take what was read and give the examples that became due, by (due time, stage, impression id).

        Args:
            impressions: In offset order within each partition.
            feedback: Likewise. That of tasks that there are no more moves the watermark, and is left out.
            idle: Sources that have had nothing to read for a while; the watermark does not wait for them.
        """
        floor_ms = self.watermark_ms
        self._admit(impressions, floor_ms)
        self._attach(feedback, floor_ms)
        idle = set(idle)
        active_ms = [self._watermarks[s.topic].of(s.partition) for s in self.sources if s not in idle]
        if active_ms:
            self.watermark_ms = max(self.watermark_ms, min(active_ms))
        return self._emit()

    @property
    def is_ahead(self) -> bool:
        """Whether the watermark is ahead of a partition's own: because that one was idle, or the stream had ended."""
        return any(self._watermarks[s.topic].of(s.partition) < self.watermark_ms for s in self.sources)

    def advance_to(self, watermark_ms: int) -> ExampleBlock:
        """Move the watermark on, as idle partitions had let it move before a restart; the examples that became due."""
        self.watermark_ms = max(self.watermark_ms, watermark_ms)
        return self._emit()

    def flush(self) -> ExampleBlock:
        """End the stream: every waiting impression becomes an example, feedback that waits is orphaned."""
        self.watermark_ms = END_OF_TIME
        return self._emit()

    def _watermarks_before(self, topic: str, block: ImpressionBlock | FeedbackBlock, floor_ms: int) -> I64:
        own = self._own[topic][block.partition]
        assert own.all(), "an event is from a partition that is none of the join's sources"
        return self._watermarks[topic].before(block.partition, block.event_time_ms, block.impression_id, floor_ms)

    def _admit(self, block: ImpressionBlock, floor_ms: int) -> None:
        if len(block) == 0:
            return
        before_ms = self._watermarks_before(IMPRESSIONS, block, floor_ms)
        if self.begins_ms is not None:
            before_ms = np.where(block.event_time_ms <= self.begins_ms, END_OF_TIME, before_ms)
        entry = self._entries.insert(block.impression_id)
        events = Impressions(entry, block.partition, block.event_time_ms, before_ms, block.no_label)
        columns = self._entries.columns
        outcome = admit_impressions(events, columns, self._ledgers, self._stages)
        self._entries.forget(entry[(outcome == LATE) & (columns.status[entry] == FREE)])
        waiting = outcome == HELD
        self._entries.keep_features(entry[waiting], block.take(waiting))
        self._note_due(entry[waiting])

    def _attach(self, block: FeedbackBlock, floor_ms: int) -> None:
        if len(block) == 0:
            return
        before_ms = self._watermarks_before(FEEDBACK, block, floor_ms)
        if (dropped := block.task == DROPPED).any():
            block, before_ms = block.take(~dropped), before_ms[~dropped]
        entry = self._entries.insert(block.impression_id)
        events = Feedback(
            entry, block.partition, block.event_time_ms, before_ms, block.task, block.value, block.arrival_ms
        )
        outcome = attach_feedback(events, self._entries.columns, self._ledgers, self._stages)
        self._note_due(np.unique(entry[(outcome == HELD) | (outcome == CORRECTED)]))

    def _note_due(self, entries: I64) -> None:
        self._due.note(self._entries.columns.due_ms[entries], entries)

    def _emit(self) -> ExampleBlock:
        nothing = np.zeros(0, np.int64)
        emitted = [Emitted(nothing, nothing, nothing)]
        while (candidates := self._due.pop_before(self.watermark_ms)) is not None:
            examples, forgotten = settle_due(
                candidates, self.watermark_ms, self._remember_ms, self._entries.columns, self._ledgers, self._stages
            )
            self._entries.forget(forgotten)
            self._note_due(examples.entry)
            emitted.append(examples)
        return self._examples(Emitted(*map(np.concatenate, zip(*emitted, strict=True))))

    def _examples(self, emitted: Emitted) -> ExampleBlock:
        columns, stages = self._entries.columns, self._stages
        order = np.lexsort((columns.impression_id[emitted.entry], emitted.example, emitted.due_ms))
        entries, due_ms, example = (column[order] for column in emitted)
        features = self._entries.features(entries, _FEATURES)
        num_stages, num_tasks = len(stages.wait_ms), len(stages.window_ms)
        first = WHOLE if stages.is_whole else FIRST
        kind = np.where(example == 0, first, np.where(example < num_stages + num_tasks, FURTHER, CLOSING))
        self._entries.drop_features(entries[(kind == WHOLE) | (kind == CLOSING)])

        kind = kind.astype(np.int8)
        known, label_mask, is_late = known_labels(entries, example, columns, stages)
        labels = np.where(known, columns.labels[entries], np.float32(0))
        return ExampleBlock(
            **features,
            labels=labels,
            label_mask=label_mask,
            weight=np.ones(len(entries), np.float32),
            feedback_arrival_ms=np.where(known, columns.label_arrival_ms[entries], MISSING),
            due_ms=due_ms,
            kind=kind,
            late_share=self._late_shares.of_examples(kind, label_mask, labels, is_late),
        )

    def state(self) -> Arrays:
        """Arrays from which :meth:`load_state` goes on as if nothing had happened.

        Each array but ``watermark_ms``, ``waits``, ``late_counts`` and ``begins_ms`` belongs to one partition; the
        names are those of :mod:`stream.partition_state`.
        """
        state: Arrays = {"watermark_ms": np.array([self.watermark_ms]), "waits": described(self._stages)}
        state["late_counts"] = self._late_shares.counts.copy()
        if self.begins_ms is not None:
            state["begins_ms"] = np.array([self.begins_ms], np.int64)
        for topic, partition in ((s.topic, s.partition) for s in self.sources):
            state |= self._watermarks[topic].state(topic, partition)
            state[state_name(topic, partition, "ledger")] = self._counts(topic)[partition].copy()
        partitions = sorted({source.partition for source in self.sources})
        return state | self._entries.state(partitions)

    def load_state(self, state: Arrays) -> None:
        """The inverse of :meth:`state`, for a joiner with the same schema, configuration and at least its partitions.

        Partitions that the state does not have start with nothing read; the watermark waits for them. If the waits of
        the tasks are others now, impressions that were trained on for some tasks are so with later feedback alone.

        Raises:
            ValueError: The state has more partitions than this joiner.
        """
        require_partitions(state, (IMPRESSIONS, FEEDBACK), len(self._ledgers.impressions))
        self.watermark_ms = int(state["watermark_ms"][0])
        self.begins_ms = int(state["begins_ms"][0]) if "begins_ms" in state else None
        self._late_shares.counts = state["late_counts"].copy()
        for topic in (IMPRESSIONS, FEEDBACK):
            # Where only one topic has grown, the other's partition has nothing but rows of a table.
            saved = [p for p in saved_partitions(state, topic) if state_name(topic, p, "ledger") in state]
            self._watermarks[topic].load_state(topic, saved, state)
            self._counts(topic)[:] = 0
            for partition in saved:
                self._counts(topic)[partition] = state[state_name(topic, partition, "ledger")]
        entries = self._entries.load_state(state)
        if not np.array_equal(state["waits"], described(self._stages)):
            restage(entries, self._entries.columns, self._stages)
            self._late_shares.counts[:] = 0
        self._due = DueTimes()
        self._note_due(entries)

    def _counts(self, topic: str) -> I64:
        return self._ledgers.impressions if topic == IMPRESSIONS else self._ledgers.feedback


def join_sources(partitions: int) -> Sequence[TopicPartition]:
    """Every partition of the impressions and feedback topics."""
    return [TopicPartition(topic, p) for topic in (FEEDBACK, IMPRESSIONS) for p in range(partitions)]
