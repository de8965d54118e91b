"""Count different ids in bounded memory: the smallest hashes that were seen (k minimum values).

Source: Bar-Yossef et al., "Counting distinct elements in a data stream", RANDOM 2002; the unbiased estimate is that of
Beyer et al., SIGMOD 2007. Letters: N ids.
"""

import numpy as np
from numpy.typing import NDArray

from smes.arrays import I64
from smes.hashing import splitmix64

_KEPT = 16_384


class DistinctIds:
    """The number of different ids among those added: exact up to 16,383, beyond that about 0.8 % off."""

    def __init__(self) -> None:
        self._hashes: NDArray[np.uint64] = np.empty(0, np.uint64)

    def add(self, ids_N: I64) -> None:
        """Count some ids; none of them is ``MISSING``."""
        hashes = splitmix64(ids_N)
        if len(self._hashes) == _KEPT:
            hashes = hashes[hashes < self._hashes[-1]]
        if len(hashes):
            self._hashes = np.unique(np.concatenate([self._hashes, hashes]))[:_KEPT]

    def join(self, other: "DistinctIds") -> None:
        """Count what another one has counted, too."""
        self._hashes = np.unique(np.concatenate([self._hashes, other._hashes]))[:_KEPT]

    def count(self) -> int:
        """How many there are."""
        if len(self._hashes) < _KEPT:
            return len(self._hashes)
        return round((_KEPT - 1) / ((float(self._hashes[-1]) + 1) / 2.0**64))
