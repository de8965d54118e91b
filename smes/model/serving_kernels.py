"""The compiled loops of :mod:`smes.model.serving_rows`: maps from keys to rows, and copies of rows.

Both maps are open addressing with linear probing, of any number of slots. A slot of a table is 32 bits: the row, and in
the bits above it some of the key's hash, which spare most looks at the keys of other rows. The key itself stands at the
head of its row's record.

Letters: N keys, X words of 64 bits that a record has, C columns of a group.
"""

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from smes.arrays import F32, I64
from smes.lanes import LANES, copy8
from smes.prefetch import prefetch
from smes.scatter import scatter

Slots = NDArray[np.uint32]
Words = NDArray[np.int64]

EMPTY = np.uint32(0xFFFFFFFF)
"""A slot that never held a row: a search ends there."""

GONE = np.uint32(0xFFFFFFFE)
"""A slot whose row was given back: a search goes on."""

OPEN = np.int64(-(2**63))
"""A key that was not looked for yet."""

ABSENT = np.int64(-(2**63) + 1)
"""A key that has no row."""

_BEHIND = 12  # keys
_LINE = 8  # words of a cache line


@njit(cache=True, nogil=True)
def _home(key: np.int64, slots: int) -> np.int64:  # pragma: no cover - compiled
    """Where the search for a key begins."""
    return np.int64(((scatter(np.uint64(key)) >> np.uint64(32)) * np.uint64(slots)) >> np.uint64(32))


@njit(cache=True, nogil=True)
def _mark(key: np.int64, row_bits: int) -> np.uint32:  # pragma: no cover - compiled
    """Bits of the key's hash, where a slot has them: above the row."""
    return np.uint32((scatter(np.uint64(key)) << np.uint64(row_bits)) & np.uint64(0xFFFFFFFF))


@njit(cache=True, nogil=True)
def _row_of(key: np.int64, slots: Slots, row_bits: int, records: Words) -> np.int64:  # pragma: no cover - compiled
    mark, row_mask = _mark(key, row_bits), np.uint32((np.uint64(1) << np.uint64(row_bits)) - np.uint64(1))
    slot = _home(key, len(slots))
    while True:
        word = slots[slot]
        if word == EMPTY:
            return ABSENT
        if word != GONE and word & ~row_mask == mark:
            row = np.int64(word & row_mask)
            # A row beyond the records was added after the caller took them: it is none that the caller looks for.
            if row < len(records) and records[row, 0] == key:
                return row
        slot += 1
        if slot == len(slots):
            slot = 0


@njit(cache=True, nogil=True)
def find_open(
    found_N: I64, keys_N: I64, slots: Slots, row_bits: int, records: Words
) -> None:  # pragma: no cover - compiled
    """Look for the keys that are ``OPEN`` still: their rows, or ``ABSENT``, into ``found_N``.

    Three places run through the keys, one behind the other: at the first the slot is fetched, at the second the record
    of the row in it, at the third the key is compared.
    """
    row_mask = np.uint32((np.uint64(1) << np.uint64(row_bits)) - np.uint64(1))
    flat, width = records.reshape(-1), np.uint64(records.shape[1])
    for first in range(len(keys_N) + 2 * _BEHIND):
        if first < len(keys_N):
            prefetch(slots, np.uint64(_home(keys_N[first], len(slots))))
        second = first - _BEHIND
        if 0 <= second < len(keys_N):
            word = slots[_home(keys_N[second], len(slots))]
            at = np.uint64(word & row_mask) * width
            for line in range(0, records.shape[1], _LINE):
                prefetch(flat, at + np.uint64(line))
        third = second - _BEHIND
        if third >= 0 and found_N[third] == OPEN:
            found_N[third] = _row_of(keys_N[third], slots, row_bits, records)


@njit(cache=True, nogil=True)
def _put(slots: Slots, row_bits: int, key: np.int64, row: int) -> bool:  # pragma: no cover - compiled
    """Give a key that has no slot one; whether it was an empty one."""
    slot = _home(key, len(slots))
    while slots[slot] < GONE:
        slot += 1
        if slot == len(slots):
            slot = 0
    was_empty = bool(slots[slot] == EMPTY)
    slots[slot] = _mark(key, row_bits) | np.uint32(row)
    return was_empty


@njit(cache=True, nogil=True)
def put_rows(keys_N: I64, rows_N: I64, slots: Slots, row_bits: int) -> int:  # pragma: no cover - compiled
    """Give keys that have no slot one each. Returns how many empty slots that took."""
    taken = 0
    for i in range(len(keys_N)):
        taken += _put(slots, row_bits, keys_N[i], rows_N[i])
    return taken


@njit(cache=True, nogil=True)
def add_rows(
    keys_N: I64, first_row: int, slots: Slots, row_bits: int, records: Words
) -> int:  # pragma: no cover - compiled
    """Give N keys the rows from ``first_row`` on, and write the keys at their heads.

    Returns:
        N, or how many were added before one that is there already.
    """
    for i in range(len(keys_N)):
        if _row_of(keys_N[i], slots, row_bits, records) != ABSENT:
            return i
        records[first_row + i, 0] = keys_N[i]
        _put(slots, row_bits, keys_N[i], first_row + i)
    return len(keys_N)


