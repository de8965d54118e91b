"""Which rank of a training owns which rows of the id table, and which rows travel between ranks for a batch.

Letters: N keys or ranks, A rows that ranks ask for.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from smes.arrays import I64
from smes.hashing import splitmix64

if TYPE_CHECKING:
    from torch import Tensor

_HALF = np.uint64(32)


def owner_of(keys_N: I64, size: int) -> I64:
    """The rank that owns the row of each key: by its hash alone, so that every rank and every reader finds the same.

    Args:
        keys_N: int64, keys of :class:`smes.model.ids.IdKeys`; those of default and shared rows are keys as well.
        size: How many ranks there are, ≥ 1 and below 2³¹.

    Returns:
        int64 [N], 0 ≤ rank < ``size``: the upper 32 bits of SplitMix64's output, as a fraction, times ``size`` (Lemire,
        "Fast random integer generation in an interval", ACM TOMACS 2019, section 4, without the correction: a rank's
        share is 1/``size`` to within 2⁻³²). Counters of sightings take the lower bits of the same hash.

    Raises:
        ValueError: ``size`` is out of its range.
    """
    if not 1 <= size < 2**31:
        raise ValueError(f"size: {size} ranks, expected 1 to {2**31 - 1}")
    owners: I64 = ((splitmix64(keys_N) >> _HALF) * np.uint64(size) >> _HALF).view(np.int64)
    return owners


@dataclass(frozen=True, slots=True)
class Routes:
    """Which rows travel between ranks for a batch, and their gradients the other way.

    Attributes:
        asked_A: int64, the rows of this rank that the ranks read, rank by rank, as places in
            :attr:`smes.model.id_rows.BatchRows.rows_U`.
        asked_N: How many of them each rank reads.
        wanted_N: How many rows this rank reads of each one.
    """

    asked_A: "Tensor"
    asked_N: tuple[int, ...]
    wanted_N: tuple[int, ...]
