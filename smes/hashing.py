"""Hashes that never change: SplitMix64 for integers, BLAKE2b for text; and the one rule that makes ids of values.

Source of SplitMix64: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014; constants as in
Vigna's ``splitmix64.c``. Letters: N keys.
"""

import hashlib
import re
from operator import index

import numpy as np
from numpy.typing import NDArray

from smes.arrays import I64

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""SplitMix64 adds this to its state at every draw."""

EXACT_DOUBLE = 2.0**53
"""From here on a double no longer tells every integer from its neighbours."""

_INTEGER = re.compile(r"(-?(?:0|[1-9][0-9]*))(?:\.0)?")
_LARGEST_ID = 2**63 - 1  # the smallest int64 stands for a missing id, so ids begin one above it
_MOST_DIGITS = 20


def splitmix64(keys: I64) -> NDArray[np.uint64]:
    """SplitMix64's output for the states ``keys``. int64 [N] → uint64 [N]. For compiled code: :mod:`smes.scatter`."""
    x: NDArray[np.uint64] = np.ascontiguousarray(keys, np.int64).view(np.uint64) + GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def stable_id(text: str) -> int:
    """The id of a categorical value that is not an integer, from 0 to 2⁶³ - 1: BLAKE2b of the UTF-8 text.

    Any two of 10 million distinct values have the same id with probability below 1e-5.
    """
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def encode_id(value: str | int | float) -> int:
    """The id of a user, an item or a categorical value: the one rule, for logs, producers and callers alike.

    A text is an integer if and only if it is written as one, ``-?(0|[1-9][0-9]*)`` in ASCII digits, with ``.0`` behind
    it or not, and lies within ±(2⁶³ - 1). Every other text stays text, and :func:`stable_id` hashes it as it stands:
    nothing is trimmed, folded or normalised. An integer, and a float without a fraction, count as written out, so
    ``5``, ``5.0``, ``"5"`` and ``"5.0"`` are one id. Any other float is the text that ``repr`` makes of it.

    >>> [encode_id(value) for value in (100, "100", "100.0", -3.0)]
    [100, 100, 100, -3]
    >>> len({encode_id(text) for text in ("1e2", "0100", "+100", "1_00", " 100", "100.00")} - {100})
    6

    Raises:
        ValueError: A float from 2⁵³ on, which may have been another integer, or NaN; or a text that is no Unicode (it
            holds a surrogate).
    """
    if isinstance(value, float):
        if not abs(value) < EXACT_DOUBLE:
            raise ValueError(f"id: {value!r}, expected a double below 2^53, an integer or a text")
        value = int(value) if value.is_integer() else repr(float(value))
    text = value if isinstance(value, str) else str(index(value))
    if (written := _INTEGER.fullmatch(text)) is not None and len(text) <= _MOST_DIGITS + len(".0"):
        integer = int(written[1])
        if abs(integer) <= _LARGEST_ID:
            return integer
    try:
        return stable_id(text)
    except UnicodeEncodeError as error:
        raise ValueError(f"id: {text!r}, expected a text without surrogates") from error
