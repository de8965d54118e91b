"""Compiled loops over the rows of ids: what is distinct in a batch, and which rows were not seen for the longest time.

Letters: N values, U distinct ones, R rows of the table, V vocabularies.
"""

import numpy as np
from numba import njit
from numpy.typing import NDArray

from smes.arrays import I64, Bool
from smes.scatter import scatter

Seconds = NDArray[np.uint32]
Vocabularies = NDArray[np.int16]

_LOW = 16
_BUCKETS = 1 << _LOW


@njit(cache=True, nogil=True)
def distinct(values: I64) -> tuple[I64, I64, I64, I64]:  # pragma: no cover - compiled
    """Find the distinct values, in order of appearance. A table of the size of a batch stays in the cache.

    Args:
        values: int64 [N].

    Returns:
        (the distinct values, int64 [U]; for each value its place among them, int64 [N]; how often each occurs, int64
        [U]; where each occurs first, int64 [U]).
    """
    slots = 16
    while slots < 2 * len(values):
        slots *= 2
    mask = np.uint64(slots - 1)
    place_in = np.full(slots, -1, np.int32)
    found = np.empty(len(values), np.int64)
    first = np.empty(len(values), np.int64)
    times = np.empty(len(values), np.int64)
    place = np.empty(len(values), np.int64)
    count = 0
    for i in range(len(values)):
        value = values[i]
        slot = scatter(np.uint64(value)) & mask
        while place_in[slot] >= 0 and found[place_in[slot]] != value:
            slot = (slot + np.uint64(1)) & mask
        if place_in[slot] < 0:
            place_in[slot] = count
            found[count] = value
            first[count] = i
            times[count] = 0
            count += 1
        u = place_in[slot]
        times[u] += 1
        place[i] = u
    return found[:count].copy(), place, times[:count].copy(), first[:count].copy()


@njit(cache=True, nogil=True)
def not_among(values: I64, others: I64) -> Bool:  # pragma: no cover - compiled
    """Which of the values are not among the others. bool [N]."""
    slots = 16
    while slots < 2 * len(others):
        slots *= 2
    mask = np.uint64(slots - 1)
    place_in = np.full(slots, -1, np.int32)
    for i in range(len(others)):
        slot = scatter(np.uint64(others[i])) & mask
        while place_in[slot] >= 0 and others[place_in[slot]] != others[i]:
            slot = (slot + np.uint64(1)) & mask
        place_in[slot] = i
    result = np.empty(len(values), np.bool_)
    for i in range(len(values)):
        slot = scatter(np.uint64(values[i])) & mask
        while place_in[slot] >= 0 and others[place_in[slot]] != values[i]:
            slot = (slot + np.uint64(1)) & mask
        result[i] = place_in[slot] < 0
    return result


@njit(cache=True, nogil=True)
def oldest(
    seen_s: Seconds, vocabulary: Vocabularies, in_pool_V: Bool, count: int
) -> I64:  # pragma: no cover - compiled
    """The rows that were not seen for the longest time, at most ``count``; of one second those with low numbers first.

    Args:
        seen_s: [R], when each row was last seen.
        vocabulary: [R], below 0 for a row that is not looked at.
        in_pool_V: Which vocabularies are looked at.
        count: ≥ 0.

    Returns:
        int64, in the order of their numbers.
    """
    high = np.zeros(_BUCKETS, np.int64)
    total = 0
    for row in range(len(seen_s)):
        if vocabulary[row] >= 0 and in_pool_V[vocabulary[row]]:
            high[seen_s[row] >> _LOW] += 1
            total += 1
    wanted = min(count, total)
    if wanted == 0:
        return np.empty(0, np.int64)
    bucket, before = 0, 0
    while before + high[bucket] < wanted:
        before += high[bucket]
        bucket += 1
    low = np.zeros(_BUCKETS, np.int64)
    for row in range(len(seen_s)):
        if vocabulary[row] >= 0 and in_pool_V[vocabulary[row]] and seen_s[row] >> _LOW == bucket:
            low[seen_s[row] & (_BUCKETS - 1)] += 1
    second = 0
    while before + low[second] < wanted:
        before += low[second]
        second += 1
    last = (bucket << _LOW) | second  # all rows seen before it, and so many of those seen in it:
    ties = wanted - before
    rows = np.empty(wanted, np.int64)
    n = 0
    for row in range(len(seen_s)):
        if vocabulary[row] >= 0 and in_pool_V[vocabulary[row]] and seen_s[row] <= last:
            if seen_s[row] == last:
                if ties == 0:
                    continue
                ties -= 1
            rows[n] = row
            n += 1
    return rows


@njit(cache=True, nogil=True)
def not_seen_since(seen_s: Seconds, vocabulary: Vocabularies, limit_s_V: I64) -> I64:  # pragma: no cover - compiled
    """The rows that were last seen at or before the limit of their vocabulary; int64, in the order of their numbers."""
    count = 0
    for row in range(len(seen_s)):
        if vocabulary[row] >= 0 and seen_s[row] <= limit_s_V[vocabulary[row]]:
            count += 1
    rows = np.empty(count, np.int64)
    n = 0
    for row in range(len(seen_s)):
        if vocabulary[row] >= 0 and seen_s[row] <= limit_s_V[vocabulary[row]]:
            rows[n] = row
            n += 1
    return rows
