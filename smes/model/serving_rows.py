"""The scorer's id table: one copy of the rows, that changes while requests read it.

A delta enters as a :class:`Shadow`: an immutable small table that readers of the new version look into first. Later,
when nobody reads an older version any more, the shadow is *folded* into the table, in place. What a fold changes, no
reader looks up in the table: those of this version or a later one find these keys in the shadow, and those of an older
one are gone. So a fold holds nobody up, needs no second table, and every reader sees exactly its own version.

One thread loads and folds; any number of threads read. The caller counts the readers: see
:meth:`ServingTable.fold`. Sources: the idea of two structures of which the readers' one is replaced when they have left
is left–right (Ramalhete and Correia, "Left-Right: a concurrency control technique with wait-free population oblivious
reads", 2013); a small structure in front of a large one into which it is merged later is the log-structured merge tree
(O'Neil et al., Acta Informatica 33, 1996).

Letters: R rows, N keys or instances, W id columns, C columns of a group, X words of 64 bits of a record.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from smes.arrays import F32, I32, I64, Bool
from smes.model.deltas import RowDelta, merged
from smes.model.fitting import check_finite
from smes.model.ids import IdKeys
from smes.model.serving_kernels import (
    ABSENT,
    Slots,
    Words,
    add_rows,
    copy_slots,
    empty_slots,
    find_in_shadow,
    find_open,
    no_rows,
    put_rows,
    read_columns,
    read_shadow,
    remove_rows,
    shadow_slots,
    write_columns,
)
from smes.reserved import ReservedArray

MOST_ROWS = 2**31
"""A slot has 32 bits, for the row and some of its key's hash."""

_FULLEST = 0.8  # share of slots that are not empty; from there on searches get long
_AFTER_REBUILD = 0.58
_AT_FIRST = 0.76  # of a table of known size: a second one must fit beside it while a lineage is replaced
_FEWEST_SLOTS = 64


class RowMap(NamedTuple):
    """Where the rows of keys are."""

    slots: Slots
    row_bits: int

    @property
    def most_used(self) -> int:
        """How many slots may be taken, and how many rows be numbered."""
        return int(_FULLEST * len(self.slots))


class Shadow:
    """What changed in a version, as readers look it up before the table. Immutable.

    Args:
        delta: The change. Its arrays must not change any more.
        version: The version that it leads to.
        groups: Column group → C, of the table.

    Attributes:
        delta, version: As given.
        keys, slots: What it is looked up with: the changed keys and then the removed ones, int64 [N]; and a map.

    Raises:
        ValueError: Other groups or shapes, a key twice, or a weight that is not finite.
    """

    def __init__(self, delta: RowDelta, version: int, groups: Mapping[str, int]) -> None:
        _check_columns(delta.keys, delta.columns, groups)
        columns = {name: np.ascontiguousarray(values) for name, values in delta.columns.items()}
        self.delta = RowDelta(np.ascontiguousarray(delta.keys), columns, np.ascontiguousarray(delta.removed))
        self.version = version
        self.keys: I64 = np.concatenate([delta.keys, delta.removed])
        self.slots: I32 = np.full(2 * len(self.keys) + 1, -1, np.int32)
        entered = int(shadow_slots(self.keys, self.slots))
        if entered < len(self.keys):
            raise ValueError(f"keys of a delta: {self.keys[entered]} occurs twice, expected distinct keys")

    @classmethod
    def of_arrays(cls, delta: RowDelta, version: int, keys: I64, slots: I32) -> "Shadow":
        """One that was made and checked before, from what it consists of."""
        shadow = cls.__new__(cls)
        shadow.delta, shadow.version, shadow.keys, shadow.slots = delta, version, keys, slots
        return shadow

    def __len__(self) -> int:
        """Rows that changed."""
        return len(self.delta.keys)

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        return self.delta.nbytes + self.keys.nbytes + self.slots.nbytes

    def find(self, found_N: I64, keys_N: I64, first: int) -> None:
        """See :func:`smes.model.serving_kernels.find_in_shadow`."""
        find_in_shadow(found_N, keys_N, self.slots, self.keys, len(self), first)

    def then(self, newer: "Shadow", groups: Mapping[str, int]) -> "Shadow":
        """One shadow of two, one after the other."""
        return Shadow(merged(self.delta, newer.delta), newer.version, groups)


