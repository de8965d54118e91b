"""What the publish gate can hold against a candidate.

Imports no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

NOT_FINITE, CALIBRATION, BASE_RATE, LOSS, AUC, TOO_FEW = (
    "not_finite",
    "calibration",
    "base_rate",
    "loss",
    "auc",
    "too_few",
)
STREAM_CALIBRATION, STREAM_RANKING, STREAM_BASE_RATE = "stream_calibration", "stream_ranking", "stream_base_rate"
STREAM_LABELS = (STREAM_CALIBRATION, STREAM_RANKING, STREAM_BASE_RATE)
STREAM_USER, STREAM_INPUTS, STREAM_IMPLAUSIBLE = "stream_user", "stream_inputs", "stream_implausible"
LEARNED = "learned_suspect"

_LONGEST = 280  # characters of a reason
_NAMED = 3  # findings in it


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that speaks against a candidate.

    Attributes:
        code: One of the names above; those that begin with ``stream`` speak against the stream that it learned from.
        where: The task, or another place; empty for none.
        text: What came and what was expected.
        examples: Length of the stretch that showed it, sampled examples.
    """

    code: str
    where: str
    text: str
    examples: int = 0

    def __str__(self) -> str:
        return f"{self.code}{f' ({self.where})' if self.where else ''}: {self.text}"


def reason_of(findings: Sequence[Finding]) -> str:
    """One line of bounded length, with each thing once: as the shortest stretch shows it, which comes first."""
    findings = list({(finding.code, finding.where): finding for finding in reversed(findings)}.values())[::-1]
    named = "; ".join(map(str, findings[:_NAMED]))
    more = f"; and {len(findings) - _NAMED} more" if len(findings) > _NAMED else ""
    return named if len(named + more) <= _LONGEST and not more else f"{named[: _LONGEST - len(more)]}{more}"
