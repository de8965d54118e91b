"""Results of the steps of several ranks: each rank's own observers hear of its examples, rank 0's of those of all.

Letters: B instances of a rank's batch, T tasks, E experts.
"""

from collections.abc import Callable, Sequence

import numpy as np

from smes.arrays import Arrays, prefixed, under
from smes.errors import SmesError, StepsNotFinite
from smes.events import ExampleBlock
from smes.world import World
from trainer.observers import DelayedResults, Observer, StepFigures, fetch, tell
from trainer.rank_messages import joined, pack, slim, unpack


class RankResults(DelayedResults):
    """Keeps a step's result until the next step has started, then gives it to the observers of all ranks.

    All ranks call :meth:`keep` and :meth:`deliver` at the same places of the same turns.

    Attributes:
        impressions: Impressions of the step whose result was kept last, of all ranks together; its user sets it.
        error: What an observer of this rank alone has met: the others do not know of it yet.

    Args:
        world: The ranks.
        own: Who gets the results of this rank's examples; the caller may add to it.
        shared: Who gets, on rank 0, the results of all ranks' examples, in the order of the ranks. These examples are
            without features, and of their ids they have the user's alone.
        failed: Called with the impressions of a step that was not taken, of all ranks together.
    """

    def __init__(
        self, world: World, own: Sequence[Observer], shared: Sequence[Observer], failed: Callable[[int], object]
    ) -> None:
        super().__init__(own)
        self._world, self._shared, self._failed = world, shared, failed
        self.impressions = 0
        self.error: SmesError | None = None

    def deliver(self) -> None:
        """Give the observers the result that is kept, if any."""
        if self._kept is None:
            return
        (examples, result, closings), self._kept = self._kept, None
        figures = None if result is None else fetch(result)
        if messages := self._world.collect(_packed(examples, figures, closings)):
            self._share(*_together([unpack(message) for message in messages], figures))
        if figures is not None and not figures.taken:
            self._failed(self.impressions)
        try:
            tell(self._observers, examples, figures, closings)
        except StepsNotFinite:  # on all ranks
            raise
        except SmesError as error:
            self.error = self.error or error

    def _share(self, examples: ExampleBlock, figures: StepFigures | None, closings: ExampleBlock) -> None:
        for observer in self._shared if figures is not None else ():
            observer.before_step(examples)
        tell(self._shared, examples, figures, closings)


def _packed(examples: ExampleBlock, figures: StepFigures | None, closings: ExampleBlock) -> bytes:
    arrays = prefixed("examples.", slim(examples)) | prefixed("closings.", slim(closings))
    if figures is not None:
        arrays["scores"] = figures.scores
        if figures.active_experts is not None and figures.expert_load is not None:
            arrays |= {"active": figures.active_experts, "load": figures.expert_load}
    return pack(arrays)


def _together(
    parts: Sequence[Arrays], own: StepFigures | None
) -> tuple[ExampleBlock, StepFigures | None, ExampleBlock]:
    """The examples, figures and closings of all ranks."""
    examples, closings = (joined([under(name, part) for part in parts]) for name in ("examples.", "closings."))
    if own is None:
        return examples, None, closings
    routes = "load" in parts[0]
    figures = StepFigures(
        scores=np.concatenate([part["scores"] for part in parts]),
        active_experts=np.concatenate([part["active"] for part in parts]) if routes else None,
        expert_load=sum((part["load"] for part in parts[1:]), parts[0]["load"]) if routes else None,
        taken=own.taken,
    )
    return examples, figures, closings
