"""The optimiser of the dense weights is torch's own to the last bit."""

from typing import Any

import pytest
import torch

from smes.model.fused_adam import FusedAdam

_RATE, _BETAS, _DECAY = 0.01, (0.9, 0.98), 0.1
_SHAPES = {"narrow": (3,), "wide": (17, 40), "late": (5, 2), "free": (9,)}


def _weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator).requires_grad_() for name, shape in _SHAPES.items()}


def test_it_is_torchs_own_bit_for_bit_over_a_restart() -> None:
    ours, theirs = _weights(), _weights()
    decaying = [name for name in ours if name != "free"]
    decay = dict.fromkeys(decaying, _DECAY)
    optimizer = FusedAdam(ours, _RATE, _BETAS, decay)
    groups: list[dict[str, Any]] = [
        {"params": [theirs[name] for name in decaying]},
        {"params": [theirs["free"]], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(
        groups,
        lr=_RATE,
        betas=_BETAS,
        weight_decay=_DECAY,
        fused=True,
    )
    generator = torch.Generator().manual_seed(4)
    for step in range(40):
        for name in ours:
            gradient = torch.randn(_SHAPES[name], generator=generator)
            if name != "late" or step >= 5:  # a weight's moments begin with its first gradient
                ours[name].grad, theirs[name].grad = gradient, gradient.clone()
        taken = None if step % 3 else torch.tensor(step % 2 == 0)
        reference.grad_scale = None  # type: ignore[attr-defined]
        reference.found_inf = None if taken is None else (~taken).float()  # type: ignore[attr-defined]
        before = ours["wide"].detach().clone()
        optimizer.step(taken)
        reference.step()
        assert torch.equal(before, ours["wide"]) == (taken is not None and not taken)
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), (step, name)
        optimizer.clear()
        reference.zero_grad()
        if step == 20:
            state = {name: tensor.clone() for name, tensor in optimizer.state().items()}
            optimizer = FusedAdam(ours, _RATE, _BETAS, decay)
            optimizer.load_state(state)
    kept = {f"{name}.{kind}": v for name, w in theirs.items() for kind, v in reference.state[w].items()}
    assert all(torch.equal(kept[name], tensor) for name, tensor in optimizer.state().items())
    assert kept.keys() == optimizer.state().keys()
    assert kept["late.step"] == kept["wide.step"] - 4  # of the five steps that it missed, the first was not taken


def test_the_sum_of_the_squares_is_finite_only_if_all_gradients_are() -> None:
    weights = _weights()
    optimizer = FusedAdam(weights, _RATE)
    assert float(optimizer.square()) == 0
    generator = torch.Generator().manual_seed(5)
    for weight in weights.values():
        weight.grad = torch.randn(weight.shape, generator=generator)
    expected = sum(float(weight.grad.square().sum()) for weight in weights.values() if weight.grad is not None)
    assert float(optimizer.square()) == pytest.approx(expected, rel=1e-5)
    for name, weight in weights.items():
        for spoilt in (float("nan"), float("inf"), float("-inf"), 1e20):  # whose square is infinite
            assert weight.grad is not None
            kept = weight.grad.clone()
            weight.grad.view(-1)[-1] = spoilt
            assert not optimizer.square().isfinite(), (name, spoilt)
            weight.grad = kept
