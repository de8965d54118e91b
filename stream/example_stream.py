"""From the event log to mini-batches: read by position → decode → fill features → dead-letter → join → batch.

A batch ends when it is full, when the stream has left its first example behind in event time, or when that example has
waited ``max_wait_s`` by the clock. What a restart repeats bit for bit: batches of the first two kinds, always; those
that the clock ended, if a :class:`stream.batch_journal.BatchJournal` says where that was.
"""

import logging
import time
from collections.abc import Callable, Sequence

import numpy as np

from smes.arrays import Arrays
from smes.errors import PositionOutOfRange
from smes.events import ExampleBlock
from smes.schema import Schema
from smes.schema_change import SchemaChange
from smes_io.clock import wall_clock_ms
from stream.batch_journal import BatchJournal
from stream.batch_queue import BatchTimes, MiniBatcher, ended_in
from stream.codec.codec import decode
from stream.config import StreamConfig
from stream.dead_letters import DeadLetter, DeadLetterWriter
from stream.join.ledgers import StreamLedger
from stream.left_out_features import FeatureSource
from stream.log.event_log import EventLog, Fetch, Positions, TopicPartition
from stream.mini_batches import Assembler
from stream.partition_state import OTHER_RANKS, saved_partitions
from stream.priming import is_of_blocks
from stream.sources import WHOLE_LOG, Counted, Share, Skipped, Sources, counted_in
from stream.topics import EXAMPLES

_logger = logging.getLogger(__name__)
_FIRST_READ_RECORDS = 8  # an Arrow record may hold thousands of events: only reading tells


