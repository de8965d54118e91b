"""The publish gate's part in the training loop: when it is asked, what it compares with, and what follows a refusal."""

import logging
import math
import time
from collections.abc import Callable
from typing import Literal, Protocol

import numpy as np

from smes.arrays import Arrays
from trainer.cuts import Cut
from trainer.gate import PublishGate
from trainer.gate_verdicts import Reference

_logger = logging.getLogger(__name__)

Outcome = Literal["publish", "hold", "skip", "go_back"]


class GoesBack(Reference, Protocol):
    """A reference that the learner can go back to."""

    def go_back(self) -> None:
        """Put the learner's state back as it was; its step number stays."""


class Promotions(Protocol):
    """Says whether somebody put a cut into service that was held. :class:`trainer.publisher.Publisher` does."""

    promoted: bool

    def look_for_promoted(self) -> None:
        """Begin to find out."""


class GatedCuts:
    """Asks the gate once for each step that is to be cut.

    Attributes:
        gate: The gate; it observes the training.

    Args:
        gate: As above.
        reference: Makes a reference of the present weights.
        keep: Makes one that the learner can go back to; used if the gate is to go back.
        monotonic_s: Clock of ``held_interval_s``, seconds.
    """

    def __init__(
        self,
        gate: PublishGate,
        *,
        reference: Callable[[], Reference],
        keep: Callable[[], GoesBack],
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.gate = gate
        self._reference: Callable[[], Reference] = keep if gate.config.then == "go_back" else reference
        self._monotonic_s = monotonic_s
        self._held_s = -math.inf
        self._judged_step = -1

    def judge(self, step: int, promotions: Promotions) -> Outcome:
        """What is to be done with the weights of a step, whose results were all delivered.

        ``skip`` stands for nothing, because these weights were refused before, or the last one that was held was a
        short while ago.
        """
        gate = self.gate
        promoted = gate.refuses and promotions.promoted
        promotions.promoted = False
        if step == self._judged_step and gate.refuses and not promoted:
            promotions.look_for_promoted()
            return "skip"
        self._judged_step = step
        if promoted:
            gate.accept_stream("a cut that was refused was promoted")
        verdict = gate.judge(promoted=promoted)
        if verdict.passed:
            return "publish"
        promotions.look_for_promoted()
        return "go_back" if verdict.go_back else self._held_or_skipped()

    def _held_or_skipped(self) -> Outcome:
        now_s = self._monotonic_s()
        if now_s - self._held_s < self.gate.config.held_interval_s:
            return "skip"
        self._held_s = now_s
        return "hold"

    def refuses_weights(self, cut: Cut) -> bool:
        """Whether a cut that passed is refused after all, because a weight of it is not finite."""
        arrays: Arrays = {name: tensor.numpy() for name, tensor in cut.dense.items()}
        for delta in cut.deltas:
            arrays |= {f"table.{name}": column for name, column in delta.columns.items()}
        for name, array in arrays.items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                self.gate.refuse_weights(name)
                return True
        return False

    def published(self, step: int) -> None:
        """The present weights go out: compare with them from now on."""
        self.gate.published(self._reference(), step)

    def go_back(self, step: int) -> None:
        """Put the learner back to the last cut that passed; ``step`` is the present step number, which stays."""
        gate, before = self.gate, self.gate.reference
        assert before is not None, "a gate that goes back has a reference"
        gate.score_rest()
        before.go_back()  # type: ignore[attr-defined]  # ``keep`` made it
        gate.went_back(self._reference(), step)
        back = gate.backs[-1]
        _logger.error(
            "the weights of step %d go back to those of step %d: %s; reading goes on where it is",
            back.at_step,
            back.to_step,
            back.reason,
        )

    @property
    def postpones_checkpoints(self) -> bool:
        """Whether a checkpoint is to wait: cuts are refused, and it is not an alarm yet."""
        return 0 < self.gate.in_a_row < self.gate.config.max_refusals
