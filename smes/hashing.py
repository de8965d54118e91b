"""Hashes that never change: SplitMix64 for integers, BLAKE2b for text.

Source of SplitMix64: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014; constants as in
Vigna's ``splitmix64.c``. Letters: N keys.
"""

import hashlib

import numpy as np
from numba import njit
from numpy.typing import NDArray

from smes.arrays import I64

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""SplitMix64 adds this to its state at every draw."""


@njit(cache=True, inline="always")
def scatter(x: np.uint64) -> np.uint64:  # pragma: no cover - compiled
    """SplitMix64's finaliser: a bijection of the 64-bit integers that moves neighbours far apart. For compiled code."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def splitmix64(keys: I64) -> NDArray[np.uint64]:
    """SplitMix64's output for the states ``keys``. int64 [N] → uint64 [N]."""
    mixed: NDArray[np.uint64] = _splitmix64(np.ascontiguousarray(keys, np.int64))
    return mixed


def stable_id(text: str) -> int:
    """The id of a categorical value that is not an integer, from 0 to 2⁶³ - 1: BLAKE2b of the UTF-8 text.

    Any two of 10 million distinct values have the same id with probability below 1e-5.
    """
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@njit(cache=True, nogil=True)
def _splitmix64(keys_N: I64) -> NDArray[np.uint64]:  # pragma: no cover - compiled
    mixed = np.empty(len(keys_N), np.uint64)
    for n in range(len(keys_N)):
        mixed[n] = scatter(np.uint64(keys_N[n]) + GOLDEN)
    return mixed
