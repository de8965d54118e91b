"""A growing map from int64 ids to rows: open addressing with linear probing, compiled by Numba.

The embedding table and the join use it. A slot takes four bytes: a row, and in the bits that the row leaves free a part
of the id's hash, so that hardly ever an id is compared in vain. The ids themselves lie by row. At 10 million ids that
is 15 bytes an id in all.

The map grows without stopping. A table of twice as many slots is filled step by step, by the insertions that come
after. The highest bits of its hash say where an id's search begins, so both tables hold the ids in the same order, and
one position says which ids have moved: a search looks into one table only.
"""

import numpy as np
from numba import njit
from numpy.typing import NDArray

from smes.arrays import I64
from smes.hashing import scatter
from smes.prefetch import prefetch
from smes.reserved import ReservedArray

ABSENT = -1
"""The row that :meth:`IdMap.find` returns for an id that is not in the map."""

_U32 = NDArray[np.uint32]

_MAX_LOAD = 0.7
_MOVED_PER_INSERT = 10  # slots: the old table's load stays below 0.7 + 1/10 until all its ids have moved
_MOST_SLOT_BITS = 31
_BLOCK = 128  # ids whose slots, and then whose rows, are fetched from memory side by side


class IdMap:
    """int64 id → row. A new id gets the most recently freed row or, if there is none, the next one: 0, 1, 2 …

    Any int64 is a valid id. An id keeps its row until it is removed. Not thread-safe.

    Args:
        capacity: How many ids to make room for at first.
    """

    def __init__(self, capacity: int = 1024) -> None:
        self._slots = _no_slots(max(4, int(np.ceil(np.log2(max(capacity, 1) / _MAX_LOAD)))))
        self._old = _no_slots(0)
        self._first, self._moved = 0, 1  # the old table's ids are moved from slot _first on; so many slots are done
        self._keys = ReservedArray(np.int64)
        self._free = ReservedArray(np.int64)
        self._num_free = 0
        self._next_row = 0

    def __len__(self) -> int:
        return self._next_row - self._num_free

    @property
    def num_rows(self) -> int:
        """How many rows a table indexed by this map needs: the largest row ever given out, plus one."""
        return self._next_row

    @property
    def nbytes(self) -> int:
        """Bytes of memory in use."""
        rows = self._next_row * self._keys.array.itemsize
        return rows + self._num_free * self._free.array.itemsize + self._slots.nbytes + self._old.nbytes

    @property
    def key_by_row(self) -> I64:
        """The id that has each row, or had it last; a view that later insertions write to. int64 [num_rows]."""
        keys: I64 = self._keys.array[: self._next_row]
        return keys

    @property
    def free_rows(self) -> I64:
        """The rows that were freed and not used again; the last one is used next. A view. int64."""
        free: I64 = self._free.array[: self._num_free]
        return free

    def find(self, ids: I64) -> I64:
        """Look up the row of each id; ``ABSENT`` for unknown ids. int64 [N] → int64 [N]."""
        ids = np.ascontiguousarray(ids, np.int64)
        rows: I64 = _find(self._slots, self._old, self._first, self._moved, self._keys.array, ids)
        return rows

    def insert(self, ids: I64) -> I64:
        """Look up the row of each id; new ids get rows, in order of appearance. int64 [N] → int64 [N]."""
        ids = np.ascontiguousarray(ids, np.int64)
        self._keys.reserve(self._next_row + len(ids))
        rows = np.empty(len(ids), np.int64)
        start = 0
        while start < len(ids):
            stop = start + self._room(len(ids) - start)
            self._insert(ids[start:stop], rows[start:stop])
            start = stop
        return rows

    def remove(self, ids: I64) -> I64:
        """Remove ids and free their rows. The row that was freed last is reused first.

        Returns:
            int64 [N], the row that each id had; ``ABSENT`` for unknown ids.
        """
        ids = np.ascontiguousarray(ids, np.int64)
        rows: I64 = _remove(self._slots, self._old, self._first, self._moved, self._keys.array, ids)
        freed = rows[rows != ABSENT]
        self._free.reserve(self._num_free + len(freed))
        self._free.array[self._num_free : self._num_free + len(freed)] = freed
        self._num_free += len(freed)
        return rows

    def items(self) -> tuple[I64, I64]:
        """All (ids, rows), ordered by row."""
        used = np.ones(self._next_row, np.bool_)
        used[self._free.array[: self._num_free]] = False
        rows = np.flatnonzero(used)
        return self.key_by_row[rows], rows

    def keys(self) -> I64:
        """All ids, ordered by row; only for a map without free rows. int64 [len]."""
        assert self._num_free == 0, "rows have holes: use items()"
        return self.key_by_row.copy()

    @classmethod
    def from_keys(cls, keys: I64) -> "IdMap":
        """Make a map in which ``keys[r]`` has row r.

        Raises:
            ValueError: A key occurs twice.
        """
        result = cls(len(keys))
        result.insert(keys)
        if len(result) != len(keys):
            raise ValueError(f"ids for an id map: {len(keys) - len(result)} of {len(keys)} occur twice")
        return result

    def state(self) -> dict[str, I64]:
        """Arrays from which :meth:`from_state` builds a map that behaves exactly like this one."""
        ids, rows = self.items()
        free = self._free.array[: self._num_free].copy()
        return {"ids": ids, "rows": rows, "free": free, "next_row": np.array([self._next_row])}

    @classmethod
    def from_state(cls, state: dict[str, I64]) -> "IdMap":
        """Rebuild a map from its :meth:`state`."""
        result = cls(int(state["next_row"][0]))  # a slot holds as many bits of a row as number the slots
        result._next_row, result._num_free = int(state["next_row"][0]), len(state["free"])
        result._keys.reserve(result._next_row)
        result._keys.array[state["rows"]] = state["ids"]
        result._free.reserve(result._num_free)
        result._free.array[: result._num_free] = state["free"]
        _place(result._slots, result._keys.array, np.ascontiguousarray(state["rows"], np.int64))
        return result

    def _insert(self, ids: I64, rows: I64) -> None:
        known = len(self)
        self._num_free, self._next_row = _insert(
            self._slots,
            self._old,
            self._first,
            self._moved,
            self._keys.array,
            ids,
            rows,
            self._free.array,
            self._num_free,
            self._next_row,
        )
        if len(self._old) > 1 and len(self) > known:
            self._move(_MOVED_PER_INSERT * (len(self) - known))

    def _room(self, wanted: int) -> int:
        """How many of the next ids may be inserted at once, at least 1; the map begins to grow if that is too few."""
        limit = int(len(self._slots) * _MAX_LOAD)
        if limit - len(self) < min(wanted, len(self._slots) // 16 + 1):
            self._move(len(self._old))
            if len(self._slots) >> _MOST_SLOT_BITS:
                raise OverflowError(f"id map: {len(self)} ids, expected at most {limit}")
            self._old, self._slots = self._slots, _no_slots(_bits(self._slots) + 1)
            self._first, self._moved = int(np.argmin(self._old[: 1 << 16])), 0
            if self._old[self._first]:
                self._first = int(np.argmin(self._old))
            self._move(_step(self._old) + 1)
            limit = int(len(self._slots) * _MAX_LOAD)
        while_growing = _step(self._old) if len(self._old) > 1 else wanted
        return min(wanted, limit - len(self), while_growing)

    def _move(self, count: int) -> None:
        if len(self._old) == 1:
            return
        self._moved = _move(self._slots, self._old, self._first, self._moved, self._keys.array, count)
        if self._moved == len(self._old):
            self._old, self._first, self._moved = _no_slots(0), 0, 1


def _no_slots(bits: int) -> _U32:
    slots = ReservedArray(np.uint32, largest_bytes=4 << bits)
    slots.reserve(1 << bits)
    empty: _U32 = slots.array[: 1 << bits]
    return empty


def _bits(slots: _U32) -> int:
    return len(slots).bit_length() - 1


def _step(old: _U32) -> int:
    """How many ids may be inserted at once while the map grows."""
    return len(old) // 256 + 1


# A slot is 0 if it is empty. Else its lower bits, as many as number the slots, are the row plus 1, and its upper ones
# are those bits of the hash that follow the bits which say where the search begins.

_ONE, _HALF, _WORD = np.uint64(1), np.uint64(32), np.uint64(0xFFFFFFFF)


@njit(cache=True, inline="always")
def _hash(key: int) -> np.uint64:  # pragma: no cover - compiled
    """32 bits: where the search for an id begins, then those that its slot holds."""
    hashed: np.uint64 = scatter(np.uint64(key)) >> _HALF
    return hashed


@njit(cache=True)
def _slot_bits(slots: _U32) -> np.uint64:  # pragma: no cover - compiled
    bits = np.uint64(0)
    while np.uint64(len(slots)) >> bits > _ONE:
        bits += _ONE
    return bits


@njit(cache=True, inline="always")
def _is_old(
    hashed: np.uint64, old_bits: np.uint64, old_mask: np.uint64, first: np.uint64, moved: np.uint64
) -> bool:  # pragma: no cover - compiled
    """Whether ids of this hash have not moved from the old table yet."""
    return bool((((hashed >> (_HALF - old_bits)) - first) & old_mask) >= moved)


@njit(cache=True, inline="always")
def _candidate(
    slots: _U32, bits: np.uint64, hashed: np.uint64, slot: np.uint64
) -> np.uint64:  # pragma: no cover - compiled
    """The first slot from ``slot`` on that is empty, or whose bits of the hash agree."""
    mask = (_ONE << bits) - _ONE
    tag = (hashed << bits) & _WORD
    while True:
        word = np.uint64(slots[slot])
        if word == np.uint64(0) or (word ^ tag) >> bits == np.uint64(0):
            return slot
        slot = (slot + _ONE) & mask


@njit(cache=True, inline="always")
def _row(slots: _U32, bits: np.uint64, slot: np.uint64) -> np.uint64:  # pragma: no cover - compiled
    """The row of a slot that is not empty."""
    return (np.uint64(slots[slot]) & ((_ONE << bits) - _ONE)) - _ONE


@njit(cache=True, inline="always")
def _search(
    slots: _U32, bits: np.uint64, keys: I64, hashed: np.uint64, key: int, slot: np.uint64
) -> np.uint64:  # pragma: no cover - compiled
    """The slot of an id, or the empty one where it would go, from the slot on that :func:`_candidate` found."""
    mask = (_ONE << bits) - _ONE
    while slots[slot] != np.uint32(0) and keys[_row(slots, bits, slot)] != key:
        slot = _candidate(slots, bits, hashed, (slot + _ONE) & mask)
    return slot


@njit(cache=True, nogil=True)
def _fetch(
    slots: _U32,
    old: _U32,
    first: int,
    moved: int,
    keys: I64,
    ids: I64,
    hashes: NDArray[np.uint64],
    at: NDArray[np.uint64],
) -> None:  # pragma: no cover - compiled
    """Note the hash of each id of a block and its first candidate slot, and fetch the candidates' keys."""
    bits, old_bits = _slot_bits(slots), _slot_bits(old)
    old_mask = (_ONE << old_bits) - _ONE
    for i in range(len(ids)):
        hashed = _hash(ids[i])
        hashes[i] = hashed
        if _is_old(hashed, old_bits, old_mask, np.uint64(first), np.uint64(moved)):
            prefetch(old, hashed >> (_HALF - old_bits))
        else:
            prefetch(slots, hashed >> (_HALF - bits))
    for i in range(len(ids)):
        hashed = hashes[i]
        if _is_old(hashed, old_bits, old_mask, np.uint64(first), np.uint64(moved)):
            at[i] = _candidate(old, old_bits, hashed, hashed >> (_HALF - old_bits))
            prefetch(keys, _row(old, old_bits, at[i]))
        else:
            at[i] = _candidate(slots, bits, hashed, hashed >> (_HALF - bits))
            prefetch(keys, _row(slots, bits, at[i]))


@njit(cache=True, nogil=True)
def _find(slots: _U32, old: _U32, first: int, moved: int, keys: I64, ids: I64) -> I64:  # pragma: no cover - compiled
    bits, old_bits = _slot_bits(slots), _slot_bits(old)
    old_mask = (_ONE << old_bits) - _ONE
    hashes, at = np.empty(_BLOCK, np.uint64), np.empty(_BLOCK, np.uint64)
    rows = np.empty(len(ids), np.int64)
    for start in range(0, len(ids), _BLOCK):
        block = ids[start : start + _BLOCK]
        _fetch(slots, old, first, moved, keys, block, hashes, at)
        for i in range(len(block)):
            if _is_old(hashes[i], old_bits, old_mask, np.uint64(first), np.uint64(moved)):
                slot = _search(old, old_bits, keys, hashes[i], block[i], at[i])
                rows[start + i] = np.int64(_row(old, old_bits, slot)) if old[slot] else ABSENT
            else:
                slot = _search(slots, bits, keys, hashes[i], block[i], at[i])
                rows[start + i] = np.int64(_row(slots, bits, slot)) if slots[slot] else ABSENT
    return rows


@njit(cache=True, nogil=True)
def _insert(
    slots: _U32,
    old: _U32,
    first: int,
    moved: int,
    keys: I64,
    ids: I64,
    rows: I64,
    free: I64,
    num_free: int,
    next_row: int,
) -> tuple[int, int]:  # pragma: no cover - compiled
    bits, old_bits = _slot_bits(slots), _slot_bits(old)
    old_mask = (_ONE << old_bits) - _ONE
    hashes, at = np.empty(_BLOCK, np.uint64), np.empty(_BLOCK, np.uint64)
    for start in range(0, len(ids), _BLOCK):
        block = ids[start : start + _BLOCK]
        _fetch(slots, old, first, moved, keys, block, hashes, at)
        for i in range(len(block)):
            # An id that was inserted since the block was fetched filled an empty slot: the search from there finds it.
            in_old = _is_old(hashes[i], old_bits, old_mask, np.uint64(first), np.uint64(moved))
            table, table_bits = (old, old_bits) if in_old else (slots, bits)
            slot = _search(table, table_bits, keys, hashes[i], block[i], at[i])
            if table[slot]:
                rows[start + i] = np.int64(_row(table, table_bits, slot))
                continue
            if num_free > 0:
                num_free -= 1
                row = free[num_free]
            else:
                row = next_row
                next_row += 1
            keys[row] = block[i]
            table[slot] = np.uint32(((hashes[i] << table_bits) & _WORD) | np.uint64(row + 1))
            rows[start + i] = row
    return num_free, next_row


@njit(cache=True, nogil=True)
def _remove(slots: _U32, old: _U32, first: int, moved: int, keys: I64, ids: I64) -> I64:  # pragma: no cover - compiled
    bits, old_bits = _slot_bits(slots), _slot_bits(old)
    old_mask = (_ONE << old_bits) - _ONE
    rows = np.empty(len(ids), np.int64)
    for i in range(len(ids)):
        hashed = _hash(ids[i])
        in_old = _is_old(hashed, old_bits, old_mask, np.uint64(first), np.uint64(moved))
        table, table_bits = (old, old_bits) if in_old else (slots, bits)
        home = hashed >> (_HALF - table_bits)
        slot = _search(table, table_bits, keys, hashed, ids[i], _candidate(table, table_bits, hashed, home))
        rows[i] = np.int64(_row(table, table_bits, slot)) if table[slot] else ABSENT
        if rows[i] != ABSENT:
            _close_gap(table, table_bits, keys, slot)
    return rows


@njit(cache=True, nogil=True)
def _close_gap(slots: _U32, bits: np.uint64, keys: I64, hole: np.uint64) -> None:  # pragma: no cover - compiled
    """Empty a slot by shifting back those behind it: no tombstones, so searches stay short as long as the map lives."""
    mask = (_ONE << bits) - _ONE
    slot = (hole + _ONE) & mask
    while slots[slot]:
        home = _hash(keys[_row(slots, bits, slot)]) >> (_HALF - bits)
        if ((slot - home) & mask) >= ((slot - hole) & mask):
            slots[hole] = slots[slot]
            hole = slot
        slot = (slot + _ONE) & mask
    slots[hole] = np.uint32(0)


@njit(cache=True, nogil=True)
def _place(slots: _U32, keys: I64, rows: I64) -> None:  # pragma: no cover - compiled
    """Insert ids that are not in the map, by their rows."""
    bits = _slot_bits(slots)
    mask = (_ONE << bits) - _ONE
    for i in range(len(rows)):
        hashed = _hash(keys[rows[i]])
        slot = hashed >> (_HALF - bits)
        while slots[slot]:
            slot = (slot + _ONE) & mask
        slots[slot] = np.uint32(((hashed << bits) & _WORD) | np.uint64(rows[i] + 1))


@njit(cache=True, nogil=True)
def _move(slots: _U32, old: _U32, first: int, moved: int, keys: I64, count: int) -> int:  # pragma: no cover - compiled
    """Move the ids of at least ``count`` slots of the old table; returns how many slots are done.

    It stops at an empty slot only, so that no id is left behind on the wrong side of the position. The first slot was
    empty when the growth began. Ids that came later may lie in it and behind it, though their search begins at the end
    of the table; they are moved last. They never reach the position: more slots are done than ids came.
    """
    old_bits = _slot_bits(old)
    mask = (_ONE << old_bits) - _ONE
    rows = np.empty(_BLOCK, np.int64)
    while True:
        num_rows, at_end = 0, False
        while num_rows < _BLOCK:
            slot = (np.uint64(first) + np.uint64(moved)) & mask
            empty = old[slot] == np.uint32(0)
            if empty and (moved >= len(old) or count <= 0):
                at_end = True
                break
            if not empty:
                row = _row(old, old_bits, slot)
                prefetch(keys, row)
                rows[num_rows] = np.int64(row)
                num_rows += 1
                old[slot] = np.uint32(0)
            moved += 1
            count -= 1
        _place(slots, keys, rows[:num_rows])
        if at_end:
            return min(moved, len(old))
