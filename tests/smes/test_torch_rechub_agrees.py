"""MMoE and PLE against torch-rechub's, with copied weights; skipped where torch-rechub is not installed.

Its MLPs are Linear → BatchNorm → activation. Batch norm is replaced by ours in the experts and taken out of the gates
(the papers have none), and the towers pass each column on, so that what is compared is the library's own mixing.
"""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smes.rankers.config import MmoeConfig, PleConfig
from smes.rankers.mmoe import MMoE
from smes.rankers.ple import PLE

multi_task = pytest.importorskip("torch_rechub.models.multi_task", reason="torch-rechub is not installed")

_INPUT, _TASKS, _DIMS = 6, 3, (8, 5)


class _Records(nn.Module):
    """A tower that keeps what it is given, and answers one column of it."""

    seen: Tensor

    def forward(self, x_BH: Tensor) -> Tensor:
        self.seen = x_BH
        return x_BH[:, :1]


def _copy_expert(mlp: nn.Module, weights: Iterable[Tensor]) -> None:
    layers: Any = mlp.mlp
    for i, weight in enumerate(weights):
        layers[4 * i].weight.data, layers[4 * i].bias.data = weight.t().clone(), torch.zeros(weight.shape[1])
        layers[4 * i + 1] = nn.LayerNorm(weight.shape[1], elementwise_affine=False)
        layers[4 * i + 2] = nn.SiLU()


def _copy_gate(mlp: nn.Module, weight_DN: Tensor) -> None:
    layers: Any = mlp.mlp
    layers[0].weight.data, layers[0].bias.data = weight_DN.t().clone(), torch.zeros(weight_DN.shape[1])
    layers[1] = nn.Identity()


def _library(build: Callable[..., Any], **arguments: Any) -> Any:
    from torch_rechub.basic.features import DenseFeature

    features = [DenseFeature("x", embed_dim=_INPUT)]
    model = build(
        features,
        ["classification"] * _TASKS,
        expert_params={"dims": list(_DIMS)},
        tower_params_list=[{"dims": []}] * _TASKS,
        **arguments,
    )
    model.towers = nn.ModuleList(_Records() for _ in range(_TASKS))
    return model


def _assert_agree(ranker: nn.Module, library: Any) -> None:
    x_BI = torch.randn(7, _INPUT, generator=torch.Generator().manual_seed(1))
    library({"x": x_BI})
    expected = torch.stack([tower.seen for tower in library.towers], dim=1)
    torch.testing.assert_close(ranker(x_BI).tasks_BTH, expected, rtol=1e-4, atol=1e-5)


def test_mmoe() -> None:
    torch.manual_seed(0)
    ranker = MMoE(_INPUT, _TASKS, MmoeConfig(4, (), _DIMS))
    library = _library(multi_task.MMOE, n_expert=4)
    for n, mlp in enumerate(library.experts):
        _copy_expert(mlp, [weight[n] for weight in ranker.experts.weights])
    for t, mlp in enumerate(library.gates):
        _copy_gate(mlp, ranker.gates.weight[t])
    _assert_agree(ranker, library)


def test_ple() -> None:
    torch.manual_seed(0)
    ranker = PLE(_INPUT, _TASKS, PleConfig(2, 2, 2, (), _DIMS))
    library = _library(multi_task.PLE, n_level=2, n_expert_specific=2, n_expert_shared=2)
    for ours, theirs in zip(ranker.levels, library.cgc_layers, strict=True):
        level: Any = ours
        for n, mlp in enumerate([*theirs.experts_specific, *theirs.experts_shared]):
            _copy_expert(mlp, [weight[n] for weight in level.experts.weights])
        allowed: Tensor = level.gates.allowed_GN
        gates = [*theirs.gates_specific, *([theirs.gate_shared] if hasattr(theirs, "gate_shared") else [])]
        for weight_DN, used_N, mlp in zip(level.gates.weight, allowed, gates, strict=True):
            _copy_gate(mlp, weight_DN[:, used_N])
    _assert_agree(ranker, library)
