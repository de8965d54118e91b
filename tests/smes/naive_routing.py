"""Routers and the three stages written out slowly: one instance, one task, one expert at a time.

An independent reference: it shares no code with the routing, and takes only the routers' weights. Everything is by the
expert's number in the whole pool.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from smes.rankers.sparse.config import SmesConfig
from smes.rankers.sparse.ranker import SMES


def pool_of(config: SmesConfig, groups: Sequence[int], group: int) -> list[int]:
    """The experts that a task of a group may choose."""
    fixed = config.num_shared if config.shared_experts == "always_on" else 0
    if config.groups.pools == "common":
        return list(range(fixed, config.experts.num))
    size = (config.experts.num - fixed) // len(set(groups))
    return list(range(fixed + group * size, fixed + (group + 1) * size))


def softmax(z: dict[int, float]) -> dict[int, float]:
    highest = max(z.values())
    powers = {e: torch.tensor(v - highest, dtype=torch.float64).exp().item() for e, v in z.items()}
    return {e: power / sum(powers.values()) for e, power in powers.items()}


def chosen(
    config: SmesConfig, groups: Sequence[int], z: Sequence[dict[int, float]], weights: Sequence[float] | None = None
) -> list[list[int]]:
    """The experts of every task of one instance: fixed, stage I, stage II, stage III.

    Args:
        config: Numbers, pools, budget.
        groups: The group of each task.
        z: Each task's logits by expert: of the fixed ones and of its pool. Without ties.
        weights: Of stage I; None for equal ones.
    """
    tasks, everyone = range(len(groups)), sorted(set(groups))
    weights = weights or [1 / len(groups)] * len(groups)
    fixed = list(range(config.num_shared)) if config.shared_experts == "always_on" else []
    pools = [pool_of(config, groups, g) for g in everyone]
    p = [softmax({e: z[t][e] for e in pools[groups[t]]}) for t in tasks]

    def best(score: dict[int, float], number: int) -> list[int]:
        return sorted(score, key=lambda e: -score[e])[:number]

    shared: list[int] = []
    if config.num_shared and not fixed:
        shared = best({e: sum(weights[t] * p[t][e] for t in tasks) for e in pools[0]}, config.num_shared)
    open_ = budgeted(config, groups, p, shared, fixed, pools)
    of_group = []
    for g in everyone:
        members = [t for t in tasks if groups[t] == g]
        mean = {e: sum(p[t][e] for t in members) / len(members) for e in open_[g]}
        of_group.append(best(mean, config.num_group))
    own = [
        best({e: z[t][e] for e in open_[groups[t]] if e not in of_group[groups[t]]}, config.num_adaptive) for t in tasks
    ]
    return [fixed + shared + of_group[groups[t]] + own[t] for t in tasks]


def budgeted(
    config: SmesConfig,
    groups: Sequence[int],
    p: Sequence[dict[int, float]],
    shared: list[int],
    fixed: list[int],
    pools: list[list[int]],
) -> list[set[int]]:
    """What stages II and III of each group may choose from."""
    everyone = sorted(set(groups))
    rest = [set(pool) - set(shared) for pool in pools]
    own = config.groups.pools == "own"
    parts = [[g] for g in everyone] if own else [everyone]

    def wanted(part: list[int]) -> int:
        members = sum(g in part for g in groups)
        most = len(shared) + len(part) * config.num_group + members * config.num_adaptive
        return min(most, len(pools[0]))

    if config.max_active is None or config.max_active >= len(fixed) + sum(wanted(part) for part in parts):
        return rest
    quota = (config.max_active - len(fixed)) // len(parts)
    for part in parts:
        if wanted(part) > quota:
            members = [t for t in range(len(groups)) if groups[t] in part]
            unmet = {e: max(p[t][e] for t in members) for e in rest[part[0]]}
            best = sorted(unmet, key=lambda e: -unmet[e])[: quota - len(shared)]
            for g in part:
                rest[g] = set(best)
    return rest


def bound(config: SmesConfig, groups: Sequence[int]) -> int:
    """``min(K_s + G·K_g + T·K_a, E)`` or the budget."""
    most = config.num_shared + len(set(groups)) * config.num_group + len(groups) * config.num_adaptive
    return min(most, config.experts.num, config.max_active or most)


def router_logits(ranker: SMES, groups: Sequence[int], x_BI: Tensor, h_BD: Tensor) -> list[list[dict[int, Tensor]]]:
    """Logits by instance, task and expert, from the weights alone, with gradients.

    With ``router.norm: batch``, of a ranker that does not train: its moments are taken as they stand.
    """
    config = ranker.config
    fixed = config.num_shared if config.shared_experts == "always_on" else 0
    of_task = list(groups) if config.router.per == "group" else list(range(len(groups)))
    columns = [list(range(fixed)) + pool_of(config, groups, g) for g in groups]
    result = []
    for x, h in zip(x_BI, h_BD, strict=True):
        parts = {"encoder": [h], "raw": [x], "both": [x, h]}[config.router.input]
        if config.router.norm == "layer":
            parts = [(v - v.mean()) / torch.sqrt(((v - v.mean()) ** 2).mean() + 1e-5) for v in parts]
        v = torch.cat(parts)
        if config.router.norm == "batch":
            seen = dict(ranker.router.named_buffers())
            v = ((v - seen["moments.mean_C"]) / seen["moments.variance_C"].sqrt()).clamp(-8, 8).float()
        row = []
        for t, r in enumerate(of_task):
            vectors = _vectors(ranker, r, len(columns[t]))
            row.append({e: torch.dot(v, vector) for e, vector in zip(columns[t], vectors, strict=True)})
        result.append(row)
    return result


def _vectors(ranker: SMES, router: int, columns: int) -> list[Tensor]:
    """Whose products with the input are a router's logits; low-rank maps multiplied out."""
    weights = dict(ranker.router.named_parameters())
    up = weights["up.weight"]
    if ranker.config.router.rank is None:
        return list(up[router * columns : (router + 1) * columns])
    rank, down = ranker.config.router.rank, weights["down.weight"]
    if ranker.config.router.maps == "own":
        return [up[router][:, c] @ down[router * rank : (router + 1) * rank] for c in range(columns)]
    return [up[router * columns + c] @ down for c in range(columns)]
