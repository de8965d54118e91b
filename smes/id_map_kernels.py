"""The compiled loops of the id map (:mod:`smes.id_map`).

A slot is 0 if it is empty. Else its lower bits, as many as number the slots, are the row plus 1, and its upper ones are
those bits of the hash that follow the bits which say where the search begins.

While the map grows there is an old table beside the new one: ``first`` is the slot of it from which on ids are moved,
``moved`` the number of its slots that are done. Without growth the old table has one slot, which is done.
"""

import numpy as np
from numba import njit
from numpy.typing import NDArray

from smes.arrays import I64
from smes.prefetch import prefetch
from smes.scatter import scatter

ABSENT = -1
"""The row of an id that is not in the map."""

U32 = NDArray[np.uint32]

_BEHIND = 16  # ids between the places at which a search is begun, goes on, and ends
_RING = 64  # a power of 2, more than twice that
_BLOCK = 128  # ids whose slots, and then whose rows, are fetched from memory side by side
_ONE, _HALF, _WORD = np.uint64(1), np.uint64(32), np.uint64(0xFFFFFFFF)


@njit(cache=True, inline="always")
def _hash(key: int) -> np.uint64:  # pragma: no cover - compiled
    """32 bits: where the search for an id begins, then those that its slot holds."""
    hashed: np.uint64 = scatter(np.uint64(key)) >> _HALF
    return hashed


@njit(cache=True)
def _slot_bits(slots: U32) -> np.uint64:  # pragma: no cover - compiled
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
    slots: U32, bits: np.uint64, hashed: np.uint64, slot: np.uint64
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
def _row(slots: U32, bits: np.uint64, slot: np.uint64) -> np.uint64:  # pragma: no cover - compiled
    """The row of a slot that is not empty."""
    return (np.uint64(slots[slot]) & ((_ONE << bits) - _ONE)) - _ONE


@njit(cache=True, inline="always")
def _search(
    slots: U32, bits: np.uint64, keys: I64, hashed: np.uint64, key: int, slot: np.uint64
) -> np.uint64:  # pragma: no cover - compiled
    """The slot of an id, or the empty one where it would go, from the slot on that :func:`_candidate` found."""
    mask = (_ONE << bits) - _ONE
    while slots[slot] != np.uint32(0) and keys[_row(slots, bits, slot)] != key:
        slot = _candidate(slots, bits, hashed, (slot + _ONE) & mask)
    return slot


@njit(cache=True, nogil=True)
def _fetch(
    slots: U32,
    old: U32,
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
def find(slots: U32, keys: I64, ids: I64) -> I64:  # pragma: no cover - compiled
    """The row of each id in a map that does not grow.

    Three places run through the ids, one behind the other: at the first the slot is fetched, at the second the key of
    the candidate in it, at the third the key is compared. So fetches never pause.
    """
    bits = _slot_bits(slots)
    hashes, at = np.empty(_RING, np.uint64), np.empty(_RING, np.uint64)
    rows = np.empty(len(ids), np.int64)
    for first in range(len(ids) + 2 * _BEHIND):
        if first < len(ids):
            hashed = _hash(ids[first])
            hashes[first & (_RING - 1)] = hashed
            prefetch(slots, hashed >> (_HALF - bits))
        second = first - _BEHIND
        if 0 <= second < len(ids):
            hashed = hashes[second & (_RING - 1)]
            slot = _candidate(slots, bits, hashed, hashed >> (_HALF - bits))
            at[second & (_RING - 1)] = slot
            prefetch(keys, _row(slots, bits, slot))
        third = second - _BEHIND
        if third >= 0:
            place = third & (_RING - 1)
            slot = _search(slots, bits, keys, hashes[place], ids[third], at[place])
            rows[third] = np.int64(_row(slots, bits, slot)) if slots[slot] else ABSENT
    return rows


@njit(cache=True, nogil=True)
def find_while_growing(
    slots: U32, old: U32, first: int, moved: int, keys: I64, ids: I64
) -> I64:  # pragma: no cover - compiled
    """The row of each id in a map that grows."""
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
def insert(
    slots: U32,
    old: U32,
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
def remove(slots: U32, old: U32, first: int, moved: int, keys: I64, ids: I64) -> I64:  # pragma: no cover - compiled
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
def _close_gap(slots: U32, bits: np.uint64, keys: I64, hole: np.uint64) -> None:  # pragma: no cover - compiled
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
def place(slots: U32, keys: I64, rows: I64) -> None:  # pragma: no cover - compiled
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
def move(slots: U32, old: U32, first: int, moved: int, keys: I64, count: int) -> int:  # pragma: no cover - compiled
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
        place(slots, keys, rows[:num_rows])
        if at_end:
            return min(moved, len(old))


def compile_map_kernels() -> None:
    """Run every loop once, on no ids."""
    slots, old, none = np.zeros(16, np.uint32), np.zeros(1, np.uint32), np.zeros(0, np.int64)
    find(slots, none, none)
    find_while_growing(slots, old, 0, 1, none, none)
    insert(slots, old, 0, 1, none, none, none, none, 0, 0)
    remove(slots, old, 0, 1, none, none)
    place(slots, none, none)
    move(slots, old, 0, 1, none, 0)
