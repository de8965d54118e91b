"""What impressions share with others of their request, written into their rows.

Letters: N impressions, R requests.
"""

from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smes.arrays import I64, Bool
from smes.events import ImpressionBlock
from smes.schema import MISSING, Schema

Columns = NDArray[Any]
"""The columns of one field, [N, L]; a view."""


def give(block: ImpressionBlock, given: ImpressionBlock, of_N: I64, schema: Schema) -> dict[int, str]:
    """Write into the rows, in place, what their requests have.

    Args:
        block: N impressions, with ``MISSING`` for what is absent, also for ids and the time.
        given: R rows, what the impressions of a request share, likewise; impression ids are passed over.
        of_N: int64 [N], the number of an impression's request; -1 where it has none.
        schema: The features.

    Returns:
        Row → the first field of which its request has another value.
    """
    conflicts: dict[int, str] = {}
    everywhere = bool((of_N >= 0).all())
    rows = slice(None) if everywhere else np.flatnonzero(of_N >= 0)
    of = of_N[rows]
    numbers = np.arange(len(of_N))[rows]
    of_requests = _ids_of_requests(block, schema)
    if everywhere:
        block.ids[:, of_requests] = given.ids[:, of_requests][of]
    else:
        block.ids[numbers[:, None], of_requests] = given.ids[:, of_requests][of]
    for name, own, shared in _fields(block, given, schema, set(of_requests.tolist())):
        there = _present(shared)
        if not there.any():
            continue
        has, mine = there[of], _present(own)[rows]
        both = np.flatnonzero(has & mine)
        if len(both):
            a, b = own[numbers[both]], shared[of[both]]
            differ = ((a != b) & ((a == a) | (b == b))).any(axis=1)  # NaN is NaN
            for number in numbers[both[differ]].tolist():
                conflicts.setdefault(number, name)
        fill = has & ~mine
        if everywhere and fill.all():
            own[:] = shared[of]
        else:
            own[numbers[fill]] = shared[of[fill]]
    return conflicts


def _ids_of_requests(block: ImpressionBlock, schema: Schema) -> I64:
    """The id columns of the features that no impression has itself."""
    nobody_W = (block.ids == MISSING).all(axis=0)
    columns = [schema.id_slices[feature.name] for feature in schema.id_features]
    own = [np.arange(at.start, at.stop) for at in columns if nobody_W[at.start]]  # bags are filled from the left
    return np.concatenate([np.zeros(0, np.int64), *own])


def _fields(
    block: ImpressionBlock, given: ImpressionBlock, schema: Schema, done: AbstractSet[int]
) -> Iterator[tuple[str, Columns, Columns]]:
    """Each field, but for id columns that are done: its name in JSON, and its columns of impressions and requests."""
    for feature in schema.id_features:
        columns = schema.id_slices[feature.name]
        if columns.start not in done:
            name = feature.name if columns.start < 2 else f"features.{feature.name}"
            yield name, block.ids[:, columns], given.ids[:, columns]
    yield "event_time_ms", block.event_time_ms[:, None], given.event_time_ms[:, None]
    yield "request_id", block.request_id[:, None], given.request_id[:, None]
    for column, feature in enumerate(schema.numeric_features):
        at = slice(column, column + 1)
        yield f"features.{feature.name}", block.numerics[:, at], given.numerics[:, at]
    yield "served.version", block.served_version[:, None], given.served_version[:, None]
    yield "served.scores", block.served_scores, given.served_scores
    yield "served.arm", block.served_arm, given.served_arm


def _present(columns: Columns) -> Bool:
    """In which rows a field has a value."""
    if columns.dtype.kind == "f":
        return np.asarray(~np.isnan(columns).all(axis=1))
    # A bag or a name is filled from the left.
    return np.asarray(columns[:, 0] != (0 if columns.dtype == np.uint8 else MISSING))
