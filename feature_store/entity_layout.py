"""Which columns a stored row of features has, and how they become columns of a schema.

A row is int64 columns (ids, padded bags and sequences), then float32 numerics, little-endian, in the order of its
*layout*. A layout is described once in the store, under an id that is a hash of the description. So a row that was
written under one schema is read under another one, column by column, by name.

Letters: N entities, W id columns and F numeric columns of a schema.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from smes.arrays import F32, I64
from smes.events import misaligned
from smes.schema import ITEM_ID, MISSING, USER_ID, Feature, Schema

Entity = Literal["user", "item"]
ENTITIES: tuple[Entity, ...] = get_args(Entity)

Kind = Literal["id", "bag", "sequence", "numeric", "time"]
"""``time``: seconds since 1970, of an ``elapsed`` feature; the others are those of :class:`smes.schema.Feature`."""

Columns = I64 | slice
"""Columns of a matrix."""

LAYOUT_ID_BYTES = 8
MAX_DESCRIPTION_BYTES = 1024 * 1024
_MAX_WIDTH = 1024
_LISTS = ("bag", "sequence")
_NUMBERS = ("numeric", "time")


class Column(NamedTuple):
    """A feature as it is stored.

    Attributes:
        name: Of the feature.
        kind: What its values are.
        width: How many ids of a bag or sequence, else 1.
    """

    name: str
    kind: Kind
    width: int

    @classmethod
    def of(cls, feature: Feature) -> "Column":
        """The column of a feature."""
        return cls(feature.name, "time" if feature.elapsed else feature.kind, feature.width)


def own_features(schema: Schema, entity: Entity) -> tuple[Feature, ...]:
    """The features of a schema that the store holds for an entity; not its id."""
    return tuple(f for f in schema.features if f.source == entity and f.name not in (USER_ID, ITEM_ID))


@dataclass(frozen=True)
class Layout:
    """The columns of a row, in their order: those of ids stand before numbers in the row."""

    columns: tuple[Column, ...]

    @classmethod
    def of(cls, schema: Schema, entity: Entity) -> "Layout":
        """The layout in which rows are written under a schema."""
        return cls(tuple(map(Column.of, own_features(schema, entity))))

    @cached_property
    def dtype(self) -> np.dtype[np.void]:
        """``ids`` int64 and ``numerics`` float32, one row."""
        ids = sum(c.width for c in self.columns if c.kind not in _NUMBERS)
        numbers = sum(c.kind in _NUMBERS for c in self.columns)
        return np.dtype([("ids", "<i8", (ids,)), ("numerics", "<f4", (numbers,))])

    @cached_property
    def starts(self) -> dict[str, int]:
        """Name → its first column among the row's ids, or its column among the numerics."""
        starts, next_id, next_number = {}, 0, 0
        for column in self.columns:
            if column.kind in _NUMBERS:
                starts[column.name] = next_number
                next_number += 1
            else:
                starts[column.name] = next_id
                next_id += column.width
        return starts

    @cached_property
    def description(self) -> bytes:
        """JSON from which :meth:`described` builds an equal layout."""
        return json.dumps({"columns": self.columns}, separators=(",", ":")).encode()

    @cached_property
    def id(self) -> bytes:
        """The first 8 bytes of the SHA-256 of the description."""
        return hashlib.sha256(self.description).digest()[:LAYOUT_ID_BYTES]

    @classmethod
    def described(cls, description: bytes) -> "Layout":
        """The inverse of :attr:`description`.

        Raises:
            ValueError: It describes no layout.
        """
        if len(description) > MAX_DESCRIPTION_BYTES:
            raise ValueError(f"{len(description)} bytes, expected at most {MAX_DESCRIPTION_BYTES}")
        try:
            columns = tuple(Column(name, kind, width) for name, kind, width in json.loads(description)["columns"])
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"no columns of a layout ({error})") from None
        for column in columns:
            good = isinstance(column.name, str) and column.kind in get_args(Kind) and type(column.width) is int
            if not good or not 1 <= column.width <= (_MAX_WIDTH if column.kind in _LISTS else 1):
                raise ValueError(f"column {column!r}, expected name, kind and width")
        if len({column.name for column in columns}) < len(columns):
            raise ValueError("a column twice")
        return cls(columns)

    def pack(self, schema: Schema, n: int, columns: Mapping[str, NDArray[Any]]) -> NDArray[np.void]:
        """Rows of N entities; a feature without a column is missing.

        Args:
            schema: The one that the layout is of.
            n: N.
            columns: As of :meth:`feature_store.entities.EntityStore.put_many`.

        Raises:
            ValueError: A column is unknown, of another type or shape, or has infinite numbers; or a sequence has
                another length than the one that it accompanies.
        """
        known = {c.name for c in self.columns}
        if unknown := columns.keys() - known:
            raise ValueError(f"column {min(unknown)!r}: expected one of {sorted(known)}")
        rows = np.empty(n, self.dtype)
        rows["ids"] = MISSING
        rows["numerics"] = np.nan
        for name, kind, width in self.columns:
            column = columns.get(name)
            if column is None:
                continue
            _check_column(name, kind, width, n, column)
            start = self.starts[name]
            if kind in _NUMBERS:
                with np.errstate(over="ignore"):
                    rows["numerics"][:, start] = column
            else:
                rows["ids"][:, start : start + width] = column.reshape(n, width)
        infinite = np.isinf(rows["numerics"])
        if infinite.any():
            name = [c.name for c in self.columns if c.kind in _NUMBERS][int(np.flatnonzero(infinite.any(axis=0))[0])]
            raise ValueError(f"column {name!r}: an infinite number, expected numbers that float32 can hold")
        self._check_companions(schema, rows)
        return rows

    def _check_companions(self, schema: Schema, rows: NDArray[np.void]) -> None:
        if not any(f.accompanies in self.starts for f in schema.features):
            return
        ids_NW = np.full((len(rows), schema.id_width), MISSING, np.int64)
        plan = ReadingPlan.of(self, schema, [c.name for c in self.columns])
        ids_NW[:, plan.to_ids] = rows["ids"][:, plan.from_ids]
        bad = misaligned(ids_NW, schema)
        if bad.any():
            raise ValueError(
                f"row {int(np.flatnonzero(bad)[0])}: a sequence of another length than the one that it accompanies"
            )

    def values(self, row: np.void) -> dict[str, int | float | list[int] | None]:
        """One row in plain values by name: an id, a list of ids, or a number; None where it is missing."""
        ids, numbers = row["ids"], row["numerics"]
        out: dict[str, int | float | list[int] | None] = {}
        for name, kind, width in self.columns:
            start = self.starts[name]
            if kind in _NUMBERS:
                number = float(numbers[start])
                out[name] = None if np.isnan(number) else number
            elif kind == "id":
                out[name] = None if ids[start] == MISSING else int(ids[start])
            else:
                out[name] = [i for i in ids[start : start + width].tolist() if i != MISSING]
        return out


