import numpy as np
import pytest

from smes.hashing import splitmix64
from stream.topics import partition_of

MASK = (1 << 64) - 1


def splitmix64_by_integers(state: int) -> int:
    """Vigna's splitmix64.c, line by line, in Python's unbounded integers."""
    z = (state + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_matches_the_published_generator() -> None:
    # first two outputs for seed 0, and the first five for seed 1234567 that Rosetta Code lists
    assert splitmix64(np.array([0], np.int64))[0] == 0xE220A8397B1DCDAF

    golden = 0x9E3779B97F4A7C15
    states = [(1234567 + i * golden) & MASK for i in range(5)]
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]

    assert splitmix64(np.array(states, np.uint64).view(np.int64)).tolist() == expected


@pytest.mark.parametrize("partitions", [1, 2, 3, 7, 64])
def test_equals_a_plain_loop_also_for_negative_keys(partitions: int) -> None:
    info = np.iinfo(np.int64)
    keys = np.concatenate([np.arange(-50, 50), np.array([info.min, info.max])]).astype(np.int64)
    expected = [splitmix64_by_integers(int(k) & MASK) % partitions for k in keys]

    found = partition_of(keys, partitions)

    assert found.dtype == np.int32
    assert found.tolist() == expected


@pytest.mark.parametrize("step", [1, 2, 1024, 1 << 40])
def test_spreads_regular_keys_evenly(step: int) -> None:
    counts = np.bincount(partition_of(np.arange(40_000, dtype=np.int64) * step, 4), minlength=4)

    # 10,000 expected each, standard deviation 87
    assert counts.min() > 10_000 - 5 * 87
    assert counts.max() < 10_000 + 5 * 87


def test_no_keys_give_no_partitions_and_no_partitions_are_refused() -> None:
    assert partition_of(np.empty(0, np.int64), 3).tolist() == []
    with pytest.raises(ValueError, match="partitions 0"):
        partition_of(np.zeros(1, np.int64), 0)
