"""The compiled loops behind :mod:`smes.rankers.sparse.kernels`.

A module of its own because it imports no torch: what compiles before other processes start need not wait for it.
"""

import numpy as np
from numba import njit

from smes.arrays import F32, I64
from smes.vector_code import SUMS, exponential

_LEAST = np.float32(-87.0)  # what is further below the largest logit has probability 0
_INFINITE = np.float32(np.inf)


@njit(cache=True, nogil=True)
def best_of_row(  # type: ignore[no-untyped-def]  # numba infers the types
    values_L, kept_K, places_K
):  # pragma: no cover - compiled
    """The places of the largest values, the largest first; ``kept_K`` is room for them."""
    count = len(kept_K)
    if count == 0:
        return
    for i in range(len(values_L)):
        value = values_L[i]
        if value != value:
            value = np.float32(np.inf)
        if i >= count and value <= kept_K[count - 1]:
            continue
        place = min(i, count - 1)
        while place > 0 and kept_K[place - 1] < value:
            kept_K[place] = kept_K[place - 1]
            places_K[place] = places_K[place - 1]
            place -= 1
        kept_K[place] = value
        places_K[place] = i


@njit(cache=True, nogil=True)
def best_of_rows(values_NL: F32, places_NK: I64) -> None:  # pragma: no cover - compiled
    kept_K = np.empty(places_NK.shape[1], np.float32)
    for n in range(len(values_NL)):
        best_of_row(values_NL[n], kept_K, places_NK[n])


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


@njit(cache=True, nogil=True, error_model="numpy", fastmath=set(SUMS))
def weigh_experts(  # type: ignore[no-untyped-def]  # numba infers the types
    z_BRC, chosen_BRN, choose, fixed, first_R, experts_BRK, weights_BRK, probs_BRL, mean_RL, load_RE
):  # pragma: no cover - compiled
    """Softmax of all logits and of the chosen ones, experts by number, and how often a router uses each.

    Args:
        z_BRC: Logits; those of the ``fixed`` experts first.
        chosen_BRN: Places of the chosen logits behind the fixed ones; written here, the largest first, if ``choose``.
        choose: See there. Of equal logits the first is chosen; NaN counts as infinite.
        fixed: How many experts are.
        first_R: The expert that each router's first place behind the fixed ones stands for, less ``fixed``.
        experts_BRK, weights_BRK, probs_BRL, mean_RL: As in :class:`smes.rankers.sparse.routing.Routing`; written.
        load_RE: Written; how many instances each router sends to each expert.
    """
    B, R, C = z_BRC.shape
    N, K, L = chosen_BRN.shape[2], weights_BRK.shape[2], C - fixed
    sum_RL = np.zeros((R, L))
    kept_N, of_chosen_K, e_L = np.empty(N, np.float32), np.empty(K, np.float32), np.empty(L, np.float32)
    load_RE[:] = 0
    for b in range(B):
        for r in range(R):
            z_L, chosen_N = z_BRC[b, r, fixed:], chosen_BRN[b, r]
            if choose:
                best_of_row(z_L, kept_N, chosen_N)
            most, total = z_L[0], np.float32(0)
            for i in range(L):
                most = max(most, z_L[i])
                total += z_L[i]
            whole = np.float32(0)
            for i in range(L):
                below = z_L[i] - most
                e_L[i] = exponential(below) if below > _LEAST else np.float32(0)
                whole += e_L[i]
            share = np.float32(1) / whole if np.abs(total) < _INFINITE else np.float32(np.nan)
            for i in range(L):
                e_L[i] *= share
                probs_BRL[b, r, i] = e_L[i]
                sum_RL[r, i] += e_L[i]
            for k in range(K):
                column = k if k < fixed else fixed + chosen_N[k - fixed]
                expert = column if k < fixed else first_R[r] + column
                experts_BRK[b, r, k] = expert
                load_RE[r, expert] += 1
                of_chosen_K[k] = z_BRC[b, r, column]
            most = of_chosen_K[0]
            total = np.float32(0)
            for k in range(K):
                most = max(most, of_chosen_K[k])
                total += of_chosen_K[k]
            whole = np.float32(0)
            for k in range(K):
                below = of_chosen_K[k] - most
                of_chosen_K[k] = exponential(below) if below > _LEAST else np.float32(0)
                whole += of_chosen_K[k]
            share = np.float32(1) / whole if np.abs(total) < _INFINITE else np.float32(np.nan)
            for k in range(K):
                weights_BRK[b, r, k] = of_chosen_K[k] * share
    for r in range(R):
        for i in range(L):
            mean_RL[r, i] = sum_RL[r, i] / B


@njit(cache=True, nogil=True, error_model="numpy", fastmath=set(SUMS))
def logit_gradient(  # type: ignore[no-untyped-def]  # numba infers the types
    probs_BRL, weights_BRK, chosen_BRN, of_mean_RL, of_weights_BRK, of_z_BRC
):  # pragma: no cover - compiled
    """The gradient by the logits of :func:`weigh_experts`, through ``mean_RL`` and ``weights_BRK``."""
    B, R, L = probs_BRL.shape
    K, N = weights_BRK.shape[2], chosen_BRN.shape[2]
    fixed = K - N
    for b in range(B):
        for r in range(R):
            p_L, of_mean_L, of_z_C = probs_BRL[b, r], of_mean_RL[r], of_z_BRC[b, r]
            dot = np.float32(0)
            for i in range(L):
                dot += p_L[i] * of_mean_L[i]
            for k in range(fixed):
                of_z_C[k] = 0
            for i in range(L):
                of_z_C[fixed + i] = p_L[i] * (of_mean_L[i] - dot) / np.float32(B)
            dot = np.float32(0)
            for k in range(K):
                dot += weights_BRK[b, r, k] * of_weights_BRK[b, r, k]
            for k in range(K):
                column = k if k < fixed else fixed + chosen_BRN[b, r, k - fixed]
                of_z_C[column] += weights_BRK[b, r, k] * (of_weights_BRK[b, r, k] - dot)


def compile_routing_kernels() -> None:
    """Run each loop once on a single row, as the routing does."""
    best_of_rows(np.zeros((1, 2), np.float32), np.empty((1, 1), np.int64))
    expert_P = np.zeros(1, np.int64)
    sort_pairs(expert_P, 1, expert_P.copy(), expert_P.copy(), expert_P.copy(), np.zeros(1, np.int32))
    z_BRC, places = np.zeros((1, 1, 1), np.float32), np.zeros((1, 1, 1), np.int64)
    outputs = places.copy(), z_BRC.copy(), z_BRC.copy(), np.zeros((1, 1), np.float32), np.zeros((1, 1), np.int64)
    weigh_experts(z_BRC, places, True, 0, expert_P, *outputs)
    logit_gradient(z_BRC, z_BRC, places, np.zeros((1, 1), np.float32), z_BRC, z_BRC.copy())
