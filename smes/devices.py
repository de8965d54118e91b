"""How batches reach the training device, and in which precision the dense part runs there."""

from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smes.batch import RankBatch


class Device(Protocol):
    """A training device. The CPU's is :class:`HostDevice`, CUDA's :class:`smes.cuda.CudaDevice`."""

    device: torch.device

    def host(self, array: NDArray[Any]) -> Tensor:
        """The array as a tensor on the host from which a copy to the device does not block."""
        ...

    def send(self, array: NDArray[Any]) -> Tensor:
        """The array on the device; the copy may still be under way."""
        ...

    def ticket(self) -> object:
        """Marks the point where everything sent so far has arrived."""
        ...

    def receive(self, batch: RankBatch) -> None:
        """Make the computing stream wait for a batch's copies, without waiting on the host."""
        ...

    def autocast(self) -> AbstractContextManager[object]:
        """The precision of the dense part."""
        ...


class HostDevice:
    """The CPU: tensors share memory with the arrays, all in float32."""

    device = torch.device("cpu")

    def host(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.require(array, requirements=["C", "W"]))

    def send(self, array: NDArray[Any]) -> Tensor:
        return self.host(array)

    def ticket(self) -> object:
        return None

    def receive(self, batch: RankBatch) -> None:
        pass

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast("cpu", enabled=False)


def open_device(device: torch.device) -> Device:
    """The :class:`Device` for a torch device.

    Raises:
        ValueError: Neither cpu nor cuda, or CUDA is not available.
    """
    if device.type == "cpu":
        return HostDevice()
    if device.type != "cuda":
        raise ValueError(f"device {str(device)!r}: expected cpu or cuda")
    if not torch.cuda.is_available():
        raise ValueError(f"device {str(device)!r}: this machine has no usable CUDA GPU")
    from smes.cuda import CudaDevice  # imported where it is used: a machine without a GPU never loads it

    return CudaDevice(device)
