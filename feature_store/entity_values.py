"""Features in plain values, as JSON and Python have them, to the columns that the store takes.

Letters: N rows, L ids of a bag or sequence.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from feature_store.entity_layout import Entity, own_features
from smes.arrays import I64
from smes.hashing import encode_id
from smes.schema import MISSING, Feature, Schema

_LARGEST = float(np.finfo(np.float32).max)


def columns_of(schema: Schema, entity: Entity, rows: Sequence[Mapping[str, Any]]) -> dict[str, NDArray[Any]]:
    """The columns of N rows, as :meth:`feature_store.entities.EntityStore.put_many` takes them.

    Args:
        schema: The features.
        entity: ``user`` or ``item``.
        rows: Name of a feature → value; None, the empty text, or nothing, where it is missing. An id is an integer or a
            text, which becomes one by :func:`smes.hashing.encode_id`; a bag or sequence a list of ids, of which the
            first ``max_length`` are kept; a numeric feature a finite number.

    Raises:
        ValueError: A name is unknown, or a value is of another kind; the message names the row and the feature.
    """
    features = own_features(schema, entity)
    names = {f.name for f in features}
    for n, row in enumerate(rows):
        if unknown := row.keys() - names:
            name = min(unknown, key=str)
            raise ValueError(
                f"{_where(rows, n)}{name}: no {entity} feature, expected one of {', '.join(sorted(names))}"
            )
    return {f.name: _column(f, rows) for f in features if any(f.name in row for row in rows)}


def entity_ids(values: Sequence[object], what: str) -> I64:
    """The ids of N entities, int64 [N], from integers and texts.

    Args:
        values: N ids.
        what: Names the field in a message.

    Raises:
        ValueError: A value is no id.
    """
    out = np.empty(len(values), np.int64)
    for n, value in enumerate(values):
        try:
            out[n] = _id(value)
        except ValueError as error:
            raise ValueError(f"{_where(values, n)}{what}: {error}") from None
    return out


def _column(feature: Feature, rows: Sequence[Mapping[str, Any]]) -> NDArray[Any]:
    n = len(rows)
    out: NDArray[Any]
    if feature.kind == "numeric":
        out = np.full(n, np.nan, np.float64)
    elif feature.is_list:
        out = np.full((n, feature.max_length), MISSING, np.int64)
    else:
        out = np.full(n, MISSING, np.int64)
    for i, row in enumerate(rows):
        value = row.get(feature.name)
        if value is None or _is_empty(value):
            continue
        try:
            if feature.kind == "numeric":
                out[i] = _number(value)
            elif feature.is_list:
                ids = [_id(each) for each in _list(value) if not _is_empty(each)][: feature.max_length]
                out[i, : len(ids)] = ids
            else:
                out[i] = _id(value)
        except ValueError as error:
            raise ValueError(f"{_where(rows, i)}{feature.name}: {error}") from None
    return out


def _where(rows: Sequence[object], n: int) -> str:
    return f"row {n}: " if len(rows) > 1 else ""


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise ValueError(f"{value!r:.60}, expected a number")
    try:
        number = float(value)
    except OverflowError:  # a long integer
        number = np.inf
    if not abs(number) <= _LARGEST:  # NaN, too
        raise ValueError(f"{value!r:.60}, expected a finite number that float32 can hold")
    return number


def _id(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float | str | np.integer):
        raise ValueError(f"{value!r:.60}, expected an integer or a text")
    if _is_empty(value):
        raise ValueError("'', expected an integer or a text that is not empty")
    if isinstance(value, str | float):
        return encode_id(value)
    if abs(int(value)) >= -MISSING:
        raise ValueError(f"{value!r:.60}, expected an integer within ±(2^63 - 1)")
    return int(value)


def _is_empty(value: object) -> bool:
    """Whether it is the empty text: no value, as in a log in files."""
    return isinstance(value, str) and not value


def _list(value: object) -> Sequence[object]:
    if not isinstance(value, list | tuple | np.ndarray):
        raise ValueError(f"{value!r:.60}, expected a list of ids")
    return list(value)
