"""What the topic of examples has already: its newest turns, and which rows of a repeated turn it lacks."""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from smes.arrays import I64
from smes.errors import EventLogError
from smes.events import ExampleBlock
from smes.schema import Schema
from stream.joined.records import decode_examples
from stream.joined.turns import Turn, readable_turn
from stream.log.event_log import EventLog, Record, TopicPartition
from stream.topics import EXAMPLES

_logger = logging.getLogger(__name__)
_SCAN_RECORDS, _SCAN_S = 256, 1.0
_Key = tuple[int, int, int, bytes]


@dataclass(slots=True)
class FoundTurn:
    """A turn that the topic has already, if only in part.

    Attributes:
        turn: The header of one of its records.
        parts: (partition, part) → the record.
        turns: And its header.
    """

    turn: Turn
    parts: dict[tuple[int, int], Record] = field(default_factory=dict)
    turns: dict[tuple[int, int], Turn] = field(default_factory=dict)


def newest_records(log: EventLog) -> list[Record]:
    """The last record of each partition of the topic, and perhaps some before it."""
    begin, end, records = log.begin(EXAMPLES), log.end(EXAMPLES), list[Record]()
    for source, stop in end.items():
        back, found = 1, list[Record]()
        while not found and begin[source] < stop:
            start = max(begin[source], stop - back)
            found = _records(log, {source: start}, {source: stop})
            if start == begin[source]:
                break
            back *= 8
        records += found
    return records


def newest_epoch(log: EventLog) -> int:
    """The highest epoch of the last records; 0 where they name none."""
    return _highest_epoch(newest_records(log))


def newest_epoch_since(log: EventLog, written: Mapping[TopicPartition, int], end: Mapping[TopicPartition, int]) -> int:
    """The highest epoch of all records between two positions that are in the log still; 0 where they name none."""
    begin = log.begin(EXAMPLES)
    return _highest_epoch(_records(log, {source: max(begin[source], written.get(source, 0)) for source in end}, end))


def turns_since(
    log: EventLog, number: int, written: Mapping[TopicPartition, int], epoch: int, epoch_before: int = 0
) -> list[FoundTurn]:
    """The turns that the topic has between a checkpoint and the fence of a run, in order.

    Args:
        log: Where the topic is.
        number: The checkpoint's last turn.
        written: Where the topic ended then, or begins now.
        epoch: Of this run.
        epoch_before: Of the run that wrote the checkpoint, whose fences lie before ``written``: records of earlier runs
            that came later still count for nobody.

    Raises:
        EventLogError: A later run than this one has written.
    """
    found: dict[int, FoundTurn] = {}
    epochs: dict[TopicPartition, int] = {}
    for record in _records(log, written, log.end(EXAMPLES)):
        turn, source = readable_turn(record), TopicPartition(record.topic, record.partition)
        if turn is None or turn.epoch < epochs.get(source, epoch_before):
            continue
        if turn.epoch > epoch:
            raise EventLogError(
                f"topic {EXAMPLES!r}: {source.partition}/{record.offset} is of another join, which has begun to "
                "write after this one, expected one join a topic"
            )
        epochs[source] = turn.epoch
        if turn.number > number and not turn.is_fence:
            there = found.setdefault(turn.number, FoundTurn(turn))
            there.parts.setdefault((record.partition, turn.part), record)
            there.turns.setdefault((record.partition, turn.part), turn)
    expected = list(range(number + 1, number + 1 + len(found)))
    if sorted(found) != expected:
        raise EventLogError(
            f"topic {EXAMPLES!r}: turns {sorted(found)[:8]} after the checkpoint's {number}, expected "
            f"{expected[:8]}: records are gone, or another join has written them"
        )
    return [found[each] for each in expected]


def missing_rows(
    found: FoundTurn, examples: ExampleBlock, schema: Schema, parts_of: Callable[[I64], list[I64]]
) -> dict[int, dict[int, I64]]:
    """Which rows of a repeated turn the topic lacks: partition → part → rows.

    What the topic has stands. Where the repeat gives other examples (:mod:`stream.join.joiner` says of which events
    that can come), those that are there stay, and those that are not there are added.

    Args:
        found: What the topic has.
        examples: What the repeat gives.
        schema: Features and tasks.
        parts_of: How the rows of a partition are divided among records.

    Raises:
        EventLogError: A part that is there cannot be read.
    """
    missing, others = dict[int, dict[int, I64]](), 0
    for partition, rows in rows_by_partition(examples).items():
        there = {part: record for (p, part), record in found.parts.items() if p == partition}
        if not there:
            missing[partition] = dict(enumerate(parts_of(rows)))
            continue
        keys = set[_Key]()
        for record in there.values():
            read = decode_examples(record, schema)
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


def _records(log: EventLog, begin: Mapping[TopicPartition, int], end: Mapping[TopicPartition, int]) -> list[Record]:
    """What lies in the topic between two positions, in the order of each partition."""
    records: list[Record] = []
    at = {source: position for source, position in begin.items() if position < end.get(source, 0)}
    while at:
        fetch = log.read(at, max_records=_SCAN_RECORDS, timeout_s=_SCAN_S)
        records += [r for r in fetch.records if r.offset < end[TopicPartition(r.topic, r.partition)]]
        at = {source: position for source, position in fetch.positions.items() if position < end[source]}
    return records


def _highest_epoch(records: Iterable[Record]) -> int:
    return max((turn.epoch for turn in map(readable_turn, records) if turn is not None), default=0)


def _key_list(examples: ExampleBlock) -> list[_Key]:
    """What tells each example from all others: impression, kind, when it was due, of which tasks it has labels."""
    masks = [mask.tobytes() for mask in examples.label_mask]
    columns = (examples.impression_id.tolist(), examples.kind.tolist(), examples.due_ms.tolist(), masks)
    return list(zip(*columns, strict=True))


def _keys(examples: ExampleBlock) -> set[_Key]:
    return set(_key_list(examples))


def rows_by_partition(examples: ExampleBlock) -> dict[int, I64]:
    """The rows of each partition that has any; those of the first, none, if nothing is there."""
    partitions = np.unique(examples.partition).tolist()
    return {p: np.flatnonzero(examples.partition == p) for p in partitions} or {0: np.zeros(0, np.int64)}
