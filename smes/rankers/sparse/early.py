"""More experts for each task group while the stream is young.

Letters: B instances, R routers, C columns of a router's logits.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smes.rankers.sparse.config import SmesConfig
from smes.rankers.sparse.routing import Routing, Selection
from smes.rankers.sparse.stages import Stages


class EarlyChoice(nn.Module):
    """Selections that replace each other as the stream goes on.

    The number of instances trained on decides which one is current. It is part of the model's state.

    Args:
        stages: The stages of each selection; they differ in ``num_group`` only.
        until: For each selection but the last: it ends after this many instances.
        weights_R: As for :class:`smes.rankers.sparse.routing.Selection`.
    """

    seen: Tensor

    def __init__(self, stages: Sequence[Stages], until: Sequence[int], weights_R: Tensor) -> None:
        super().__init__()
        assert len(until) == len(stages) - 1, "the last selection has no end"
        self._until = tuple(until)
        self._selections = nn.ModuleList(Selection(one, weights_R) for one in stages)
        self.register_buffer("seen", torch.tensor(0), persistent=bool(until))
        self._seen = 0  # the same number beside the tensor: reading the tensor would wait for a GPU

    @property
    def current(self) -> Selection:
        """The selection in force now."""
        return self._selection(sum(self._seen >= end for end in self._until))

    @property
    def final(self) -> Selection:
        """The selection in force once the stream is no longer young."""
        return self._selection(-1)

    def forward(self, z_BRC: Tensor) -> Routing:
        """The current routing by float32 logits."""
        routing: Routing = self.current(z_BRC)
        return routing

    def observe(self, instances: int) -> None:
        """Count instances that were trained on."""
        self._seen += instances
        self.seen += instances

    def _selection(self, index: int) -> Selection:
        selection = self._selections[index]
        assert isinstance(selection, Selection), "the list has nothing else"
        return selection

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._seen = int(self.seen)


def early_stages(config: SmesConfig, group_R: tuple[int, ...]) -> tuple[list[Stages], tuple[int, ...]]:
    """The arguments ``stages`` and ``until`` of :class:`EarlyChoice`, those with the most experts first.

    Args:
        config: Shape of the ranker.
        group_R: The group of each router.

    Raises:
        ValueError: The numbers of experts do not fit this many groups, or ``early.num_group`` is more than a group can
            choose from.
    """
    early = config.early
    pool_size = config.stages(group_R).pool_size
    if early.num_group > pool_size:
        wanted = f"expected at most the experts that a group chooses from ({pool_size})"
        raise ValueError(f"SmesConfig.early.num_group: {early.num_group}, {wanted}")
    counts, until = halved(early.num_group, config.num_group, early.until)
    try:
        return [config.stages(group_R, count) for count in counts], until
    except ValueError as error:  # the later num_group fits: config.stages accepted it above
        message = f"expected a number that fits the other keys ({error})"
        raise ValueError(f"SmesConfig.early.num_group: {early.num_group}, {message}") from error


def halved(early: int, last: int, until: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Halve a number of experts, each for twice as many instances as the one before, down to ``last``.

    Returns:
        The number of experts of each selection, and after how many instances each but the last ends.

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
