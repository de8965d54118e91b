"""More experts for each task group while the stream is young.

An expert of a large pool learns from the few instances that it was chosen for, and a router from the few experts that
it tried: in the first thousands of instances sparse routing is behind dense experts. With several times as many chosen
at first, and half as many each time the number of instances doubles, it is not; weights and moments simply go on
(docs/quality.md; ours, in no paper).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smes.routing import Routing, Selection
from smes.stages import Stages


class EarlyChoice(nn.Module):
    """Selections one after the other. How many instances were trained on is part of the model's state.

    Args:
        stages: Of each selection; they differ in ``num_group`` only.
        until: How many instances each but the last serves.
        weights_T: As for :class:`smes.routing.Selection`.
    """

    seen: Tensor

    def __init__(self, stages: Sequence[Stages], until: Sequence[int], weights_T: Tensor) -> None:
        super().__init__()
        assert len(until) == len(stages) - 1, "the last one has no end"
        self._until = tuple(until)
        self._selections = nn.ModuleList(Selection(one, weights_T) for one in stages)
        self.register_buffer("seen", torch.tensor(0), persistent=bool(until))
        self._seen = 0  # the same number, beside the tensor: a GPU would have to be waited for

    @property
    def now(self) -> Selection:
        """The selection of this moment."""
        selection = self._selections[sum(self._seen >= end for end in self._until)]
        assert isinstance(selection, Selection), "that is all there are"
        return selection

    @property
    def at_last(self) -> Selection:
        """The selection that all ends with."""
        selection = self._selections[-1]
        assert isinstance(selection, Selection), "that is all there are"
        return selection

    def forward(self, z_BTC: Tensor) -> Routing:
        """The routing by float32 logits, as of this moment."""
        routing: Routing = self.now(z_BTC)
        return routing

    def observe(self, instances: int) -> None:
        """So many more instances were trained on."""
        self._seen += instances
        self.seen += instances

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._seen = int(self.seen)


def halved(early: int, last: int, until: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(experts of each selection, instances until which each but the last serves).

    ``early`` up to ``until`` instances, half of it up to twice as many, and so on down to ``last``.

    >>> halved(16, 4, 1000)
    ((16, 8, 4), (1000, 2000))
    >>> halved(0, 4, 1000)
    ((4,), ())
    """
    chosen = []
    while early > last:
        chosen.append(early)
        early //= 2
    return (*chosen, last), tuple(until << n for n in range(len(chosen)))
