"""What follows from a module's buffers is computed once while the module is in evaluation."""

from collections.abc import Callable
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from smes.rankers.kernels import on_host

_T = TypeVar("_T")


class Keeping(nn.Module):
    """Keeps what it computed of its buffers on the host, in evaluation, until they change.

    Compiled loops change buffers without a trace, but in training only: going into evaluation forgets what was kept.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kept: dict[str, tuple[tuple[int, ...], Any]] = {}

    def train(self, mode: bool = True) -> Self:
        """As of every module."""
        self._kept = {}
        return super().train(mode)

    def kept(self, name: str, buffers: tuple[Tensor, ...], make: Callable[[], _T]) -> _T:
        """What ``make`` gives, or gave the last time.

        Args:
            name: Of the result.
            buffers: What it depends on.
            make: Computes it, without gradients.
        """
        if self.training or not on_host(buffers[0]):
            return make()
        versions = tuple(buffer._version for buffer in buffers)
        found = self._kept.get(name)
        if found is None or found[0] != versions:
            with torch.inference_mode(False), torch.no_grad():  # what is kept may be read where gradients are wanted
                found = self._kept[name] = versions, make()
        value: _T = found[1]
        return value
