"""How batches reach the training device, and in which precision the dense part runs there."""

import ctypes
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smes.arrays import I64
from smes.model.table import Readers

# TODO(merge) was smes.batch: A mini-batch on the training device. Letters: B instances, W


@dataclass(frozen=True, slots=True)
class RankBatch:
    """What one step needs, columnar.

    Attributes:
        rows_U: int64, the distinct table rows of the batch.
        cells_BW: int64, which of them each id column reads.
        readers: The same the other way round; None on a GPU.
        pool_BW: float32, weight of each id within its bag; None for a schema without bags.
        numerics_BF: float32, NaN where missing.
        labels_BT: float32.
        mask_BT: bool, true where there is a label.
        weight_B: float32, sample weights.
        user_id: int64 [B], on the host: for the metrics.
        event_time_ms: int64 [B], on the host.
        ticket: What :meth:`smes.model.devices.Device.receive` needs to hand the tensors to the computing stream.
    """

    rows_U: Tensor
    cells_BW: Tensor
    readers: Readers | None
    pool_BW: Tensor | None
    numerics_BF: Tensor
    labels_BT: Tensor
    mask_BT: Tensor
    weight_B: Tensor
    user_id: I64
    event_time_ms: I64
    ticket: object = None

    def __len__(self) -> int:
        return len(self.user_id)

    def tensors(self) -> list[Tensor]:
        """Those that live on the device."""
        columns = (self.rows_U, self.cells_BW, self.numerics_BF, self.labels_BT, self.mask_BT, self.weight_B)
        return [*columns] if self.pool_BW is None else [*columns, self.pool_BW]


class Device(Protocol):
    """A training device. The CPU's is :class:`HostDevice`, CUDA's :class:`smes.model.cuda.CudaDevice`."""

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
    from smes.model.cuda import CudaDevice  # imported where it is used: a machine without a GPU never loads it

    return CudaDevice(device)


# TODO(merge) was smes.memory: Memory that is freed stays with the process, for the next st

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_KEPT = 32 << 20  # tables and snapshots are larger: those go back
_MOST_KEPT = 1 << 30  # at the end of the heap


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, in blocks of up to 32 MiB, 1 GiB at most. Idempotent.

    Returns:
        Whether it does: only glibc is told so, other systems stay as they are.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # another C library may have none
    return mallopt is not None and all(
        mallopt(option, size) == 1
        for option, size in ((_M_MMAP_THRESHOLD, _LARGEST_KEPT), (_M_TRIM_THRESHOLD, _MOST_KEPT))
    )
