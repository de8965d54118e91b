"""From ids to rows of the one growing table behind all id, bag and sequence features.

Letters: B instances, W id columns (:attr:`Schema.id_width`), U distinct rows of a batch.

An id is looked up by a *key*: a bijective 64-bit mix of the id and a salt of its vocabulary. Ids of one vocabulary
never collide. Ids of different vocabularies share a row only when their xor equals the xor of the two salts: impossible
for small ids in practice, and for n hashed ids about n²/2⁶⁵ (10 million ids: 3 in a million for any pair at all).

The absent value is an id like any other: its key is inserted first for every vocabulary, so that rows 0 … V-1 are the
vocabularies' default rows, which also stand for ids that serving has never heard of.
"""

import hashlib
from collections.abc import Iterable

import numpy as np
from numba import njit

from smes.arrays import F32, I64
from smes.hashing import GOLDEN, scatter
from smes.id_map import ABSENT, IdMap
from smes.schema import MISSING, Feature, Schema


class IdRows:
    """The id table of one model.

    Args:
        schema: Its id and bag features give the columns and the vocabularies.
        keys: Keys by row of an earlier table (:meth:`keys`), to go on from it.

    Raises:
        ValueError: ``keys`` do not begin with the default rows of the schema's vocabularies.
    """

    def __init__(self, schema: Schema, keys: I64 | None = None) -> None:
        vocabularies = list(dict.fromkeys(vocabulary_of(f) for f in schema.id_features))
        salts = np.array([_salt(v) for v in vocabularies], np.int64)
        index = {v: i for i, v in enumerate(vocabularies)}
        self._default_row_W = np.array(
            per_column(schema, (index[vocabulary_of(f)] for f in schema.id_features)), np.int64
        )
        self._salt_W = salts[self._default_row_W]
        defaults = _mix(np.full((1, len(salts)), MISSING, np.int64), salts)
        if keys is not None and not np.array_equal(keys[: len(defaults)], defaults):
            raise ValueError(f"keys of an id table: expected the default rows of {vocabularies} first")
        self._keys = np.array(defaults if keys is None else keys, np.int64)
        self._map = IdMap.from_keys(self._keys)

    def __len__(self) -> int:
        """Rows in use, the default rows included."""
        return len(self._map)

    def insert(self, ids_BW: I64) -> I64:
        """Row of every id; new ids get the next rows in order of appearance. int64 [B, W] → int64 [B, W]."""
        known = len(self._map)
        keys = _mix(ids_BW, self._salt_W)
        rows = self._map.insert(keys)
        if len(self._map) > known:
            self._note_keys(keys, rows, known)
        return rows.reshape(ids_BW.shape)

    def find(self, ids_BW: I64) -> I64:
        """Row of every id, the vocabulary's default row for unknown ones. int64 [B, W] → int64 [B, W]."""
        rows_BW = self._map.find(_mix(ids_BW, self._salt_W)).reshape(ids_BW.shape)
        return np.where(rows_BW == ABSENT, self._default_row_W, rows_BW)

    def keys(self, start: int = 0) -> I64:
        """Keys by row, from row ``start`` on, not a copy. int64 [len - start]."""
        return self._keys[start : len(self)]

    def _note_keys(self, keys: I64, rows: I64, known: int) -> None:
        if len(self) > len(self._keys):
            self._keys = np.resize(self._keys, max(len(self), 2 * len(self._keys)))
        new = rows >= known
        self._keys[rows[new]] = keys[new]


class DistinctRows:
    """Finds the distinct rows of a batch in one pass, by stamping them."""

    def __init__(self) -> None:
        self._stamp = np.zeros(1024, np.int64)
        self._position = np.zeros(1024, np.int64)
        self._batch = 0

    def __call__(self, rows_BW: I64, num_rows: int) -> tuple[I64, I64]:
        """(distinct rows in order of appearance [U], place of each cell's row among them [B, W])."""
        if num_rows > len(self._stamp):
            size = max(num_rows, 2 * len(self._stamp))
            self._stamp, self._position = np.zeros(size, np.int64), np.zeros(size, np.int64)
            self._batch = 0
        self._batch += 1
        distinct_U, cells = _distinct(rows_BW.ravel(), self._stamp, self._position, self._batch)
        return distinct_U, cells.reshape(rows_BW.shape)