class ExampleStream:
    """Mini-batches out of an event log, in a reproducible order, with resumable state.

    Args:
        schema: Features and tasks.
        config: Join, batch and read bounds.
        log: Where impressions and feedback are read; both topics must exist.
        dead_letters: Where refused events go.
        changes: From old schemas, whose events are read during a change-over, to this one.
        features: What fills features that impressions leave out; None: nothing does.
        journal: Where the ends of batches are written down; None: a restart does not repeat those that the clock set.
        share: Which partitions are read; the others are those of other ranks.
        batcher: Says where batches end; None: one that keeps the bounds of the configuration.
        monotonic: Seconds of a clock that never goes back; it decides only which partitions are idle, when the log is
            asked for new ones, and which batches have waited for long enough.
        now_ms: The reader's clock, Unix milliseconds; it decides only which events are from the future.

    Raises:
        EventLogError: The feedback topic has fewer partitions than the impressions topic; the message names both.
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
        features: FeatureSource | None = None,
        journal: BatchJournal | None = None,
        share: Share = WHOLE_LOG,
        batcher: MiniBatcher | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        now_ms: Callable[[], int] = wall_clock_ms,
    ) -> None:
        self._schema, self._config, self._log, self._dead_letters = schema, config, log, dead_letters
        self._features, self._journal, self._monotonic, self._now_ms = features, journal, monotonic, now_ms
        self._changes = tuple(changes)
        self._max_wait_s = config.batch.max_wait_s
        self._sources = Sources(log, config.metadata_refresh_s, monotonic, share=share)
        self.assembler = Assembler(schema, config.join, config.batch, self._sources.positions, batcher)
        self._last_news_s: dict[TopicPartition, float] = {}
        self._last_events_s: float | None = None
        self._polled_s = 0.0
        self.is_caught_up = False
        """Whether the last :meth:`poll` found nothing new in any partition."""
        self._events_per_record = config.events_per_read / _FIRST_READ_RECORDS

    @property
    def positions(self) -> Positions:
        """Next record to read of every partition."""
        return self._sources.positions

    def move_to(self, positions: Positions) -> None:
        """Read from these positions on."""
        self.positions.update(positions)

    def poll(self, timeout_s: float) -> int:
        """Read once, join what was read and queue the batches that are complete; the number of events read.

        Refused events are in the dead-letter topic before the positions move past them.

        Args:
            timeout_s: Longest wait for the first record, seconds.

        Raises:
            EventLogUnavailable, PositionOutOfRange, Stopped: As the log raises them.
            LogReplaced: A position belongs to another incarnation of the log.
            EventLogError: The feedback topic has fewer partitions than the impressions topic.
            FeatureStoreError: Features that impressions leave out could not be looked up.

            After any of them the state is as before the call.
        """
        self._add(self._sources.refresh_if_due())
        fetch = self._read(min(timeout_s, self._until_overdue_s()))
        now_ms, max_future_ms = self._now_ms(), round(self._config.max_future_s * 1000)
        decoded = decode(fetch.records, self._schema, changes=self._changes, max_future_ms=max_future_ms, now_ms=now_ms)
        filled = None if self._features is None else self._features.fill(decoded.impressions)  # it may raise
        self._dead_letters.write([*decoded.dead, *map(DeadLetter.of_unreadable, fetch.unreadable)])
        self.assembler.count_refused(decoded.dead_by_source, decoded.unknown_by_source)
        self.assembler.count_passed(fetch.gaps, fetch.unreadable)
        impressions = decoded.impressions
        if filled is not None:
            impressions = filled.impressions
            self.assembler.features.add(impressions.partition, filled.outcome)
        events = len(decoded.impressions) + len(decoded.feedback)
        if fetch.records:
            # Grows at once and shrinks slowly: unexpectedly full records cost memory, the reverse a few small reads.
            self._events_per_record = max(1.0, events / len(fetch.records), 0.5 * self._events_per_record)
        news = _passed(fetch) | (set(self.assembler.sources) - fetch.at_end)
        self.is_caught_up = not news
        self._polled_s = now_s = self._monotonic()
        self.assembler.push(impressions, decoded.feedback, self._idle(news, now_s), now_s=now_s)
        self.positions.update(fetch.positions)
        self._stop_repeating_at_the_end(bool(news), now_s)
        if self._until_overdue_s() <= 0:
            self.assembler.end_batch(now_s)
        return events

    def _until_overdue_s(self) -> float:
        """How long until the half-filled batch has waited for long enough; infinite if it has not to end by then.

        While batches are repeated, the clock ends none.
        """
        oldest_s = self.assembler.oldest_s
        if self._max_wait_s is None or oldest_s is None or self.assembler.is_repeating:
            return np.inf
        return max(0.0, oldest_s + self._max_wait_s - self._monotonic())

    def _stop_repeating_at_the_end(self, has_news: bool, now_s: float) -> None:
        """Give up ends that the log does not lead to: examples of before the restart are gone from it."""
        if has_news or self._last_events_s is None:
            self._last_events_s = now_s
        if self.assembler.is_repeating and self.is_spent:
            _logger.warning(
                "the log has ended before the examples that were trained on before the restart: from here on batches "
                "may end elsewhere"
            )
            self.repeat_none()

    def repeat_none(self) -> None:
        """End batches anew: where they ended before belongs to another number of ranks, or to another log."""
        self.assembler.repeat([])
        if self._journal is not None:
            self._journal.clear()

    def _read(self, timeout_s: float) -> Fetch:
        return self._read_at(self.positions, timeout_s)

    def _read_at(self, positions: Positions, timeout_s: float) -> Fetch:
        max_records = max(1, round(self._config.events_per_read / self._events_per_record))
        try:
            fetch = self._log.read(positions, max_records=max_records, timeout_s=timeout_s)
        except PositionOutOfRange:
            self._sources.refresh()  # is it another log? That says more.
            raise
        self._sources.identify(_passed(fetch))
        return fetch

    def _add(self, sources: list[TopicPartition]) -> None:
        if sources:
            _logger.warning("partitions were added: %s", ", ".join(f"{s.topic}/{s.partition}" for s in sources))
            self.assembler.add_partitions(sources)

    def _idle(self, news: set[TopicPartition], now_s: float) -> list[TopicPartition]:
        """The sources without news for too long; that of a source begins with the first read of it."""
        for source in self.assembler.sources:
            if source in news or source not in self._last_news_s:
                self._last_news_s[source] = now_s
        return [s for s, last_s in self._last_news_s.items() if now_s - last_s > self._config.idle_after_s]

    @property
    def is_spent(self) -> bool:
        """Whether at the last :meth:`poll` nothing new had come for so long that what a restart repeats will not come.

        Between two reads of the log nobody knows; they may be far apart, where other ranks are waited for.
        """
        longest_s = 2 * self._config.idle_after_s + (self._max_wait_s or 0.0)
        return self._last_events_s is not None and self._polled_s - self._last_events_s > longest_s

    @property
    def is_idle(self) -> bool:
        """Whether, at the last :meth:`poll`, all partitions had had nothing new for so long that none is waited for."""
        since_s = self._polled_s - self._config.idle_after_s
        last_s = self._last_news_s
        return all(source in last_s and last_s[source] < since_s for source in self.assembler.sources)

    def next_batch(self) -> ExampleBlock | None:
        """Take the next complete mini-batch out of the queue; None when none is ready. Its end is written down."""
        batch = self.assembler.next_batch()
        if batch is not None and self._journal is not None:
            self._journal.add(self.assembler.taken)
        return batch

    def taken_times(self) -> BatchTimes | None:
        """When the examples of the batch taken last came; None before the first one."""
        return self.assembler.taken_times

    def upcoming(self) -> ExampleBlock | None:
        """Look at the next complete mini-batch without taking it: the object that :meth:`next_batch` will return."""
        return self.assembler.upcoming()

    def ledger(self) -> StreamLedger:
        """Where every event read so far is now."""
        return self.assembler.ledger()

    def end(self) -> Positions:
        """Where both topics end now, with partitions that were added a moment ago."""
        self._add(self._sources.refresh())
        return self._sources.end()

    def has_reached(self, end: Positions) -> bool:
        """Whether everything before ``end`` has been read."""
        return all(self.positions.get(source, 0) >= position for source, position in end.items())

    def flush(self) -> None:
        """Close the open windows, as at the end of a finite log: every impression that waits becomes an example.

        Feedback that waits for its impression is orphaned. The ledger has nothing waiting once the batches that this
        makes were taken. The stream may go on: what is read later is judged by the watermark that it had before.
        """
        self.assembler.flush(self._monotonic())

    def skip_lost(self) -> dict[TopicPartition, Skipped]:
        """Move positions that the log does not hold to its oldest record, and accept the log that is there now.

        These are positions of trimmed records, positions past the end of a log that is empty after a restart, and
        those of another incarnation of the log. Training never sees the events that are skipped, so only an operator
        should ask for this.

        Returns:
            Source → what that costs, of those that moved.
        """
        skipped = self._sources.skip_lost(self._counted)
        if skipped:
            self.repeat_none()  # examples are counted from another beginning now
        return skipped

    def _counted(self) -> dict[TopicPartition, Counted]:
        state = self.assembler.state()
        return {source: counted_in(state, source) for source in self.assembler.sources}

    @property
    def join_nbytes(self) -> int:
        """Bytes of memory that the join takes."""
        return self.assembler.join_nbytes

    def positions_by_topic(self) -> dict[str, dict[str, int]]:
        """Topic → partition (decimal digits) → next record to read."""
        topics: dict[str, dict[str, int]] = {}
        for source, position in sorted(self.positions.items()):
            topics.setdefault(source.topic, {})[str(source.partition)] = position
        return topics

    def state(self) -> Arrays:
        """Arrays from which :meth:`load_state` goes on: positions, the log's incarnations, the assembler's state.

        Their names are those of :mod:`stream.partition_state`.
        """
        return {**self.assembler.state(), **self._sources.state()}

    def load_state(self, state: Arrays) -> None:
        """The inverse of :meth:`state`. Partitions that were added since are read from the log's beginning.

        Positions in another incarnation of the log stop the next :meth:`poll`, unless :meth:`skip_lost` comes before.

        Raises:
            ValueError: The state has more partitions than the log, or it is of a log in files.
        """
        if is_of_blocks(state):
            raise ValueError(
                "the state of a log in files, as smes backtest --checkpoint writes it, expected one of an event log: "
                "smes train --from goes on from the former, with a folder of its own for its checkpoints"
            )
        if saved_partitions(state, EXAMPLES):
            raise ValueError(
                f"the state of a training on the topic {EXAMPLES}, expected one on the topics of events: smes train "
                "--examples goes on from it"
            )
        self.assembler.load_state(state, now_s=self._monotonic())
        self._sources.load_state(state)
        if OTHER_RANKS in state:
            self.repeat_none()
        elif self._journal is not None:
            self.assembler.repeat(self._journal.resume(self.assembler.ended))

    def saved(self, state: Arrays) -> None:
        """Note that a state is on disk: batches before it need not be repeated once enough later ones are, too."""
        if self._journal is not None:
            self._journal.saved(ended_in(state))


def _passed(fetch: Fetch) -> set[TopicPartition]:
    """The partitions in which something was read or passed over."""
    records = {TopicPartition(record.topic, record.partition) for record in fetch.records}
    return records | {TopicPartition(each.topic, each.partition) for each in fetch.unreadable} | set(fetch.gaps)
