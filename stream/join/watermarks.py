"""How far each partition is: the event time that several of its last events vouch for.

A partition's time is ahead of no lone event. With ``vouchers`` = 4 and events that come in this order (seconds)::

    event       10   11   12   13   312   14   15   16   17
    vouched      -    -    -   10    11   12   13   14   15      (``-``: nothing yet)

The *recent* events of a partition are its last ``2 * vouchers - 1`` ones. The *vouched* time is the latest that at
least ``vouchers`` of them have reached, so the majority; it never goes back. So ``vouchers - 1`` wrong clocks among
so many events do nothing, and after a real jump (a gap in the log, a night without traffic) the time is there with the
``vouchers``-th event behind the jump. In traffic without disorder the vouched time is that of the event that was read
``vouchers - 1`` events ago: this is what the safety costs.

Two kinds of event vouch for nothing:

- Further events of an impression that a recent event belongs to: a record that a producer sent twice, or the click and
  the like of one device with a wrong clock, count once, with the latest of their times.
- Events behind the watermark (the vouched time less the allowed lateness). They say nothing about how far the partition
  is, so a producer that delivers an hour late does not hold it back.

All this depends on what the partition holds, in its order, and on nothing else.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
from numba import njit
from numpy.typing import NDArray

from smes.arrays import I32, I64, Arrays
from stream.partition_state import state_name

START_OF_TIME = int(np.iinfo(np.int64).min) // 2  # room to subtract windows from

_Array = TypeVar("_Array", bound=NDArray[Any])


class Vouched(NamedTuple):
    """Columns by partition. R recent events are kept, oldest first; places not yet used come before them.

    Attributes:
        vouched_ms: int64 [P].
        recent_ms: int64 [P, R], event times; ``START_OF_TIME`` where there is none yet.
        recent_id: int64 [P, R], impression ids.
    """

    vouched_ms: I64
    recent_ms: I64
    recent_id: I64


class Watermarks:
    """The watermarks of one topic's partitions: what each has vouched for, less the allowed lateness.

    Args:
        lateness_ms: The allowed lateness.
        vouchers: How many of a partition's recent events must have reached a time.
    """

    def __init__(self, lateness_ms: int, vouchers: int) -> None:
        self._lateness_ms, self._vouchers = lateness_ms, vouchers
        shape = (0, 2 * vouchers - 1)
        self._columns = Vouched(np.zeros(0, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.int64))

    def grow(self, partitions: int) -> None:
        """Have so many partitions; of the new ones nothing has been read."""
        start = (START_OF_TIME + self._lateness_ms, START_OF_TIME, 0)
        self._columns = Vouched(
            *(longer(column, partitions, fill) for column, fill in zip(self._columns, start, strict=True))
        )

    def of(self, partition: int) -> int:
        """The watermark of a partition, Unix milliseconds; ``START_OF_TIME`` until enough of it was read."""
        return int(self._columns.vouched_ms[partition]) - self._lateness_ms

    def before(self, partition: I32, event_time_ms: I64, impression_id: I64, floor_ms: int) -> I64:
        """Each event's own watermark just before it, or ``floor_ms`` if that is later; the events are then recent.

        Lateness is judged by the event's own partition, never by how far others were read. So the join's outcome does
        not depend on how reads interleave.

        Args:
            partition: int32 [N].
            event_time_ms: int64 [N], in offset order within each partition.
            impression_id: int64 [N].
            floor_ms: A watermark that the whole stream has passed.

        Returns:
            int64 [N].
        """
        before_ms: I64 = _watermarks_before(
            partition, event_time_ms, impression_id, self._columns, self._lateness_ms, self._vouchers, floor_ms
        )
        return before_ms

    def state(self, topic: str, partition: int) -> Arrays:
        """What :meth:`load_state` goes on from."""
        columns = self._columns._asdict()
        return {state_name(topic, partition, name): c[[partition]].ravel() for name, c in columns.items()}

    def load_state(self, topic: str, partitions: Iterable[int], state: Arrays) -> None:
        """The inverse of :meth:`state` for each of these partitions; of all others nothing has been read."""
        size = len(self._columns.vouched_ms)
        self._columns = Vouched(*(column[:0] for column in self._columns))
        self.grow(size)
        for partition in partitions:
            if (old := state_name(topic, partition, "latest_ms")) in state:  # saved when the latest event counted alone
                self._columns.vouched_ms[partition] = state[old][0]
                continue
            vouched_ms, recent_ms, recent_id = (
                state[state_name(topic, partition, name)] for name in self._columns._fields
            )
            kept = min(len(recent_ms), 2 * self._vouchers - 1)  # saved with another number of vouchers, perhaps
            self._columns.vouched_ms[partition] = vouched_ms[0]
            self._columns.recent_ms[partition, -kept:] = recent_ms[-kept:]
            self._columns.recent_id[partition, -kept:] = recent_id[-kept:]


def longer(array: _Array, rows: int, fill: int) -> _Array:
    """The array with ``rows`` rows, the new ones ``fill``."""
    added = np.full((rows - len(array), *array.shape[1:]), fill, array.dtype)
    return cast(_Array, np.concatenate([array, added]))


@njit(cache=True)
def _watermarks_before(
    partition: I32,
    event_time_ms: I64,
    impression_id: I64,
    columns: Vouched,
    lateness_ms: int,
    vouchers: int,
    floor_ms: int,
) -> I64:  # pragma: no cover - compiled
    """See :meth:`Watermarks.before`; advances the columns in place."""
    before = np.empty(len(partition), np.int64)
    for i in range(len(partition)):
        p = partition[i]
        own_ms = columns.vouched_ms[p] - lateness_ms
        before[i] = max(own_ms, floor_ms)
        if event_time_ms[i] >= own_ms:
            _note(columns.recent_ms[p], columns.recent_id[p], event_time_ms[i], impression_id[i])
            columns.vouched_ms[p] = _vouched(columns.recent_ms[p], columns.vouched_ms[p], vouchers)
    return before


@njit(cache=True)
def _note(recent_ms: I64, recent_id: I64, time_ms: int, impression_id: int) -> None:  # pragma: no cover - compiled
    """Note an event of one partition among its recent ones, [R] each."""
    for j in range(len(recent_ms)):
        if recent_id[j] == impression_id and recent_ms[j] != START_OF_TIME:
            recent_ms[j] = max(recent_ms[j], time_ms)
            return
    for j in range(len(recent_ms) - 1):
        recent_ms[j], recent_id[j] = recent_ms[j + 1], recent_id[j + 1]
    recent_ms[-1], recent_id[-1] = time_ms, impression_id


@njit(cache=True)
def _vouched(recent_ms: I64, vouched_ms: int, vouchers: int) -> int:  # pragma: no cover - compiled
    """The latest time that ``vouchers`` of the recent events [R] have reached, or ``vouched_ms`` if that is later."""
    while True:
        count, earliest_ms = 0, vouched_ms
        for j in range(len(recent_ms)):
            if recent_ms[j] > vouched_ms:
                earliest_ms = recent_ms[j] if count == 0 else min(earliest_ms, recent_ms[j])
                count += 1
        if count < vouchers:
            return vouched_ms
        vouched_ms = earliest_ms
