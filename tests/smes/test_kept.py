"""What a module keeps in evaluation follows its buffers."""

import torch
from torch import Tensor

from smes.rankers.ranker import RunningMoments


def _standardised(moments: RunningMoments, x_BC: Tensor) -> Tensor:
    return moments.standardise(x_BC, 8.0, torch.float32)


def test_it_is_forgotten_when_the_moments_change_by_whatever_way() -> None:
    moments, x_BC = RunningMoments(3), torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    weight_BC = torch.ones(50, 3)
    seen = [_standardised(moments.eval(), x_BC)]
    for scale in (2.0, 5.0):
        moments.train()
        moments.observe(scale * x_BC + 1, weight_BC)  # by a compiled loop
        fresh = _standardised(moments, x_BC)
        moments.eval()
        with torch.inference_mode():
            seen.append(_standardised(moments, x_BC))
        assert torch.equal(seen[-1], fresh)
    other = RunningMoments(3)
    moments.load_state_dict(other.state_dict())
    assert torch.equal(_standardised(moments, x_BC), seen[0])
    assert not torch.equal(seen[1], seen[2])
    x_BC.requires_grad_()
    _standardised(moments, x_BC).sum().backward()  # type: ignore[no-untyped-call]  # torch ships no type for it
    assert x_BC.grad is not None, "what inference has kept serves gradients, too"


def test_it_is_forgotten_when_other_buffers_take_their_place_and_when_they_change_in_evaluation() -> None:
    moments, x_BC = RunningMoments(3).eval(), torch.randn(50, 3)
    before = _standardised(moments, x_BC)
    others = {name: torch.full_like(value, 4.0) for name, value in moments.state_dict().items()}
    moments.load_state_dict(others, assign=True)
    torch.testing.assert_close(_standardised(moments, x_BC), (x_BC - 4) / 2)
    moments.observe(x_BC, torch.ones(50, 3))
    observed = RunningMoments(3)
    observed.load_state_dict(moments.state_dict())
    assert torch.equal(_standardised(moments, x_BC), _standardised(observed, x_BC))
    with torch.inference_mode():
        assert torch.equal(_standardised(RunningMoments(3).eval(), x_BC), before), "its buffers count no changes"


def test_the_same_is_given_again_while_nothing_changes() -> None:
    moments = RunningMoments(3).eval()
    assert moments.affine()[0] is moments.affine()[0]
    assert moments.train().affine()[0] is not moments.affine()[0]
