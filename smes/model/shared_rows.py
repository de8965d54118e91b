"""Rows of one process that others read: a serving table, and what changed in it, in memory that all of them map.

One process loads and folds (:mod:`smes.model.serving_rows`). It tells the others where its memory is, by numbers and
descriptors, and they look rows up there as it does: what holds for threads that read while one folds holds for
processes, too. Each of them has the descriptions of one generation after the other, and says which it still reads.

Letters: N keys, M removed keys, C columns of a group, X words of 64 bits of a record.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from smes.arrays import F32, I32, I64
from smes.model.deltas import RowDelta
from smes.model.serving_kernels import EMPTY, Slots, Words, no_rows, read_shadow
from smes.model.serving_rows import RowMap, RowTable, ServingTable, Shadow
from smes.reserved import ReservedArray
from smes.shared_memory import Bytes, SharedArray, SharedBytes

_WORD, _FLOAT = 8, 4


@dataclass(frozen=True)
class Place:
    """Memory, as another process is told of it: its number, which none other of the writer has, and its size."""

    number: int
    size: int


class Map(Protocol):
    """Maps memory of another process, by its place."""

    def __call__(self, place: Place) -> Bytes: ...


@dataclass(frozen=True)
class TablePlaces:
    """Where a table is.

    Attributes:
        records, slots: Its memory.
        row_bits: Of the map that the slots are.
        rows: How many keys it had.
        groups: Column group → C.
    """

    records: Place
    slots: Place
    row_bits: int
    rows: int
    groups: dict[str, int]


@dataclass(frozen=True)
class ShadowPlace:
    """Where what changed is: keys, removed keys, the columns of all groups, and the map, one behind the other.

    Attributes:
        memory: Of all of it.
        version, changed, removed: As of the :class:`smes.model.serving_rows.Shadow`; N and M.
    """

    memory: Place
    version: int
    changed: int
    removed: int


class SharedTable(ServingTable):
    """A :class:`smes.model.serving_rows.ServingTable` that other processes may read.

    Raises:
        ValueError: There are too many rows.
        MemoryError: The system does not give the memory.
    """

    def __init__(self, groups: Mapping[str, int], rows: int = 0) -> None:
        self._slots_memory: list[tuple[Slots, SharedBytes]] = []
        super().__init__(groups, rows)

    def places(self) -> tuple[TablePlaces, list[SharedBytes]]:
        """Where the table is now, and the memory itself: that of the records, then that of the map."""
        records = self._records
        assert isinstance(records, SharedArray)
        self._slots_memory = [(slots, memory) for slots, memory in self._slots_memory if slots is self._map.slots]
        ((_, slots_memory),) = self._slots_memory
        both = [records.memory, slots_memory]
        places = TablePlaces(place_of(both[0]), place_of(both[1]), self._map.row_bits, self.num_rows, self.groups)
        return places, both

    def _empty_records(self) -> ReservedArray:
        return SharedArray(np.int64, self.record_words)

    def _empty_slots(self, count: int) -> Slots:
        memory = SharedBytes(count * EMPTY.itemsize)
        slots: Slots = memory.array.view(np.uint32)
        slots.fill(EMPTY)
        self._slots_memory.append((slots, memory))
        return slots


class MappedTable(RowTable):
    """A table of another process, to read.

    Args:
        places: Where it is.
        map_memory: Maps it.
    """

    def __init__(self, places: TablePlaces, map_memory: Map) -> None:
        super().__init__(places.groups)
        self._rows = places.rows
        words: I64 = map_memory(places.records).view(np.int64)
        self._records: Words = words[: len(words) // self.record_words * self.record_words].reshape(
            -1, self.record_words
        )
        self._map = RowMap(map_memory(places.slots).view(np.uint32), places.row_bits)

    @property
    def num_rows(self) -> int:
        """Keys in the table when it was described."""
        return self._rows

    def _words(self) -> Words:
        return self._records


def place_of(memory: SharedBytes) -> Place:
    """What others are told of some memory."""
    return Place(memory.number, memory.size)


def share(shadow: Shadow) -> tuple[ShadowPlace, SharedBytes]:
    """Copy what changed in a version into memory for others."""
    parts: list[NDArray[Any]] = [
        shadow.keys,
        *(shadow.delta.columns[name] for name in sorted(shadow.delta.columns)),
        shadow.slots,
    ]
    memory = SharedBytes(max(1, sum(part.nbytes for part in parts)))
    start = 0
    for part in parts:
        memory.array[start : start + part.nbytes] = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
        start += part.nbytes
    return ShadowPlace(place_of(memory), shadow.version, len(shadow), len(shadow.delta.removed)), memory


def mapped_shadow(place: ShadowPlace, groups: Mapping[str, int], map_memory: Map) -> Shadow:
    """What changed in a version, in memory of another process."""
    raw = map_memory(place.memory)
    take = _taker(raw)
    keys: I64 = take((place.changed + place.removed) * _WORD).view(np.int64)
    columns: dict[str, F32] = {}
    for name in sorted(groups):
        floats: F32 = take(place.changed * groups[name] * _FLOAT).view(np.float32)
        columns[name] = floats.reshape(place.changed, groups[name])
    slots: I32 = take((2 * len(keys) + 1) * _FLOAT).view(np.int32)
    delta = RowDelta(keys[: place.changed], columns, keys[place.changed :])
    return Shadow.of_arrays(delta, place.version, keys, slots)


def _taker(raw: Bytes) -> Callable[[int], Bytes]:
    """Gives the next bytes, at each call."""
    start = 0

    def take(size: int) -> Bytes:
        nonlocal start
        start += size
        return raw[start - size : start]

    return take


def compile_mapped_kernels() -> None:
    """Run the compiled loops that read once on memory that cannot be written to, for which they are others."""
    table, floats = SharedTable({"a": 2}), np.zeros((2, 2), np.float32)
    table.add(np.arange(2), {"a": floats})
    places, memory = table.places()
    change = Shadow(RowDelta(np.arange(1), {"a": floats[:1]}, np.arange(1, 2)), 1, {"a": 2})
    shadow_place, shadow_memory = share(change)
    by_number = {place_of(one): one for one in (*memory, shadow_memory)}

    def look_at(place: Place) -> Bytes:
        bytes_ = by_number[place].array.view()
        bytes_.flags.writeable = False
        return bytes_

    mapped, shadow = MappedTable(places, look_at), mapped_shadow(shadow_place, places.groups, look_at)
    found_N = no_rows(2)
    shadow.find(found_N, np.arange(2), 0)
    records, out_NC = mapped.find(found_N, np.arange(2)), np.empty((2, 2), np.float32)
    mapped.read(found_N, records, "a", out_NC)
    read_shadow(found_N, shadow.delta.columns["a"], 0, out_NC)
