"""Target attention on a CUDA GPU: the same results as on the CPU, and no step waits for the GPU.

Needs what ``test_cuda.py`` needs.
"""

from collections.abc import Iterator

import pytest
import torch

from smes.model.config import ModelConfig, OptimizerConfig
from smes.model.learner import Learner
from smes.schema import Schema
from tests.smes.streams import history_stream

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture
def sync_is_an_error() -> Iterator[None]:
    """Reset, after the test, the debug mode in which an operation that makes the host wait for the GPU is an error."""
    yield
    torch.cuda.set_sync_debug_mode("default")


def _learner(schema: Schema, device: str) -> Learner:
    return Learner(schema, ModelConfig(embedding_dim=8), OptimizerConfig(), device=torch.device(device), seed=1)


def test_a_history_is_learned_from_as_on_the_cpu() -> None:
    schema, blocks = history_stream(batches=20, size=128)
    reference, learner = _learner(schema, "cpu"), _learner(schema, "cuda")
    for block in blocks:
        expected, got = (each.step(each.prepare(block)) for each in (reference, learner))
        assert torch.isfinite(got.scores).all()
        assert float((got.scores.cpu() - expected.scores).abs().mean()) < 0.03


@pytest.mark.usefixtures("sync_is_an_error")
def test_a_step_with_a_history_never_waits_for_the_gpu() -> None:
    schema, blocks = history_stream(batches=4, size=128)
    learner = _learner(schema, "cuda")
    learner.step(learner.prepare(blocks[0]))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    for block in blocks[1:]:
        learner.step(learner.prepare(block))
