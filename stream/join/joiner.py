"""Join feedback to impressions by event time: a pure function of (state, events) → (state, examples).

Rules, with ``W_s`` the watermark of one source (a topic partition): the largest event time read from it, less
``allowed_lateness_s``; and ``W``, the smallest ``W_s`` over the sources that are not idle, which never goes back:

- an impression is emitted when ``W`` has passed its event time plus the longest attribution window;
- an impression is *late* when the ``W_s`` of its own source had passed that time before it came;
- feedback is *attached* when its event time lies within its task's window; it is *late* after the window, or when the
  ``W_s`` of its own source had passed the impression's emission time;
- feedback whose impression has not come waits; it is *orphaned* when ``W`` passes the time at which any impression
  that it could belong to would itself be late, or when the impression came more than the allowed lateness after it;
- the first of several equal events counts (impressions by id, feedback by impression id and task, whatever became of
  it), the others are *duplicates*; ids are remembered for ``remember_s`` after emission.

Lateness is judged by the event's own source and examples leave in the order (event time, impression id), so what is
emitted, and in which order, depends on the contents of the partitions alone, not on how reads interleaved (unless a
source is declared idle). The ledgers balance at every moment:

    impressions read = emitted + waiting + late + duplicate
    feedback read    = attached + waiting + late + orphaned + duplicate

Joining features with feedback that comes later, before an online training step: Monolith (arXiv 2209.07663). Of the
known answers to delayed feedback this is the first: wait for the window, then emit once.
"""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smes.arrays import I32, I64, GrowingColumns
from smes.events import ExampleBlock, FeedbackBlock, ImpressionBlock
from smes.id_map import IdMap
from smes.schema import MISSING, Schema
from stream.join.kernels import (
    ACCEPTED,
    DUPLICATE,
    EARLY,
    FREE,
    LATE,
    ORPHANED,
    WAITING,
    admit_impressions,
    attach_feedback,
    settle_due,
    watermarks_before,
)
from stream.join.ledgers import JoinLedger
from stream.log.event_log import TopicPartition
from stream.topics import FEEDBACK, IMPRESSIONS

END_OF_TIME = int(np.iinfo(np.int64).max)
_START_OF_TIME = int(np.iinfo(np.int64).min) // 2  # room to subtract windows from


@dataclass(frozen=True)
class JoinConfig:
    """How long the join waits and remembers.

    Attributes:
        allowed_lateness_s: How far behind its source's newest event an event may lie and still count as in time,
            seconds of event time, ≥ 0. It delays every example by as much.
        remember_s: How long after its emission an impression id is remembered, seconds of event time, ≥ 0: within it a
            second copy is a duplicate and feedback is late; after it the copy is late and the feedback orphaned.
    """

    allowed_lateness_s: float = 1.0
    remember_s: float = 600.0

    def __post_init__(self) -> None:
        if self.allowed_lateness_s < 0:
            raise ValueError(f"allowed_lateness_s {self.allowed_lateness_s}, expected at least 0 seconds")
        if self.remember_s < 0:
            raise ValueError(f"remember_s {self.remember_s}, expected at least 0 seconds")