class RowTable:
    """Rows by key, to be read: float32 weights in records.

    Args:
        groups: Column group → C.

    Attributes:
        groups: As given.
        record_words: X.
    """

    _map: RowMap

    def __init__(self, groups: Mapping[str, int]) -> None:
        self.groups = dict(groups)
        self._start: dict[str, int] = {}
        width = 2  # floats: the key
        for name, columns in self.groups.items():
            self._start[name] = width
            width += columns
        self.record_words = (width + 1) // 2

    @property
    def num_rows(self) -> int:
        """Keys in the table."""
        raise NotImplementedError

    def _words(self) -> Words:
        """The records, int64 [R, X]."""
        raise NotImplementedError

    def find(self, found_N: I64, keys_N: I64) -> F32:
        """Look for the keys that are ``OPEN`` still. Returns the records to read the rows from, float32 [R, 2·X]."""
        words = self._words()
        find_open(found_N, keys_N, *self._map, words)
        return _floats(words)

    def read(self, found_N: I64, records: F32, name: str, out_NC: F32) -> None:
        """Copy one group of the rows that :meth:`find` found, from the records that it returned."""
        read_columns(found_N, records, self._start[name], out_NC)


class ServingTable(RowTable):
    """Rows by key: float32 weights in records that lie in reserved memory, so that they are never copied.

    Args:
        groups: Column group → C.
        rows: How many it will have at first; more is no error, only slower.

    Raises:
        ValueError: There are too many rows.
    """

    def __init__(self, groups: Mapping[str, int], rows: int = 0) -> None:
        _check_rows(rows)
        super().__init__(groups)
        self._records = self._empty_records()
        self._map = self._empty_map(rows, _AT_FIRST)
        self._taken = 0  # slots that are not empty
        self._next_row = 0
        self._free: I64 = np.zeros(0, np.int64)

    @property
    def num_rows(self) -> int:
        """Keys in the table."""
        return self._next_row - len(self._free)

    @property
    def nbytes(self) -> int:
        """Bytes of records that are in use, and of the map."""
        return self._words()[: self._next_row].nbytes + self._map.slots.nbytes + self._free.nbytes

    def add(self, keys_N: I64, columns: Mapping[str, F32]) -> None:
        """Add rows to a table that nobody reads yet.

        Args:
            keys_N: int64 [N], none of which is in the table.
            columns: The weights of all groups, float32 [N, C].

        Raises:
            ValueError: Other groups or shapes, a key that is there already, or a weight that is not finite.
        """
        _check_columns(keys_N, columns, self.groups)
        first = self._next_row
        self._reserve(len(keys_N))
        words = self._words()
        added = add_rows(keys_N, first, *self._map, words)
        self._next_row += added
        self._taken += added
        if added < len(keys_N):
            raise ValueError(f"keys of a table: {keys_N[added]} occurs twice, expected distinct keys")
        floats = _floats(words)
        for name, values in columns.items():
            start = self._start[name]
            floats[first : self._next_row, start : start + values.shape[1]] = values

    def fold(self, shadow: Shadow) -> None:
        """Make the table that of the shadow's version, in place.

        Nobody may read the table without this shadow, or one that is merged of it and later ones, at that time. After
        it, either way gives the same rows. A fold that failed, for want of memory, may be tried again.
        """
        delta = shadow.delta
        removed = remove_rows(delta.removed, *self._map, self._words())
        self._free = np.concatenate([self._free, removed[removed != ABSENT]])
        rows_N = no_rows(len(delta.keys))
        find_open(rows_N, delta.keys, *self._map, self._words())
        born = np.flatnonzero(rows_N == ABSENT)
        self._reserve(len(born))
        rows_N[born] = self._new_rows(len(born))
        words = self._words()
        words[rows_N, 0] = delta.keys
        for name, values in delta.columns.items():
            write_columns(_floats(words), rows_N, self._start[name], values)
        # After the records, by a call of its own: no reader finds a row before its record is complete.
        self._taken += put_rows(delta.keys[born], rows_N[born], *self._map)

    def _new_rows(self, count: int) -> I64:
        again = min(count, len(self._free))
        rows = np.concatenate(
            [self._free[len(self._free) - again :], np.arange(self._next_row, self._next_row + count - again)]
        )
        self._free = self._free[: len(self._free) - again].copy()
        self._next_row += count - again
        return rows

    def _reserve(self, count: int) -> None:
        """Make room for so many more keys: in the records, and in the map or in a new one, made aside."""
        rows = self._next_row + max(0, count - len(self._free))
        _check_rows(rows)
        self._records.reserve(rows)
        if max(self._taken + count, rows) <= self._map.most_used:
            return
        keys = max(self.num_rows + count, int(rows * _AFTER_REBUILD / _FULLEST) + 1)
        larger = self._empty_map(keys, _AFTER_REBUILD)
        copy_slots(*self._map, self._words(), *larger)
        self._map, self._taken = larger, self.num_rows

    def _words(self) -> Words:
        words: Words = self._records.array
        return words

    def _empty_records(self) -> ReservedArray:
        return ReservedArray(np.int64, self.record_words)

    def _empty_map(self, rows: int, share: float) -> RowMap:
        """An empty map of which ``rows`` take this share of the slots."""
        count = max(_FEWEST_SLOTS, int(rows / share))
        return RowMap(self._empty_slots(count), count.bit_length())

    def _empty_slots(self, count: int) -> Slots:
        return empty_slots(count)


