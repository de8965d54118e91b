"""Compiled loops of the routing, for the CPU: the best of a row, and the packing of pairs by expert.

Letters: N rows, L columns of a row, K best of a row, P executed pairs, U pairs of an instance, E experts.
"""

import numpy as np
import torch
from numba import njit
from torch import Tensor

from smes.arrays import F32, I64


def compiled(x: Tensor) -> bool:
    """Whether these loops may stand in for torch's operations: on the CPU, on values (none while a model is traced)."""
    return type(x) is Tensor and x.device.type == "cpu"


def best(values: Tensor, count: int) -> Tensor:
    """The places of the ``count`` largest along the last dimension, the largest first; int64.

    NaN counts as infinite. Of equal values the CPU takes the first.
    """
    if not compiled(values) or values.dtype != torch.float32:
        return values.topk(count, dim=-1).indices
    rows_NL = values.detach().contiguous().view(-1, values.shape[-1])
    places = torch.empty(*values.shape[:-1], count, dtype=torch.int64)
    _best(rows_NL.numpy(), places.view(-1, count).numpy())
    return places


def sorted_pairs(expert_P: Tensor, num_experts: int, per_instance: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sort pairs by expert; those of an expert keep their order.

    Args:
        expert_P: int64, the expert of each pair, 0 … E − 1; the pairs of an instance are neighbours.
        num_experts: E.
        per_instance: U.

    Returns:
        For each place in the order its pair and its instance, for each pair its place (int64 [P] each), and the end of
        each expert's segment (int32 [E]).
    """
    pair_P, instance_P, place_P = (torch.empty_like(expert_P) for _ in range(3))
    ends_E = torch.zeros(num_experts, dtype=torch.int32)
    _sorted_pairs(
        expert_P.numpy(), per_instance, pair_P.numpy(), instance_P.numpy(), place_P.numpy(), ends_E.numpy()
    )  # fmt: skip
    return pair_P, instance_P, place_P, ends_E


@njit(cache=True, nogil=True)
def _best(values_NL: F32, places_NK: I64) -> None:  # pragma: no cover - compiled
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
def _sorted_pairs(  # type: ignore[no-untyped-def]  # numba infers the types
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
