"""SMES written out slowly: every expert on every instance, masked; loops over instances, tasks and experts.

An independent reference for the grouped execution: it shares no routing, packing or combining code with it, only the
weights. Selection breaks ties as ``torch.topk`` happens to, so it takes the selected sets from the routing under test
and checks separately that they are valid top-K sets.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from smes.experts import Experts, FullExperts, LowRankExperts, ResidualExperts
from smes.smes_ranker import SMES


def dense_smes(ranker: SMES, x_BI: Tensor, experts_BTK: Tensor) -> tuple[Tensor, Tensor]:
    """(tasks_BTH, auxiliary loss) of the ranker for given selected sets, with gradients."""
    config = ranker.config
    h_BD = ranker.encoder(x_BI)
    z_BTE = ranker.router(x_BI if config.router_input == "raw" else h_BD)
    B, T, E = z_BTE.shape
    outputs = [_expert(ranker.experts, e, h_BD) for e in range(E)]
    rows = []
    used = [0.0] * E
    for b in range(B):
        for t in range(T):
            chosen = experts_BTK[b, t].tolist()
            exp_z = {e: torch.exp(z_BTE[b, t, e] - z_BTE[b, t].max().detach()) for e in chosen}
            total = torch.stack(list(exp_z.values())).sum()
            rows.append(torch.stack([exp_z[e] / total * outputs[e][b] for e in chosen]).sum(dim=0))
            for e in chosen:
                used[e] += 1.0 / (B * T)
    p_E = torch.exp(F.log_softmax(z_BTE, dim=-1)).mean(dim=(0, 1))
    per_task = config.num_shared + config.num_adaptive
    balance = (E / per_task) * sum((used[e] * p_E[e] for e in range(E)), start=torch.zeros(()))
    return torch.stack(rows).view(B, T, -1), config.balance * balance


def _expert(experts: Experts, e: int, h_BD: Tensor) -> Tensor:
    """Expert e on every instance, by the equations of its form."""
    if isinstance(experts, LowRankExperts):
        return _activated(h_BD @ (experts.base + experts.down[e] @ experts.up[e]))
    if isinstance(experts, ResidualExperts):
        return _activated(h_BD @ (experts.base + experts.narrow @ experts.differences[e]))
    assert isinstance(experts, FullExperts)
    y = h_BD
    for weight_E in experts.weights:
        y = _activated(y @ weight_E[e])
    return y


def _activated(y: Tensor) -> Tensor:
    centred = y - y.mean(dim=1, keepdim=True)
    y = centred / torch.sqrt((centred**2).mean(dim=1, keepdim=True) + 1e-5)
    return y * torch.sigmoid(y)
