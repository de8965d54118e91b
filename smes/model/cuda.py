"""The GPU's side of a training step: pinned copies on a stream of their own, bf16 for the dense part."""

from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smes.model.devices import RankBatch


class CudaDevice:
    """Copies run beside the computation: a batch prepared while a step runs is there when the step ends.

    Weights stay in float32; autocast computes the ranker in bfloat16, whose range needs no loss scaling.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device if device.index is not None else torch.device("cuda", torch.cuda.current_device())
        self._copies = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]  # torch ships no type for it

    def host(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.require(array, requirements=["C", "W"])).pin_memory()

    def send(self, array: NDArray[Any]) -> Tensor:
        with torch.cuda.stream(self._copies):
            # The caching host allocator keeps the pinned block until the copy has run, so it may be dropped here.
            return self.host(array).to(self.device, non_blocking=True)

    def ticket(self) -> object:
        return self._copies.record_event()

    def receive(self, batch: RankBatch) -> None:
        compute = torch.cuda.current_stream(self.device)
        assert isinstance(batch.ticket, torch.cuda.Event), "a batch made by this device"
        compute.wait_event(batch.ticket)
        for tensor in batch.tensors():
            # Allocated on the copying stream: its memory must not be reused there while a step still reads it.
            tensor.record_stream(compute)

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast("cuda", dtype=torch.bfloat16)
