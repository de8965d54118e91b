"""The checks of ``tests/gpu`` on the CPU, so that they cannot go stale on machines without a GPU."""

import pytest
import torch

from smes.model.devices import open_device
from tests.smes import device_checks


def test_grouped_execution() -> None:
    device_checks.check_grouped_execution(device_checks.CPU)


@pytest.mark.parametrize("ranker", device_checks.STEPPED)
def test_steps(ranker: str) -> None:
    device_checks.check_steps_follow_the_cpu(device_checks.CPU, ranker)


@pytest.mark.parametrize("ranker", device_checks.STEPPED)
def test_a_broken_step(ranker: str) -> None:
    device_checks.check_a_broken_step(device_checks.CPU, ranker)


def test_a_replayed_step() -> None:
    device_checks.check_a_replayed_step(device_checks.CPU)


def test_a_snapshot_is_served() -> None:
    device_checks.check_snapshot_served_on_cpu(device_checks.CPU)


def test_prefetch() -> None:
    device_checks.check_prefetch(device_checks.CPU)


@pytest.mark.parametrize("ranker", device_checks.RANKERS)
def test_choices(ranker: str) -> None:
    device_checks.check_choices(device_checks.CPU, ranker)


def test_a_device_of_another_type_is_refused() -> None:
    with pytest.raises(ValueError, match="expected cpu or cuda"):
        open_device(torch.device("meta"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA GPU")
def test_cuda_without_a_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match="no usable CUDA GPU"):
        open_device(torch.device("cuda"))
