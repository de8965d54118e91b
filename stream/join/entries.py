"""What the join knows of each impression id, and when something is due for it.

An *entry* lives in a row that stays the same until the entry is forgotten; rows are then used again, so memory is
bounded by what waits and what is remembered. Features are kept only for impressions that wait. Letters: M entries, T
tasks.
"""

import heapq
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from smes.arrays import F32, I32, I64, U64, Arrays, GrowingColumns
from smes.events import ImpressionBlock
from smes.id_map import IdMap
from smes.schema import Schema
from stream.partition_state import load_rows, save_rows
from stream.topics import FEEDBACK, IMPRESSIONS

FREE, EARLY, WAITING, DONE = range(4)
"""Status of an entry: unused; has feedback but no impression yet; its impression waits for its last example; that one
was emitted and the id is remembered.
"""

U8 = NDArray[np.uint8]


class Entries(NamedTuple):
    """Columns of the table of entries. Bit t of a bit set stands for task t.

    Attributes:
        impression_id: int64 [M].
        status: uint8 [M], one of ``FREE, EARLY, WAITING, DONE``.
        partition: int32 [M], of the impression; of the first feedback while the entry is ``EARLY``.
        due_ms: int64 [M], the watermark at which something happens to it: an example of it is emitted, it is orphaned
            or forgotten.
        event_time_ms: int64 [M], of the impression.
        read_ms: int64 [M], the impression's own watermark just before it: none of its examples is due before.
        stage: uint8 [M], how many stages its impression has been emitted at.
        pending: uint64 [M], the tasks whose label is still to be emitted as a correction.
        no_label: uint64 [M], the tasks that its impression has no label of, whatever feedback comes
            (:attr:`smes.events.ImpressionBlock.no_label`).
        seen: uint64 [M], the tasks that some feedback was read for, whatever became of it.
        attached: uint64 [M], the tasks whose label the entry holds.
        labels: float32 [M, T].
        label_time_ms, label_arrival_ms: int64 [M, T].
        label_due_ms: int64 [M, T], the label's time, or its own watermark just before it, whichever is later: what is
            due later may depend on it, however reads interleave.
        label_partition: int32 [M, T], the partition that feedback was read from before its impression.
        not_before_ms: int64 [M, T], feedback before its impression is late for an impression older than this.
    """

    impression_id: I64
    status: U8
    partition: I32
    due_ms: I64
    event_time_ms: I64
    read_ms: I64
    stage: U8
    pending: U64
    no_label: U64
    seen: U64
    attached: U64
    labels: F32
    label_time_ms: I64
    label_due_ms: I64
    label_arrival_ms: I64
    label_partition: I32
    not_before_ms: I64


