"""The seam through which a diagnostic sees a training step from inside.

Letters: B instances, T tasks, I input width, H width of a task's representation.
"""

from typing import Protocol

from smes.model.devices import RankBatch
from smes.model.rank_model import ModelOutput
from smes.rankers.ranker import Clusters


class StepWatcher(Protocol):
    """Watches the steps of a learner. It must change nothing that a step reads."""

    def before_backward(self, output: ModelOutput) -> None:
        """Called with the forward pass of each batch, before its gradients are computed."""
        ...

    def after_backward(self, output: ModelOutput, batch: RankBatch) -> None:
        """Called when the gradients are there and the weights still are what they were; not for a step not taken."""
        ...

    def regroup(self, groups: Clusters) -> None:
        """Called when the learner has found task groups, after the step."""
        ...
