"""A world of ranks by ``torch.distributed``: gloo between processors, NCCL between GPUs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp


class ProcessGroupWorld:
    """The ranks of a process group.

    An error of a collective (another rank ended, or did not answer in the group's time) is torch's ``RuntimeError``.

    Args:
        group: Of ``torch.distributed``; its backends decide between which devices it carries tensors.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._group: Any = group  # torch's stubs leave out what its collectives take
        self.rank, self.size = group.rank(), group.size()

    def sum(self, tensors: Sequence[Tensor]) -> None:
        for some in _by_kind(tensors):
            flat = some[0].view(-1) if len(some) == 1 else torch.cat([tensor.view(-1) for tensor in some])
            self._group.allreduce([flat], ReduceOp.SUM).wait()
            if len(some) > 1:
                parts = torch.split(flat, [tensor.numel() for tensor in some])
                for tensor, part in zip(some, parts, strict=True):
                    tensor.copy_(part.view(tensor.shape))

    def exchange(self, parts: Sequence[Tensor]) -> list[Tensor]:
        sizes = torch.tensor([len(part) for part in parts])
        coming = torch.empty_like(sizes)
        self._all_to_all(coming, sizes, [], [])
        counts: list[int] = coming.tolist()
        sent = torch.cat(list(parts))
        received = sent.new_empty((sum(counts), *sent.shape[1:]))
        self._all_to_all(received, sent, counts, sizes.tolist())
        return list(torch.split(received, counts))

    def _all_to_all(self, received: Tensor, sent: Tensor, counts: list[int], sizes: list[int]) -> None:
        self._group.alltoall_base(received, sent, counts, sizes).wait()

    def gather(self, values: Tensor) -> list[Tensor]:
        return self.exchange([values] * self.size)

    def broadcast(self, message: bytes) -> bytes:
        own = _bytes(message if self.rank == 0 else b"")
        empty = own.new_empty(0)
        parts = self.exchange([own] * self.size if self.rank == 0 else [empty] * self.size)
        return parts[0].numpy().tobytes()

    def collect(self, message: bytes) -> list[bytes]:
        own = _bytes(message)
        empty = own.new_empty(0)
        parts = self.exchange([own, *[empty] * (self.size - 1)])
        return [part.numpy().tobytes() for part in parts] if self.rank == 0 else []

    def wait_for_all(self) -> None:
        self._group.barrier().wait()


def _bytes(message: bytes) -> Tensor:
    return torch.frombuffer(bytearray(message), dtype=torch.uint8) if message else torch.empty(0, dtype=torch.uint8)


def _by_kind(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Tensors of one type and device together, in their order: one message each."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return list(kinds.values())
