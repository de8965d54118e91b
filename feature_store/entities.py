"""User and item features in Redis: one fixed-width value per entity, many entities in one round trip.

Keys, all under ``{namespace}:features:``; the braces are part of the key, a hash tag

============ ====== ===================================================================================
``schema``     string :attr:`smes.schema.Schema.hash` of the schema that the values were written with
``user:{id}``  string the user's row: int64 columns (ids, padded bags), then float32 numerics, little-endian
``item:{id}``  string the item's row, likewise
============ ====== ===================================================================================

A row holds its entity's columns of :class:`smes.events.ImpressionBlock`, in schema order and in the same encoding
(``MISSING``, NaN). So rows are copied into the matrices without parsing.

Letters: N entities, W id columns, F numeric columns.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import redis
from numpy.typing import NDArray

from feature_store.damage import Damage, shown
from smes.arrays import F32, I64, Bool
from smes.errors import FeatureStoreError, SchemaMismatch
from smes.schema import ITEM_ID, MISSING, USER_ID, Feature, Schema
from smes_io.redis_access import key_prefix
from smes_io.redis_client import address, translated

Entity = Literal["user", "item"]

_BATCH = 1000
_HASH = re.compile(rb"[0-9a-f]{8,64}")


@dataclass(frozen=True, slots=True)
class EntityRows:
    """The instances of one request: a user with N items.

    Attributes:
        ids: int64 [N, W]; user id, item id, and the known features of both; ``MISSING`` elsewhere.
        numerics: float32 [N, F]; NaN where unknown.
        user_known: Whether the store has the user; true if the schema has no user features.
        items_known: bool [N], the same for each item.
        problem: Which stored value is broken and counts as missing, None if none is.
    """

    ids: I64
    numerics: F32
    user_known: bool
    items_known: Bool
    problem: str | None = None


def blank_rows(schema: Schema, user_id: int, item_ids: I64) -> EntityRows:
    """Rows without a feature store: only the ids of user and items are known."""
    ids = np.full((len(item_ids), schema.id_width), MISSING, np.int64)
    ids[:, 0] = user_id
    ids[:, 1] = item_ids
    numerics = np.full((len(item_ids), schema.num_numerics), np.nan, np.float32)
    return EntityRows(ids, numerics, user_known=False, items_known=np.zeros(len(item_ids), np.bool_))


class EntityStore:
    """Writes and reads entity features of one schema.

    Args:
        client: A client that returns bytes; its timeout bounds every call.
        schema: Which columns there are.
        namespace: Prefix of every key.
    """

    def __init__(self, client: redis.Redis, schema: Schema, namespace: str = "smes") -> None:
        self.damage = Damage()
        """What was found broken in the store."""
        self._client = client
        self._schema = schema
        self._prefix = f"{key_prefix(namespace)}:features:"
        self._layouts: dict[Entity, _Layout] = {e: _Layout.of(schema, e) for e in ("user", "item")}

    def put_many(self, entity: Entity, ids: I64, columns: Mapping[str, NDArray[Any]]) -> None:
        """Write the features of N entities; an entity written before is replaced as a whole.

        Args:
            entity: ``user`` or ``item``.
            ids: int64 [N].
            columns: Feature name → values: int64 [N] of an id feature, int64 [N, max_length] of a bag or sequence
                (padded with ``MISSING``), float32 [N] of a numeric feature. A feature left out is missing for all.

        Raises:
            ValueError: An unknown column, or one of the wrong type or shape.
            SchemaMismatch: The store holds features of another schema; :meth:`clear` it first.
            FeatureStoreError, FeatureStoreUnavailable: Redis refused, or gave no answer.
        """
        rows = self._layouts[entity].pack(len(ids), columns)
        if ids.dtype != np.int64 or ids.ndim != 1:
            raise ValueError(f"{entity} ids: {ids.dtype} {list(ids.shape)}, expected int64 [N]")
        with translated(self._client, f"{entity} features were written"):
            self._claim()
            width = self._layouts[entity].dtype.itemsize
            if width == 0:
                return
            packed = rows.tobytes()
            for start in range(0, len(ids), _BATCH):
                names = [f"{self._prefix}{entity}:{i}" for i in ids[start : start + _BATCH].tolist()]
                offsets = range(start * width, (start + len(names)) * width, width)
                self._client.mset({name: packed[o : o + width] for name, o in zip(names, offsets, strict=True)})

    def get(self, user_id: int, item_ids: I64) -> EntityRows:
        """The stored features of a user and N items, in one round trip. Unknown entities are not an error.

        A value that is broken (of another length, or with infinite numbers) counts as missing, and is noted.

        Raises:
            SchemaMismatch: The store holds features of another schema.
            FeatureStoreError, FeatureStoreUnavailable: Redis refused, gave no answer, or holds features without the
                mark of a schema.
        """
        user, item = self._layouts["user"], self._layouts["item"]
        keys = [f"{self._prefix}schema", f"{self._prefix}user:{user_id}"]
        keys += [f"{self._prefix}item:{i}" for i in item_ids.tolist()]
        with translated(self._client, "features were read"):
            found = self._client.mget(keys)
        values = cast("list[bytes | None]", found)
        self._guard(values[0])
        if values[0] is None and any(value is not None for value in values[1:]):
            raise FeatureStoreError(f"Redis key {keys[0]}: missing or no string, expected {self._schema.hash}")
        rows = blank_rows(self._schema, user_id, item_ids)
        broken: list[str] = []
        users_known, stored = user.unpack(keys[1:2], values[1:2], broken)
        if len(stored):
            rows.ids[:, user.id_columns] = stored["ids"]
            rows.numerics[:, user.numeric_columns] = stored["numerics"]
        items_known, stored = item.unpack(keys[2:], values[2:], broken)
        if len(stored):
            found_N1 = np.flatnonzero(items_known)[:, None]
            rows.ids[found_N1, item.id_columns] = stored["ids"]
            rows.numerics[found_N1, item.numeric_columns] = stored["numerics"]
        for message in broken:
            self.damage.note(message)
        problem = broken[0] if broken else None
        return EntityRows(rows.ids, rows.numerics, bool(users_known[0]), items_known, problem)

    def clear(self) -> int:
        """Remove every feature and the schema's mark; the number of entities removed."""
        removed = 0
        with translated(self._client, "features were removed"):
            for entity in self._layouts:
                batch: list[Any] = []
                for key in self._client.scan_iter(f"{self._prefix}{entity}:*", count=_BATCH):
                    batch.append(key)
                    if len(batch) == _BATCH:
                        removed += int(self._client.unlink(*batch))
                        batch.clear()
                removed += int(self._client.unlink(*batch)) if batch else 0
            self._client.delete(f"{self._prefix}schema")
        return removed

    def _claim(self) -> None:
        """Mark the store as holding this schema's values, unless it holds those of another."""
        key = f"{self._prefix}schema"
        self._client.set(key, self._schema.hash, nx=True)
        self._guard(cast("bytes | None", self._client.get(key)))

    def _guard(self, mark: bytes | None) -> None:
        if mark is None or mark == self._schema.hash.encode():
            return
        if not _HASH.fullmatch(mark):
            raise FeatureStoreError(f"Redis key {self._prefix}schema: {shown(mark)}, expected {self._schema.hash}")
        raise SchemaMismatch(
            f"features in Redis at {address(self._client)}", expected=self._schema.hash, got=mark.decode()
        )


