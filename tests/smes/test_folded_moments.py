"""A map of standardised columns, folded into the map's weights, against standardising and multiplying."""

import pytest
import torch

from smes.rankers.folded import read_folded
from smes.rankers.ranker import RunningMoments


@pytest.mark.parametrize("batches", [0, 3])
@pytest.mark.parametrize("spoilt", [False, True])
@pytest.mark.parametrize("size", [1, 64])
def test_folded_is_standardised_clipped_and_multiplied(size: int, spoilt: bool, batches: int) -> None:
    """Columns that are clipped, constant or far from zero among plain ones; also while nothing was seen."""
    generator = torch.Generator().manual_seed(batches)
    raw_OC = torch.randn(5, 7, generator=generator, requires_grad=True)
    weight_QC = torch.randn(3, 7, generator=generator, requires_grad=True)
    deviation_C = torch.tensor([0.1, 1.0, 5.0, 1.0, 0.0, 1e-3, 0.0]) if spoilt else torch.ones(7)
    mean_C = torch.tensor([0.0, 1.0, -2.0, 0.0, 1.0, 10.0, 0.0]) if spoilt else torch.arange(7) / 3

    def batch(rows: int) -> torch.Tensor:
        return torch.randn(rows, 7, generator=generator) * deviation_C + mean_C

    folding, plain = RunningMoments(7), RunningMoments(7)
    for _ in range(batches):
        x_BC = batch(64)
        read_folded(x_BC, raw_OC, weight_QC, folding, 8.0, observe=True)
        plain.observe(x_BC)
    for a, b in zip(folding.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    x_BC = batch(size)
    if spoilt:
        x_BC[-1, 3], x_BC[0, 3], x_BC[0, 6] = -100.0, 100.0, 1.0
    x_BC.requires_grad_()
    got = read_folded(x_BC, raw_OC, weight_QC, folding, 8.0, observe=False)
    expected = x_BC @ raw_OC.t(), folding.standardise(x_BC, 8.0, torch.float32) @ weight_QC.t()
    probes = [torch.randn(part.shape, generator=generator) for part in got]
    for used in ([0], [1], [0, 1]):
        torch.testing.assert_close([got[i] for i in used], [expected[i] for i in used], rtol=1e-4, atol=1e-4)
        gradients = [
            torch.autograd.grad(
                [parts[i] for i in used],
                (x_BC, raw_OC, weight_QC),
                [probes[i] for i in used],
                retain_graph=True,
                materialize_grads=True,
            )
            for parts in (got, expected)
        ]
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)
    for a, b in zip(folding.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9, msg="what is only read leaves the moments alone")
