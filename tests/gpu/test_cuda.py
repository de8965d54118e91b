"""The same results on a CUDA GPU as on the CPU.

Needs a CUDA GPU, torch 2.11 or later, numpy, numba, annotated-types and pytest; no broker, store or service. To run it
on a machine that has only those, from the repository's root:

    PYTHONPATH=. python -m pytest -c /dev/null --rootdir=. --noconftest --import-mode=importlib tests/gpu
"""

from collections.abc import Iterator

import pytest
import torch

from tests.smes import device_checks
from tests.smes.streams import RICH_SCHEMA, stream

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(scope="module")
def cuda() -> torch.device:
    return torch.device("cuda")


@pytest.fixture
def sync_is_an_error() -> Iterator[None]:
    """Reset, after the test, the debug mode in which an operation that makes the host wait for the GPU is an error."""
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_grouped_execution(cuda: torch.device) -> None:
    device_checks.check_grouped_execution(cuda)


@pytest.mark.parametrize("ranker", device_checks.STEPPED)
def test_steps_follow_the_cpu(cuda: torch.device, ranker: str) -> None:
    device_checks.check_steps_follow_the_cpu(cuda, ranker)


@pytest.mark.parametrize("ranker", device_checks.STEPPED)
def test_a_broken_step(cuda: torch.device, ranker: str) -> None:
    device_checks.check_a_broken_step(cuda, ranker)


def test_a_replayed_step(cuda: torch.device) -> None:
    device_checks.check_a_replayed_step(cuda)


def test_a_snapshot_is_served_on_the_cpu(cuda: torch.device) -> None:
    device_checks.check_snapshot_served_on_cpu(cuda)


def test_prefetch(cuda: torch.device) -> None:
    device_checks.check_prefetch(cuda)


@pytest.mark.parametrize("ranker", device_checks.RANKERS)
def test_choices(cuda: torch.device, ranker: str) -> None:
    device_checks.check_choices(cuda, ranker)


@pytest.mark.usefixtures("sync_is_an_error")
@pytest.mark.parametrize("ranker", device_checks.STEPPED)
def test_a_step_never_waits_for_the_gpu(cuda: torch.device, ranker: str) -> None:
    learner = device_checks.make_learner(cuda, ranker)
    blocks = stream(RICH_SCHEMA, batches=4, size=128)
    learner.step(learner.prepare(blocks[0]))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    for block in blocks[1:]:
        learner.step(learner.prepare(block))