class Matrices(Protocol):
    """The matrices of N instances: int64 [N, W] and float32 [N, F]."""

    @property
    def ids(self) -> I64: ...

    @property
    def numerics(self) -> F32: ...


@dataclass(frozen=True)
class ReadingPlan:
    """How columns of a layout become columns of a schema: ``ids[:, to_ids] = row["ids"][:, from_ids]``, and so on.

    A column is taken over where name and kind are the same. A wider bag has missing ids at its end, a narrower one
    keeps the first. Everything else stays missing.

    Attributes:
        from_ids, to_ids: Columns of the row and of a matrix [N, W].
        from_numerics, to_numerics: Columns of the row and of a matrix [N, F].
        names: The features that are taken over.
    """

    from_ids: Columns
    to_ids: Columns
    from_numerics: Columns
    to_numerics: Columns
    names: frozenset[str]

    def write(self, into: Matrices, places_M: I64, ids_MC: I64, numerics_MC: F32) -> None:
        """Write columns, as the plan takes them from rows, into some rows of matrices: places ascending."""
        if len(places_M) == len(into.ids):
            into.ids[:, self.to_ids], into.numerics[:, self.to_numerics] = ids_MC, numerics_MC
        elif len(places_M):
            into.ids[places_M[:, None], np.arange(into.ids.shape[1])[self.to_ids]] = ids_MC
            into.numerics[places_M[:, None], np.arange(into.numerics.shape[1])[self.to_numerics]] = numerics_MC

    @classmethod
    def of(
        cls, layout: Layout, schema: Schema, names: Sequence[str], renamed: Mapping[str, str] | None = None
    ) -> "ReadingPlan":
        """The plan for the features ``names`` of a schema.

        Args:
            layout: Of the rows.
            schema: What they are read under.
            names: Names of features.
            renamed: Name of a feature → its name before; rows of before have that one.
        """
        stored = {column.name: column for column in layout.columns}
        features = {f.name: f for f in schema.features}
        number_columns = {f.name: i for i, f in enumerate(schema.numeric_features)}
        ids: list[tuple[int, int]] = []
        numerics: list[tuple[int, int]] = []
        taken: list[str] = []
        for name in names:
            wanted = Column.of(features[name])
            column = stored.get(name) or stored.get((renamed or {}).get(name, name))
            if column is None or column.kind != wanted.kind:
                continue
            taken.append(name)
            start = layout.starts[column.name]
            if column.kind in _NUMBERS:
                numerics.append((start, number_columns[name]))
            else:
                width, first = min(column.width, wanted.width), schema.id_slices[name].start
                ids += [(start + i, first + i) for i in range(width)]
        return cls(
            from_ids=_columns([each for each, _ in ids]),
            to_ids=_columns([each for _, each in ids]),
            from_numerics=_columns([each for each, _ in numerics]),
            to_numerics=_columns([each for _, each in numerics]),
            names=frozenset(taken),
        )


def _columns(columns: list[int]) -> Columns:
    """A slice, which is quicker, where the columns are a run."""
    first = columns[0] if columns else 0
    run = range(first, first + len(columns))
    return slice(run.start, run.stop) if columns == list(run) else np.array(columns, np.int64)


def _check_column(name: str, kind: Kind, width: int, n: int, column: NDArray[Any]) -> None:
    shape = (n, width) if kind in _LISTS else (n,)
    type_fits = column.dtype.kind in "fiu" if kind in _NUMBERS else column.dtype == np.int64
    if column.shape != shape or not type_fits:
        expected = "a number" if kind in _NUMBERS else "int64"
        raise ValueError(f"column {name!r}: {column.dtype} {list(column.shape)}, expected {expected} {list(shape)}")
