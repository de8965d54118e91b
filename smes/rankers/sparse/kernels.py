"""Compiled loops of the routing, for the CPU: the best of a row, and the packing of pairs by expert.

Letters: N rows, L columns of a row, K best of a row, P executed pairs, U pairs of an instance, E experts.
"""

import torch
from torch import Tensor

from smes.rankers.kernels import on_host
from smes.rankers.sparse.routing_kernels import best_of_rows, sort_pairs


def best(values: Tensor, count: int) -> Tensor:
    """The places of the ``count`` largest along the last dimension, the largest first; int64.

    NaN counts as infinite. Of equal values the CPU takes the first.
    """
    if not on_host(values) or values.dtype != torch.float32:
        return values.topk(count, dim=-1).indices
    rows_NL = values.detach().contiguous().view(-1, values.shape[-1])
    places = torch.empty(*values.shape[:-1], count, dtype=torch.int64)
    best_of_rows(rows_NL.numpy(), places.view(-1, count).numpy())
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
    sort_pairs(
        expert_P.numpy(), per_instance, pair_P.numpy(), instance_P.numpy(), place_P.numpy(), ends_E.numpy()
    )  # fmt: skip
    return pair_P, instance_P, place_P, ends_E