@njit(cache=True, nogil=True)
def remove_rows(keys_N: I64, slots: Slots, row_bits: int, records: Words) -> I64:  # pragma: no cover - compiled
    """Mark the slots of keys as gone. Returns the rows that they had, int64 [N]; ``ABSENT`` for those without."""
    rows_N = np.empty(len(keys_N), np.int64)
    row_mask = np.uint32((np.uint64(1) << np.uint64(row_bits)) - np.uint64(1))
    for i in range(len(keys_N)):
        rows_N[i] = row = _row_of(keys_N[i], slots, row_bits, records)
        if row == ABSENT:
            continue
        slot = _home(keys_N[i], len(slots))
        while slots[slot] >= GONE or np.int64(slots[slot] & row_mask) != row:
            slot += 1
            if slot == len(slots):
                slot = 0
        slots[slot] = GONE
    return rows_N


@njit(cache=True, nogil=True)
def copy_slots(
    slots: Slots, row_bits: int, records: Words, into: Slots, into_row_bits: int
) -> None:  # pragma: no cover - compiled
    """Give every key of one map a slot of another, empty one."""
    row_mask = np.uint32((np.uint64(1) << np.uint64(row_bits)) - np.uint64(1))
    for slot in range(len(slots)):
        if slots[slot] < GONE:
            row = np.int64(slots[slot] & row_mask)
            _put(into, into_row_bits, records[row, 0], row)


@njit(cache=True, inline="always")
def _copy(
    source: F32, row: int, at: int, out: F32, into: int, to: int, columns: int
) -> None:  # pragma: no cover - compiled
    """``out[into, to:to+columns] = source[row, at:at+columns]`` of contiguous arrays.

    The assignment itself would be slower, and take 2 s to compile.
    """
    first, begin = np.uint64(row * source.shape[1] + at), np.uint64(into * out.shape[1] + to)
    whole = columns - columns % LANES
    for c in range(0, whole, LANES):
        copy8(source, first + np.uint64(c), out, begin + np.uint64(c))
    for c in range(whole, columns):
        out[into, to + c] = source[row, at + c]


@njit(cache=True, nogil=True)
def write_columns(records: F32, rows_N: I64, start: int, weights_NC: F32) -> None:  # pragma: no cover - compiled
    """Write the weights of one group into the records of rows, from element ``start`` on."""
    for i in range(len(rows_N)):
        _copy(weights_NC, i, 0, records, rows_N[i], start, weights_NC.shape[1])


@njit(cache=True, nogil=True)
def read_columns(found_N: I64, records: F32, start: int, out_NC: F32) -> None:  # pragma: no cover - compiled
    """Copy one group of the rows that were found in the table (≥ 0)."""
    for i in range(len(found_N)):
        if found_N[i] >= 0:
            _copy(records, found_N[i], start, out_NC, i, 0, out_NC.shape[1])


@njit(cache=True, nogil=True)
def shadow_slots(keys_N: I64, slots: NDArray[np.int32]) -> int:  # pragma: no cover - compiled
    """Enter keys into the empty map of a shadow (-1 everywhere).

    Returns:
        N, or the place of the first key that occurs twice.
    """
    for i in range(len(keys_N)):
        slot = _home(keys_N[i], len(slots))
        while slots[slot] >= 0:
            if keys_N[slots[slot]] == keys_N[i]:
                return i
            slot += 1
            if slot == len(slots):
                slot = 0
        slots[slot] = i
    return len(keys_N)


@njit(cache=True, nogil=True)
def find_in_shadow(
    found_N: I64, keys_N: I64, slots: NDArray[np.int32], shadow_keys: I64, changed: int, first: int
) -> None:  # pragma: no cover - compiled
    """Look for the keys that are ``OPEN`` still.

    A key that the shadow changed becomes -1 - ``first`` - its place, one that it removed ``ABSENT``. The others stay.
    """
    for i in range(len(keys_N)):
        if found_N[i] != OPEN:
            continue
        slot = _home(keys_N[i], len(slots))
        while slots[slot] >= 0:
            place = slots[slot]
            if shadow_keys[place] == keys_N[i]:
                found_N[i] = np.int64(-1) - first - place if place < changed else ABSENT
                break
            slot += 1
            if slot == len(slots):
                slot = 0


@njit(cache=True, nogil=True)
def read_shadow(found_N: I64, weights_RC: F32, first: int, out_NC: F32) -> None:  # pragma: no cover - compiled
    """Copy one group of the rows that were found in a shadow."""
    for i in range(len(found_N)):
        place = np.int64(-1) - found_N[i] - first
        if 0 <= place < len(weights_RC):
            _copy(weights_RC, place, 0, out_NC, i, 0, out_NC.shape[1])


def empty_slots(count: int) -> Slots:
    """The slots of an empty map."""
    return np.full(count, EMPTY, np.uint32)


def no_rows(count: int) -> NDArray[Any]:
    """N keys that were not looked for yet. int64 [N]."""
    return np.full(count, OPEN, np.int64)


def compile_serving_kernels() -> None:
    """Run each of these once on next to nothing, so that no request and no swap waits for a compiler."""
    keys, weights = np.arange(2), np.zeros((2, 2), np.float32)
    slots, records = empty_slots(8), np.zeros((4, 2), np.int64)
    floats: F32 = records.view(np.float32)
    add_rows(keys, 0, slots, 4, records)
    rows = no_rows(2)
    find_open(rows, keys, slots, 4, records)
    write_columns(floats, rows, 2, weights)
    remove_rows(keys, slots, 4, records)
    put_rows(keys, rows, slots, 4)
    copy_slots(slots, 4, records, empty_slots(8), 4)
    shadow = np.full(8, -1, np.int32)
    shadow_slots(keys, shadow)
    find_in_shadow(no_rows(2), keys, shadow, keys, 1, 0)
    read_columns(rows, floats, 2, weights)
    read_shadow(rows, weights, 0, weights)
