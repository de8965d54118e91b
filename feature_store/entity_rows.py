"""What is read of an entity store.

Letters: N items or look-ups, W id columns, F numeric columns.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from smes.arrays import F32, I64, Bool
from smes.schema import MISSING, Schema

ALWAYS = 0
"""Time of a row that holds until the first one with a time."""


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


class AsOf(NamedTuple):
    """What the store had of N entities at N times.

    Attributes:
        known: bool [N], whether a row held then.
        later: bool [N], whether the store has rows of the entity, and all that are kept are later.
    """

    known: Bool
    later: Bool


class EntityVersion(NamedTuple):
    """One row of an entity.

    Attributes:
        time_ms: From when it holds, Unix milliseconds; :data:`ALWAYS`: from ever.
        values: Name of a feature → an id, a list of ids or a number; None where it is missing.
    """

    time_ms: int
    values: dict[str, int | float | list[int] | None]


def blank_rows(schema: Schema, user_id: int, item_ids: I64) -> EntityRows:
    """Rows without a feature store: only the ids of user and items are known."""
    ids = np.full((len(item_ids), schema.id_width), MISSING, np.int64)
    ids[:, 0] = user_id
    ids[:, 1] = item_ids
    numerics = np.full((len(item_ids), schema.num_numerics), np.nan, np.float32)
    return EntityRows(ids, numerics, user_known=False, items_known=np.zeros(len(item_ids), np.bool_))
