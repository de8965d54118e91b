"""The order of joined examples across partitions, found from their records alone: turn by turn."""

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from smes.arrays import I64
from smes.events import ExampleBlock
from stream.joined.turns import Turn


@dataclass(frozen=True, slots=True)
class Item:
    """A record that was read.

    Attributes:
        turn: Of the record; None: its writer names none.
        examples: The good ones.
        row: int64 [N], each one's place in its turn.
        next_offset: What to read after it.
        counts: What else is to be counted when it is taken: ``dead_lettered``, ``unknown_fields``, ``gaps``,
            ``unreadable``.
    """

    turn: Turn | None
    examples: ExampleBlock
    row: I64
    next_offset: int
    counts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Taken:
    """The next examples in order.

    Attributes:
        examples: In the order in which the join gave them.
        watermark_ms: Event time that the join had reached after them; None where the writer says nothing.
    """

    examples: ExampleBlock
    watermark_ms: int | None


@dataclass(slots=True)
class PartitionQueue:
    """What was read of a partition and not taken yet.

    Attributes:
        position: The next record to take.
        read_to: The next record to read.
        done: The last turn that was taken whole, and all before it; -1: turns that come are the first.
        epoch: The highest epoch of a record that was taken.
        started: Whether a record was seen, or none was lost before the first.
        end_at_start: Where the partition ended when it was looked at first.
        items: In the order of their offsets.
        counts: Of what was taken: ``read``, examples of impressions that begin, and those refused or ``duplicate``:
            of records that do not count, because they were written twice or by a join that was thought dead; and the
            counts of the items.
    """

    position: int
    read_to: int
    done: int = -1
    epoch: int = 0
    started: bool = True
    end_at_start: int = 0
    items: deque[Item] = field(default_factory=deque)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, item: Item) -> None:
        """Take a record that was read."""
        if not self.started and item.turn is not None:
            self.done, self.started = item.turn.number - (0 if item.turn.is_fence else 1), True
        self.items.append(item)

    def settle(self) -> None:
        """Pass over what counts for nothing, so that the position is at what will be taken next."""
        if self.head() is None:
            self.position = self.read_to

    def head(self) -> Item | None:
        """The first record that counts; those before it are passed over."""
        while self.items:
            item = self.items[0]
            if item.turn is None:
                if len(item.examples):
                    return item
                self._pop()
                continue
            if item.turn.epoch >= self.epoch and item.turn.number > self.done and not item.turn.is_fence:
                return item
            self.epoch = max(self.epoch, item.turn.epoch)
            self.counts["duplicate"] += item.examples.num_impressions
            self._pop()
        return None

    def has_whole(self, number: int) -> bool:
        """Whether all parts of a turn are here, or will never be: the partition has gone on to another one."""
        parts, wanted, epoch = set[int](), 0, self.epoch
        for item in self.items:
            turn = item.turn
            if turn is None or turn.epoch < epoch:
                continue
            epoch = turn.epoch
            if turn.number > number:
                return True
            if turn.number == number and not turn.is_fence:
                parts.add(turn.part)
                wanted = turn.parts
                if len(parts) == wanted:
                    return True
        return False

    def take(self, number: int) -> Iterator[Item]:
        """The parts of a turn that :meth:`has_whole`, each once."""
        parts = set[int]()
        while (item := self.head()) is not None and item.turn is not None and item.turn.number == number:
            self.epoch = max(self.epoch, item.turn.epoch)
            self._pop()
            if item.turn.part in parts:
                self.counts["duplicate"] += item.examples.num_impressions
                continue
            parts.add(item.turn.part)
            yield item
            if len(parts) == item.turn.parts:
                break
        self.done = max(self.done, number)

    def take_first(self) -> Item:
        """The first record, whatever it is."""
        item = self.items[0]
        self._pop()
        return item

    @property
    def impressions(self) -> int:
        """Impressions that begin in what is here."""
        return sum(item.examples.num_impressions for item in self.items)

    @property
    def rows(self) -> int:
        """Examples that are here."""
        return sum(len(item.examples) for item in self.items)

    @property
    def may_have_started(self) -> bool:
        """Whether it is known what the first turn here is; records before it are gone from the log."""
        return self.started or self.read_to >= self.end_at_start

    def _pop(self) -> None:
        item = self.items.popleft()
        self.position = item.next_offset if self.items else max(item.next_offset, self.read_to)
        self.counts["read"] += item.examples.num_impressions + item.counts.get("dead_lettered", 0)
        self.counts.update(item.counts)


def next_turn(queues: dict[int, PartitionQueue], idle: Iterable[int]) -> Taken | None:
    """The next examples in order; None while some of them may still be on their way.

    Turns come by their numbers. One is ready when each of these partitions has all of its parts, and every turn before
    it. Records without a turn come by the time at which their first example was due, one at a time; only for these it
    matters which partitions are idle.

    Args:
        queues: By partition.
        idle: Partitions that have had nothing to read for a while.
    """
    if not all(queue.may_have_started for queue in queues.values()):
        return None
    heads = {p: head for p, queue in queues.items() if (head := queue.head()) is not None}
    if not heads:
        return None
    turns = {p: head.turn for p, head in heads.items() if head.turn is not None}
    if len(turns) < len(heads):
        return _next_without_turn(queues, heads, set(idle))
    number = min(turn.number for turn in turns.values())
    first = {p: turn for p, turn in turns.items() if turn.number == number}
    some = next(iter(first.values()))
    for p, queue in queues.items():
        if p in first:
            if not queue.has_whole(number):
                return None
        elif p not in heads and queue.started and some.last_of(p) > queue.done:
            return None
    items = [item for p in first for item in queues[p].take(number)]
    examples = ExampleBlock.concat([item.examples for item in items])
    row = np.concatenate([item.row for item in items])
    return Taken(examples.take(np.argsort(row, kind="stable")), some.watermark_ms)


def lacking_of_the_next(queues: dict[int, PartitionQueue]) -> set[int]:
    """Partitions of which more must be read before :func:`next_turn` gives something; where it gives None, some."""
    heads = {p: head for p, queue in queues.items() if (head := queue.head()) is not None}
    turns = {p: head.turn for p, head in heads.items() if head.turn is not None}
    number = min((turn.number for turn in turns.values()), default=0)
    cut = {p for p, turn in turns.items() if turn.number == number and not queues[p].has_whole(number)}
    return cut | {p for p, queue in queues.items() if p not in heads or not queue.may_have_started}


def _next_without_turn(queues: dict[int, PartitionQueue], heads: dict[int, Item], idle: set[int]) -> Taken | None:
    if any(p not in heads and p not in idle for p in queues):
        return None

    def due_ms(p: int) -> tuple[int, int]:
        block = heads[p].examples
        return (int(block.due_ms[0]) if len(block) else np.iinfo(np.int64).min, p)

    item = queues[min(heads, key=due_ms)].take_first()
    return Taken(item.examples.take(np.argsort(item.examples.due_ms, kind="stable")), None)
