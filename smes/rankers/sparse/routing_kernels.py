"""The compiled loops behind :mod:`smes.rankers.sparse.kernels`.

A module of its own because it imports no torch: what compiles before other processes start need not wait for it.
"""

import numpy as np
from numba import njit

from smes.arrays import F32, I64


@njit(cache=True, nogil=True)
def best_of_rows(values_NL: F32, places_NK: I64) -> None:  # pragma: no cover - compiled
    rows, columns = values_NL.shape
    count = places_NK.shape[1]
    if count == 0:
        return
    kept_K = np.empty(count, np.float32)
    for n in range(rows):
        for i in range(columns):
            value = values_NL[n, i]
            if value != value:
                value = np.float32(np.inf)
            if i >= count and value <= kept_K[count - 1]:
                continue
            place = min(i, count - 1)
            while place > 0 and kept_K[place - 1] < value:
                kept_K[place] = kept_K[place - 1]
                places_NK[n, place] = places_NK[n, place - 1]
                place -= 1
            kept_K[place] = value
            places_NK[n, place] = i


@njit(cache=True, nogil=True)
def sort_pairs(  # type: ignore[no-untyped-def]  # numba infers the types
    expert_P, per_instance, pair_P, instance_P, place_P, ends_E
):  # pragma: no cover - compiled
    next_E = np.zeros(len(ends_E), np.int64)
    for expert in expert_P:
        next_E[expert] += 1
    start = 0
    for e in range(len(ends_E)):
        count = next_E[e]
        next_E[e] = start
        start += count
        ends_E[e] = start
    for pair in range(len(expert_P)):
        expert = expert_P[pair]
        place = next_E[expert]
        next_E[expert] = place + 1
        pair_P[place] = pair
        instance_P[place] = pair // per_instance
        place_P[pair] = place


def compile_routing_kernels() -> None:
    """Run each loop once on a single row, as the routing does."""
    best_of_rows(np.zeros((1, 2), np.float32), np.empty((1, 1), np.int64))
    expert_P = np.zeros(1, np.int64)
    sort_pairs(expert_P, 1, expert_P.copy(), expert_P.copy(), expert_P.copy(), np.zeros(1, np.int32))
