"""The fused gradient of the logits against autograd and finite differences.

Letters as in smes.rankers.sparse.routing.
"""

import pytest
import torch
from torch import Tensor

from smes.rankers.sparse.kernels import weighed
from smes.rankers.sparse.routing import expert_load, mean_and_chosen


def _drawn(fixed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(fixed)
    z_BRC = torch.randn(5, 3, fixed + 6, generator=generator, dtype=torch.float64, requires_grad=True)
    columns_BRK = torch.rand(5, 3, fixed + 6, generator=generator).topk(4, dim=-1).indices
    return z_BRC, columns_BRK


@pytest.mark.parametrize("fixed", [0, 2])
def test_it_is_the_gradient_of_softmax_mean_and_gather(fixed: int) -> None:
    z_BRC, columns_BRK = _drawn(fixed)
    probs_BRL = z_BRC[..., fixed:].softmax(dim=-1)
    expected = probs_BRL.mean(dim=0), z_BRC.gather(-1, columns_BRK)
    ours = mean_and_chosen(z_BRC, probs_BRL.detach(), columns_BRK)
    upstream = [torch.randn_like(part) for part in expected]
    for used in ([0], [1], [0, 1]):
        gradients = [
            torch.autograd.grad([parts[i] for i in used], z_BRC, [upstream[i] for i in used], retain_graph=True)[0]
            for parts in (ours, expected)
        ]
        torch.testing.assert_close(*gradients)
    for our, their in zip(ours, expected, strict=True):
        assert torch.equal(our, their)


@pytest.mark.parametrize("fixed", [0, 2])
def test_it_is_the_slope_that_finite_differences_find(fixed: int) -> None:
    z_BRC, columns_BRK = _drawn(fixed)
    assert torch.autograd.gradcheck(
        lambda z: mean_and_chosen(z, z.detach()[..., fixed:].softmax(dim=-1), columns_BRK), z_BRC
    )


@pytest.mark.parametrize(("fixed", "chosen"), [(0, 4), (2, 3), (0, 1), (3, 6)])
@pytest.mark.parametrize("size", [1, 33])
def test_the_compiled_weights_of_experts_are_torchs(size: int, fixed: int, chosen: int) -> None:
    """Also where logits lie so far apart that the smaller have no probability left."""
    torch.manual_seed(size)
    z_BRC = (torch.randn(size, 3, fixed + 6) * torch.tensor([1.0, 30.0, 300.0]).view(1, 3, 1)).requires_grad_()
    first_R = torch.tensor([0, 6, 12])
    z_BRL = z_BRC[..., fixed:].detach()
    places = z_BRL.topk(chosen, dim=-1).indices
    columns = torch.cat([torch.arange(fixed).expand(size, 3, fixed), fixed + places], dim=-1)
    mean_RL, z_BRK = mean_and_chosen(z_BRC, z_BRL.softmax(dim=-1), columns)
    expected = z_BRK.softmax(dim=-1), mean_RL
    for given in (None, places):
        experts, weights, probs, mean, load = weighed(z_BRC, given, chosen, fixed, first_R, fixed + 18)
        assert torch.equal(experts, torch.where(columns < fixed, columns, columns + first_R.view(1, 3, 1)))
        assert torch.equal(load, expert_load(experts, fixed + 18))
        torch.testing.assert_close(probs, z_BRL.softmax(dim=-1))
        torch.testing.assert_close((weights, mean), expected)
        probes = [torch.randn_like(part) for part in expected]
        for used in ([0], [1], [0, 1]):
            ours, theirs = (
                torch.autograd.grad([parts[i] for i in used], z_BRC, [probes[i] for i in used], retain_graph=True)[0]
                for parts in ((weights, mean), expected)
            )
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("spoilt", [float("nan"), float("inf")])
def test_a_logit_that_is_no_number_leaves_no_weight_a_number(spoilt: float) -> None:
    z_BRC = torch.zeros(2, 1, 5)
    z_BRC[1, 0, 3] = spoilt
    _, weights, probs, mean, _ = weighed(z_BRC, None, 2, 0, torch.zeros(1, dtype=torch.int64), 5)
    assert weights[0].isfinite().all()
    assert weights[1].isnan().all()
    assert probs[1].isnan().all()
    assert mean.isnan().all()