@dataclass(frozen=True)
class _Layout:
    """One entity's row: its features, and their columns in the row and in the matrices."""

    features: tuple[Feature, ...]
    id_columns: I64
    numeric_columns: I64
    dtype: np.dtype[np.void]

    @classmethod
    def of(cls, schema: Schema, entity: Entity) -> "_Layout":
        own = [f for f in schema.features if f.source == entity and f.name not in (USER_ID, ITEM_ID)]
        slices = [schema.id_slices[f.name] for f in own if f.kind != "numeric"]
        id_columns = [column for s in slices for column in range(s.start, s.stop)]
        numeric_columns = [schema.numeric_features.index(f) for f in own if f.kind == "numeric"]
        dtype = np.dtype([("ids", "<i8", (len(id_columns),)), ("numerics", "<f4", (len(numeric_columns),))])
        return cls(tuple(own), np.array(id_columns, np.int64), np.array(numeric_columns, np.int64), dtype)

    def pack(self, n: int, columns: Mapping[str, NDArray[Any]]) -> NDArray[np.void]:
        """Rows of N entities; a feature without a column is missing."""
        unknown = columns.keys() - {f.name for f in self.features}
        if unknown:
            raise ValueError(f"column {min(unknown)!r}: expected one of {sorted(f.name for f in self.features)}")
        rows = np.empty(n, self.dtype)
        rows["ids"] = MISSING
        rows["numerics"] = np.nan
        next_id = next_numeric = 0
        for feature in self.features:
            column = columns.get(feature.name)
            if column is not None:
                _check_column(feature, n, column)
            if feature.kind == "numeric":
                if column is not None:
                    rows["numerics"][:, next_numeric] = column
                next_numeric += 1
            else:
                if column is not None:
                    rows["ids"][:, next_id : next_id + feature.width] = column.reshape(n, feature.width)
                next_id += feature.width
        return rows

    def unpack(
        self, keys: Sequence[str], values: Sequence[bytes | None], broken: list[str]
    ) -> tuple[Bool, NDArray[np.void]]:
        """(bool [N], which values exist; their rows). Without features, every entity counts as existing.

        What is broken is added to ``broken``. A value of another length does not exist; infinite numbers are missing.
        """
        width = self.dtype.itemsize
        if width == 0:
            return np.ones(len(values), np.bool_), np.empty(0, self.dtype)
        for key, value in zip(keys, values, strict=True):
            if value is not None and len(value) != width:
                broken.append(f"Redis key {key}: {len(value)} bytes, expected {width}")
        whole = [value is not None and len(value) == width for value in values]
        present = [value for value, fits in zip(values, whole, strict=True) if fits and value is not None]
        rows = np.frombuffer(b"".join(present), self.dtype)
        if np.isinf(rows["numerics"]).any():
            rows = rows.copy()
            infinite_N = np.isinf(rows["numerics"]).any(axis=1)
            named = [key for key, fits in zip(keys, whole, strict=True) if fits]
            broken += [
                f"Redis key {named[n]}: an infinite number, expected numbers" for n in np.flatnonzero(infinite_N)
            ]
            rows["numerics"][np.isinf(rows["numerics"])] = np.nan
        return np.array(whole, np.bool_), rows


def _check_column(feature: Feature, n: int, column: NDArray[Any]) -> None:
    shape = (n, feature.max_length) if feature.is_list else (n,)
    type_fits = column.dtype.kind in "fiu" if feature.kind == "numeric" else column.dtype == np.int64
    if column.shape != shape or not type_fits:
        expected = "a number" if feature.kind == "numeric" else "int64"
        raise ValueError(
            f"column {feature.name!r}: {column.dtype} {list(column.shape)}, expected {expected} {list(shape)}"
        )
