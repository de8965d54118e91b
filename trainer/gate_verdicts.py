"""What the publish gate says of a cut, what it compares with, and where it is."""

from dataclasses import dataclass
from typing import Protocol

from smes.arrays import F32, I64, Arrays


class Reference(Protocol):
    """The weights of the last cut that passed."""

    def score(self, ids: I64, numerics: F32) -> F32:
        """int64 [N, W], float32 [N, F] → float32 [N, T]."""

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
    """Where the gate is. Numbers of examples are those of the sample."""

    suspect_from: int = 0  # judged by what came after
    compared_from: int = 0  # candidate and version in service, likewise
    trusted_until: int = 0  # what the history has taken in
    looked_at: int = 0
    needed: int = 0  # examples in order, before a suspect stream is trusted again
    suspect_since_ms: int = 0
    event_time_ms: int = 0
    is_open: int = 1  # no refusal and no suspicion since the last cut that passed
    learned_suspect: int = 0
    not_finite: int = 0
    passed: int = 0
    refused: int = 0
    in_a_row: int = 0
    alarms: int = 0
    reference_step: int = 0
