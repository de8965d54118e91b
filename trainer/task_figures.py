"""What a report says of the tasks: figures of each, and a headline of two lines, dense tasks and rare ones.

Imports no torch: the demo's own process reads reports without it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

RARE_BELOW = 0.01
"""A binary task is rare where its base rate in what was scored is lower, else dense."""


@dataclass(frozen=True, slots=True)
class TaskFigures:
    """Progressive metrics of one task; see :class:`trainer.evaluation.TaskMetrics`.

    ``base_rate``, ``auc``, ``gauc_windowed``, ``ne``, ``calibration`` and ``ece`` are for binary tasks; ``xauc``,
    ``mae`` and ``mean_bias`` for regression tasks. ``base_rate`` is the share of positives among the labelled examples
    that were scored, 0 … 1; None without any.
    """

    positives: int
    base_rate: float | None
    auc: float | None
    gauc_windowed: float | None
    ne: float | None
    calibration: float | None
    ece: float | None
    xauc: float | None
    mae: float | None
    mean_bias: float | None


@dataclass(frozen=True, slots=True)
class HeadlineFigures:
    """Means over some binary tasks, each counting the same.

    Attributes:
        tasks: Their names.
        auc, ne: None where one of the tasks has none, because an example was not scored.
        gauc_windowed: Over those of the tasks that have one: a rare task may have no group with both classes. None
            where none has, and where ``auc`` is None.
    """

    tasks: tuple[str, ...]
    auc: float | None
    gauc_windowed: float | None
    ne: float | None


@dataclass(frozen=True, slots=True)
class Headline:
    """The binary tasks with both classes, by their base rate; None where there is no such task.

    Attributes:
        dense: Those with a base rate of at least :data:`RARE_BELOW`.
        rare: The others.
    """

    dense: HeadlineFigures | None
    rare: HeadlineFigures | None


def headline(tasks: Mapping[str, TaskFigures]) -> Headline:
    """The two lines of some tasks, by name."""
    both_classes = {name: task for name, task in tasks.items() if task.base_rate is not None and 0 < task.base_rate < 1}
    rare = {name: task for name, task in both_classes.items() if (task.base_rate or 0) < RARE_BELOW}
    dense = {name: task for name, task in both_classes.items() if name not in rare}
    return Headline(_means(dense), _means(rare))


def _means(tasks: Mapping[str, TaskFigures]) -> HeadlineFigures | None:
    if not tasks:
        return None
    auc = _mean(task.auc for task in tasks.values())
    groups = [task.gauc_windowed for task in tasks.values() if task.gauc_windowed is not None]
    return HeadlineFigures(
        tasks=tuple(tasks),
        auc=auc,
        gauc_windowed=None if auc is None else _mean(groups),
        ne=_mean(task.ne for task in tasks.values()),
    )


def _mean(values: Iterable[float | None]) -> float | None:
    """None of nothing, and where a value is None."""
    defined: list[float] = []
    for value in values:
        if value is None:
            return None
        defined.append(value)
    return sum(defined) / len(defined) if defined else None
