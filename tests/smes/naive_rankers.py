"""The dense rankers written out slowly: loops over instances, tasks and experts, one vector at a time.

An independent reference for the batched rankers: it takes only their weights. Experts, gates and layers are found by
their place in the order that the rankers document. Every function gives gradients.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from smes.rankers.dense_experts import DenseExperts
from smes.rankers.home import FeatureGates, HoME, HomeLayer
from smes.rankers.mmoe import MMoE
from smes.rankers.ple import PLE
from smes.rankers.ranker import Encoder


def silu(v: Tensor) -> Tensor:
    return v / (1 + torch.exp(-v))


def normalised(v: Tensor) -> Tensor:
    return (v - v.mean()) / torch.sqrt(((v - v.mean()) ** 2).mean() + 1e-5)


def softmax(z: Sequence[Tensor]) -> list[Tensor]:
    highest = max(float(value.detach()) for value in z)
    powers = [torch.exp(value - highest) for value in z]
    total = torch.stack(powers).sum()
    return [power / total for power in powers]


def expert(experts: DenseExperts, n: int, v: Tensor) -> Tensor:
    """One expert on one instance."""
    for weights in experts.weights:
        v = silu(normalised(v @ weights[n]))
    return v


def encoded(encoder: Encoder, v: Tensor) -> Tensor:
    for layer in encoder.layers:
        linear, norm = layer.children()
        v = silu(normalised(linear.weight @ v) * norm.weight + norm.bias)  # type: ignore[operator]  # modules' weights
    return v


def gated(weight_DN: Tensor, v: Tensor, outputs: dict[int, Tensor]) -> Tensor:
    """Mix the experts that a gate may use: those in ``outputs``, by number."""
    shares = softmax([torch.dot(v, weight_DN[:, n]) for n in outputs])
    return torch.stack([share * output for share, output in zip(shares, outputs.values(), strict=True)]).sum(dim=0)


def every_instance(one: Callable[[Tensor], list[Tensor]]) -> Callable[[Tensor], Tensor]:
    """[B, I] → [B, T, H] from a function of one instance."""
    return lambda x_BI: torch.stack([torch.stack(one(v)) for v in x_BI])


def mmoe(ranker: MMoE) -> Callable[[Tensor], Tensor]:
    def one(v: Tensor) -> list[Tensor]:
        v = encoded(ranker.encoder, v)
        outputs = {n: expert(ranker.experts, n, v) for n in range(len(ranker.experts.weights[0]))}
        return [gated(gate, v, outputs) for gate in ranker.gates.weight]

    return every_instance(one)


def ple(ranker: PLE, num_tasks: int, shared: int, specific: int) -> Callable[[Tensor], Tensor]:
    def one(v: Tensor) -> list[Tensor]:
        streams = [encoded(ranker.encoder, v)] * (num_tasks + 1)
        for number, level in enumerate(ranker.levels):
            experts, gates = level.experts, level.gates
            assert isinstance(experts, DenseExperts)
            of_task = {
                t: {n: expert(experts, n, streams[t]) for n in range(t * specific, (t + 1) * specific)}
                for t in range(num_tasks)
            }
            first = num_tasks * specific
            common = {n: expert(experts, n, streams[-1]) for n in range(first, first + shared)}
            weight: Tensor = gates.weight  # type: ignore[assignment, union-attr]  # of a module in a ModuleList
            following = [gated(weight[t], streams[t], of_task[t] | common) for t in range(num_tasks)]
            if number + 1 < len(ranker.levels):
                everyone = {n: y for outputs in of_task.values() for n, y in outputs.items()} | common
                following.append(gated(weight[num_tasks], streams[-1], everyone))
            streams = following
        return streams

    return every_instance(one)


def feature_gated(gates: FeatureGates, group: int, v: Tensor) -> Tensor:
    """``v ⊙ Σ_l gate_l(v) · 2·sigmoid(v B_l A_l)``."""
    L = gates.num_gates
    if L == 0:
        return v
    shares = softmax([torch.dot(v, gates.choice[group][:, i]) for i in range(L)])
    gate = torch.zeros_like(v)
    for i in range(L):
        low_rank = (v @ gates.down[group * L + i]) @ gates.up[group * L + i]
        gate = gate + shares[i] * 2 / (1 + torch.exp(-low_rank))
    return v * gate


def home(ranker: HoME, group_T: Sequence[int]) -> Callable[[Tensor], Tensor]:
    G, T = max(group_T) + 1, len(group_T)

    def group_outputs(layer: HomeLayer, group: int, v: Tensor) -> dict[int, Tensor]:
        M = layer.experts_per_group
        v = feature_gated(layer.feature_gates, group, v)
        return {n: expert(layer.experts, n, v) for n in range(group * M, (group + 1) * M)}

    def residual(layer: HomeLayer, output: int, gate_input: Tensor, own: dict[int, Tensor]) -> Tensor:
        assert layer.self_gates is not None
        z = [torch.dot(gate_input, column) for column in layer.self_gates.weight[output].t()]
        shares = softmax(z) if len(z) > 1 else [1 / (1 + torch.exp(-z[0]))]
        return torch.stack([share * y for share, y in zip(shares, own.values(), strict=True)]).sum(dim=0)

    def one(x: Tensor) -> list[Tensor]:
        v = encoded(ranker.encoder, x)
        meta = [group_outputs(ranker.meta, c, v) for c in range(G + 1)]
        z = []
        for c in range(G + 1):
            seen = {n: y for own in meta for n, y in own.items()} if c == G else meta[c] | meta[G]
            z.append(gated(ranker.meta.gates.weight[c], v, seen) + residual(ranker.meta, c, v, meta[c]))
        category = [group_outputs(ranker.task, T + g, z[g]) for g in range(G)]
        common = group_outputs(ranker.task, T + G, z[G])
        results = []
        for t, g in enumerate(group_T):
            gate_input = torch.cat([z[g], z[G]])
            own = group_outputs(ranker.task, t, z[g])
            mixed = gated(ranker.task.gates.weight[t], gate_input, own | category[g] | common)
            results.append(mixed + residual(ranker.task, t, gate_input, own))
        return results

    return every_instance(one)
