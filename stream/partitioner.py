"""Which partition a key goes to: the same on every producer, machine and day.

Letters: N keys.
"""

import numpy as np
from numpy.typing import NDArray

from smes.events import I32, I64

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def splitmix64(keys: I64) -> NDArray[np.uint64]:
    """SplitMix64's output for the states ``keys``: a bijection of 64-bit integers that scatters neighbours.

    Args:
        keys: int64 [N].

    Returns:
        uint64 [N].

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014; constants as in
    Vigna's ``splitmix64.c``.
    """
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
        z = keys.astype(np.int64, copy=False).view(np.uint64) + _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * _MIX_1
        z = (z ^ (z >> np.uint64(27))) * _MIX_2
        mixed: NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return mixed


def partition_of(keys: I64, partitions: int) -> I32:
    """Partition of each key, evenly spread also when the keys are consecutive or share their low bits.

    Args:
        keys: int64 [N], such as impression ids, so that an impression and its feedback meet in one partition number.
        partitions: Number of partitions of the topic, at least 1.

    Returns:
        int32 [N], ``0 … partitions - 1``.

    Raises:
        ValueError: ``partitions`` is less than 1.
    """
    if partitions < 1:
        raise ValueError(f"partitions {partitions}, expected at least 1")
    return (splitmix64(keys) % np.uint64(partitions)).astype(np.int32)
