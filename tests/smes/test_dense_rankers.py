"""The dense rivals of SMES equal loops over instances and experts, in values and in every gradient."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smes.model.config import ModelConfig
from smes.model.rank_model import RANKERS
from smes.rankers.config import HomeConfig, MmoeConfig, PleConfig, SharedBottomConfig, task_groups
from smes.rankers.dense_experts import BatchNorm, DenseExperts
from smes.rankers.home import FeatureGates, HoME
from smes.rankers.mmoe import MMoE
from smes.rankers.ple import PLE
from smes.rankers.shared_bottom import SharedBottom
from smes.rankers.sparse.config import smes_paper
from smes.schema import Schema, Task
from tests.smes import naive_rankers

_INPUT = 10


def _spread(ranker: nn.Module, seed: int) -> None:
    """Weights that leave nothing at 0 or 1, so that no term of an equation can go missing unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in ranker.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.6)


def _assert_equal(ranker: nn.Module, reference: Callable[[Tensor], Tensor], seed: int = 0) -> None:
    _spread(ranker, seed)
    x_BI = torch.randn(5, _INPUT, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    output = ranker(x_BI)
    assert output.auxiliary_loss is None
    expected = reference(x_BI)
    torch.testing.assert_close(output.tasks_BTH, expected, rtol=1e-4, atol=1e-5)
    probe = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    leaves = [x_BI, *ranker.parameters()]
    got = torch.autograd.grad((output.tasks_BTH * probe).sum(), leaves)
    wanted = torch.autograd.grad((expected * probe).sum(), leaves)
    for name, a, b in zip(["x", *(n for n, _ in ranker.named_parameters())], got, wanted, strict=True):
        assert float(b.abs().max()) > 0, name
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4), name


def test_shared_bottom() -> None:
    ranker = SharedBottom(_INPUT, 3, SharedBottomConfig((9, 6)))
    assert ranker.output_dim == 6
    one = naive_rankers.every_instance(lambda v: [naive_rankers.encoded(ranker.encoder, v)] * 3)
    _assert_equal(ranker, one)


@pytest.mark.parametrize("encoder", [(), (8,)])
def test_mmoe(encoder: tuple[int, ...]) -> None:
    ranker = MMoE(_INPUT, 3, MmoeConfig(5, encoder, (7, 6)))
    _assert_equal(ranker, naive_rankers.mmoe(ranker))


@pytest.mark.parametrize(("levels", "shared", "specific", "encoder"), [(1, 2, 1, ()), (2, 1, 2, (8,)), (3, 2, 1, ())])
def test_ple(levels: int, shared: int, specific: int, encoder: tuple[int, ...]) -> None:
    ranker = PLE(_INPUT, 3, PleConfig(levels, shared, specific, encoder, (7, 6)))
    _assert_equal(ranker, naive_rankers.ple(ranker, 3, shared, specific))


@pytest.mark.parametrize(
    ("group_T", "config"),
    [
        ((0, 1, 0, 1), HomeConfig(experts_per_group=1, encoder_dims=(8,), expert_dims=(6,))),
        ((0, 1, 2), HomeConfig(experts_per_group=2, encoder_dims=(), expert_dims=(7, 6))),
        ((0, 0), HomeConfig(experts_per_group=3, feature_gates=3, encoder_dims=(), expert_dims=(6,))),
        ((0, 1), HomeConfig(feature_gates=0, encoder_dims=(), expert_dims=(6,))),
    ],
)
def test_home(group_T: tuple[int, ...], config: HomeConfig) -> None:
    ranker = HoME(_INPUT, group_T, config)
    _assert_equal(ranker, naive_rankers.home(ranker, group_T))


def test_home_without_self_gates_is_what_remains() -> None:
    whole = HoME(_INPUT, (0, 1), HomeConfig(encoder_dims=(), expert_dims=(6,)))
    bare = HoME(_INPUT, (0, 1), HomeConfig(self_gates=False, encoder_dims=(), expert_dims=(6,)))
    names = {name for name, _ in whole.named_parameters()} - {name for name, _ in bare.named_parameters()}
    assert names == {"meta.self_gates.weight", "task.self_gates.weight"}
    bare.load_state_dict({n: v for n, v in whole.state_dict().items() if n not in names})
    # A sigmoid far below zero is 0: the residual is gone.
    assert whole.meta.self_gates is not None
    whole.meta.self_gates.weight.data.fill_(-1e4)
    v_BD = torch.rand(4, _INPUT, generator=torch.Generator().manual_seed(0)) + 1
    streams = v_BD.expand(3, -1, -1)
    torch.testing.assert_close(whole.meta(streams, v_BD), bare.meta(streams, v_BD))


