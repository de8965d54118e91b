"""Training on the CPU in half precision: close to single precision, repeatable, with float32 weights and scores."""

from typing import Any

import numpy as np
import pytest
import torch

from smes.model.config import ModelConfig, OptimizerConfig, RankerName
from smes.model.learner import Learner
from smes.rankers.folded import read_folded
from smes.rankers.half import check_half, half_products
from smes.rankers.ranker import RunningMoments
from tests.smes.streams import RICH_SCHEMA, stream


def _trained(ranker: RankerName, *, half: bool) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """Scores of each step, and what is served after the last."""
    config = ModelConfig(ranker=ranker, embedding_dim=8)
    learner = Learner(RICH_SCHEMA, config, OptimizerConfig(), device=torch.device("cpu"), half=half)
    scores = [learner.step(learner.prepare(block)).scores.numpy() for block in stream(RICH_SCHEMA, batches=12, size=64)]
    return scores, learner.serving_state()


@pytest.mark.parametrize("ranker", ["smes", "mmoe", "home"])
def test_half_precision_is_close_to_single_and_repeats_bit_for_bit(
    ranker: RankerName, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smes.model.devices.check_half", lambda: None)  # slow where it is not in hardware, not wrong
    single, _ = _trained(ranker, half=False)
    scores, state = _trained(ranker, half=True)
    again, state_again = _trained(ranker, half=True)
    for a, b in zip(scores, again, strict=True):
        np.testing.assert_array_equal(a, b)
    for name, tensor in state.items():
        assert tensor.dtype != torch.bfloat16, name
        assert torch.equal(tensor, state_again[name]), name
    assert scores[0].dtype == np.float32
    assert any((a != b).any() for a, b in zip(scores, single, strict=True)), "nothing was rounded"
    close = np.isclose(np.stack(scores), np.stack(single), rtol=0.03, atol=0.02)
    assert close.mean() > 0.95, "near ties may choose other experts, few of them"


def test_a_folded_norm_in_half_precision_is_exact_where_rounding_would_show() -> None:
    generator = torch.Generator().manual_seed(0)
    raw_OC, weight_QC = torch.randn(2, 6, generator=generator), torch.randn(3, 6, generator=generator)
    mean_C = torch.tensor([0.0, 1.0, -3.0, 20.0, 60.0, -1000.0])  # in deviations
    x_BC = torch.randn(256, 6, generator=generator) + mean_C
    x_BC[7, 0] = 50.0
    moments = RunningMoments(6)
    moments.observe(x_BC)
    expected = moments.standardise(x_BC, 8.0, torch.float32) @ weight_QC.t()
    with half_products():
        _, got = read_folded(x_BC, raw_OC, weight_QC, moments, 8.0, observe=False)
    assert 1e-4 < float((got - expected).abs().max()) < 0.1


def test_a_cpu_without_bfloat16_is_refused_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    with pytest.raises(ValueError, match=r"^trainer\.cpu_precision: 'bf16', expected fp32: this CPU"):
        check_half()
