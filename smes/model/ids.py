"""From ids to table rows. All id, bag and sequence features share one growing table.

Letters: B and N instances, W id columns that the model reads (those of :attr:`Schema.inputs`), U distinct rows of
a batch, V vocabularies.

The table finds an id by its *key*, a 64-bit hash of the id and its vocabulary's salt. The hash is a bijection for each
vocabulary, so two ids of one vocabulary never get the same key. Ids of two vocabularies do only if the xor of the ids
equals the xor of the salts. In practice this never happens for small ids. For n hashed ids the chance that any pair
collides is about n²/2⁶⁵: 3 in a million for 10 million ids.

Each vocabulary has a *default row*, which a missing value reads. An id without a row of its own (it was never seen, not
seen often enough, or not for long: :mod:`smes.model.id_rows`) reads one of its vocabulary's *shared rows*, or the
default row if it has none.
"""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
from numba import njit

from smes.arrays import F32, I64
from smes.hashing import GOLDEN
from smes.scatter import scatter
from smes.schema import MISSING, Feature, Schema


class IdKeys:
    """The keys by which a table knows ids: one of the id's own, and one of the row that an id without its own reads.

    Args:
        schema: The id, bag and sequence features of its inputs give the columns and the vocabularies.
        shared_rows: How many rows the ids without their own share, by vocabulary; 0 where they read the default row.
            int64 [V], as in the weights ``dense.shared_rows_V``. None: 0 for all.

    Attributes:
        vocabularies: Their names, in the order of their first features.
        vocabulary_W: int64, the vocabulary of each column.
        shared_rows: As given.
        required: int64 [V + shared rows], the keys of the rows that every table has: first the default rows, then the
            shared ones.
    """

    def __init__(self, schema: Schema, shared_rows: Sequence[int] | I64 | None = None) -> None:
        schema = schema.inputs
        self.vocabularies = tuple(dict.fromkeys(f.vocabulary_name for f in schema.id_features))
        salts = np.array([_salt(v) for v in self.vocabularies], np.int64)
        index = {v: i for i, v in enumerate(self.vocabularies)}
        self.vocabulary_W: I64 = np.array(
            per_column(schema, [index[f.vocabulary_name] for f in schema.id_features]), np.int64
        )
        self._salt_W = salts[self.vocabulary_W]
        defaults = _mix(np.full((1, len(salts)), MISSING, np.int64), salts)
        self.shared_rows: I64 = np.array(np.zeros(len(salts)) if shared_rows is None else shared_rows, np.int64)
        shared = [
            _mix(np.arange(count).reshape(-1, 1), np.array([_salt(f"\0shared rows of {name}")], np.int64))
            for name, count in zip(self.vocabularies, self.shared_rows, strict=True)
        ]
        self.required: I64 = np.concatenate([defaults, *shared])
        self._first_shared = len(defaults) + np.cumsum(self.shared_rows) - self.shared_rows

    def own(self, ids_NW: I64, columns_W: I64 | None = None) -> I64:
        """The key of each id; of a missing one that of the default row.

        Args:
            ids_NW: int64.
            columns_W: Which columns these are; None: all.

        Returns:
            int64 [N·W].
        """
        keys: I64 = _mix(ids_NW, self._salt_W if columns_W is None else self._salt_W[columns_W])
        return keys

    def shared(self, keys_N: I64, cells_N: I64, columns_W: I64 | None = None) -> I64:
        """The keys of the rows that ids read while they have none of their own.

        Args:
            keys_N: int64, the ids' own keys.
            cells_N: int64, where each of them stood in the matrix of ids, counted row by row.
            columns_W: As for :meth:`own`.
        """
        vocabulary_W = self.vocabulary_W if columns_W is None else self.vocabulary_W[columns_W]
        keys: I64 = self.required[self.required_place(keys_N, vocabulary_W[cells_N % len(vocabulary_W)])]
        return keys

    def required_place(self, keys: I64, vocabulary: I64) -> I64:
        """Which of the rows in ``required`` ids without their own read.

        Args:
            keys: int64 [N], the ids' own keys.
            vocabulary: int64 [N], their vocabularies.
        """
        count = self.shared_rows[vocabulary]
        place = (keys.view(np.uint64) % np.maximum(count, 1).astype(np.uint64)).astype(np.int64)
        return np.where(count > 0, self._first_shared[vocabulary] + place, vocabulary)


def per_column(schema: Schema, values: Iterable[int]) -> list[int]:
    """Repeat one value per id feature of the schema for each of the feature's columns."""
    return [value for f, value in zip(schema.id_features, values, strict=True) for _ in range(f.width)]


def pool_weights(schema: Schema, ids_BW: I64, features: Sequence[Feature] | None = None) -> F32 | None:
    """Weights with which the sum over a feature's columns is the mean over its ids.

    A bag without any id reads the default row of its vocabulary, through its first column. So does a sequence that
    accompanies another one. In a sequence with a query, all weights are 0 if it has no ids: the default row of its
    vocabulary belongs to the queried feature.

    Args:
        schema: Its inputs have these columns.
        ids_BW: int64, ``MISSING`` where missing.
        features: Those id features that the columns belong to; None: all.

    Returns:
        float32 [B, W]; None without bags and sequences.
    """
    if not schema.inputs.has_lists:
        return None
    features = schema.inputs.id_features if features is None else features
    if not any(f.is_list for f in features):
        return None
    weight_BW, start = np.ones(ids_BW.shape, np.float32), 0
    for feature in features:
        columns, start = slice(start, start + feature.width), start + feature.width
        if feature.is_list:
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


def keys_of(ids_N: I64, vocabulary: str) -> I64:
    """The keys of ids of a vocabulary. int64 [N] → int64 [N]."""
    keys: I64 = _mix(ids_N.reshape(-1, 1), np.array([_salt(vocabulary)], np.int64))
    return keys


def ids_of(keys_N: I64, vocabulary: str) -> I64:
    """The inverse of :func:`keys_of`: the hash is a bijection. int64 [N] → int64 [N]."""
    x = np.ascontiguousarray(keys_N).view(np.uint64).copy()
    for shift, multiplier in ((31, 0x94D049BB133111EB), (27, 0xBF58476D1CE4E5B9), (30, 1)):
        x ^= (x >> np.uint64(shift)) ^ (x >> np.uint64(2 * shift))
        x *= np.uint64(pow(multiplier, -1, 1 << 64))
    ids: I64 = x.view(np.int64) ^ np.int64(_salt(vocabulary))
    return ids
