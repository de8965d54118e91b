"""The join's examples into the topic ``examples``: none lost and none twice, whenever the process dies.

The topic itself is the journal. A turn's records say up to where the join had read and which watermark it had reached
(:mod:`stream.joined.turns`). After a restart from a checkpoint, the join

1. writes a fence, so that records which a process that was killed has still on their way count for nobody;
2. reads what the topic has between the checkpoint and the fence;
3. repeats each turn that it finds there: it reads the events up to exactly where that turn had, moves the watermark to
   where that turn had it, and appends those of the turn's parts that are missing;
4. goes on.

That the repeat gives the same examples is what :mod:`stream.join.joiner` promises: they depend on what the partitions
hold, not on how reads interleave, except where an idle partition was not waited for. So a turn ends wherever that
happened, even without an example.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable

import numpy as np

from smes.arrays import I64, Arrays
from smes.errors import EventLogError
from smes.events import ExampleBlock
from smes.schema import Schema
from smes_io.clock import wall_clock_ms
from stream.codec.limits import max_rows
from stream.codec.record_headers import headers
from stream.join.joiner import END_OF_TIME
from stream.joined.config import ExamplesConfig
from stream.joined.found_turns import (
    FoundTurn,
    missing_rows,
    newest_epoch,
    newest_epoch_since,
    newest_records,
    rows_by_partition,
    turns_since,
)
from stream.joined.records import encode_examples
from stream.joined.turn_stream import TurnStream, positions_of
from stream.joined.turns import Turn, newest_turn, readable_turn
from stream.log.event_log import EventLog, OutRecord, Positions, TopicPartition
from stream.topics import EXAMPLES, FEEDBACK, IMPRESSIONS

_logger = logging.getLogger(__name__)
_TURN, _EPOCH, _LAST, _WRITTEN = "turn", "epoch", "last", "written"
_REPEAT_S = 1.0


class ExampleWriter:
    """Reads the event log, joins, and appends what becomes due.

    Attributes:
        number: The last turn written; 0 before the first.
        repeated: How many turns were repeated after the last restart.
        completed: How many records of them were missing.

    Args:
        schema: Features and tasks.
        config: When a turn ends.
        stream: The join; nothing was read of it yet.
        log: Where the topic ``examples`` is.
        monotonic: Seconds of a clock that never goes back.
        now_ms: Unix milliseconds.
        pause: Waits for so many seconds.

    Raises:
        EventLogError: The topic has fewer partitions than ``impressions``; the message names both.
    """

    def __init__(
        self,
        schema: Schema,
        config: ExamplesConfig,
        stream: TurnStream,
        log: EventLog,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        now_ms: Callable[[], int] = wall_clock_ms,
        pause: Callable[[float], object] = time.sleep,
    ) -> None:
        self._schema, self._config, self._stream, self._log = schema, config, stream, log
        self._monotonic, self._now_ms, self._pause = monotonic, now_ms, pause
        self._rows_per_record = min(config.rows_per_record, max_rows(schema))
        self.number = self.repeated = self.completed = 0
        self._epoch = 0
        self._last: list[int] = []
        self._written: Positions = {}
        self._appended = Counter[int]()  # records by partition, since then
        self._held: list[ExampleBlock] = []
        self._held_since_s = self._rests_until_s = 0.0

    def begin_anew(self) -> None:
        """Start with the event log's oldest record, behind whatever the topic has."""
        found = newest_turn(newest_records(self._log))
        if found is not None:
            self.number, self._epoch, self._last = found.number, found.epoch, list(found.last)
        self._fence()
        self._written = self._log.end(EXAMPLES)
        self._appended.clear()

    def has_written_before(self) -> bool:
        """Whether the topic has examples, whoever wrote them."""
        turns = map(readable_turn, newest_records(self._log))
        return any(turn is None or turn.number > 0 for turn in turns)

    def resume(self, state: Arrays) -> None:
        """Go on from :meth:`state`: repeat the turns that were written since, and complete them.

        Raises:
            EventLogError: Another join has written since, or the repeat gives other examples than the topic has.
            PositionOutOfRange, LogReplaced: The event log no longer holds what is to be repeated.
            ValueError: The state is of another stream.
        """
        self._load(state)
        before = self._epoch
        self._fence()
        for found in turns_since(self._log, self.number, self._written, self._epoch, before):
            self._repeat(found)

    def resume_behind(self, state: Arrays) -> None:
        """Go on from :meth:`state` where the event log has lost what is to be repeated, behind what the topic has.

        Of the turns since, nothing is repeated or completed: their impressions may come twice, and those of a turn that
        was cut short may be lost.
        """
        self._load(state)
        found = newest_turn(newest_records(self._log))
        if found is not None:
            self.number, self._last = max(self.number, found.number), list(found.last)
        self._fence()

    def _load(self, state: Arrays) -> None:
        self._stream.load_state(state)
        self.number, self._epoch = int(state[_TURN][0]), int(state[_EPOCH][0])
        self._last = state[_LAST].tolist()
        self._written = positions_of(EXAMPLES, state[_WRITTEN].tolist())
        for source, position in self._log.begin(EXAMPLES).items():
            self._written[source] = max(position, self._written.get(source, 0))

    def advance(self, timeout_s: float) -> int:
        """Read once, and write a turn if one has ended; the number of events read.

        Args:
            timeout_s: Longest wait for the first event, seconds.
        """
        if (rest_s := self._rests_until_s - self._monotonic()) > 0:
            self._pause(min(rest_s, timeout_s))
        before_ms = self._stream.watermark_ms
        if self._held:
            timeout_s = min(timeout_s, max(0.0, self._due_s() - self._monotonic()))
        events = self._stream.poll(timeout_s)
        self._hold()
        is_full = sum(map(len, self._held)) >= self._rows_per_record
        is_due = bool(self._held) and self._monotonic() >= self._due_s()
        # Where idle partitions were not waited for is written down: nobody could find it out again.
        must_tell = self._stream.is_ahead and self._stream.watermark_ms > before_ms
        if is_full or is_due or must_tell:
            self.end_turn()
            if must_tell:  # each such read makes a turn: fewer reads, fewer turns
                self._rests_until_s = self._monotonic() + self._config.max_wait_s
        return events

    def end_turn(self) -> None:
        """Write what is held as a turn, if only a mark of how far the watermark is."""
        self._write(self._take_held(), self._stream.watermark_ms)

    def settle(self) -> None:
        """Write what is held, if there is anything."""
        if self._held:
            self.end_turn()

    def flush(self) -> None:
        """The log ends here: close the open windows, and write what waited. The join may go on."""
        self.settle()
        self._stream.flush()
        self._hold()
        self._write(self._take_held(), END_OF_TIME)

    def state(self) -> Arrays:
        """Arrays from which :meth:`resume` goes on: those of the stream, and how far the topic is."""
        assert not self._held, "a checkpoint is taken between two turns"
        partitions = self._log.partitions(EXAMPLES)
        written = [self._written.get(TopicPartition(EXAMPLES, p), 0) for p in range(partitions)]
        own = {_TURN: [self.number], _EPOCH: [self._epoch], _LAST: self._last, _WRITTEN: written}
        return {**self._stream.state(), **{name: np.array(values, np.int64) for name, values in own.items()}}

    def note_written(self) -> None:
        """Ask where the topic ends: a restart from the next state looks for turns from there on.

        Raises:
            EventLogError: Another join has begun to write: what this one writes counts for nobody.
        """
        end, newest = self._log.end(EXAMPLES), newest_epoch(self._log)
        if any(at > self._written.get(source, 0) + self._appended[source.partition] for source, at in end.items()):
            # There is more than this run has written: of the last records alone, all may be its own.
            newest = max(newest, newest_epoch_since(self._log, self._written, end))
        if newest > self._epoch:
            raise EventLogError(
                f"topic {EXAMPLES!r}: another join has begun to write after this one, expected one join a topic"
            )
        self._written = end
        self._appended.clear()

    def _due_s(self) -> float:
        return self._held_since_s + self._config.max_wait_s

    def _hold(self) -> None:
        blocks = self._stream.emitted()
        if blocks and not self._held:
            self._held_since_s = self._monotonic()
        self._held += blocks

    def _take_held(self) -> ExampleBlock:
        held, self._held = self._held, []
        return ExampleBlock.concat(held) if held else ExampleBlock.empty(self._schema)

    def _write(self, examples: ExampleBlock, watermark_ms: int, found: FoundTurn | None = None) -> None:
        """Append the records of the next turn, but those that are there already."""
        partitions = self._partitions()
        number, last = self.number + 1, self._padded(partitions)
        parts_of = {
            partition: dict(enumerate(self._parts(rows))) for partition, rows in rows_by_partition(examples).items()
        }
        counts = {partition: len(parts) for partition, parts in parts_of.items()}
        if found is not None:
            parts_of = missing_rows(found, examples, self._schema, self._parts)
            counts |= {p: turn.parts for (p, _), turn in found.turns.items()}
        for partition in counts:
            last[partition] = number
        records = []
        for partition, parts in parts_of.items():
            for part, rows in parts.items():
                turn = self._turn(number, part, counts[partition], last, watermark_ms)
                records.append(encode_examples(examples.take(rows), self._schema, turn, partition, rows))
        if records:
            self._append(records)
        self.number, self._last = number, last
        if found is not None:
            self.completed += len(records)

    def _parts(self, rows: I64) -> list[I64]:
        size = self._rows_per_record
        return [rows[start : start + size] for start in range(0, len(rows), size)] or [rows]

    def _turn(self, number: int, part: int, parts: int, last: list[int], watermark_ms: int) -> Turn:
        return Turn(
            epoch=self._epoch,
            number=number,
            part=part,
            parts=parts,
            last=tuple(last),
            watermark_ms=watermark_ms,
            impressions=self._read_of(IMPRESSIONS),
            feedback=self._read_of(FEEDBACK),
        )

    def _read_of(self, topic: str) -> tuple[int, ...]:
        return tuple(position for source, position in sorted(self._stream.positions.items()) if source.topic == topic)

    def _partitions(self) -> int:
        """Those of the topic.

        Raises:
            EventLogError: There are fewer than of ``impressions``.
        """
        partitions, needed = self._log.partitions(EXAMPLES), len(self._read_of(IMPRESSIONS))
        if partitions < needed:
            raise EventLogError(
                f"topic {EXAMPLES!r}: {partitions} partitions, expected at least {needed} as topic {IMPRESSIONS!r} "
                f"has: let {EXAMPLES!r} grow first"
            )
        return partitions

    def _padded(self, partitions: int) -> list[int]:
        return self._last + [0] * (partitions - len(self._last))

    def _fence(self) -> None:
        """Begin an epoch: nothing that a run before still writes counts from here on."""
        before = newest_epoch(self._log)
        self._epoch = max(self._now_ms(), self._epoch + 1, before + 1)
        partitions = self._partitions()
        turn = self._turn(self.number, 0, 0, self._padded(partitions), self._stream.watermark_ms)
        head = (*headers("arrow", self._schema), turn.header())
        empty = encode_examples(ExampleBlock.empty(self._schema), self._schema, None, 0, np.zeros(0, np.int64)).value
        self._append([OutRecord(empty, head, p) for p in range(partitions)])

    def _append(self, records: list[OutRecord]) -> None:
        self._log.append(EXAMPLES, records)
        self._appended.update(record.partition for record in records)

    def _repeat(self, found: FoundTurn) -> None:
        turn = found.turn
        until = positions_of(IMPRESSIONS, turn.impressions) | positions_of(FEEDBACK, turn.feedback)
        self._require(until)
        self._stream.until = until
        try:
            while not self._stream.has_reached_until:
                self._stream.poll(_REPEAT_S)
        finally:
            self._stream.until = None
        if turn.watermark_ms == END_OF_TIME:
            self._stream.flush()
        else:
            self._stream.advance_to(turn.watermark_ms)
        self._hold()
        self._write(self._take_held(), turn.watermark_ms, found)
        self.repeated += 1

    def _require(self, until: Positions) -> None:
        """Check that the event log still has what a turn was made of.

        Raises:
            EventLogError: It ends before.
        """
        end = self._stream.end()
        for source, position in sorted(until.items()):
            if position > end.get(source, 0):
                raise EventLogError(
                    f"{source.topic}/{source.partition}: ends at {end.get(source, 0)}, expected {position} or more, "
                    "which the join has read before: records are gone from the log"
                )
