"""From the event log to mini-batches: read by position → decode → dead-letter → join → batch."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from smes.arrays import Arrays
from smes.events import ExampleBlock
from smes.ranges import NonNegativeFloat, PositiveFloat, PositiveInt, check_ranges
from smes.schema import Schema
from stream.codec.codec import decode
from stream.dead_letters import DeadLetterWriter
from stream.join.joiner import JoinConfig
from stream.join.ledgers import StreamLedger
from stream.log.event_log import EventLog, Positions, TopicPartition
from stream.mini_batches import Assembler, MiniBatchConfig
from stream.partition_state import state_name
from stream.topics import FEEDBACK, IMPRESSIONS

_FIRST_READ_RECORDS = 8  # an Arrow record may hold thousands of events: only reading tells


@dataclass(frozen=True)
class StreamConfig:
    """How events become mini-batches.

    Attributes:
        join: How long to wait and to remember.
        batch: Bounds of a mini-batch.
        events_per_read: About how many events one read returns; bounds memory when catching up.
        idle_after_s: The watermark no longer waits for a partition that has had nothing new for this long, wall clock.
        max_future_s: An event is refused if its time lies more than this after its arrival in the log, seconds.
    """

    join: JoinConfig = field(default_factory=JoinConfig)
    batch: MiniBatchConfig = field(default_factory=MiniBatchConfig)
    events_per_read: PositiveInt = 16_384
    idle_after_s: PositiveFloat = 10.0
    max_future_s: NonNegativeFloat = 300.0

    def __post_init__(self) -> None:
        check_ranges(self)


class ExampleStream:
    """Mini-batches out of an event log, in a reproducible order, with resumable state.

    Args:
        schema: Features and tasks.
        config: Join, batch and read bounds.
        log: Where impressions and feedback are read; both topics must exist with the same number of partitions.
        dead_letters: Where refused events go.
        monotonic: Seconds of a clock that never goes back; it decides only which partitions are idle.

    Raises:
        ValueError: The two topics have different numbers of partitions.
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
        self.assembler = Assembler(schema, config.join, config.batch, partitions)
        self.positions: Positions = {**log.begin(IMPRESSIONS), **log.begin(FEEDBACK)}
        self._last_news_s = dict.fromkeys(self.assembler.sources, monotonic())
        self._events_per_record = config.events_per_read / _FIRST_READ_RECORDS

    def poll(self, timeout_s: float) -> int:
        """Read once, join what was read and queue the batches that are complete; the number of events read.

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
        self.assembler.count_refused(decoded.dead_by_source, decoded.unknown_by_source)
        events = len(decoded.impressions) + len(decoded.feedback)
        if fetch.records:
            # Grows at once and shrinks slowly: unexpectedly full records cost memory, the reverse a few small reads.
            self._events_per_record = max(1.0, events / len(fetch.records), 0.5 * self._events_per_record)
        news = {TopicPartition(r.topic, r.partition) for r in fetch.records}
        behind = set(self.assembler.sources) - fetch.at_end
        self.assembler.push(decoded.impressions, decoded.feedback, self._idle(news | behind))
        self.positions = dict(fetch.positions)
        return events

    def _idle(self, news: set[TopicPartition]) -> list[TopicPartition]:
        now_s = self._monotonic()
        self._last_news_s.update(dict.fromkeys(news, now_s))
        return [s for s, last_s in self._last_news_s.items() if now_s - last_s > self._config.idle_after_s]

    def next_batch(self) -> ExampleBlock | None:
        """Take the next complete mini-batch out of the queue; None when none is ready."""
        return self.assembler.next_batch()

    def upcoming(self) -> ExampleBlock | None:
        """Look at the next complete mini-batch without taking it: the object that :meth:`next_batch` will return."""
        return self.assembler.upcoming()

    def ledger(self) -> StreamLedger:
        """Where every event read so far is now."""
        return self.assembler.ledger()

    def end(self) -> Positions:
        """Where both topics end now."""
        return {**self._log.end(IMPRESSIONS), **self._log.end(FEEDBACK)}

    def has_reached(self, end: Positions) -> bool:
        """Whether everything before ``end`` has been read."""
        return all(self.positions[source] >= position for source, position in end.items())

    def skip_lost(self) -> dict[TopicPartition, tuple[int, int]]:
        """Move positions that the log does not hold to its oldest record.

        These are positions of trimmed records, and positions past the end of a log that is empty after a restart.
        Training never sees the events that are skipped, so only an operator should ask for this.

        Returns:
            Source → (position before, position now), of those that moved.
        """
        begin, end = {**self._log.begin(IMPRESSIONS), **self._log.begin(FEEDBACK)}, self.end()
        moved = {s: (p, begin[s]) for s, p in self.positions.items() if not begin[s] <= p <= end[s]}
        self.positions.update({source: now for source, (_, now) in moved.items()})
        return moved

    def positions_by_topic(self) -> dict[str, dict[str, int]]:
        """Topic → partition (decimal digits) → next record to read."""
        topics: dict[str, dict[str, int]] = {}
        for source, position in sorted(self.positions.items()):
            topics.setdefault(source.topic, {})[str(source.partition)] = position
        return topics

    def state(self) -> Arrays:
        """Arrays from which :meth:`load_state` goes on: positions and the assembler's state.

        Their names are those of :mod:`stream.partition_state`.
        """
        state = self.assembler.state()
        for source, position in self.positions.items():
            state[state_name(source.topic, source.partition, "position")] = np.array([position], np.int64)
        return state

    def load_state(self, state: Arrays) -> None:
        """The inverse of :meth:`state`. Partitions that were added since are read from the log's beginning.

        Raises:
            ValueError: The state has more partitions than the log.
        """
        self.assembler.load_state(state)
        for source in self.positions:
            saved = state.get(state_name(source.topic, source.partition, "position"))
            if saved is not None:
                self.positions[source] = int(saved[0])
