"""SplitMix64's finaliser for compiled code. Apart from :mod:`smes.hashing`, which has to load without a compiler.

Source: as there.
"""

import numpy as np
from numba import njit


@njit(cache=True, inline="always")
def scatter(x: np.uint64) -> np.uint64:  # pragma: no cover - compiled
    """A bijection of the 64-bit integers that moves neighbours far apart."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