def readers(cells_BW: I64, num_rows: int) -> tuple[I64, I64]:
    """Which cells read each row, by counting.

    Args:
        cells_BW: The row that each cell reads, from 0 to below ``num_rows``; every row has a reader.
        num_rows: U.

    Returns:
        (cells of row 0, then those of row 1, and so on, each row's in order: int64 [B·W]; where each row's begin:
        int64 [U]).
    """
    order, start_U = _readers(cells_BW.ravel(), num_rows)
    return order, start_U


def vocabulary_of(feature: Feature) -> str:
    """The vocabulary that a feature's ids belong to."""
    return feature.vocabulary_name


def per_column(schema: Schema, values: Iterable[int]) -> list[int]:
    """One value per id feature, repeated for each of its columns."""
    return [value for f, value in zip(schema.id_features, values, strict=True) for _ in range(f.width)]


def pool_weights(schema: Schema, ids_BW: I64) -> F32 | None:
    """Weight of every id within its feature: the mean over the ids present in a bag or sequence, 1 elsewhere.

    A bag without any id takes the vocabulary's default row, through its first column, and so does a sequence that
    accompanies another. A queried sequence without ids weighs nothing: its vocabulary's default row is not its own.

    Returns:
        float32 [B, W]; None for a schema without bags and sequences.
    """
    if not any(f.is_list for f in schema.id_features):
        return None
    weight_BW = np.ones(ids_BW.shape, np.float32)
    for feature in schema.id_features:
        if feature.is_list:
            columns = schema.id_slices[feature.name]
            present = ids_BW[:, columns] != MISSING
            if feature.query is None:
                present[~present.any(axis=1), 0] = True
            count = np.maximum(present.sum(axis=1, keepdims=True, dtype=np.float32), 1)
            weight_BW[:, columns] = present / count
    return weight_BW


def uniform_rows(keys_N: I64, columns: int, scale: float, seed: int = 0) -> F32:
    """First weights of rows, uniform in ±``scale``, from their keys and a seed ≥ 0 alone. float32 [N, columns].

    Counter-based (splitmix64 of key and column), not from a random stream: a row is born the same in whatever order
    the ids of a stream come, before and after a restart.
    """
    salt = _mix(np.array([[seed]], np.int64), np.zeros(1, np.int64))[0]  # 0 for seed 0
    result: F32 = _uniform(np.ascontiguousarray(keys_N) ^ salt, columns, np.float32(scale))
    return result


def _salt(vocabulary: str) -> int:
    return int.from_bytes(hashlib.blake2b(vocabulary.encode(), digest_size=8).digest(), "little", signed=True)


@njit(cache=True, nogil=True)
def _mix(ids_BW: I64, salt_W: I64) -> I64:  # pragma: no cover - compiled
    rows, columns = ids_BW.shape
    keys = np.empty(rows * columns, np.int64)
    for b in range(rows):
        for w in range(columns):
            keys[b * columns + w] = np.int64(scatter(np.uint64(ids_BW[b, w] ^ salt_W[w])))
    return keys


@njit(cache=True, nogil=True)
def _uniform(keys_N: I64, columns: int, scale: np.float32) -> F32:  # pragma: no cover - compiled
    weights = np.empty((len(keys_N), columns), np.float32)
    for n in range(len(keys_N)):
        for c in range(columns):
            bits = scatter(np.uint64(keys_N[n]) + np.uint64(c + 1) * GOLDEN)
            unit = np.float32(np.int64(bits >> np.uint64(40))) * np.float32(2.0**-23) - np.float32(1.0)
            weights[n, c] = unit * scale
    return weights


@njit(cache=True, nogil=True)
def _distinct(rows: I64, stamp: I64, position: I64, batch: int) -> tuple[I64, I64]:  # pragma: no cover - compiled
    distinct = np.empty(len(rows), np.int64)
    cells = np.empty(len(rows), np.int64)
    count = 0
    for i in range(len(rows)):
        row = rows[i]
        if stamp[row] != batch:
            stamp[row] = batch
            position[row] = count
            distinct[count] = row
            count += 1
        cells[i] = position[row]
    return distinct[:count].copy(), cells


@njit(cache=True, nogil=True)
def _readers(cells: I64, num_rows: int) -> tuple[I64, I64]:  # pragma: no cover - compiled
    end = np.zeros(num_rows, np.int64)
    for cell in cells:
        end[cell] += 1
    start = np.empty(num_rows, np.int64)
    total = 0
    for row in range(num_rows):
        start[row] = total
        total += end[row]
        end[row] = start[row]
    order = np.empty(len(cells), np.int64)
    for i in range(len(cells)):
        order[end[cells[i]]] = i
        end[cells[i]] += 1
    return order, start
