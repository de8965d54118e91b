"""What a training step gives back. Letters: B instances, T tasks, E experts."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class StepResult:
    """Results of a step. The tensors are on the training device, and a GPU may still be computing them.

    Of several ranks, each has the scores and the figures of its own instances; ``finite`` is of all of them.

    Attributes:
        scores: float32 [B, T], computed before the step changed the weights: probabilities of binary tasks, values in
            the label's unit of regression tasks.
        active_experts: int64 [B], number of experts executed for each instance; None for a ranker without experts.
        expert_load: int64 [T, E], number of instances that each task sent to each expert; None for a ranker without
            experts.
        finite: bool scalar, whether loss and gradients were finite.
    """

    scores: Tensor
    active_experts: Tensor | None
    expert_load: Tensor | None
    finite: Tensor

    @property
    def taken(self) -> bool:
        """Whether the step was taken. If not, nothing has changed, and the scores may not be finite.

        On a GPU this waits until the step has ended: ask one step later.
        """
        return bool(self.finite)
