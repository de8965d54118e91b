"""Learning curves for a page: few enough points to draw, of as many stretches as there are.

Stretches are put together in groups of equal number. What a point then says:

- GAUC is the mean by ranked impressions, as that of the whole run is. Base rate, calibration, normalised entropy, mean
  absolute error and mean bias are those of the group's examples together, but for stretches that have none: one
  without a positive has no calibration and no entropy.
- AUC is the share of ordered pairs of a positive and a negative of the same stretch. ECE and XAUC are means by
  examples.

Letters: N lines, P points, T tasks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from smes.arrays import F64, I64, Bool
from smes_console.history_lines import FIGURES, Line, figures_of

Axis = Literal["event_time", "wall_time", "impressions"]

_COLUMN = {figure: m for m, figure in enumerate(FIGURES)}
_GAP = 20.0  # times the usual distance of two lines is a gap
_LONGEST_PART = 4096
_ENOUGH_POSITIVES, _FEWEST_POINTS = 50, 8


@dataclass(frozen=True, slots=True)
class Parts:
    """Which lines make which points.

    Attributes:
        lines: N of them, those that the axis can place.
        starts: int64 [P], the first line of each point.
        x: float64 [P], the position of its last line.
        places: float64 [N], those of the lines.
        interrupted: bool [P], whether something is missing before it.
        stretches_a_point: Lines of a full point.
    """

    lines: list[Line]
    starts: I64
    x: F64
    places: F64
    interrupted: Bool
    stretches_a_point: int

    def listed_x(self) -> list[float]:
        """The positions; where something is missing one stands between, whose value is None."""
        return _with_gaps(self.x, self, between=True)

    def breaks(self) -> list[int]:
        """Where in the lists something is missing; elsewhere None only says that a stretch has no such figure."""
        at = np.flatnonzero(self.interrupted).tolist()
        return [each + before for before, each in enumerate(at)]

    def listed(self, values: F64) -> list[float | None]:
        """A figure of the points; None where there is none, and where something is missing."""
        return [None if value is None or value != value else round(value, 6) for value in _with_gaps(values, self)]

    def ends(self) -> list[Line]:
        """The last line of each point."""
        after = np.append(self.starts[1:], len(self.lines)) if len(self.starts) else self.starts
        return [self.lines[n - 1] for n in after.tolist()]

    @property
    def newest(self) -> int:
        """Stretches behind the last point: as many as a full one, and those that make none yet."""
        return len(self.lines) - int(self.starts[-1]) if len(self.starts) else 0

    def gaps(self) -> list[dict[str, Any]]:
        """Where stretches are missing: ``x`` of the first one after, and how many (0: only time has passed)."""
        stops = np.flatnonzero(self.interrupted).tolist()
        found = []
        for stop in stops:
            n = int(self.starts[stop])
            missing = self.lines[n].stretch - self.lines[n - 1].stretch - 1
            found.append({"x": float(self.places[n]), "missing": max(0, missing)})
        return found

    def lineage_changes(self) -> list[dict[str, Any]]:
        """Where the lineage changed: ``x``, and the new ``lineage``."""
        return [
            {"x": float(self.places[n]), "lineage": line.lineage}
            for n, (before, line) in enumerate(pairwise(self.lines), start=1)
            if line.lineage != before.lineage
        ]


def enough(lines: Sequence[Line], task: str) -> int:
    """How many stretches a point of a task needs, a power of two: some fifty positives, and eight points at least."""
    positives = float(np.nan_to_num(figures_of(lines, task)[:, _COLUMN["positives"]]).sum())
    together = 1
    while together * 2 * _FEWEST_POINTS <= len(lines) and positives * together < _ENOUGH_POSITIVES * len(lines):
        together *= 2
    return together


def positions_of(lines: Sequence[Line], axis: Axis) -> F64:
    """Where lines stand: float64 [N], never going back; NaN where a line has no such time."""
    places = [_place(line, axis) for line in lines]
    x = np.array([np.nan if place is None else float(place) for place in places], np.float64)
    known = np.isfinite(x)
    x[known] = np.maximum.accumulate(x[known])
    return x


def _place(line: Line, axis: Axis) -> int | None:
    if axis == "event_time":
        return line.event_time_ms
    return line.trained if axis == "impressions" else line.wall_ms or None


def parts_of(
    lines: Sequence[Line], axis: Axis, most: int, within: tuple[float, float] | None = None, at_least: int = 1
) -> Parts:
    """Put lines of one run together into points.

    Args:
        lines: Oldest first.
        axis: What x is.
        most: Points at most, about; where many parts are missing there are more.
        within: Only the lines of this range of x, and on each side those up to one in which a window closed: to there
            every metric has a value.
        at_least: Lines that a point is made of at least.
    """
    x = positions_of(lines, axis)
    placed = np.flatnonzero(np.isfinite(x))
    if within is not None and len(placed):
        low = int(np.searchsorted(x[placed], within[0], "left"))
        high = int(np.searchsorted(x[placed], within[1], "right"))
        has_window = [n for n, at in enumerate(placed.tolist()) if lines[at].windows]
        low = max((n for n in has_window if n < low), default=low - 1)
        high = min((n + 1 for n in has_window if n >= high), default=high + 1)
        placed = placed[max(0, low) : high]
    chosen, x = [lines[n] for n in placed.tolist()], x[placed]
    together = at_least
    while together < _LONGEST_PART and len(chosen) > most * together:
        together *= 2
    # Groups are counted by the numbers of the stretches, so that they stay the same while the run goes on.
    group = np.array([line.stretch for line in chosen], np.int64) // together
    gap = _gaps(chosen, x)
    is_start = np.ones(len(chosen), np.bool_)
    if len(chosen):
        is_start[1:] = (group[1:] != group[:-1]) | gap[1:]
    starts = np.flatnonzero(is_start)
    if len(starts) > 1 and len(chosen) - starts[-1] < together and not gap[starts[-1]]:
        starts = starts[:-1]  # what is not a full point yet counts with the one before
    ends = np.append(starts[1:], len(chosen)) - 1 if len(starts) else starts
    return Parts(chosen, starts, x[ends], x, gap[starts], together)


def _gaps(lines: Sequence[Line], x: F64) -> Bool:
    """Whether stretches are missing before a line, or it comes much later than usual: bool [N]."""
    gap = np.zeros(len(lines), np.bool_)
    if len(lines) > 1:
        number = np.array([line.stretch for line in lines], np.int64)
        gap[1:] = np.diff(number) != 1
        distance = np.diff(x)
        usual = float(np.median(distance[distance > 0])) if (distance > 0).any() else 0.0
        if len(lines) > 8 and usual > 0:
            gap[1:] |= distance > _GAP * usual
    return gap


def curve_of(parts: Parts, figure: str, task: str) -> list[float | None] | None:
    """A figure of a task at each point, as :meth:`Parts.listed`; None if no line has it.

    Args:
        parts: See :func:`parts_of`.
        figure: One of ``history_lines.FIGURES`` that is no count.
        task: Its name.
    """
    values = together(figures_of(parts.lines, task), figure, parts.starts)
    return parts.listed(values) if np.isfinite(values).any() else None


def _with_gaps(values: NDArray[Any], parts: Parts, *, between: bool = False) -> list[Any]:
    """The values as a list, with another one before each part that follows a gap: None, or the middle."""
    listed: list[Any] = []
    for value, interrupted in zip(values.tolist(), parts.interrupted.tolist(), strict=True):
        if interrupted and listed:
            listed.append((listed[-1] + value) / 2 if between else None)
        listed.append(value)
    return listed


def counts_of(parts: Parts, task: str) -> tuple[F64, F64]:
    """Examples and positives of a task behind each point: float64 [P] and [P]."""
    figures_NM = np.nan_to_num(figures_of(parts.lines, task))
    if not len(parts.starts):
        return np.zeros(0), np.zeros(0)
    examples, positives = (
        np.add.reduceat(figures_NM[:, _COLUMN[name]], parts.starts) for name in ("examples", "positives")
    )
    return examples, positives


def together(figures_NM: F64, figure: str, starts: I64) -> F64:
    """A figure of groups of stretches of one task.

    Args:
        figures_NM: float64 [N, M], a task's figures, NaN where there is none.
        figure: Which one.
        starts: int64 [P], the first stretch of each group, growing from 0.

    Returns:
        float64 [P], NaN where no stretch of the group has it.
    """
    value = figures_NM[:, _COLUMN[figure]]
    if not len(starts):
        return np.zeros(0)
    examples, positives = (np.nan_to_num(figures_NM[:, _COLUMN[name]]) for name in ("examples", "positives"))
    if figure == "ne":
        return _normalised_entropy(value, examples, positives, starts)
    if figure == "gauc_windowed":
        weight = np.nan_to_num(figures_NM[:, _COLUMN["ranked"]])
    elif figure == "calibration":
        weight = positives
    elif figure == "auc":
        weight = positives * (examples - positives)
    else:
        weight = examples
    weight = np.where(np.isfinite(value), weight, 0.0)
    return _ratio(np.nan_to_num(value) * weight, weight, starts)


def _normalised_entropy(value: F64, examples: F64, positives: F64, starts: I64) -> F64:
    """Σ log loss / (examples · entropy of their base rate), of stretches that say the same of themselves."""
    known = np.isfinite(value)
    loss = np.where(known, np.nan_to_num(value) * examples * _entropy(positives, examples), 0.0)
    n, k = (np.add.reduceat(np.where(known, counts, 0.0), starts) for counts in (examples, positives))
    scale = n * _entropy(k, n)
    total = np.add.reduceat(loss, starts)
    return _divided(total, scale)


def _entropy(positives: F64, examples: F64) -> F64:
    rate = np.divide(positives, examples, out=np.zeros_like(positives), where=examples > 0)
    inside = (rate > 0) & (rate < 1)
    r = np.where(inside, rate, 0.5)
    entropy: F64 = np.where(inside, -(r * np.log(r) + (1 - r) * np.log(1 - r)), 0.0)
    return entropy


def _ratio(sums: F64, weights: F64, starts: I64) -> F64:
    total, weight = np.add.reduceat(sums, starts), np.add.reduceat(weights, starts)
    return _divided(total, weight)


def _divided(value: F64, by: F64) -> F64:
    """NaN where there is nothing to divide by."""
    quotient: F64 = np.divide(value, by, out=np.full(len(by), np.nan), where=by > 0)
    return quotient


def whole(lines: Sequence[Line], task: str, figure: str) -> float | None:
    """A figure of a task over all these lines; None where there is none."""
    if not lines:
        return None
    value = float(together(figures_of(lines, task), figure, np.zeros(1, np.int64))[0])
    return None if value != value else value
