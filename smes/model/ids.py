"""From ids to table rows. All id, bag and sequence features share one growing table.

Letters: B instances, W id columns (:attr:`Schema.id_width`), U distinct rows of a batch, V vocabularies.

The table finds an id by its *key*, a 64-bit hash of the id and its vocabulary's salt. The hash is a bijection for each
vocabulary, so two ids of one vocabulary never get the same key. Ids of two vocabularies do only if the xor of the ids
equals the xor of the salts. In practice this never happens for small ids. For n hashed ids the chance that any pair
collides is about n²/2⁶⁵: 3 in a million for 10 million ids.

Rows 0 … V-1 are the *default rows*, one per vocabulary. A missing value reads the default row, and so does, in serving,
an id that was never trained on.
"""

import hashlib
from collections.abc import Iterable

import numpy as np
from numba import njit

from smes.arrays import F32, I64, GrowingColumns, grown
from smes.hashing import GOLDEN, scatter
from smes.id_map import ABSENT, IdMap
from smes.schema import MISSING, Schema


class IdKeys:
    """The keys by which a table knows ids: one of the id's own, and one of the row that an id without its own reads.

    Args:
        schema: Its id, bag and sequence features give the columns and the vocabularies.

    Attributes:
        required: int64 [V], the keys of the rows that every table has: the default rows.
    """

    def __init__(self, schema: Schema) -> None:
        vocabularies = list(dict.fromkeys(f.vocabulary_name for f in schema.id_features))
        salts = np.array([_salt(v) for v in vocabularies], np.int64)
        index = {v: i for i, v in enumerate(vocabularies)}
        vocabulary_W = np.array(per_column(schema, [index[f.vocabulary_name] for f in schema.id_features]), np.int64)
        self._salt_W = salts[vocabulary_W]
        self.required: I64 = _mix(np.full((1, len(salts)), MISSING, np.int64), salts)
        self._default_W: I64 = self.required[vocabulary_W]

    def own(self, ids_NW: I64) -> I64:
        """The key of each id; of a missing one that of the default row. int64 [N, W] → int64 [N·W]."""
        keys: I64 = _mix(ids_NW, self._salt_W)
        return keys

    def shared(self, ids_NW: I64) -> I64:
        """The key of the row that each id reads while it has none of its own. int64 [N, W] → int64 [N·W]."""
        return np.tile(self._default_W, len(ids_NW))


class IdRows:
    """Which row of the table each id has.

    Args:
        schema: Its id, bag and sequence features give the columns and the vocabularies.
        keys: What :meth:`keys` of an earlier instance returned, to continue from it.

    Raises:
        ValueError: ``keys`` do not begin with the default rows of the schema's vocabularies.
    """

    def __init__(self, schema: Schema, keys: I64 | None = None) -> None:
        vocabularies = list(dict.fromkeys(f.vocabulary_name for f in schema.id_features))
        salts = np.array([_salt(v) for v in vocabularies], np.int64)
        index = {v: i for i, v in enumerate(vocabularies)}
        default_rows = [index[f.vocabulary_name] for f in schema.id_features]
        self._default_row_W = np.array(per_column(schema, default_rows), np.int64)
        self._salt_W = salts[self._default_row_W]
        defaults = _mix(np.full((1, len(salts)), MISSING, np.int64), salts)
        if keys is not None and not np.array_equal(keys[: len(defaults)], defaults):
            raise ValueError(f"keys of an id table: expected the default rows of {vocabularies} first")
        self._keys = np.array(defaults if keys is None else keys, np.int64)
        self._map = IdMap.from_keys(self._keys)

    def __len__(self) -> int:
        """Number of rows in use, the default rows included."""
        return len(self._map)

    def insert(self, ids_BW: I64) -> I64:
        """Look up every id's row; new ids get the next rows, in order of appearance. int64 [B, W] → int64 [B, W]."""
        known = len(self._map)
        keys = _mix(ids_BW, self._salt_W)
        rows = self._map.insert(keys)
        if len(self._map) > known:
            self._note_keys(keys, rows, known)
        return rows.reshape(ids_BW.shape)

    def find(self, ids_BW: I64) -> I64:
        """Look up every id's row, the default row of its vocabulary for unknown ids. int64 [B, W] → int64 [B, W]."""
        rows_BW = self._map.find(_mix(ids_BW, self._salt_W)).reshape(ids_BW.shape)
        return np.where(rows_BW == ABSENT, self._default_row_W, rows_BW)

    def keys(self, start: int = 0) -> I64:
        """The keys of the rows from ``start`` on, in row order; a view. int64 [len - start]."""
        return self._keys[start : len(self)]

    def _note_keys(self, keys: I64, rows: I64, known: int) -> None:
        self._keys = grown(self._keys, len(self))
        new = rows >= known
        self._keys[rows[new]] = keys[new]


class DistinctRows:
    """Finds the distinct rows of a batch in one pass: the first time that a row occurs, it is marked with the batch."""

    def __init__(self) -> None:
        self._by_row = GrowingColumns({"batch": np.zeros(1024, np.int64), "position": np.zeros(1024, np.int64)})
        self._batch = 0

    def __call__(self, rows_BW: I64, num_rows: int) -> tuple[I64, I64]:
        """Find the distinct rows of a batch.

        Args:
            rows_BW: int64 [B, W], each below ``num_rows``.
            num_rows: Rows of the table.

        Returns:
            (the distinct rows in order of appearance, int64 [U]; for each cell the place of its row among them,
            int64 [B, W]).
        """
        self._by_row.reserve(num_rows)
        self._batch += 1
        marks = self._by_row.arrays
        distinct_U, cells = _distinct(rows_BW.ravel(), marks["batch"], marks["position"], self._batch)
        return distinct_U, cells.reshape(rows_BW.shape)


def readers(cells_BW: I64, num_rows: int) -> tuple[I64, I64]:
    """Group the cells of a batch by the row that they read (a counting sort).

    Args:
        cells_BW: int64, the row that each cell reads, from 0 to U - 1. Every row is read by at least one cell.
        num_rows: U.

    Returns:
        (the indices of the flattened cells, first those that read row 0, then those that read row 1, and so on, each in
        ascending order, int64 [B·W]; where the cells of each row begin, int64 [U]).
    """
    order, start_U = _readers(cells_BW.ravel(), num_rows)
    return order, start_U


def per_column(schema: Schema, values: Iterable[int]) -> list[int]:
    """Repeat one value per id feature for each of the feature's columns."""
    return [value for f, value in zip(schema.id_features, values, strict=True) for _ in range(f.width)]


def pool_weights(schema: Schema, ids_BW: I64) -> F32 | None:
    """Weights with which the sum over a feature's columns is the mean over its ids.

    A bag without any id reads the default row of its vocabulary, through its first column. So does a sequence that
    accompanies another one. In a sequence with a query, all weights are 0 if it has no ids: the default row of its
    vocabulary belongs to the queried feature.

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
    """Make the first weights of rows, uniform in ±``scale``. float32 [N, columns].

    A weight depends only on the row's key, its column and the seed (≥ 0), through SplitMix64. So a row starts with the
    same weights whatever ids came before it, and also after a restart.
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
def _distinct(rows: I64, seen_in: I64, position: I64, batch: int) -> tuple[I64, I64]:  # pragma: no cover - compiled
    distinct = np.empty(len(rows), np.int64)
    cells = np.empty(len(rows), np.int64)
    count = 0
    for i in range(len(rows)):
        row = rows[i]
        if seen_in[row] != batch:
            seen_in[row] = batch
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