class EntryTable:
    """One entry per impression id, and the features of the impressions that wait.

    Args:
        schema: Features and tasks.
    """

    def __init__(self, schema: Schema) -> None:
        self._rows = IdMap()
        self._columns = GrowingColumns(_no_entries(schema.num_tasks)._asdict())
        self._feature_rows = IdMap()  # entry → row of the features
        self._features = GrowingColumns(ImpressionBlock.empty(schema).arrays())

    @property
    def nbytes(self) -> int:
        """Bytes of memory, the room for more entries included."""
        columns = self._columns.nbytes + self._features.nbytes
        return columns + self._rows.nbytes + self._feature_rows.nbytes

    @property
    def columns(self) -> Entries:
        """The entries' columns, to be read and written in place; good until the next :meth:`insert`."""
        return Entries(**self._columns.arrays)

    def insert(self, impression_id: I64) -> I64:
        """The entry of each id, made where there is none. int64 [N] → int64 [N]."""
        self._columns.reserve(self._rows.num_rows + len(impression_id))
        entries = self._rows.insert(impression_id)
        self._columns.arrays["impression_id"][entries] = impression_id
        return entries

    def forget(self, entries: I64) -> None:
        """Free the rows of these entries."""
        self._rows.remove(self.columns.impression_id[entries])

    def keep_features(self, entries: I64, block: ImpressionBlock) -> None:
        """Keep the impressions of these entries until :meth:`drop_features`."""
        rows = self._feature_rows.insert(entries)
        self._features.reserve(self._feature_rows.num_rows)
        for name, column in block.arrays().items():
            self._features.arrays[name][rows] = column

    def features(self, entries: I64, names: Iterable[str]) -> Arrays:
        """Columns of these entries' impressions."""
        rows = self._feature_rows.find(entries)
        return {name: self._features.arrays[name][rows] for name in names}

    def drop_features(self, entries: I64) -> None:
        """Keep the impressions of these entries no longer."""
        self._feature_rows.remove(entries)

    def state(self, partitions: Sequence[int]) -> Arrays:
        """Arrays per partition; see :mod:`stream.partition_state`."""
        _, rows = self._rows.items()
        columns = {name: column[rows] for name, column in self._columns.arrays.items()}
        early = columns["status"] == EARLY
        waiting = self._feature_rows.find(rows[columns["status"] == WAITING])
        features = {name: column[waiting] for name, column in self._features.arrays.items()}
        return {
            **save_rows(FEEDBACK, "entry", {name: c[early] for name, c in columns.items()}, partitions),
            **save_rows(IMPRESSIONS, "entry", {name: c[~early] for name, c in columns.items()}, partitions),
            **save_rows(IMPRESSIONS, "waiting", features, partitions),
        }

    def load_state(self, state: Arrays) -> I64:
        """The inverse of :meth:`state`; all entries are returned."""
        early, others = load_rows(FEEDBACK, "entry", state), load_rows(IMPRESSIONS, "entry", state)
        columns = {name: np.concatenate([others[name], early[name]]) for name in self._columns.arrays}
        self._columns = GrowingColumns(columns)
        self._rows = IdMap.from_keys(columns["impression_id"])
        # Impressions that wait have their features in the same order.
        self._feature_rows = IdMap.from_keys(np.flatnonzero(columns["status"] == WAITING).astype(np.int64))
        self._features = GrowingColumns(load_rows(IMPRESSIONS, "waiting", state))
        return np.arange(len(columns["status"]), dtype=np.int64)


class DueTimes:
    """When something is due for which entry: a heap of runs that are sorted by due time."""

    def __init__(self) -> None:
        self._runs: list[tuple[int, int, I64, I64]] = []  # (first due time, sequence number, due times, entries)
        self._sequence = 0

    def note(self, due_ms: I64, entries: I64) -> None:
        """Note when each entry is due. int64 [N] each."""
        order = np.argsort(due_ms, kind="stable")
        self._push(due_ms[order], entries[order])

    def pop_before(self, watermark_ms: int) -> I64 | None:
        """Take entries that are due before the watermark; None when there are no more."""
        if not self._runs or self._runs[0][0] >= watermark_ms:
            return None
        _, _, due_ms, entries = heapq.heappop(self._runs)
        count = int(np.searchsorted(due_ms, watermark_ms, side="left"))
        self._push(due_ms[count:], entries[count:])
        return entries[:count]

    def _push(self, due_ms: I64, entries: I64) -> None:
        if len(entries):
            self._sequence += 1
            heapq.heappush(self._runs, (int(due_ms[0]), self._sequence, due_ms, entries))


def _no_entries(num_tasks: int) -> Entries:
    by_task = (0, num_tasks)
    return Entries(
        impression_id=np.zeros(0, np.int64),
        status=np.zeros(0, np.uint8),
        partition=np.zeros(0, np.int32),
        due_ms=np.zeros(0, np.int64),
        event_time_ms=np.zeros(0, np.int64),
        read_ms=np.zeros(0, np.int64),
        stage=np.zeros(0, np.uint8),
        pending=np.zeros(0, np.uint64),
        no_label=np.zeros(0, np.uint64),
        seen=np.zeros(0, np.uint64),
        attached=np.zeros(0, np.uint64),
        labels=np.zeros(by_task, np.float32),
        label_time_ms=np.zeros(by_task, np.int64),
        label_due_ms=np.zeros(by_task, np.int64),
        label_arrival_ms=np.zeros(by_task, np.int64),
        label_partition=np.zeros(by_task, np.int32),
        not_before_ms=np.zeros(by_task, np.int64),
    )
