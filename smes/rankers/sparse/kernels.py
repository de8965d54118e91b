"""Compiled loops of the routing, for the CPU: the best of a row, weights of experts, the packing of pairs by expert.

Letters: N rows, L columns of a row, K best of a row, P executed pairs, U pairs of an instance, E experts; B instances,
R routers, C columns of a router's logits.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from smes.rankers.kernels import on_host
from smes.rankers.sparse.routing_kernels import best_of_rows, logit_gradient, sort_pairs, weigh_experts


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


def weighed(
    z_BRC: Tensor, chosen_BRN: Tensor | None, num_chosen: int, fixed: int, first_R: Tensor, num_experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Which experts a choice means, with which weights; with one fused gradient for the logits.

    Args:
        z_BRC: float32 logits on the host, those of the fixed experts first.
        chosen_BRN: int64, the places chosen behind those; None for the ``num_chosen`` largest logits of each router.
        num_chosen: N.
        fixed: How many experts are.
        first_R: int64, the expert of each router's first place, less ``fixed``.
        num_experts: E.

    Returns:
        ``experts``, ``weights``, ``probs`` and ``mean`` of :class:`smes.rankers.sparse.routing.Routing`, and how many
        instances each router sends to each expert, int64 [R, E].
    """
    if chosen_BRN is None:
        chosen_BRN = torch.empty(*z_BRC.shape[:2], num_chosen, dtype=torch.int64)
        choose = True
    else:
        chosen_BRN, choose = chosen_BRN.contiguous(), False
    given = z_BRC, chosen_BRN, choose, fixed, first_R, num_experts
    if not torch.is_grad_enabled():
        return _weigh(*given)
    found: _Weights = _Weighed.apply(*given)  # type: ignore[no-untyped-call]  # torch has no type
    return found


_Weights = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _weigh(z_BRC: Tensor, chosen_BRN: Tensor, choose: bool, fixed: int, first_R: Tensor, num_experts: int) -> _Weights:
    B, R, C = z_BRC.shape
    K = fixed + chosen_BRN.shape[2]
    experts_BRK, weights_BRK = torch.empty(B, R, K, dtype=torch.int64), torch.empty(B, R, K)
    probs_BRL, mean_RL = torch.empty(B, R, C - fixed), torch.empty(R, C - fixed)
    load_RE = torch.empty(R, num_experts, dtype=torch.int64)
    outputs = experts_BRK, weights_BRK, probs_BRL, mean_RL, load_RE
    z = z_BRC.detach().contiguous().numpy()
    weigh_experts(z, chosen_BRN.numpy(), choose, fixed, first_R.numpy(), *(t.numpy() for t in outputs))
    return outputs


class _Weighed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z_BRC: Tensor, chosen_BRN: Tensor, choose: bool, fixed: int, first_R: Tensor, num_experts: int
    ) -> _Weights:
        outputs = _weigh(z_BRC, chosen_BRN, choose, fixed, first_R, num_experts)
        experts_BRK, weights_BRK, probs_BRL, _, load_RE = outputs
        ctx.save_for_backward(probs_BRL, weights_BRK, chosen_BRN)
        ctx.mark_non_differentiable(experts_BRK, probs_BRL, load_RE)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        _, of_weights_BRK, _, of_mean_RL, _ = gradients
        probs_BRL, weights_BRK, chosen_BRN = ctx.saved_tensors
        B, R, L = probs_BRL.shape
        of_z_BRC = torch.empty(B, R, L + weights_BRK.shape[2] - chosen_BRN.shape[2])
        logit_gradient(
            probs_BRL.numpy(),
            weights_BRK.numpy(),
            chosen_BRN.numpy(),
            of_mean_RL.contiguous().numpy(),
            of_weights_BRK.contiguous().numpy(),
            of_z_BRC.numpy(),
        )
        return of_z_BRC, None, None, None, None, None
