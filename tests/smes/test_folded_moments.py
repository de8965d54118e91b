"""A map of standardised columns, folded into the map's weights, against standardising and multiplying."""

import pytest
import torch
import torch.nn.functional as F

from smes.rankers.ranker import RunningMoments


@pytest.mark.parametrize("batches", [0, 3])
def test_folded_is_standardised_clipped_and_multiplied(batches: int) -> None:
    """Columns that are clipped, constant or far from zero among plain ones; also while nothing was seen."""
    generator = torch.Generator().manual_seed(batches)
    weight_OC = torch.randn(3, 6, generator=generator, requires_grad=True)

    def batch() -> torch.Tensor:
        x_BC = torch.randn(64, 6, generator=generator) * torch.tensor([0.1, 1.0, 5.0, 1.0, 0.0, 1e-3])
        return x_BC + torch.tensor([0.0, 1.0, -2.0, 0.0, 1.0, 10.0])

    folding, plain = RunningMoments(6), RunningMoments(6)
    for _ in range(batches):
        x_BC = batch()
        folding.fold(weight_OC, x_BC, 8.0, observe=True)
        plain.observe(x_BC)
    for a, b in zip(folding.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    x_BC = batch()
    x_BC[5, 3], x_BC[6, 3] = 100.0, -100.0
    x_BC.requires_grad_()
    folded = folding.fold(weight_OC, x_BC, 8.0, observe=False)
    got_BO = folded.with_rest(F.linear(x_BC, folded.weight_OC, folded.bias_O), x_BC)
    expected_BO = folding.standardise(x_BC, 8.0, torch.float32) @ weight_OC.t()
    assert folded.exact_K is not None
    assert 3 in folded.exact_K.tolist()
    torch.testing.assert_close(got_BO, expected_BO, rtol=1e-4, atol=1e-4)
    probe_BO = torch.randn(got_BO.shape, generator=generator)
    got = torch.autograd.grad((got_BO * probe_BO).sum(), (x_BC, weight_OC))
    expected = torch.autograd.grad((expected_BO * probe_BO).sum(), (x_BC, weight_OC))
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
