"""Configuration of the join that writes its examples to a topic."""

from dataclasses import dataclass
from pathlib import Path

from smes.ranges import PositiveInt, Seconds, check_ranges


@dataclass(frozen=True)
class ExamplesConfig:
    """How ``smes join`` writes joined examples.

    Attributes:
        directory: Folder of its checkpoints, which no trainer uses. Needed by ``smes join``.
        checkpoint_interval_s: Seconds between two of them: a join that was killed reads so much again.
        keep: How many are kept.
        max_wait_s: Longest time that an example waits for others before it is written, wall clock, seconds.
        rows_per_record: Most examples of a record.
    """

    directory: Path | None = None
    checkpoint_interval_s: Seconds = 10.0
    keep: PositiveInt = 2
    max_wait_s: Seconds = 0.2
    rows_per_record: PositiveInt = 2_048

    def __post_init__(self) -> None:
        check_ranges(self)