def test_feature_gates_start_open() -> None:
    torch.manual_seed(0)
    v_CBD = torch.randn(3, 4, 8)
    torch.testing.assert_close(FeatureGates(3, 8, 2)(v_CBD), v_CBD)


def test_batch_norm_per_expert_against_torch() -> None:
    torch.manual_seed(0)
    experts = DenseExperts(3, 5, (4,), "batch")
    references = [nn.BatchNorm1d(4, affine=False, momentum=0.01) for _ in range(3)]
    for _ in range(3):
        x_BD = torch.randn(6, 5)
        y_NBH = experts(x_BD)
        for n, norm in enumerate(references):
            torch.testing.assert_close(y_NBH[n], nn.functional.silu(norm(x_BD @ experts.weights[0][n])))
    experts.eval()
    y_NBH = experts(x_BD)
    for n, norm in enumerate(references):
        torch.testing.assert_close(y_NBH[n], nn.functional.silu(norm.eval()(x_BD @ experts.weights[0][n])))
    assert isinstance(experts.norms[0], BatchNorm)
    before = experts.norms[0].mean_M.clone()
    alone = experts.train()(x_BD[:1])
    torch.testing.assert_close(alone, y_NBH[:, :1], msg="one instance is scored by the running moments")
    assert torch.equal(experts.norms[0].mean_M, before)


_SCHEMA = Schema("s", (Task("click"), Task("long_view"), Task("watch_time", kind="regression"), Task("like")))


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ({}, (0, 1, 1, 0)),
        ({"rare": ("like",)}, (0, 0, 0, 1)),
        ({"a": ("like", "long_view"), "b": ("click",)}, (0, 1, 2, 1)),
    ],
)
def test_task_groups(groups: dict[str, tuple[str, ...]], expected: tuple[int, ...]) -> None:
    assert task_groups("HomeConfig.groups", _SCHEMA, groups) == expected


def test_tasks_all_of_a_kind_are_one_group() -> None:
    assert task_groups("HomeConfig.groups", Schema("s", (Task("click"), Task("like"))), {}) == (0, 0)
    with pytest.raises(ValueError, match=r"HomeConfig\.groups: unknown tasks \['clack'\], expected names among"):
        task_groups("HomeConfig.groups", _SCHEMA, {"a": ("clack",)})


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (SharedBottomConfig, {"dims": ()}, r"SharedBottomConfig\.dims: \[\], expected .* 1 or more entries"),
        (MmoeConfig, {"num_experts": 0}, r"MmoeConfig\.num_experts: 0, expected at least 1"),
        (MmoeConfig, {"encoder_dims": (0,)}, r"MmoeConfig\.encoder_dims: \[0\], expected each at least 1"),
        (PleConfig, {"num_levels": 0}, r"PleConfig\.num_levels: 0, expected at least 1"),
        (PleConfig, {"num_shared": 0}, r"PleConfig\.num_shared: 0, expected at least 1"),
        (HomeConfig, {"norm": "group"}, r"HomeConfig\.norm: 'group', expected one of layer, batch"),
        (HomeConfig, {"feature_gates": -1}, r"HomeConfig\.feature_gates: -1, expected at least 0"),
        (HomeConfig, {"groups": {"a": ("x",), "b": ("x",)}}, r"HomeConfig\.groups: .* no task twice"),
        (HomeConfig, {"groups": {"a": ()}}, "at least one task"),
    ],
)
def test_a_wrong_shape_is_refused(config: type, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**fields)


def test_the_defaults_are_of_one_size() -> None:
    """Weights at 300 inputs and 8 tasks, all within a factor of two of the paper's SMES."""
    schema, paper = Schema("s", tuple(Task(f"t{i}") for i in range(8))), smes_paper()
    rankers = {
        n: build(300, schema, ModelConfig(ranker=n, smes=paper)) for n, build in RANKERS.items() if n != "linear"
    }
    sizes = {n: sum(p.numel() for p in r.parameters()) for n, r in rankers.items() if isinstance(r, nn.Module)}
    assert set(sizes) == {"smes", "home", "mmoe", "ple", "shared_bottom"}
    assert all(sizes["smes"] / 2 < size < 2 * sizes["smes"] for size in sizes.values()), sizes