class Joiner:
    """The join's state and its two moves, :meth:`push` and :meth:`flush`.

    Args:
        schema: Features and tasks.
        config: Waiting and remembering.
        sources: Every partition of the impressions and feedback topics that events will come from. ``W`` stands still
            until each has been read from, or is declared idle.
    """

    def __init__(self, schema: Schema, config: JoinConfig, sources: Iterable[TopicPartition]) -> None:
        self.schema = schema
        self.sources = tuple(sorted(sources))
        self.ledger = JoinLedger()
        self.watermark_ms = _START_OF_TIME
        self._lateness_ms = round(config.allowed_lateness_s * 1000)
        self._remember_ms = round(config.remember_s * 1000)
        self._window_ms = np.array([t.window_ms for t in schema.tasks], np.int64)
        self._latest_ms = np.full(len(self.sources), _START_OF_TIME + self._lateness_ms, np.int64)
        self._entries = IdMap()
        self._slots = IdMap()  # of waiting impressions only: DONE entries are remembered without their features
        tasks = (0, schema.num_tasks)
        self._entry = GrowingColumns(
            {
                "impression_id": np.zeros(0, np.int64),
                "status": np.zeros(0, np.uint8),
                "due_ms": np.zeros(0, np.int64),
                "event_time_ms": np.zeros(0, np.int64),
                "seen": np.zeros(0, np.uint64),  # bit t: some feedback for task t came, whatever became of it
                "attached": np.zeros(0, np.uint64),  # bit t: it is this entry's label (or will be, if EARLY)
                "labels": np.zeros(tasks, np.float32),
                "label_time_ms": np.zeros(tasks, np.int64),
                "label_arrival_ms": np.zeros(tasks, np.int64),
                "not_before_ms": np.zeros(tasks, np.int64),
            }
        )
        self._waiting = GrowingColumns(ImpressionBlock.empty(schema).arrays())
        self._due: list[tuple[int, int, I64, I64]] = []  # heap of (first due time, sequence, due times, entries)
        self._sequence = 0

    def push(
        self, impressions: ImpressionBlock, feedback: FeedbackBlock, idle: Iterable[TopicPartition] = ()
    ) -> ExampleBlock:
        """Take what was read and give the examples that became complete, by (event time, impression id).

        Args:
            impressions: In offset order within each partition.
            feedback: Likewise.
            idle: Sources that have had nothing to read for a while: ``W`` does not wait for them.
        """
        floor_ms = self.watermark_ms
        self._admit(impressions, floor_ms)
        self._attach(feedback, floor_ms)
        idle = set(idle)
        active = [m for source, m in zip(self.sources, self._latest_ms, strict=True) if source not in idle]
        if active:
            self.watermark_ms = max(self.watermark_ms, int(min(active)) - self._lateness_ms)
        return self._emit()

    def flush(self) -> ExampleBlock:
        """The stream is over: every waiting impression becomes an example, held feedback is orphaned."""
        self.watermark_ms = END_OF_TIME
        return self._emit()

    def _source_index(self, topic: str, partition: I32) -> I32:
        table = np.full(1 + max((s.partition for s in self.sources), default=0), -1, np.int32)
        for index, source in enumerate(self.sources):
            if source.topic == topic:
                table[source.partition] = index
        index_N: I32 = table[partition]
        assert (index_N >= 0).all(), "an event came from a partition that is none of the join's sources"
        return index_N

    def _reserve_entries(self, count: int) -> None:
        self._entry.reserve(self._entries.num_rows + count)

    def _note_due(self, entries: I64) -> None:
        if len(entries) == 0:
            return
        due = self._entry.arrays["due_ms"][entries]
        order = np.argsort(due, kind="stable")
        due, entries = due[order], entries[order]
        self._sequence += 1
        heapq.heappush(self._due, (int(due[0]), self._sequence, due, entries))

    def _admit(self, block: ImpressionBlock, floor_ms: int) -> None:
        if len(block) == 0:
            return
        source = self._source_index(IMPRESSIONS, block.partition)
        before = watermarks_before(source, block.event_time_ms, self._latest_ms, self._lateness_ms, floor_ms)
        self.ledger.impressions += len(block)
        self._reserve_entries(len(block))
        entry = self._entries.insert(block.impression_id)
        e = self._entry.arrays
        outcome = np.empty(len(block), np.uint8)
        held_late, held_orphaned = admit_impressions(
            entry,
            block.event_time_ms,
            before,
            self._window_ms,
            e["status"],
            e["due_ms"],
            e["event_time_ms"],
            e["seen"],
            e["attached"],
            e["label_time_ms"],
            e["not_before_ms"],
            self._lateness_ms,
            outcome,
        )
        self._entries.remove(block.impression_id[(outcome == LATE) & (e["status"][entry] == FREE)])
        self.ledger.impressions_late += int((outcome == LATE).sum())
        accepted = outcome == ACCEPTED
        entry, block = entry[accepted], block.take(accepted)
        e["impression_id"][entry] = block.impression_id
        slots = self._slots.insert(entry)
        self._waiting.reserve(self._slots.num_rows)
        for name, column in block.arrays().items():
            self._waiting.arrays[name][slots] = column
        self._note_due(entry)
        self._settle_held(entry, held_late, held_orphaned)
        self.ledger.impressions_duplicate += int((outcome == DUPLICATE).sum())
        self.ledger.impressions_waiting += len(block)

    def _settle_held(self, entry: I64, late: int, orphaned: int) -> None:
        """Feedback that was held for impressions that have now come is attached, late or orphaned."""
        attached = int(np.bitwise_count(self._entry.arrays["attached"][entry]).sum())
        self.ledger.attached += attached
        self.ledger.feedback_late += late
        self.ledger.orphaned += orphaned
        self.ledger.feedback_waiting -= attached + late + orphaned

    def _attach(self, block: FeedbackBlock, floor_ms: int) -> None:
        if len(block) == 0:
            return
        source = self._source_index(FEEDBACK, block.partition)
        before = watermarks_before(source, block.event_time_ms, self._latest_ms, self._lateness_ms, floor_ms)
        self._reserve_entries(len(block))
        entry = self._entries.insert(block.impression_id)
        e = self._entry.arrays
        e["impression_id"][entry] = block.impression_id
        outcome = np.empty(len(block), np.uint8)
        attach_feedback(
            entry,
            block.task,
            block.event_time_ms,
            block.value,
            block.arrival_ms,
            before,
            self._window_ms,
            e["status"],
            e["due_ms"],
            e["event_time_ms"],
            e["seen"],
            e["attached"],
            e["labels"],
            e["label_time_ms"],
            e["label_arrival_ms"],
            e["not_before_ms"],
            self._lateness_ms,
            outcome,
        )
        accepted = entry[outcome == ACCEPTED]
        held = accepted[e["status"][accepted] == EARLY]
        self._note_due(np.unique(held))
        self.ledger.feedback += len(block)
        self.ledger.attached += len(accepted) - len(held)
        self.ledger.feedback_waiting += len(held)
        self.ledger.feedback_late += int((outcome == LATE).sum())
        self.ledger.orphaned += int((outcome == ORPHANED).sum())
        self.ledger.feedback_duplicate += int((outcome == DUPLICATE).sum())

    def _emit(self) -> ExampleBlock:
        emitted = []
        while self._due and self._due[0][0] < self.watermark_ms:
            _, _, due, entries = heapq.heappop(self._due)
            count = int(np.searchsorted(due, self.watermark_ms, side="left"))
            if count < len(due):
                self._sequence += 1
                heapq.heappush(self._due, (int(due[count]), self._sequence, due[count:], entries[count:]))
            emitted.append(self._settle(entries[:count]))
        entries = np.concatenate(emitted) if emitted else np.zeros(0, np.int64)
        self.ledger.emitted += len(entries)
        self.ledger.impressions_waiting -= len(entries)
        return self._examples(entries)

    def _settle(self, candidates: I64) -> I64:
        e = self._entry.arrays
        emitted: I64
        emitted, forgotten, orphaned = settle_due(
            candidates, self.watermark_ms, self._remember_ms, e["status"], e["due_ms"], e["attached"]
        )
        self.ledger.orphaned += orphaned
        self.ledger.feedback_waiting -= orphaned
        self._entries.remove(e["impression_id"][forgotten])
        self._note_due(emitted)
        return emitted

    def _examples(self, entries: I64) -> ExampleBlock:
        e = self._entry.arrays
        order = np.lexsort((e["impression_id"][entries], e["event_time_ms"][entries]))
        entries = entries[order]
        slots = self._slots.remove(entries)
        w = self._waiting.arrays
        bits = np.uint64(1) << np.arange(self.schema.num_tasks, dtype=np.uint64)
        attached = (e["attached"][entries][:, None] & bits) != 0
        binary = np.array([t.kind == "binary" for t in self.schema.tasks])
        columns = {f.name: w[f.name][slots] for f in fields(ExampleBlock) if f.name in w}
        return ExampleBlock(
            **columns,
            labels=np.where(attached, e["labels"][entries], np.float32(0)),
            label_mask=attached | binary,
            weight=np.ones(len(entries), np.float32),
            feedback_arrival_ms=np.where(attached, e["label_arrival_ms"][entries], MISSING),
        )

    def state(self) -> dict[str, NDArray[Any]]:
        """Arrays from which :meth:`load_state` continues as if nothing had happened."""
        ids, rows = self._entries.items()
        waiting = rows[self._entry.arrays["status"][rows] == WAITING]
        slots = self._slots.find(waiting)
        state = {f"entry.{name}": column[rows] for name, column in self._entry.arrays.items()}
        state |= {f"waiting.{name}": column[slots] for name, column in self._waiting.arrays.items()}
        state["entry.impression_id"] = ids
        state["latest_ms"] = self._latest_ms.copy()
        state["watermark_ms"] = np.array([self.watermark_ms])
        state["ledger"] = np.array([getattr(self.ledger, f.name) for f in fields(JoinLedger)])
        return state

    def load_state(self, state: dict[str, NDArray[Any]]) -> None:
        """The inverse of :meth:`state`, for a joiner built with the same schema, configuration and sources.

        Raises:
            ValueError: The number of sources differs.
        """
        if len(state["latest_ms"]) != len(self.sources):
            raise ValueError(
                f"join state of {len(state['latest_ms'])} sources, expected {len(self.sources)}: "
                "the topics' partitions changed"
            )
        self._latest_ms = state["latest_ms"].copy()
        self.watermark_ms = int(state["watermark_ms"][0])
        self.ledger = JoinLedger(*(int(n) for n in state["ledger"]))
        self._entries = IdMap.from_keys(state["entry.impression_id"])
        self._entry = GrowingColumns({name: state[f"entry.{name}"].copy() for name in self._entry.arrays})
        waiting = np.flatnonzero(self._entry.arrays["status"] == WAITING).astype(np.int64)
        self._slots = IdMap.from_keys(waiting)
        self._waiting = GrowingColumns({name: state[f"waiting.{name}"].copy() for name in self._waiting.arrays})
        self._due = []
        self._note_due(np.arange(len(state["entry.impression_id"]), dtype=np.int64))


def join_sources(partitions: int) -> Sequence[TopicPartition]:
    """Every partition of the impressions and feedback topics."""
    return [TopicPartition(topic, p) for topic in (FEEDBACK, IMPRESSIONS) for p in range(partitions)]
