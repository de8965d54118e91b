"""Steps whose loss or gradients are not finite: their examples are dead-lettered and counted, and many in a row stop.

Such a step changes nothing (:class:`smes.model.step_result.StepResult`), so the weights stay good.
"""

import logging
from collections.abc import Callable, Sequence

import msgspec

from smes.errors import SmesError, StepsNotFinite
from smes.events import ExampleBlock
from stream.dead_letters import DeadLetter
from stream.topics import IMPRESSIONS
from trainer.observers import Observer, StepFigures

_logger = logging.getLogger(__name__)
_NAMED = 5  # impression ids in a message

DEFAULT_MAX_FAILED_STEPS = 5


class FailedSteps(Observer):
    """Counts failed steps.

    Attributes:
        in_a_row: Failed steps since the last one that was taken.

    Args:
        most: So many in a row stop the trainer.
        forget: Called with each failed batch, which was counted as trained on when its step began.
        write: Where dead letters go; None writes none.
    """

    def __init__(
        self,
        most: int,
        forget: Callable[[ExampleBlock], None],
        write: Callable[[Sequence[DeadLetter]], None] | None,
    ) -> None:
        self._most, self._forget, self._write = most, forget, write
        self.in_a_row = 0

    def after_step(self, examples: ExampleBlock, figures: StepFigures) -> None:
        """A step was taken: start counting anew."""
        self.in_a_row = 0

    def after_failed_step(self, examples: ExampleBlock) -> None:
        """Count the batch and set its examples aside.

        Raises:
            StepsNotFinite: So many steps in a row failed that going on is of no use. Of several ranks, all raise it at
                one step, whatever became of a rank's dead letters.
            SmesError: The dead letters could not be written.
        """
        self._forget(examples)
        self.in_a_row += 1
        named = ", ".join(map(str, examples.impression_id[:_NAMED].tolist()))
        more = f" and {len(examples) - _NAMED} more" if len(examples) > _NAMED else ""
        _logger.warning(
            "a step was not taken: its loss or gradients are not finite, expected finite ones; its %d examples "
            "(impressions %s%s) are dead-lettered",
            len(examples),
            named,
            more,
        )
        failure: SmesError | None = None
        if self._write is not None and len(examples):
            try:
                self._write(letters(examples))
            except SmesError as error:
                _logger.error("the dead letters of %d examples were not written: %s", len(examples), error)
                failure = error
        if self.in_a_row == self._most:  # once: what was in flight is still counted after it
            raise StepsNotFinite(
                f"loss or gradients of {self.in_a_row} steps in a row: not finite (last: impressions {named}{more}), "
                f"expected finite ones; the weights and the last checkpoint are those before these steps. Look at the "
                f"dead letters with code not_finite, lower optimizer.learning_rate, or raise trainer.max_failed_steps"
            ) from failure
        if failure is not None:
            raise failure


def letters(examples: ExampleBlock) -> list[DeadLetter]:
    """A dead letter for every example of a batch; the payload is what the model was given.

    An example knows no offset: its ``place`` names the impression.
    """
    return [
        DeadLetter(
            topic=IMPRESSIONS,
            partition=int(examples.partition[i]),
            offset=-1,
            row=None,
            code="not_finite",
            reason="training step: loss or gradients of this example's batch are not finite, expected finite ones",
            field=None,
            payload=_payload(examples, i),
            place=f"impression {int(examples.impression_id[i])}",
        )
        for i in range(len(examples))
    ]


def _payload(examples: ExampleBlock, i: int) -> bytes:
    """One example as JSON. Numbers that JSON does not have are null."""
    return msgspec.json.encode(
        {
            "impression_id": int(examples.impression_id[i]),
            "event_time_ms": int(examples.event_time_ms[i]),
            "ids": examples.ids[i].tolist(),
            "numerics": examples.numerics[i].tolist(),
            "labels": examples.labels[i].tolist(),
            "label_mask": examples.label_mask[i].tolist(),
            "weight": float(examples.weight[i]),
        }
    )
