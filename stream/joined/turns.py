"""Turns: the header that says which moment of the join a record of examples is of.

The join hands out examples in *turns*, numbered 1, 2, 3, …. The examples of a turn lie in the partitions of their
impressions, in one or more *parts* each. Every record names its turn, how many parts the turn has in this partition,
and which turn each partition has had last. So whoever reads some or all of the partitions finds the order in which the
join gave the examples, and knows when nothing of a turn is missing: from the log alone, whatever the clock says.

Two more things stand there, for the join itself: up to where it had read, and the watermark that it had reached. With
them a join that was killed repeats a turn to the row (:mod:`stream.joined.writer`).

An *epoch* is one run of the join. A run that begins writes a *fence* into each partition: a record without rows and
with ``parts`` 0. What a run of a lower epoch writes after it does not count: it is of a join that was thought dead.
"""

from collections.abc import Iterable
from typing import Annotated

import msgspec

from stream.log.event_log import Headers, Record

HEADER = "turn"
"""Name of the record header that holds a :class:`Turn` as JSON."""

_Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
_Part = Annotated[int, msgspec.Meta(ge=0, le=2**20)]
_Int = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]


class Turn(msgspec.Struct, frozen=True):
    """What the header says.

    Attributes:
        epoch: Which run of the join wrote it; a later run has a higher number (Unix milliseconds of its start).
        number: The turn, from 1; of a fence, the last turn of the runs before, 0 where there was none.
        part: Which of the turn's records in this partition it is, from 0.
        parts: How many there are; 0: a fence.
        last: For each partition of the topic, the last turn up to this one with a record there; 0: none. Partitions
            that were added later are not in it.
        watermark_ms: The join's watermark after the turn, Unix milliseconds; 2⁶³ - 1: the join was told that the log
            ends here.
        impressions, feedback: For each partition of these topics, the next record that the join had to read then.
    """

    epoch: _Count
    number: _Count
    part: _Part
    parts: _Part
    last: tuple[_Count, ...]
    watermark_ms: _Int
    impressions: tuple[_Count, ...]
    feedback: tuple[_Count, ...]

    @property
    def is_fence(self) -> bool:
        """Whether it only says that a run of the join begins."""
        return self.parts == 0

    def last_of(self, partition: int) -> int:
        """The last turn up to this one with a record in a partition; 0: none."""
        return self.last[partition] if partition < len(self.last) else 0

    def header(self) -> tuple[str, bytes]:
        """As a record's header."""
        return HEADER, msgspec.json.encode(self)


def turn_of(headers: Headers) -> Turn | None:
    """The turn that a record's headers name; None if they name none.

    Raises:
        ValueError: The header is no turn.
    """
    for name, value in headers:
        if name == HEADER:
            try:
                turn = msgspec.json.decode(value, type=Turn)
            except msgspec.MsgspecError as error:
                raise ValueError(f"header {HEADER}: {error}") from error
            if turn.parts and turn.part >= turn.parts:
                raise ValueError(f"header {HEADER}: part {turn.part} of {turn.parts}, expected a part below")
            return turn
    return None


def readable_turn(record: Record) -> Turn | None:
    """The turn that a record names; None if it names none, or its header is no turn."""
    try:
        return turn_of(record.headers)
    except ValueError:
        return None


def newest_turn(records: Iterable[Record]) -> Turn | None:
    """The turn with the highest number that records name, fences among them."""
    turns = [turn for turn in map(readable_turn, records) if turn is not None]
    return max(turns, key=lambda turn: (turn.number, turn.epoch), default=None)
