"""SMES written out slowly: every expert on every instance, masked; loops over instances, tasks and experts.

An independent reference for the grouped execution: it shares no routing, packing or combining code with it, only the
weights. Selection breaks ties as ``torch.topk`` happens to, so it takes the selected sets from the routing under test;
that they are the right ones is checked separately.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from smes.rankers.sparse.experts import FullExperts, LowRankExperts, ResidualExperts
from smes.rankers.sparse.ranker import SMES
from tests.smes.naive_rankers import encoded
from tests.smes.naive_routing import router_logits


def dense_smes(
    ranker: SMES, x_BI: Tensor, experts_BTK: Tensor, groups: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """(tasks_BTH, auxiliary loss) of the ranker for given selected sets, one per task, with gradients."""
    config = ranker.config
    B, T, K = experts_BTK.shape
    E, fixed = config.experts.num, config.num_shared if config.shared_experts == "always_on" else 0
    h_BD = torch.stack([encoded(ranker.encoder, x) for x in x_BI])
    logits = router_logits(ranker, groups or [0] * T, x_BI, h_BD)
    outputs = [_expert(ranker.experts, e, h_BD, config.experts.norm) for e in range(E)]
    trunk_reads = x_BI if config.trunk_input == "raw" else h_BD
    trunk_BH = None if ranker.trunk is None else torch.stack([encoded(ranker.trunk, x) for x in trunk_reads])
    rows = []
    used, p_E = [0.0] * E, [torch.zeros(()) for _ in range(E)]
    for b in range(B):
        for t in range(T):
            z = logits[b][t]
            chosen = experts_BTK[b, t].tolist()
            share = _shares({e: z[e] for e in chosen})
            h_t = torch.stack([share[e] * outputs[e][b] for e in chosen]).sum(dim=0)
            rows.append(h_t if trunk_BH is None else h_t + trunk_BH[b])
            for e in chosen:
                used[e] += 1.0 / (B * T)
            for e, p in _shares({e: v for e, v in z.items() if e >= fixed}).items():
                p_E[e] = p_E[e] + p / (B * T)
    routed = range(fixed, E)
    balance = len(routed) / (K - fixed) * sum((used[e] * p_E[e] for e in routed), start=torch.zeros(()))
    return torch.stack(rows).view(B, T, -1), config.balance.weight * balance


def _shares(z: dict[int, Tensor]) -> dict[int, Tensor]:
    highest = torch.stack(list(z.values())).max().detach()
    powers = {e: torch.exp(v - highest) for e, v in z.items()}
    total = torch.stack(list(powers.values())).sum()
    return {e: power / total for e, power in powers.items()}


def _expert(experts: nn.Module, e: int, h_BD: Tensor, norm: str) -> Tensor:
    """Expert e on every instance, by the equations of its form."""
    if isinstance(experts, FullExperts):
        y = h_BD
        for weight_E in experts.weights:
            y = _activated(y @ weight_E[e][: y.shape[1]], norm)  # rows beyond the input's width only pad
        return y
    if isinstance(experts, LowRankExperts):
        weight = experts.base + experts.down[e] @ experts.up[e]
    else:
        assert isinstance(experts, ResidualExperts)
        weight = experts.base + experts.narrow @ experts.differences[e]
    return _activated(h_BD @ weight[: h_BD.shape[1]], norm)


def _activated(y: Tensor, norm: str) -> Tensor:
    if norm == "layer":
        y = y - y.mean(dim=1, keepdim=True)
    if norm != "none":
        y = y / torch.sqrt((y**2).mean(dim=1, keepdim=True) + 1e-5)
    return y * torch.sigmoid(y)
