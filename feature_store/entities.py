"""User and item features in Redis: the last few rows of each entity, by time; many entities in one round trip.

Keys, all under ``{namespace}:features:``; the braces are part of the key, a hash tag

============ ====== ===================================================================================
``layouts``    hash   id of a layout → its columns (:mod:`feature_store.entity_layout`)
``user:{id}``  string the user's rows, newest first (:mod:`feature_store.entity_versions`)
``item:{id}``  string the item's rows, likewise
``written:…``  string ``user`` and ``item``: the mark of the last write of rows (:mod:`feature_store.item_cache`)
============ ====== ===================================================================================

A row holds its entity's columns of :class:`smes.events.ImpressionBlock` in the same encoding (``MISSING``, NaN). So
rows are copied into the matrices without parsing. Rows that were written under another schema are read by the names of
their columns.

Letters: N look-ups, W id columns, F numeric columns.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from os import urandom
from typing import Any, NamedTuple, cast

import numpy as np
import redis
from numpy.typing import NDArray

from feature_store.damage import Damage
from feature_store.described_layouts import DescribedLayouts
from feature_store.entity_layout import ENTITIES, LAYOUT_ID_BYTES, Entity, Layout, ReadingPlan
from feature_store.entity_rows import ALWAYS, AsOf, EntityRows, EntityVersion, blank_rows
from feature_store.entity_values import columns_of, entity_ids
from feature_store.entity_versions import BROKEN, FOUND, LATER, MAX_VERSIONS, PUT, Found, find, version_bytes, versions
from feature_store.item_cache import NOTHING_KEPT, ItemCache, Kept
from smes.arrays import F32, I64, Bool
from smes.schema import MISSING, Schema
from smes_io.clock import wall_clock_ms
from smes_io.redis_access import key_prefix
from smes_io.redis_client import translated

__all__ = ["ALWAYS", "AsOf", "Entity", "EntityRows", "EntityStore", "EntityVersion", "blank_rows"]

DEFAULT_VERSIONS = 4
_EARLIEST_MS = 946_684_800_000  # no event is older than 2000-01-01
_DAY_MS = 86_400_000
_BATCH = 1000
_MARK_BYTES = 16


class EntityStore:
    """Writes and reads entity features of one schema. Reads are safe to share between threads.

    Args:
        client: A client that returns bytes; its timeout bounds every call.
        schema: Which columns there are.
        namespace: Prefix of every key.
        keep: How many versions of an entity a write leaves, 1 … 64.
        renamed: Name of a feature → its name in rows from before it was renamed.
        cache: Keeps rows of items that :meth:`get` and :meth:`get_many` read; None: each is read every time.
        now_ms: Wall clock in Unix milliseconds.
    """

    def __init__(
        self,
        client: redis.Redis,
        schema: Schema,
        namespace: str = "smes",
        *,
        keep: int = DEFAULT_VERSIONS,
        renamed: Mapping[str, str] | None = None,
        cache: ItemCache | None = None,
        now_ms: Callable[[], int] = wall_clock_ms,
    ) -> None:
        if not 1 <= keep <= MAX_VERSIONS:
            raise ValueError(f"feature versions: {keep}, expected 1 … {MAX_VERSIONS}")
        self.damage = Damage()
        """What was found broken in the store."""
        self._client, self._schema, self._keep, self._now_ms = client, schema, keep, now_ms
        self._renamed, self._cache = dict(renamed or {}), cache
        self._prefix = f"{key_prefix(namespace)}:features:"
        self._mark_key = f"{self._prefix}written:item"
        self._layouts: dict[Entity, Layout] = {entity: Layout.of(schema, entity) for entity in ENTITIES}
        self._put = client.register_script(PUT)
        self._described = DescribedLayouts(client, f"{self._prefix}layouts", self.damage, self._layouts.values())
        self._own_columns = {entity: self._plan(entity, layout) for entity, layout in self._layouts.items()}
        self._plans: dict[tuple[Entity, bytes], ReadingPlan] = {}

    def put_many(
        self, entity: Entity, ids: I64, columns: Mapping[str, NDArray[Any]], time_ms: int | I64 | None = None
    ) -> int:
        """Write rows of N entities. A row replaces one of the same entity and time as a whole.

        Args:
            entity: ``user`` or ``item``.
            ids: int64 [N]. An id may occur more than once.
            columns: Feature name → values: int64 [N] of an id feature, int64 [N, max_length] of a bag or sequence
                (padded with ``MISSING``), a number [N] of a numeric feature (of an ``elapsed`` one: seconds since
                1970). A feature left out is missing for all.
            time_ms: From when the rows hold, Unix milliseconds, one or int64 [N]: :data:`ALWAYS`, or a time from 2000
                to a day from now. None: from now.

        Returns:
            How many of the rows were dropped, because they are older than all versions that are kept of their entity.

        Raises:
            ValueError: An unknown column, or one of the wrong type or shape; an id or a time out of range.
            FeatureStoreError, FeatureStoreUnavailable: Redis refused, or gave no answer. Some rows may be written; to
                write all of them again changes nothing that is there.
        """
        layout = self._layouts[entity]
        rows = layout.pack(self._schema, len(ids), columns)
        if ids.dtype != np.int64 or ids.ndim != 1 or (ids == MISSING).any():
            raise ValueError(f"{entity} ids: {ids.dtype} {list(ids.shape)}, expected int64 [N] without {MISSING}")
        times_N = self._times(len(ids), time_ms)
        if layout.dtype.itemsize == 0:
            return 0
        dropped = 0
        with translated(self._client, f"{entity} features were written"):
            for start in range(0, len(ids), _BATCH):
                part = slice(start, start + _BATCH)
                keys = [f"{self._prefix}layouts", f"{self._prefix}written:{entity}"]
                keys += [f"{self._prefix}{entity}:{i}" for i in ids[part].tolist()]
                packed = version_bytes(rows[part], times_N[part], layout.id)
                fixed: list[Any] = [self._keep, layout.id, layout.description, urandom(_MARK_BYTES)]
                dropped += int(self._put(keys, [*fixed, *packed]))
        return dropped

    def put(self, entity: Entity, entity_id: int | str, values: Mapping[str, Any], time_ms: int | None = None) -> bool:
        """Write one row, of plain values as :func:`feature_store.entity_values.columns_of` takes them.

        Args:
            entity: ``user`` or ``item``.
            entity_id: Its id; a text becomes one by :func:`smes.hashing.encode_id`.
            values: Name of a feature → value. A feature left out is missing.
            time_ms: As of :meth:`put_many`.

        Returns:
            Whether the row is kept; false if it is older than all versions that are.

        Raises:
            ValueError, FeatureStoreError, FeatureStoreUnavailable: As :meth:`put_many`; the message names the feature.
        """
        columns = columns_of(self._schema, entity, [values])
        return self.put_many(entity, entity_ids([entity_id], f"{entity}_id"), columns, time_ms) == 0

    def get(self, user_id: int, item_ids: I64, now_ms: int | None = None) -> EntityRows:
        """The features of a user and N items as they are now, in one round trip. Unknown entities are not an error.

        A value that is broken (not the rows of a layout, or with infinite numbers) counts as missing, and is noted.

        Args:
            user_id: The user.
            item_ids: int64 [N].
            now_ms: Unix milliseconds; None asks the clock. Rows with a later time do not hold yet.

        Raises:
            FeatureStoreError, FeatureStoreUnavailable: Redis refused, or gave no answer.
        """
        return self.get_many([(user_id, item_ids)], now_ms)[0]

    def get_many(self, asked: Sequence[tuple[int, I64]], now_ms: int | None = None) -> list[EntityRows]:
        """The same of several requests, at least one, all in one round trip.

        Args:
            asked: User and items of each, int64 [N].
            now_ms: As of :meth:`get`.

        Raises:
            FeatureStoreError, FeatureStoreUnavailable: Redis refused, or gave no answer.
        """
        counts = [len(item_ids) for _, item_ids in asked]
        users_U, items_N = np.array([user for user, _ in asked], np.int64), np.concatenate([i for _, i in asked])
        of_user_N = np.repeat(np.arange(len(asked)), counts)
        rows = blank_rows(self._schema, 0, items_N)
        rows.ids[:, 0] = users_U[of_user_N]
        known_U, known_N = np.ones(len(asked), np.bool_), np.ones(len(items_N), np.bool_)
        broken: list[str] = []
        if any(layout.dtype.itemsize for layout in self._layouts.values()):
            at_ms = self._now_ms() if now_ms is None else now_ms
            first, own = blank_rows(self._schema, 0, users_U), self._own_columns["user"]
            keys = [f"{self._prefix}user:{i}" for i in users_U.tolist()]
            values, items = self._read(keys, items_N, at_ms)
            times_U = np.full(len(keys), at_ms, np.int64)
            known_U = self._write("user", keys, values, np.arange(len(keys)), times_U, first, broken).known
            rows.ids[:, own.to_ids] = first.ids[of_user_N][:, own.to_ids]
            rows.numerics[:, own.to_numerics] = first.numerics[of_user_N][:, own.to_numerics]
            self._write_items(items, items_N, at_ms, rows, known_N, broken)
        problem, ends = broken[0] if broken else None, list(accumulate(counts))
        return [
            EntityRows(rows.ids[start:end], rows.numerics[start:end], user_known, known_N[start:end], problem)
            for start, end, user_known in zip([0, *ends], ends, known_U.tolist(), strict=False)
        ]

    def _read(self, beside: list[str], ids_N: I64, at_ms: int) -> "tuple[list[bytes | None], _Items]":
        """The values of some keys, and of those of the items that are not kept; one round trip.

        It takes a second one where items were written since the kept rows were read.
        """
        if self._cache is None:
            keys = self._item_keys(ids_N)
            values = self._values([*beside, *keys])
            return values[: len(beside)], _Items(None, np.arange(len(keys)), keys, values[len(beside) :], None)
        kept = self._cache.find(ids_N, at_ms)
        missed_N = np.ones(len(ids_N), np.bool_)
        missed_N[kept.places_M] = False
        places = np.flatnonzero(missed_N)
        keys = self._item_keys(ids_N[places])
        mark, *values = self._values([self._mark_key, *beside, *keys])
        of_items = values[len(beside) :]
        if not self._cache.holds(kept, mark):
            others = self._item_keys(ids_N[kept.places_M])
            mark_now, *more = self._values([self._mark_key, *others])
            mark = mark if mark == mark_now else None
            places, keys, of_items = np.append(places, kept.places_M), keys + others, of_items + more
            kept = NOTHING_KEPT
        return values[: len(beside)], _Items(kept, places, keys, of_items, mark)

    def _item_keys(self, ids: I64) -> list[str]:
        return [f"{self._prefix}item:{i}" for i in ids.tolist()]

    def _values(self, keys: list[str]) -> list[bytes | None]:
        with translated(self._client, "features were read"):
            return cast("list[bytes | None]", self._client.mget(keys))

    def _write_items(
        self, items: "_Items", ids_N: I64, at_ms: int, rows: EntityRows, known_N: Bool, broken: list[str]
    ) -> None:
        """Write what was read, and what was kept, of items into the matrices and ``known_N``; keep what was read."""
        own, (kept, places, keys, values, mark) = self._own_columns["item"], items
        if kept is not None:
            own.write(rows, kept.places_M, kept.ids_MV, kept.numerics_MG)
            known_N[kept.places_M] = kept.known_M
        if not len(places):
            return
        into = _Matrices(rows.ids[places], rows.numerics[places]) if kept is not None else rows
        times = np.full(len(places), at_ms, np.int64)
        known_N[places] = known_M = self._write("item", keys, values, np.arange(len(places)), times, into, broken).known
        if kept is not None and self._cache is not None:
            rows.ids[places], rows.numerics[places] = into.ids, into.numerics
            if not broken:  # what is broken is said each time
                columns = into.ids[:, own.to_ids], into.numerics[:, own.to_numerics]
                self._cache.add(mark, at_ms, ids_N[places], values, columns, known_M)

    def as_of(self, entity: Entity, ids_N: I64, time_ms_N: I64, out_ids_NW: I64, out_numerics_NF: F32) -> AsOf:
        """Write the rows that held at a time into matrices, whose other columns stay as they are.

        One round trip for each 1000 different entities. Times of ``elapsed`` features are written as stored.

        Args:
            entity: ``user`` or ``item``.
            ids_N: int64 [N], may repeat.
            time_ms_N: int64 [N], Unix milliseconds.
            out_ids_NW: int64 [N, W], the entity's columns ``MISSING``.
            out_numerics_NF: float32 [N, F], the entity's columns NaN.

        Raises:
            FeatureStoreError, FeatureStoreUnavailable: Redis refused, or gave no answer.
        """
        known_N, later_N = np.zeros(len(ids_N), np.bool_), np.zeros(len(ids_N), np.bool_)
        unique, inverse_N = np.unique(ids_N, return_inverse=True)
        broken: list[str] = []
        for start in range(0, len(unique), _BATCH):
            keys = [f"{self._prefix}{entity}:{i}" for i in unique[start : start + _BATCH].tolist()]
            values = self._values(keys)
            rows = np.flatnonzero((inverse_N >= start) & (inverse_N < start + len(keys)))
            into = _Matrices(out_ids_NW[rows], out_numerics_NF[rows])
            part = self._write(entity, keys, values, inverse_N[rows] - start, time_ms_N[rows], into, broken)
            out_ids_NW[rows], out_numerics_NF[rows] = into
            known_N[rows], later_N[rows] = part
        return AsOf(known_N, later_N)

    def versions(self, entity: Entity, entity_id: int) -> tuple[EntityVersion, ...]:
        """All rows of an entity, newest first; those that cannot be read are left out, and noted.

        Raises:
            FeatureStoreError, FeatureStoreUnavailable: Redis refused, or gave no answer.
        """
        key = f"{self._prefix}{entity}:{entity_id}"
        (value,) = self._values([key])
        out: list[EntityVersion] = []
        try:
            for time_ms, layout_id, row in versions(value or b""):
                layout = self._described.get(layout_id)
                if layout is None or layout.dtype.itemsize != len(row):
                    raise ValueError(f"a row of an unknown layout {layout_id.hex()}")
                out.append(EntityVersion(time_ms, layout.values(np.frombuffer(row, layout.dtype)[0])))
        except ValueError as error:
            self.damage.note(f"Redis key {key}: {error}")
        return tuple(out)

    def holds_any(self) -> bool:
        """Whether features were ever written since the store was cleared.

        Raises:
            FeatureStoreError, FeatureStoreUnavailable: Redis refused, or gave no answer.
        """
        with translated(self._client, "the feature store was looked at"):
            return bool(self._client.exists(f"{self._prefix}layouts"))

    def clear(self) -> int:
        """Remove every row and layout; the number of entities removed."""
        removed, marks = 0, [f"{self._prefix}written:{entity}" for entity in ENTITIES]
        with translated(self._client, "features were removed"):
            self._client.delete(*marks)  # so that nobody relies on kept rows, even if this breaks off
            for entity in ENTITIES:
                batch: list[Any] = []
                for key in self._client.scan_iter(f"{self._prefix}{entity}:*", count=_BATCH):
                    batch.append(key)
                    if len(batch) == _BATCH:
                        removed += int(self._client.unlink(*batch))
                        batch.clear()
                removed += int(self._client.unlink(*batch)) if batch else 0
            self._client.delete(f"{self._prefix}layouts", *marks)  # somebody may have written meanwhile
        return removed

    def _times(self, n: int, time_ms: int | I64 | None) -> I64:
        """Times of N rows, int64 [N]."""
        now_ms = self._now_ms()
        times_N = np.full(n, now_ms if time_ms is None else time_ms, np.int64)
        bad = (times_N != ALWAYS) & ((times_N < _EARLIEST_MS) | (times_N > now_ms + _DAY_MS))
        if bad.any():
            expected = f"{ALWAYS} or Unix milliseconds from {_EARLIEST_MS} (2000-01-01) to a day from now"
            raise ValueError(f"time_ms: {times_N[bad][0]}, expected {expected}")
        return times_N

    def _write(
        self,
        entity: Entity,
        keys: Sequence[str],
        values: Sequence[bytes | None],
        which_N: I64,
        time_ms_N: I64,
        into: "EntityRows | _Matrices",
        broken: list[str],
    ) -> AsOf:
        """Write the rows found into the matrices. What is broken is noted, and its message added to ``broken``."""
        if self._layouts[entity].dtype.itemsize == 0:  # without features, every entity counts as existing
            return AsOf(np.ones(len(which_N), np.bool_), np.zeros(len(which_N), np.bool_))
        found = find(values, which_N, time_ms_N)
        bad: dict[int, str] = {
            which: f"{len(values[which] or b'')} bytes, expected versions of a row"
            for which in which_N[found.outcome == BROKEN].tolist()
        }
        lookups = np.flatnonzero(found.outcome == FOUND)
        known = found.outcome == FOUND
        for number in np.unique(found.layout[lookups]).tolist():
            some = lookups[found.layout[lookups] == number]
            layout_id = int(number).to_bytes(LAYOUT_ID_BYTES, "little")
            layout = self._described.get(layout_id)
            if layout is None:
                wrong, why = some, f"a row of layout {layout_id.hex()}, which {self._prefix}layouts does not describe"
            else:
                wrong = some[found.size[some] != layout.dtype.itemsize]
                why = f"a row of another length, expected {layout.dtype.itemsize} bytes"
                some = some[found.size[some] == layout.dtype.itemsize]
                infinite = self._copy(entity, layout, found, some, into)
                bad |= dict.fromkeys(which_N[infinite].tolist(), "an infinite number, expected numbers")
            known[wrong] = False
            bad |= dict.fromkeys(which_N[wrong].tolist(), why)
        for which, message in bad.items():
            broken.append(self.damage.note(f"Redis key {keys[which]}: {message}"))
        return AsOf(known, found.outcome == LATER)

    def _copy(self, entity: Entity, layout: Layout, found: Found, lookups: I64, into: "EntityRows | _Matrices") -> I64:
        """Copy rows of a layout into the matrices; the look-ups that found infinite numbers, which stay missing."""
        key = (entity, layout.id)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = self._plan(entity, layout)
        rows = found.rows(lookups, layout.dtype)
        ids, numbers = rows["ids"][:, plan.from_ids], rows["numerics"][:, plan.from_numerics]
        infinite = np.isinf(numbers)
        if infinite.any():
            numbers = np.where(infinite, np.float32(np.nan), numbers)
        plan.write(into, lookups, ids, numbers)
        found_infinite: I64 = lookups[infinite.any(axis=1)]
        return found_infinite

    def _plan(self, entity: Entity, layout: Layout) -> ReadingPlan:
        names = [column.name for column in self._layouts[entity].columns]
        return ReadingPlan.of(layout, self._schema, names, self._renamed)


class _Matrices(NamedTuple):
    ids: I64
    numerics: F32


class _Items(NamedTuple):
    """What a read found of items: the kept ones, if any may be; places, keys and values of the others; the mark."""

    kept: Kept | None
    places: I64
    keys: list[str]
    values: list[bytes | None]
    mark: bytes | None