@dataclass(frozen=True)
class TableRows:
    """The rows of one version: a table and the shadows before it. A :class:`smes.model.serving.RowReader`.

    Attributes:
        keys: From ids to keys.
        table: Shared by the versions.
        shadows: What the table lacks of this version, oldest first.
    """

    keys: IdKeys
    table: RowTable
    shadows: tuple[Shadow, ...] = ()

    def read(self, ids_NW: I64, columns_W: I64 | None = None) -> dict[str, Tensor]:
        """As :meth:`smes.model.serving.RowReader.read`."""
        keys = self.keys.own(ids_NW, columns_W)
        found, records = self._find(keys)
        absent = np.flatnonzero(found == ABSENT)
        if len(absent):
            # Records taken later hold what earlier ones do: no fold changes a row that this version reads there.
            found[absent], records = self._find(self.keys.shared(keys[absent], absent, columns_W))
            assert (found[absent] != ABSENT).all(), "every table has the required rows"
        result = {}
        for name, columns in self.table.groups.items():
            values: F32 = np.empty((len(found), columns), np.float32)
            self.table.read(found, records, name, values)
            for shadow, first in self._numbered():
                read_shadow(found, shadow.delta.columns[name], first, values)
            result[name] = torch.from_numpy(values).view(*ids_NW.shape, columns)
        return result

    def has(self, keys_N: I64) -> Bool:
        """Which keys have a row. bool [N]."""
        found, _ = self._find(keys_N)
        present: Bool = found != ABSENT
        return present

    def after(self, shadow: Shadow) -> "TableRows":
        """The rows of the shadow's version: one after this."""
        return TableRows(self.keys, self.table, (*self.shadows, shadow))

    def folded(self, up_to_version: int) -> "TableRows":
        """Fold the shadows up to a version into the table (:meth:`ServingTable.fold`); the same rows without them."""
        ready = [shadow for shadow in self.shadows if shadow.version <= up_to_version]
        for shadow in ready:
            assert isinstance(self.table, ServingTable), "only who loads a table folds into it"
            self.table.fold(shadow)
        return TableRows(self.keys, self.table, self.shadows[len(ready) :])

    def with_fewer_shadows(self, most: int) -> "TableRows":
        """The same rows with at most so many shadows: the smallest neighbours are merged first."""
        shadows = list(self.shadows)
        while len(shadows) > most:
            sizes = [len(a) + len(b) for a, b in pairwise(shadows)]
            i = sizes.index(min(sizes))
            shadows[i : i + 2] = [shadows[i].then(shadows[i + 1], self.table.groups)]
        return TableRows(self.keys, self.table, tuple(shadows))

    def _find(self, keys_N: I64) -> tuple[I64, F32]:
        found_N: I64 = no_rows(len(keys_N))
        for shadow, first in reversed(self._numbered()):
            shadow.find(found_N, keys_N, first)
        return found_N, self.table.find(found_N, keys_N)

    def _numbered(self) -> Sequence[tuple[Shadow, int]]:
        """Each shadow, and how many rows those before it have."""
        first, numbered = 0, []
        for shadow in self.shadows:
            numbered.append((shadow, first))
            first += len(shadow)
        return numbered


def _check_columns(keys_N: I64, columns: Mapping[str, F32], groups: Mapping[str, int]) -> None:
    expected = {name: (len(keys_N), count) for name, count in groups.items()}
    shapes = {name: values.shape for name, values in columns.items()}
    if shapes != expected:
        raise ValueError(f"columns of table rows: {shapes}, expected {expected}")
    for name, values in columns.items():
        check_finite(f"table.{name}", torch.from_numpy(values))


def _check_rows(rows: int) -> None:
    if rows > MOST_ROWS:
        raise ValueError(f"a table of {rows} rows, expected at most {MOST_ROWS}")


def _floats(words: Words) -> F32:
    floats: F32 = words.view(np.float32)
    return floats
