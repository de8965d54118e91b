"""Entry ids of Redis Streams as offsets, and what was lost between a position and the next entry.

An id is a millisecond and a sequence number. Our own entries get ``0-1, 0-2, …`` (``XADD 0-*``), so their offsets are
0, 1, …. Another program may add entries with ids of its own, as ``XADD *`` does. From then on Redis takes only larger
ids, and our entries go on after the foreign one: after ``1700000000000-0`` come ``1700000000000-1, …``.

The offset of an id is its number among all ids that the table below can hold, counted in their order. So offsets grow
with ids, and they are small and dense where nothing foreign is. 63 bits hold real milliseconds until the year 2109 with
a million entries in each, and also ids that are micro- or nanoseconds, or made up, with fewer entries in each.

=============================== ===========================
milliseconds                    sequence numbers
=============================== ===========================
0 (ours)                        up to 2**59 - 1
up to 2**42 - 1, the year 2109  up to 2**20 - 1
up to 2**53 - 1                 up to 2**7 - 1
up to 2**61 - 1                 0
=============================== ===========================

An id beyond the table cannot be a position; it is an error that names it.
"""

from dataclasses import dataclass
from typing import NamedTuple

from smes.errors import EventLogError, PositionOutOfRange
from stream.log.event_log import TopicPartition

Id = tuple[int, int]
"""Millisecond and sequence number; ids compare as Redis compares them."""

NO_ID: Id = (0, 0)
"""Before the first entry; no entry has it."""


class _Range(NamedTuple):
    """Ids of the milliseconds ``first … last``, with ``2**bits`` sequence numbers each, and the number of the first."""

    first: int
    last: int
    bits: int
    number: int


def _table() -> tuple[_Range, ...]:
    ranges, number, first = [], 0, 0
    for last, bits in ((0, 59), (2**42 - 1, 20), (2**53 - 1, 7), (2**61 - 1, 0)):
        ranges.append(_Range(first, last, bits, number))
        number += (last + 1 - first) << bits
        first = last + 1
    return tuple(ranges)


_TABLE = _table()


def parse_id(text: bytes) -> Id:
    """An entry id as Redis writes it."""
    milliseconds, _, sequence = text.partition(b"-")
    return int(milliseconds), int(sequence)


def shown(entry: Id) -> str:
    """An entry id as Redis writes it."""
    return f"{entry[0]}-{entry[1]}"


def offset_of(at: TopicPartition, entry: Id) -> int:
    """The offset of an entry; -1 of ``NO_ID``.

    Raises:
        EventLogError: The id is beyond the table.
    """
    milliseconds, sequence = entry
    for each in _TABLE:
        if milliseconds <= each.last and sequence < 1 << each.bits:
            return each.number + ((milliseconds - each.first) << each.bits) + sequence - 1
        if milliseconds <= each.last:
            break
    raise EventLogError(
        f"{at.topic}/{at.partition}: entry id {shown(entry)} of another program cannot be a position of the event log; "
        "copy the other entries to a new stream (see docs/operate/outages.md)"
    )


def id_before(position: int) -> Id:
    """The largest id whose offset lies before a position; ``XREAD`` takes it, and so does ``XRANGE`` with ``(``."""
    for each in _TABLE:
        rest = position - each.number
        if rest >> each.bits <= each.last - each.first:
            return each.first + (rest >> each.bits), rest & ((1 << each.bits) - 1)
    return _TABLE[-1].last, 0


def next_ids(newest: Id) -> tuple[str, int]:
    """What id to ask ``XADD`` for so that the new entries have offsets: the same text for up to so many of them.

    One text for all of a round trip keeps their order: if another writer was faster with a larger id, Redis refuses
    them all.

    Args:
        newest: The largest id so far, as far as it is known.
    """
    milliseconds, sequence = newest
    bits = next((each.bits for each in _TABLE if milliseconds <= each.last), 0)
    if bits == 0:
        return f"{milliseconds + 1}-0", 1
    usable = 1 << (bits - 2)  # a quarter of a millisecond's, because several writers may add as many at a time
    return f"{milliseconds + (milliseconds > 0 and sequence >= usable)}-*", usable


@dataclass(frozen=True, slots=True)
class Bounds:
    """What Redis says of a stream.

    Attributes:
        at: Which partition it is.
        length: Number of entries.
        first: Id of the oldest entry; ``NO_ID`` of an empty stream.
        last: The largest id that an entry ever had, whether or not the entry is still there.
        deleted: The largest id of those deleted by ``XDEL``; trimming does not count.
        added: Number of entries ever added.
    """

    at: TopicPartition
    length: int
    first: Id
    last: Id
    deleted: Id
    added: int

    @property
    def begin(self) -> int:
        """Position of the oldest entry, of an empty stream its end."""
        return offset_of(self.at, self.first) if self.length else self.end

    @property
    def end(self) -> int:
        """Position after the newest entry."""
        return offset_of(self.at, self.last) + 1

    def passed(self, position: int, following: Id | None) -> int:
        """How many records somebody deleted between a position and the next entry that is there.

        Args:
            position: Where reading was to go on.
            following: Id of the next entry; None: there is none up to ``last``.

        Raises:
            PositionOutOfRange: Entries there were trimmed, or may have been: the reader came too late.
        """
        before = id_before(position)
        deleted = self._deleted_between(before, following)
        if self.length and self.first <= before:
            return deleted  # trimming takes the oldest first, and an older one is still there
        last_missing = (following[0], following[1] - 1) if following else self.last
        all_deleted = before[0] == last_missing[0] and last_missing <= self.deleted
        removed = self.added - self.length
        # Before the first foreign entry, a position is the number of entries ever added before it.
        if all_deleted or removed <= (position if before[0] == 0 else 0):
            return deleted
        raise PositionOutOfRange(
            f"{self.at.topic}/{self.at.partition}: no record at position {position}: trimmed, "
            f"the log begins at {self.begin}"
        )

    def _deleted_between(self, before: Id, following: Id | None) -> int:
        """About how many entries between the two, both not counted, were deleted.

        Exact among ids of one millisecond, as ours are, unless another program left ids out there. Between
        milliseconds only the largest deleted id tells.
        """
        upto = following or (self.last[0], self.last[1] + 1)
        if before[0] == upto[0]:
            count = min((upto[0], upto[1] - 1), self.deleted)[1] - before[1] if self.deleted > before else 0
        elif before < self.deleted < upto:
            count = self.deleted[1] - before[1] if self.deleted[0] == before[0] else 1
        else:
            count = 0
        return min(count, self.added - self.length)
