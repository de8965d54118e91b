"""A world of ranks by ``torch.distributed``: gloo between processors, NCCL between GPUs."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

from smes.errors import RankLost

_ADVICE = ". This is typically caused by"  # with which gloo goes on: a guess, and whom to tell


class ProcessGroupWorld:
    """The ranks of a process group.

    Each method raises :class:`smes.errors.RankLost` where another rank ended, or did not answer in the group's time.

    Args:
        group: Of ``torch.distributed``; its backends decide between which devices it carries tensors.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._group: Any = group  # torch's stubs leave out what its collectives take
        self.rank, self.size = group.rank(), group.size()

    def close(self) -> None:
        """Let go of the group, after the last call: one that lives when the interpreter ends may abort the process."""
        self._group = None

    def sum(self, tensors: Sequence[Tensor]) -> None:
        for some in _by_kind(tensors):
            flat = some[0].view(-1) if len(some) == 1 else torch.cat([tensor.view(-1) for tensor in some])
            self._add_up(flat)
            if len(some) > 1:
                parts = torch.split(flat, [tensor.numel() for tensor in some])
                for tensor, part in zip(some, parts, strict=True):
                    tensor.copy_(part.view(tensor.shape))

    def _add_up(self, flat: Tensor) -> None:
        self._done(lambda: self._group.allreduce([flat], ReduceOp.SUM))

    def exchange(self, parts: Sequence[Tensor]) -> list[Tensor]:
        sizes = torch.tensor([len(part) for part in parts])
        coming = torch.empty_like(sizes)
        self._done(lambda: self._group.alltoall_base(coming, sizes, [], []))
        counts: list[int] = coming.tolist()
        return list(torch.split(self.trade(torch.cat(list(parts)), sizes.tolist(), counts), counts))

    def trade(self, values: Tensor, going: Sequence[int], coming: Sequence[int]) -> Tensor:
        received = values.new_empty((sum(coming), *values.shape[1:]))
        self._done(lambda: self._group.alltoall_base(received, values, list(coming), list(going)))
        return received

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
        self._done(self._group.barrier)

    def _done(self, start: Callable[[], Any]) -> None:
        """Start a collective, and return when it has ended."""
        try:
            start().wait()
        except RuntimeError as error:
            said = (str(error).splitlines() or ["no message"])[0].partition(_ADVICE)[0]
            raise RankLost(
                f"rank {self.rank} of {self.size}: another rank ended, or did not answer in time: {said}"
            ) from error


def _bytes(message: bytes) -> Tensor:
    return torch.frombuffer(bytearray(message), dtype=torch.uint8) if message else torch.empty(0, dtype=torch.uint8)


def _by_kind(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Tensors of one type and device together, in their order: one message each."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return list(kinds.values())
