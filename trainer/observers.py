"""Observers watch the training: they see each batch before the step on it, and what the step found out after it.

Letters: B instances of a batch, T tasks, E experts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from smes.arrays import F32, I64
from smes.events import ExampleBlock
from smes.model.devices import RankBatch
from smes.model.learner import Learner
from smes.model.step_result import StepResult


@dataclass(frozen=True, slots=True)
class StepFigures:
    """What a step found out, on the host.

    Attributes:
        scores: float32 [B, T], by the weights before the step: probabilities, or values in the label's unit.
        active_experts: int64 [B], experts executed for each instance; None for a ranker without experts.
        expert_load: int64 [T, E], instances that each task sent to each expert; None for a ranker without experts.
        taken: False if the loss or the gradients were not finite: then the step changed nothing.
    """

    scores: F32
    active_experts: I64 | None = None
    expert_load: I64 | None = None
    taken: bool = True


def fetch(result: StepResult) -> StepFigures:
    """Copy a step's result to the host; on a GPU this waits until the step has ended."""
    active_B, load_TE = result.active_experts, result.expert_load
    return StepFigures(
        scores=result.scores.cpu().numpy(),
        active_experts=None if active_B is None else active_B.cpu().numpy(),
        expert_load=None if load_TE is None else load_TE.cpu().numpy(),
        taken=result.taken,
    )


class Observer:
    """Watches the training. A subclass overrides the methods that it needs; the others do nothing."""

    def before_step(self, examples: ExampleBlock) -> None:
        """Called with each batch before the weights change on it: with the examples to train on."""

    def after_step(self, examples: ExampleBlock, figures: StepFigures) -> None:
        """Called with each batch and its step's figures, in order, but possibly after the next step has started."""

    def after_failed_step(self, examples: ExampleBlock) -> None:
        """Called instead of :meth:`after_step` if the step's loss or gradients were not finite: it changed nothing."""

    def after_closing(self, examples: ExampleBlock) -> None:
        """Called with the examples of kind ``CLOSING``, after every step on their impressions."""

    def after_read(self) -> None:
        """Called after each read of the stream, whether or not it returned events."""


class DelayedResults:
    """Keeps a step's result until the next step has started, then gives it to the observers.

    Fetching a result from a GPU waits for its step. One step later that wait overlaps with the step just started.

    Args:
        observers: Who gets the results; the caller may add to it.
    """

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = observers
        self._kept: tuple[ExampleBlock, StepResult | None, ExampleBlock] | None = None

    def keep(self, examples: ExampleBlock, result: StepResult | None, closings: ExampleBlock) -> None:
        """Keep the result of the step just started, and deliver the one kept before.

        Args:
            examples: The examples trained on.
            result: None if there were none.
            closings: The examples of kind ``CLOSING`` that came with them.
        """
        self.deliver()
        self._kept = examples, result, closings

    def deliver(self) -> None:
        """Give the observers the result that is kept, if any."""
        if self._kept is None:
            return
        (examples, result, closings), self._kept = self._kept, None
        tell(self._observers, examples, None if result is None else fetch(result), closings)


def tell(
    observers: Sequence[Observer], examples: ExampleBlock, figures: StepFigures | None, closings: ExampleBlock
) -> None:
    """Give observers what a step found out, None where there was no step, and final labels that came with it."""
    for observer in observers:
        if figures is not None and figures.taken:
            observer.after_step(examples, figures)
        elif figures is not None:
            observer.after_failed_step(examples)
        if len(closings):
            observer.after_closing(closings)


class BatchSender:
    """Sends batches to the training device, the next one while a step runs there.

    Args:
        learner: Prepares the batches.
        ahead: Whether to send the next batch ahead.
        first: Called with examples before their new ids get rows.
    """

    def __init__(
        self, learner: Learner, *, ahead: bool, first: Callable[[ExampleBlock], None] = lambda examples: None
    ) -> None:
        self._learner, self._ahead, self._first = learner, ahead, first
        self._sent: tuple[ExampleBlock, RankBatch] | None = None

    def take(self, examples: ExampleBlock, to_train_on: ExampleBlock) -> RankBatch:
        """The batch on the device: the one sent ahead if it is of these examples, else prepared now.

        Args:
            examples: The batch as it came from the stream.
            to_train_on: Those of its examples to train on.
        """
        sent, self._sent = self._sent, None
        if sent is not None and sent[0] is examples:
            return sent[1]
        return self._prepared(to_train_on)

    def forget(self) -> None:
        """Forget what was sent ahead: the table has other rows now."""
        self._sent = None

    def send_ahead(self, upcoming: ExampleBlock | None) -> None:
        """Prepare the upcoming batch while the device is busy with a step.

        A cut or checkpoint taken before its step already has rows for its new ids. Those rows are untrained, and after
        a restart the same ids get the same rows.
        """
        to_train_on = upcoming.to_train_on() if self._ahead and upcoming is not None else None
        if upcoming is not None and to_train_on:
            self._sent = upcoming, self._prepared(to_train_on)

    def _prepared(self, examples: ExampleBlock) -> RankBatch:
        self._first(examples)
        return self._learner.prepare(examples)
