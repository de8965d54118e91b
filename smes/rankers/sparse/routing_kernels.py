"""The compiled loops behind :mod:`smes.rankers.sparse.kernels`.

A module of its own because it imports no torch: what compiles before other processes start need not wait for it.
"""

import numpy as np
from numba import njit

from smes.arrays import F32, I64
from smes.vector_code import SUMS, exponential

_LEAST = np.float32(-87.0)  # what is further below the largest logit has probability 0
_INFINITE = np.float32(np.inf)
_INFINITE_BITS, _MAGNITUDE = np.int32(0x7F800000), np.int32(0x7FFFFFFF)
_LOWEST_32, _LOWEST_64 = np.int32(-(2**31)), np.int64(-(2**63))


@njit(nogil=True)
def _best_of_row(  # type: ignore[no-untyped-def]  # numba infers the types
    bits_NC, row, first, key_L, places_NK
):  # pragma: no cover - compiled
    """The places of the largest float32 from column ``first`` on, the largest first; ``key_L`` is room.

    Bits of a number that are flipped below 0 are ordered as numbers are. With its place below, no two keys are equal,
    and each pass over them finds the largest below the last one, which LLVM vectorises.
    """
    L, bits_L = len(key_L), bits_NC[row, first:]
    for i in range(L):
        bits = bits_L[i]
        if bits & _MAGNITUDE > _INFINITE_BITS:
            bits = _INFINITE_BITS
        bits = np.int32(0) if bits == _LOWEST_32 else bits ^ ((bits >> np.int32(31)) & _MAGNITUDE)  # -0 is 0
        key_L[i] = (np.int64(bits) << 32) | np.int64(L - 1 - i)
    most = np.int64(np.iinfo(np.int64).max)
    for k in range(places_NK.shape[1]):
        last, most = most, _LOWEST_64
        for i in range(L):
            most = max(most, key_L[i] if key_L[i] < last else _LOWEST_64)
        places_NK[row, k] = L - 1 - (most & np.int64(0xFFFFFFFF))


@njit(cache=True, nogil=True)
def best_of_rows(values_NL: F32, places_NK: I64) -> None:  # pragma: no cover - compiled
    bits_NL, key_L = values_NL.view(np.int32), np.empty(values_NL.shape[1], np.int64)
    for n in range(len(values_NL)):
        _best_of_row(bits_NL, n, np.int64(0), key_L, places_NK)  # one loop for both callers


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
    key_L, of_chosen_K, e_L = np.empty(L, np.int64), np.empty(K, np.float32), np.empty(L, np.float32)
    bits_NC, chosen_NN = z_BRC.reshape(B * R, C).view(np.int32), chosen_BRN.reshape(B * R, N)
    load_RE[:] = 0
    for b in range(B):
        for r in range(R):
            z_L, probs_L, sum_L = z_BRC[b, r, fixed:], probs_BRL[b, r], sum_RL[r]
            most, total = z_L[0], np.float32(0)
            if choose:
                _best_of_row(bits_NC, b * R + r, fixed, key_L, chosen_NN)
                most = z_L[chosen_BRN[b, r, 0]]
            else:
                for i in range(1, L):
                    most = max(most, z_L[i])
            for i in range(L):
                total += z_L[i]
            whole = np.float32(0)
            for i in range(L):
                below = z_L[i] - most
                e_L[i] = exponential(below) if below > _LEAST else np.float32(0)
                whole += e_L[i]
            share = np.float32(1) / whole if np.abs(total) < _INFINITE else np.float32(np.nan)
            for i in range(L):
                e_L[i] *= share
                probs_L[i] = e_L[i]
                sum_L[i] += e_L[i]
            for k in range(K):
                column = k if k < fixed else fixed + chosen_BRN[b, r, k - fixed]
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
            p_L, of_mean_L, of_z_L = probs_BRL[b, r], of_mean_RL[r], of_z_BRC[b, r, fixed:]
            dot = np.float32(0)
            for i in range(L):
                dot += p_L[i] * of_mean_L[i]
            for k in range(fixed):
                of_z_BRC[b, r, k] = 0
            for i in range(L):
                of_z_L[i] = p_L[i] * (of_mean_L[i] - dot) / np.float32(B)
            dot = np.float32(0)
            for k in range(K):
                dot += weights_BRK[b, r, k] * of_weights_BRK[b, r, k]
            for k in range(K):
                column = k if k < fixed else fixed + chosen_BRN[b, r, k - fixed]
                of_z_BRC[b, r, column] += weights_BRK[b, r, k] * (of_weights_BRK[b, r, k] - dot)


def compile_routing_kernels() -> None:
    """Run each loop once on a single row, as the routing does."""
    best_of_rows(np.zeros((1, 2), np.float32), np.empty((1, 1), np.int64))
    expert_P = np.zeros(1, np.int64)
    sort_pairs(expert_P, 1, expert_P.copy(), expert_P.copy(), expert_P.copy(), np.zeros(1, np.int32))
    z_BRC, places = np.zeros((1, 1, 1), np.float32), np.zeros((1, 1, 1), np.int64)
    outputs = places.copy(), z_BRC.copy(), z_BRC.copy(), np.zeros((1, 1), np.float32), np.zeros((1, 1), np.int64)
    weigh_experts(z_BRC, places, True, 0, expert_P, *outputs)
    logit_gradient(z_BRC, z_BRC, places, np.zeros((1, 1), np.float32), z_BRC, z_BRC.copy())
