"""The training devices, CPU and CUDA: how arrays get there, and the precision of the dense part there.

On a GPU, copies run beside the computation: a batch that is sent while a step runs has arrived when the step ends.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Device(Protocol):
    """A training device: :class:`HostDevice` or :class:`CudaDevice`."""

    device: torch.device

    def host(self, array: NDArray[Any]) -> Tensor:
        """Make a tensor on the host that can be copied to the device without blocking."""
        ...

    def send(self, array: NDArray[Any]) -> Tensor:
        """Copy an array to the device. The copy may still be under way when this returns."""
        ...

    def ticket(self) -> object:
        """Mark the end of the copies that were started so far, for :meth:`receive`."""
        ...

    def receive(self, tensors: Iterable[Tensor], ticket: object) -> None:
        """Let the computation wait for copies, without blocking the host.

        Args:
            tensors: What :meth:`send` returned.
            ticket: Taken after they were sent.
        """
        ...

    def autocast(self) -> AbstractContextManager[object]:
        """A context that sets the precision of the dense part."""
        ...


class HostDevice:
    """The CPU. Tensors share memory with the arrays; everything is float32."""

    device = torch.device("cpu")

    def host(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.require(array, requirements=["C", "W"]))

    def send(self, array: NDArray[Any]) -> Tensor:
        return self.host(array)

    def ticket(self) -> object:
        return None

    def receive(self, tensors: Iterable[Tensor], ticket: object) -> None:
        pass

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast("cpu", enabled=False)


class CudaDevice:  # pragma: no cover - needs a GPU
    """A CUDA GPU. Copies from pinned memory run on a CUDA stream of their own.

    Weights are float32. Autocast computes the ranker and the heads in bfloat16, whose range needs no loss scaling.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device if device.index is not None else torch.device("cuda", torch.cuda.current_device())
        self._copies = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]  # torch ships no type for it

    def host(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.require(array, requirements=["C", "W"])).pin_memory()

    def send(self, array: NDArray[Any]) -> Tensor:
        with torch.cuda.stream(self._copies):
            # Our reference to the pinned block may go: the caching host allocator keeps the block until the copy ran.
            return self.host(array).to(self.device, non_blocking=True)

    def ticket(self) -> object:
        return self._copies.record_event()

    def receive(self, tensors: Iterable[Tensor], ticket: object) -> None:
        compute = torch.cuda.current_stream(self.device)
        assert isinstance(ticket, torch.cuda.Event), "a ticket of this device"
        compute.wait_event(ticket)
        for tensor in tensors:
            # It was allocated on the copying stream, which must not reuse its memory while a step still reads it.
            tensor.record_stream(compute)

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast("cuda", dtype=torch.bfloat16)


def open_device(device: torch.device) -> Device:
    """Open the :class:`Device` for a torch device.

    Raises:
        ValueError: The device is neither cpu nor cuda, or CUDA is not available.
    """
    if device.type == "cpu":
        return HostDevice()
    if device.type != "cuda":
        raise ValueError(f"device {str(device)!r}: expected cpu or cuda")
    if not torch.cuda.is_available():
        raise ValueError(f"device {str(device)!r}: this machine has no usable CUDA GPU")
    return CudaDevice(device)
