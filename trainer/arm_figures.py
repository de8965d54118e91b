"""What a report says of the scorer's arms. Imports no torch: the demo's own process reads reports without it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ArmFigure:
    """A figure with its 95 % interval, and by how much it is above the main arm's; None where undefined.

    Attributes:
        value, low, high: The figure; bounds of its interval.
        over_main, over_main_low, over_main_high: The same of the difference to the main arm; None for the main arm.
    """

    value: float | None
    low: float | None
    high: float | None
    over_main: float | None = None
    over_main_low: float | None = None
    over_main_high: float | None = None


@dataclass(frozen=True, slots=True)
class ArmTaskFigures:
    """One task of one arm, over the final labels of the impressions that the arm served.

    Attributes:
        examples: Impressions with a label of the task.
        scored: How many of them carry the score that they were served with. AUC, NE, calibration and error are of
            these.
        positives: How many of the examples have a positive label (regression: above 0).
        mean_label: For a binary task the base rate: the figure that an arm is there to raise.
        auc, ne: As in :class:`smes.metrics.BinaryReport`; binary tasks only.
        calibration: Mean score divided by mean label of the scored.
        mae: Mean absolute error in the label's unit; regression tasks only.
    """

    examples: int
    scored: int
    positives: int
    mean_label: ArmFigure
    auc: ArmFigure | None
    ne: ArmFigure | None
    calibration: ArmFigure
    mae: ArmFigure | None


@dataclass(frozen=True, slots=True)
class ArmFigures:
    """One arm.

    Attributes:
        impressions: Impressions that it served and whose labels are final.
        tasks: Task name → figures.
    """

    impressions: int
    tasks: dict[str, ArmTaskFigures]
