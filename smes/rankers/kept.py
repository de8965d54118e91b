"""What follows from a module's buffers is computed once while the module is in evaluation."""

from collections.abc import Callable
from operator import is_
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from smes.rankers.kernels import on_host

_T = TypeVar("_T")


class Keeping(nn.Module):
    """Keeps what it computed of its buffers on the host, in evaluation, until they change.

    torch counts what its own operators change; a compiled loop that changes buffers says so
    (``torch.autograd.graph.increment_version``).
    """

    def __init__(self) -> None:
        super().__init__()
        self._kept: dict[str, tuple[tuple[Tensor, ...], tuple[int, ...], Any]] = {}

    def kept(self, name: str, buffers: tuple[Tensor, ...], make: Callable[[], _T]) -> _T:
        """What ``make`` gives, or gave the last time.

        Args:
            name: Of the result.
            buffers: What it depends on.
            make: Computes it, without gradients.
        """
        if self.training or not on_host(buffers[0]) or buffers[0].is_inference():  # inference counts no changes
            return make()
        versions = tuple(buffer._version for buffer in buffers)
        found = self._kept.get(name)
        if found is None or found[1] != versions or not all(map(is_, found[0], buffers)):
            with torch.inference_mode(False), torch.no_grad():  # what is kept may be read where gradients are wanted
                found = self._kept[name] = buffers, versions, make()
        value: _T = found[2]
        return value
