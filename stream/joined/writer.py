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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

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
from stream.joined.records import decode_examples, encode_examples
from stream.joined.turn_stream import TurnStream, positions_of
from stream.joined.turns import Turn, newest_turn, readable_turn
from stream.log.event_log import EventLog, OutRecord, Positions, Record, TopicPartition
from stream.topics import EXAMPLES, FEEDBACK, IMPRESSIONS

_logger = logging.getLogger(__name__)
_TURN, _EPOCH, _LAST, _WRITTEN = "turn", "epoch", "last", "written"
_SCAN_RECORDS, _SCAN_S = 256, 1.0


@dataclass(slots=True)
class _Found:
    """A turn that the topic has already, if only in part."""

    turn: Turn
    parts: dict[tuple[int, int], Record] = field(default_factory=dict)  # (partition, part) → the record
    turns: dict[tuple[int, int], Turn] = field(default_factory=dict)  # and its header


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
        self._held: list[ExampleBlock] = []
        self._held_since_s = self._rests_until_s = 0.0

    def begin_anew(self) -> None:
        """Start with the event log's oldest record, behind whatever the topic has."""
        found = newest_turn(self._tail())
        if found is not None:
            self.number, self._epoch, self._last = found.number, found.epoch, list(found.last)
        self._fence()
        self._written = self._log.end(EXAMPLES)

    def has_written_before(self) -> bool:
        """Whether the topic has examples, whoever wrote them."""
        turns = map(readable_turn, self._tail())
        return any(turn is None or turn.number > 0 for turn in turns)

    def resume(self, state: Arrays) -> None:
        """Go on from :meth:`state`: repeat the turns that were written since, and complete them.

        Raises:
            EventLogError: Another join has written since, or the repeat gives other examples than the topic has.
            PositionOutOfRange, LogReplaced: The event log no longer holds what is to be repeated.
            ValueError: The state is of another stream.
        """
        self._load(state)
        self._fence()
        for found in self._since():
            self._repeat(found)

    def resume_behind(self, state: Arrays) -> None:
        """Go on from :meth:`state` where the event log has lost what is to be repeated, behind what the topic has.

        Of the turns since, nothing is repeated or completed: their impressions may come twice, and those of a turn that
        was cut short may be lost.
        """
        self._load(state)
        found = newest_turn(self._tail())
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
        newest = max((turn.epoch for turn in map(readable_turn, self._tail()) if turn is not None), default=0)
        if newest > self._epoch:
            raise EventLogError(
                f"topic {EXAMPLES!r}: another join has begun to write after this one, expected one join a topic"
            )
        self._written = self._log.end(EXAMPLES)

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

    def _write(self, examples: ExampleBlock, watermark_ms: int, found: _Found | None = None) -> None:
        """Append the records of the next turn, but those that are there already."""
        partitions = self._partitions()
        number, last = self.number + 1, self._padded(partitions)
        parts_of = {partition: dict(enumerate(self._parts(rows))) for partition, rows in _rows_of(examples).items()}
        counts = {partition: len(parts) for partition, parts in parts_of.items()}
        if found is not None:
            parts_of = self._missing(found, examples)
            counts |= {p: turn.parts for (p, _), turn in found.turns.items()}
        for partition in counts:
            last[partition] = number
        records = []
        for partition, parts in parts_of.items():
            for part, rows in parts.items():
                turn = self._turn(number, part, counts[partition], last, watermark_ms)
                records.append(encode_examples(examples.take(rows), self._schema, turn, partition, rows))
        if records:
            self._log.append(EXAMPLES, records)
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
        before = max((turn.epoch for turn in map(readable_turn, self._tail()) if turn is not None), default=0)
        self._epoch = max(self._now_ms(), self._epoch + 1, before + 1)
        partitions = self._partitions()
        turn = self._turn(self.number, 0, 0, self._padded(partitions), self._stream.watermark_ms)
        head = (*headers("arrow", self._schema), turn.header())
        empty = encode_examples(ExampleBlock.empty(self._schema), self._schema, None, 0, np.zeros(0, np.int64)).value
        self._log.append(EXAMPLES, [OutRecord(empty, head, p) for p in range(partitions)])

    def _since(self) -> list[_Found]:
        """The turns that the topic has between the checkpoint and the fence, in order.

        Raises:
            EventLogError: A later run than this one has written.
        """
        found: dict[int, _Found] = {}
        epochs: dict[TopicPartition, int] = {}
        for record in self._records(self._written, self._log.end(EXAMPLES)):
            turn, source = readable_turn(record), TopicPartition(record.topic, record.partition)
            if turn is None or turn.epoch < epochs.get(source, 0):
                continue
            if turn.epoch > self._epoch:
                raise EventLogError(
                    f"topic {EXAMPLES!r}: {source.partition}/{record.offset} is of another join, which has begun to "
                    "write after this one, expected one join a topic"
                )
            epochs[source] = turn.epoch
            if turn.number > self.number and not turn.is_fence:
                there = found.setdefault(turn.number, _Found(turn))
                there.parts.setdefault((record.partition, turn.part), record)
                there.turns.setdefault((record.partition, turn.part), turn)
        expected = list(range(self.number + 1, self.number + 1 + len(found)))
        if sorted(found) != expected:
            raise EventLogError(
                f"topic {EXAMPLES!r}: turns {sorted(found)[:8]} after the checkpoint's {self.number}, expected "
                f"{expected[:8]}: records are gone, or another join has written them"
            )
        return [found[number] for number in expected]

    def _repeat(self, found: _Found) -> None:
        turn = found.turn
        until = positions_of(IMPRESSIONS, turn.impressions) | positions_of(FEEDBACK, turn.feedback)
        self._require(until)
        self._stream.until = until
        try:
            while not self._stream.has_reached_until:
                self._stream.poll(_SCAN_S)
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

    def _missing(self, found: _Found, examples: ExampleBlock) -> dict[int, dict[int, I64]]:
        """Which rows of a repeated turn the topic lacks: partition → part → rows.

        What the topic has stands. Where the repeat gives other examples (:mod:`stream.join.joiner` says of which events
        that can come), those that are there stay, and those that are not there are added.

        Raises:
            EventLogError: A part that is there cannot be read.
        """
        missing, others = dict[int, dict[int, I64]](), 0
        for partition, rows in _rows_of(examples).items():
            there = {part: record for (p, part), record in found.parts.items() if p == partition}
            if not there:
                missing[partition] = dict(enumerate(self._parts(rows)))
                continue
            keys = set[_Key]()
            for record in there.values():
                read = decode_examples(record, self._schema)
                if read.dead:
                    raise EventLogError(
                        f"topic {EXAMPLES!r}: {partition}/{record.offset}: {read.dead[0].reason}; expected a record as "
                        "this join has written it"
                    )
                keys |= _keys(read.examples)
            mine = _keys(examples.take(rows))
            others += len(keys - mine)
            left = np.array(
                [row for row, key in zip(rows, _key_list(examples.take(rows)), strict=True) if key not in keys],
                np.int64,
            )
            parts = found.turns[partition, min(there)].parts
            lacking = sorted(set(range(parts)) - there.keys())
            missing[partition] = dict(zip(lacking, np.array_split(left, max(1, len(lacking))), strict=False))
        if others:
            _logger.warning(
                "turn %d was repeated after a restart: %d of its examples in the log are not those of the repeat; "
                "those in the log stay",
                found.turn.number,
                others,
            )
        return missing

    def _records(self, begin: Mapping[TopicPartition, int], end: Mapping[TopicPartition, int]) -> list[Record]:
        """What lies in the topic between two positions, in the order of each partition."""
        records: list[Record] = []
        at = {source: position for source, position in begin.items() if position < end.get(source, 0)}
        while at:
            fetch = self._log.read(at, max_records=_SCAN_RECORDS, timeout_s=_SCAN_S)
            records += [r for r in fetch.records if r.offset < end[TopicPartition(r.topic, r.partition)]]
            at = {source: position for source, position in fetch.positions.items() if position < end[source]}
        return records

    def _tail(self) -> list[Record]:
        """The last record of each partition, and perhaps some before it."""
        begin, end, records = self._log.begin(EXAMPLES), self._log.end(EXAMPLES), list[Record]()
        for source, stop in end.items():
            back, found = 1, list[Record]()
            while not found and begin[source] < stop:
                start = max(begin[source], stop - back)
                found = self._records({source: start}, {source: stop})
                if start == begin[source]:
                    break
                back *= 8
            records += found
        return records


_Key = tuple[int, int, int, bytes]


def _key_list(examples: ExampleBlock) -> list[_Key]:
    """What tells each example from all others: impression, kind, when it was due, of which tasks it has labels."""
    masks = [mask.tobytes() for mask in examples.label_mask]
    columns = (examples.impression_id.tolist(), examples.kind.tolist(), examples.due_ms.tolist(), masks)
    return list(zip(*columns, strict=True))


def _keys(examples: ExampleBlock) -> set[_Key]:
    return set(_key_list(examples))


def _rows_of(examples: ExampleBlock) -> dict[int, I64]:
    """The rows of each partition that has any; those of the first, none, if nothing is there."""
    partitions = np.unique(examples.partition).tolist()
    return {p: np.flatnonzero(examples.partition == p) for p in partitions} or {0: np.zeros(0, np.int64)}
