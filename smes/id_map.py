"""A growing map from int64 ids to rows: open addressing with linear probing, compiled by Numba.

The embedding table and the join use it. A slot takes four bytes: a row, and in the bits that the row leaves free a part
of the id's hash, so that hardly ever an id is compared in vain. The ids themselves lie by row. At 10 million ids that
is 15 bytes an id in all.

The map grows without stopping. A table of twice as many slots is filled step by step, by the insertions that come
after. The highest bits of its hash say where an id's search begins, so both tables hold the ids in the same order, and
one position says which ids have moved: a search looks into one table only.
"""

import numpy as np

from smes.arrays import I64
from smes.id_map_kernels import ABSENT, U32, find, find_while_growing, insert, move, place, remove
from smes.reserved import ReservedArray

__all__ = ["ABSENT", "IdMap"]

_MAX_LOAD = 0.7
_MOVED_PER_INSERT = 10  # slots: the old table's load stays below 0.7 + 1/10 until all its ids have moved
_MOST_SLOT_BITS = 31


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
        rows: I64
        if len(self._old) == 1:
            rows = find(self._slots, self._keys.array, ids)
        else:
            rows = find_while_growing(self._slots, self._old, self._first, self._moved, self._keys.array, ids)
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
        rows: I64 = remove(self._slots, self._old, self._first, self._moved, self._keys.array, ids)
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
        place(result._slots, result._keys.array, np.ascontiguousarray(state["rows"], np.int64))
        return result

    def _insert(self, ids: I64, rows: I64) -> None:
        known = len(self)
        self._num_free, self._next_row = insert(
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
        self._moved = move(self._slots, self._old, self._first, self._moved, self._keys.array, count)
        if self._moved == len(self._old):
            self._old, self._first, self._moved = _no_slots(0), 0, 1


def _no_slots(bits: int) -> U32:
    slots = ReservedArray(np.uint32, largest_bytes=4 << bits)
    slots.reserve(1 << bits)
    empty: U32 = slots.array[: 1 << bits]
    return empty


def _bits(slots: U32) -> int:
    return len(slots).bit_length() - 1


def _step(old: U32) -> int:
    """How many ids may be inserted at once while the map grows."""
    return len(old) // 256 + 1
