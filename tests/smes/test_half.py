"""Training on the CPU in half precision: close to single precision, repeatable, with float32 weights and scores."""

from typing import Any

import numpy as np
import pytest
import torch

from smes.model.config import ModelConfig, OptimizerConfig, RankerName
from smes.model.devices import open_device
from smes.model.learner import Learner
from tests.smes.streams import RICH_SCHEMA, stream


def _trained(ranker: RankerName, *, half: bool) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """Scores of each step, and what is served after the last."""
    config = ModelConfig(ranker=ranker, embedding_dim=8)
    learner = Learner(RICH_SCHEMA, config, OptimizerConfig(), device=torch.device("cpu"), half=half)
    scores = [learner.step(learner.prepare(block)).scores.numpy() for block in stream(RICH_SCHEMA, batches=12, size=64)]
    return scores, learner.serving_state()


@pytest.fixture(autouse=True)
def _instructions_for_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without them products are slow, not wrong."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})


@pytest.mark.parametrize("ranker", ["mmoe", "home"])
def test_half_precision_is_close_to_single_and_repeats_bit_for_bit(ranker: RankerName) -> None:
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
    np.testing.assert_allclose(np.stack(scores), np.stack(single), rtol=0.03, atol=0.02)


def test_smes_stays_in_single_precision() -> None:
    single, half = (_trained("smes", half=half)[0] for half in (False, True))
    np.testing.assert_array_equal(np.stack(half), np.stack(single))


def test_a_cpu_without_bfloat16_is_refused_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    with pytest.raises(ValueError, match=r"^trainer\.cpu_precision: 'bf16', expected fp32: this CPU"):
        open_device(torch.device("cpu"), half=True, ranker="mmoe")
