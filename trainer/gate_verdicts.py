"""What the publish gate says of a cut, what it compares with, and where it is."""

from dataclasses import dataclass
from typing import Protocol

from smes.arrays import F32, I64, Arrays


class Reference(Protocol):
    """The weights of the last cut that passed."""

    def score(self, ids: I64, numerics: F32, now_ms: I64 | int | None = None) -> F32:
        """float32 [N, T]; see :meth:`smes.model.serving.ServingModel.score`."""

    def state(self) -> Arrays:
        """Arrays of which the same weights are made again; nothing writes to them any more."""

    def close(self) -> None:
        """Called when they are not needed any more."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the gate says of a cut.

    Attributes:
        passed: Whether it may be published.
        reason: Why not; empty if it may.
        go_back: Whether the trainer is to go back to the last cut that passed.
    """

    passed: bool
    reason: str = ""
    go_back: bool = False


@dataclass(frozen=True, slots=True)
class WentBack:
    """Weights went back to those of an earlier cut. What the steps in between learned is dropped, and not read again.

    Attributes:
        at_step: Step number when they did; steps are counted on from it.
        to_step: Step of the cut whose weights they are.
        reason: Why.
    """

    at_step: int
    to_step: int
    reason: str


@dataclass(slots=True)
class Marks:
    """Where the gate is: numbers, in the order in which a checkpoint has them.

    Attributes:
        suspect_from: Sampled example from which on the stream is judged: the first after the last suspicion.
        compared_from: Sampled example from which on the candidate is compared with the version in service.
        trusted_until: The stream's history has taken in the sampled examples up to this one.
        looked_at: Up to this sampled example the stream was judged.
        needed: So many sampled examples must be in order before a suspect stream is trusted again.
        suspect_since_ms: Event time at which the present suspicion began.
        event_time_ms: Newest event time.
        is_open: 1: there was no refusal and no suspicion since the last cut that passed; else 0.
        learned_suspect: 1: the weights learned from a suspect stretch; else 0.
        not_finite: Examples since the last judgement whose scores are not finite.
        passed, refused: Cuts so far.
        in_a_row: Cuts refused since one passed, or since the weights went back.
        alarms: So often as many were refused in a row as are an alarm.
        reference_step: Step of the version in service.
    """

    suspect_from: int = 0
    compared_from: int = 0
    trusted_until: int = 0
    looked_at: int = 0
    needed: int = 0
    suspect_since_ms: int = 0
    event_time_ms: int = 0
    is_open: int = 1
    learned_suspect: int = 0
    not_finite: int = 0
    passed: int = 0
    refused: int = 0
    in_a_row: int = 0
    alarms: int = 0
    reference_step: int = 0
