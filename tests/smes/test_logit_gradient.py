"""The fused gradient of the logits against autograd and finite differences.

Letters as in smes.rankers.sparse.routing.
"""

import pytest
import torch
from torch import Tensor

from smes.rankers.sparse.routing import mean_and_chosen


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
