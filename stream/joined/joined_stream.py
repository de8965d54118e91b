"""Mini-batches from joined examples in the event log: a stream for trainers that do not join themselves.

Batches end as those of :class:`stream.example_stream.ExampleStream` do, and hold the same examples in the same order as
if the trainer had joined itself. Any number of trainers may read the topic: each keeps its own positions.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from smes.arrays import Arrays
from smes.errors import LogReplaced
from smes.events import ExampleBlock
from smes.schema import Schema
from smes.schema_change import SchemaChange
from stream.batch_journal import BatchJournal
from stream.batch_queue import BatchQueue, BatchTimes, MiniBatcher, ended_in
from stream.config import StreamConfig
from stream.dead_letters import DeadLetter, DeadLetterWriter
from stream.join.joiner import END_OF_TIME
from stream.join.ledgers import StreamLedger
from stream.joined.queue import Item, PartitionQueue, lacking_of_the_next, next_turn
from stream.joined.records import decode_examples
from stream.left_out_features import FeatureCounts
from stream.log.event_log import EventLog, Fetch, Positions, TopicPartition
from stream.partition_state import require_partitions, state_name
from stream.sources import WHOLE_LOG, Share, Skipped
from stream.topics import EXAMPLES

_logger = logging.getLogger(__name__)
_FIRST_READ_RECORDS = 8
_COUNTS = ("read", "dead_lettered", "duplicate", "unknown_fields", "gaps", "unreadable")


class JoinedStream:
    """Mini-batches out of the topic ``examples``.

    Args:
        schema: Features and tasks.
        config: Batch and read bounds; its join is that of ``smes join``, and nothing here.
        log: Where the topic is.
        dead_letters: Where refused examples go.
        changes: From old schemas, whose examples are read, to this one.
        journal: As of :class:`stream.example_stream.ExampleStream`.
        share: Which partitions are read; the others are those of other ranks.
        monotonic: Seconds of a clock that never goes back; it decides which batches have waited for long enough, and,
            where the writer names no turns, which partitions are idle.

    Raises:
        EventLogError: There is no such topic.
        ValueError: There are more ranks than partitions.
    """

    def __init__(
        self,
        schema: Schema,
        config: StreamConfig,
        log: EventLog,
        dead_letters: DeadLetterWriter,
        *,
        changes: Sequence[SchemaChange] = (),
        journal: BatchJournal | None = None,
        share: Share = WHOLE_LOG,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._schema, self._config, self._log, self._dead_letters = schema, config, log, dead_letters
        self._changes, self._journal, self._monotonic = tuple(changes), journal, monotonic
        self._share = share
        self._max_wait_s = config.batch.max_wait_s
        self._batches = BatchQueue(MiniBatcher(schema, config.batch))
        self._queues: dict[int, PartitionQueue] = {}
        self._incarnations: dict[int, str] = {}
        self._last_news_s: dict[int, float] = {}
        self._last_s: float | None = None
        self._at_end: frozenset[TopicPartition] = frozenset()
        self._rows_per_record = config.events_per_read / _FIRST_READ_RECORDS
        self._due_s = monotonic()
        self._refresh()

    @property
    def positions(self) -> Positions:
        """Next record to take of every partition."""
        return {TopicPartition(EXAMPLES, p): queue.position for p, queue in self._queues.items()}

    def move_to(self, positions: Positions) -> None:
        """Read from these positions on."""
        for source, position in positions.items():
            self._queues[source.partition] = self._from(position)

    def poll(self, timeout_s: float) -> int:
        """Read once, and queue the batches that are complete; the number of examples read.

        Refused examples are in the dead-letter topic before the positions move past them.

        Args:
            timeout_s: Longest wait for the first record, seconds.

        Raises:
            EventLogUnavailable, PositionOutOfRange, LogReplaced, Stopped: As the log raises them.
        """
        if self._monotonic() >= self._due_s:
            self._refresh()
        # The next turn may be larger than what is read ahead otherwise.
        most, lacking = 2 * self._config.events_per_read, lacking_of_the_next(self._queues)
        if lacking and all(TopicPartition(EXAMPLES, p) in self._at_end for p in lacking):
            lacking = set(self._queues)  # what is missing may never come: a drain must reach the end of the others
        read_to = {p: queue.read_to for p, queue in self._queues.items() if queue.rows < most or p in lacking}
        at = {TopicPartition(EXAMPLES, p): position for p, position in read_to.items()}
        fetch = self._read(at, min(timeout_s, self._until_overdue_s()))
        self._at_end = fetch.at_end
        rows, news = self._add(fetch)
        now_s = self._monotonic()
        self._push(news | {p for p in self._queues if TopicPartition(EXAMPLES, p) not in fetch.at_end}, now_s)
        self._stop_repeating_at_the_end(bool(news), now_s)
        if self._until_overdue_s() <= 0:
            self._batches.end(now_s)
        return rows

    @property
    def is_idle(self) -> bool:
        """Whether all partitions have had nothing new for so long that nobody waits for them."""
        since_s = self._monotonic() - self._config.idle_after_s
        return all(p in self._last_news_s and self._last_news_s[p] < since_s for p in self._queues)

    def _read(self, at: Mapping[TopicPartition, int], timeout_s: float) -> Fetch:
        max_records = max(1, round(self._config.events_per_read / self._rows_per_record))
        return self._log.read(at, max_records=max_records, timeout_s=timeout_s)

    def _add(self, fetch: Fetch) -> tuple[int, set[int]]:
        """Queue what was read; how many examples, and which partitions had something."""
        read = [(record, decode_examples(record, self._schema, self._changes)) for record in fetch.records]
        letters = [letter for _, each in read for letter in each.dead]
        self._dead_letters.write([*letters, *map(DeadLetter.of_unreadable, fetch.unreadable)])
        items: dict[int, list[Item]] = {p: [] for p in self._queues}
        for record, each in read:
            dead = sum(letter.events for letter in each.dead)
            counts = {"dead_lettered": dead, "unknown_fields": each.unknown_fields}
            items[record.partition].append(Item(each.turn, each.examples, each.row, record.offset + 1, counts))
        nothing, no_rows = ExampleBlock.empty(self._schema), np.zeros(0, np.int64)
        for passed in fetch.unreadable:
            counts = {"dead_lettered": passed.records, "unreadable": passed.records}
            after = passed.offset + passed.records
            items[passed.partition].append(Item(None, nothing, no_rows, after, counts))
        for source, gaps in fetch.gaps.items():
            here = items[source.partition]
            after = min([item.next_offset for item in here], default=fetch.positions[source])
            here.append(Item(None, nothing, no_rows, after, {"gaps": gaps}))
        for p, found in items.items():
            queue = self._queues[p]
            queue.read_to = fetch.positions.get(TopicPartition(EXAMPLES, p), queue.read_to)
            for item in sorted(found, key=lambda item: item.next_offset):
                queue.add(item)
            queue.settle()
        rows = sum(len(each.examples) for _, each in read)
        if read:
            self._rows_per_record = max(1.0, rows / len(read), 0.5 * self._rows_per_record)
        return rows, {p for p, found in items.items() if found}

    def _push(self, news: set[int], now_s: float) -> None:
        for p in self._queues:
            if p in news or p not in self._last_news_s:
                self._last_news_s[p] = now_s
        self._take([p for p, last_s in self._last_news_s.items() if now_s - last_s > self._config.idle_after_s], now_s)

    def _take(self, idle: list[int], now_s: float) -> None:
        while (taken := next_turn(self._queues, idle)) is not None:
            examples, watermark_ms = taken.examples, taken.watermark_ms
            if watermark_ms is None:
                examples, watermark_ms = self._in_order(examples)
            self._batches.push(examples, watermark_ms, now_s)
            if watermark_ms == END_OF_TIME:
                self._batches.end(now_s)

    def _in_order(self, examples: ExampleBlock) -> tuple[ExampleBlock, int]:
        """Examples of a writer without turns, due no earlier than those before them in the same batch."""
        floor_ms = self._batches.newest_due_ms
        due_ms = np.maximum.accumulate(examples.due_ms)
        if floor_ms is not None:
            due_ms = np.maximum(due_ms, floor_ms)
        newest_ms = int(due_ms[-1]) if len(due_ms) else (floor_ms or 0)
        return ExampleBlock(**{**examples.arrays(), "due_ms": due_ms}), newest_ms

    def _until_overdue_s(self) -> float:
        oldest_s = self._batches.oldest_s
        if self._max_wait_s is None or oldest_s is None or self._batches.is_repeating:
            return np.inf
        return max(0.0, oldest_s + self._max_wait_s - self._monotonic())

    def _stop_repeating_at_the_end(self, has_news: bool, now_s: float) -> None:
        """Give up ends that the log does not lead to."""
        if has_news or self._last_s is None:
            self._last_s = now_s
        longest_s = 2 * self._config.idle_after_s + (self._max_wait_s or 0.0)
        if self._batches.is_repeating and now_s - self._last_s > longest_s:
            _logger.warning(
                "the log has ended before the examples that were trained on before the restart: from here on batches "
                "may end elsewhere"
            )
            self._repeat_none()

    def _repeat_none(self) -> None:
        self._batches.repeat([])
        if self._journal is not None:
            self._journal.clear()

    def _refresh(self) -> None:
        """Ask the log which partitions there are, and whether it is still the same one.

        Raises:
            LogReplaced: The topic was made anew.
            EventLogError: There is no such topic.
        """
        if (partitions := self._log.partitions(EXAMPLES)) < self._share.of_ranks:
            raise ValueError(
                f"{self._share.of_ranks} ranks: topic {EXAMPLES!r} has {partitions} partitions, expected at least one "
                "for each rank"
            )
        now = {source.partition: text for source, text in self._log.incarnations(EXAMPLES).items()}
        for p, was in self._incarnations.items():
            if was and now.get(p, "") != was:
                raise LogReplaced(
                    f"{EXAMPLES}/{p}: position {self._queues[p].position} of log {was}, expected the same log, found "
                    f"{now.get(p) or 'an empty one'}: the topic was made anew"
                )
        owned = self._share.of(partitions)
        if added := [p for p in owned if p not in self._queues]:
            begin, end = self._log.begin(EXAMPLES), self._log.end(EXAMPLES)
            for p in added:
                source = TopicPartition(EXAMPLES, p)
                self._queues[p] = self._from(begin[source], end[source])
        self._incarnations = {p: now.get(p, "") for p in owned}
        self._due_s = self._monotonic() + self._config.metadata_refresh_s

    @staticmethod
    def _from(position: int, end: int = 0) -> PartitionQueue:
        return PartitionQueue(position, position, started=position == 0, end_at_start=end)

    def next_batch(self) -> ExampleBlock | None:
        """Take the next complete mini-batch out of the queue; None when none is ready. Its end is written down."""
        batch = self._batches.take()
        if batch is not None and self._journal is not None:
            self._journal.add(self._batches.taken)
        return batch

    def taken_times(self) -> BatchTimes | None:
        """When the examples of the batch taken last came; None before the first one."""
        return self._batches.taken_times

    def upcoming(self) -> ExampleBlock | None:
        """Look at the next complete mini-batch without taking it: the object that :meth:`next_batch` will return."""
        return self._batches.upcoming()

    def ledger(self) -> StreamLedger:
        """Where every impression is whose examples were read; of the join's own ledger nothing is known here."""
        total = sum((queue.counts for queue in self._queues.values()), Counter[str]())
        queued = sum(queue.impressions for queue in self._queues.values())
        waiting, taken = queued + self._batches.num_impressions, total["read"]
        dead, duplicate = total["dead_lettered"], total["duplicate"]
        return StreamLedger(
            impressions=taken + queued,
            handed_out=taken + queued - waiting - dead - duplicate,
            waiting=waiting,
            late=0,
            duplicate=duplicate,
            dead_lettered=dead,
            feedback=0,
            attached=0,
            corrected=0,
            feedback_waiting=0,
            feedback_late=0,
            orphaned=0,
            feedback_duplicate=0,
            feedback_dead_lettered=0,
            feedback_dropped=0,
            unknown_fields=total["unknown_fields"],
            gaps=total["gaps"],
            feedback_gaps=0,
            unreadable=total["unreadable"],
            feedback_unreadable=0,
            features=FeatureCounts(),
        )

    def end(self) -> Positions:
        """Where the partitions that are read end now."""
        self._refresh()
        return {source: end for source, end in self._log.end(EXAMPLES).items() if source.partition in self._queues}

    def has_reached(self, end: Positions) -> bool:
        """Whether everything before ``end`` has been read."""
        return all(self._queues[source.partition].read_to >= position for source, position in end.items())

    def flush(self) -> None:
        """Wait for no idle partition, and end the half-filled batch.

        What the join itself still holds comes with ``smes join --flush``; a turn that lacks a part stays.
        """
        now_s = self._monotonic()
        self._take(list(self._queues), now_s)
        self._batches.end(now_s)

    def skip_lost(self) -> dict[TopicPartition, Skipped]:
        """As :meth:`stream.example_stream.ExampleStream.skip_lost`."""
        begin, ends = self._log.begin(EXAMPLES), self._log.end(EXAMPLES)
        now = {source.partition: text for source, text in self._log.incarnations(EXAMPLES).items()}
        skipped: dict[TopicPartition, Skipped] = {}
        for p, queue in self._queues.items():
            source, was = TopicPartition(EXAMPLES, p), self._incarnations.get(p, "")
            replaced = was not in ("", now.get(p, ""))
            if replaced or not begin[source] <= queue.position <= ends[source]:
                old = was if replaced else None
                skipped[source] = Skipped(source, queue.position, begin[source], ends[source], old, now.get(p, ""))
                self._queues[p] = PartitionQueue(
                    begin[source], begin[source], started=False, end_at_start=ends[source], counts=queue.counts
                )
        self._incarnations = {p: now.get(p, "") for p in self._queues}
        if skipped:
            self._repeat_none()
        return skipped

    @property
    def join_nbytes(self) -> int:
        """Bytes of memory that the join takes: it is elsewhere."""
        return 0

    def positions_by_topic(self) -> dict[str, dict[str, int]]:
        """Topic → partition (decimal digits) → next record to take."""
        return {EXAMPLES: {str(p): queue.position for p, queue in sorted(self._queues.items())}}

    def state(self) -> Arrays:
        """Arrays from which :meth:`load_state` goes on; names as in :mod:`stream.partition_state`.

        What was read but not taken is not in it: it is read again.
        """
        state: Arrays = self._batches.state(EXAMPLES, sorted(self._queues))
        for p, queue in self._queues.items():
            own = {
                "position": [queue.position],
                "taken": [queue.done, queue.epoch, int(queue.started)],
                "counts": [queue.counts[name] for name in _COUNTS],
            }
            state |= {state_name(EXAMPLES, p, name): np.array(values, np.int64) for name, values in own.items()}
            text = self._incarnations.get(p, "").encode()
            state[state_name(EXAMPLES, p, "incarnation")] = np.frombuffer(text, np.uint8)
        return state

    def load_state(self, state: Arrays) -> None:
        """The inverse of :meth:`state`. Partitions that were added since are read from their beginning.

        Raises:
            ValueError: The state has more partitions, or it is of a training that joins itself.
        """
        if not is_of_examples(state):
            raise ValueError(
                f"the state of a training on the topics of events, expected one on {EXAMPLES}: smes train without "
                "--examples goes on from it"
            )
        require_partitions(state, [EXAMPLES], self._log.partitions(EXAMPLES))
        self._batches.load_state(EXAMPLES, state, self._monotonic())
        for p in self._queues:
            if state_name(EXAMPLES, p, "position") not in state:
                continue
            position = int(state[state_name(EXAMPLES, p, "position")][0])
            done, epoch, started = state[state_name(EXAMPLES, p, "taken")].tolist()
            counts = Counter(dict(zip(_COUNTS, state[state_name(EXAMPLES, p, "counts")].tolist(), strict=True)))
            end = self._queues[p].end_at_start
            self._queues[p] = PartitionQueue(position, position, done, epoch, bool(started), end, counts=counts)
            self._incarnations[p] = state[state_name(EXAMPLES, p, "incarnation")].tobytes().decode(errors="replace")
        self._due_s = self._monotonic()
        if self._journal is not None:
            self._batches.repeat(self._journal.resume(self._batches.ended))

    def saved(self, state: Arrays) -> None:
        """Note that a state is on disk: batches before it need not be repeated once enough later ones are, too."""
        if self._journal is not None:
            self._journal.saved(ended_in(state))


def is_of_examples(state: Arrays) -> bool:
    """Whether a stream's state is of :class:`JoinedStream`."""
    return any(name.startswith(f"{EXAMPLES}/") for name in state)
