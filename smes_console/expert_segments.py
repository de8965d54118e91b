"""The experts over time for a page: who uses which, in each segment of the stream.

Letters: T tasks, E experts, S segments.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from smes.arrays import F64
from smes_console.history_lines import Line

_ALL = 0.998  # of a task's uses, rounded: then no other expert has any


@dataclass(frozen=True, slots=True)
class ExpertSegment:
    """A part of the stream.

    Attributes:
        steps: From and to, counted as the version is.
        event_time_ms: Of its newest example, Unix milliseconds; None where it is not known.
        is_open: Whether it goes on.
        instances: Examples in it; None where that is not known.
        load_TE: How many of them each task sent to each expert; None where only shares are known.
        share_TE: float64, an expert's share of all uses of a task; NaN where it is not known.
        load_share_E: Its share of all uses of all tasks.
        load_skew: Largest over mean load of the experts that can be chosen.
        drift_T: 1 − Jaccard of a task's experts since the segment before; None where there is no such figure.
    """

    steps: tuple[int, int]
    event_time_ms: int | None
    is_open: bool
    instances: int | None
    load_TE: list[list[int]] | None
    share_TE: F64
    load_share_E: F64
    load_skew: float | None
    drift_T: list[float | None] | None

    def summary(self) -> dict[str, Any]:
        """Plain JSON values, without the map."""
        known = [value for value in self.drift_T or () if value is not None]
        return {
            "from": self.steps[0],
            "to": self.steps[1],
            "event_time_ms": self.event_time_ms,
            "is_open": self.is_open,
            "instances": self.instances,
            "dead": np.flatnonzero(self.load_share_E == 0).tolist(),
            "load_skew": self.load_skew,
            "drift": sum(known) / len(known) if known else None,
            "drift_of_tasks": self.drift_T,
            "load_share": self.load_share_E.round(6).tolist(),
        }

    def map(self) -> dict[str, Any]:
        """Plain JSON values: ``shares`` T × E, null where not known; ``load`` T × E, or null."""
        shares = [[None if x != x else x for x in row] for row in self.share_TE.round(6).tolist()]
        return {"from": self.steps[0], "to": self.steps[1], "shares": shares, "load": self.load_TE}


@dataclass(frozen=True, slots=True)
class ExpertHistory:
    """The segments of a run, oldest first, and what the newest one shares.

    Attributes:
        tasks: Names of the T tasks.
        num_experts: E; 0 for a ranker without experts.
        always_on: So many experts, the first ones, run for every instance; None where that is not known.
        pools: The others are so many equal pools; None likewise.
        segments: S of them.
        overlap_TT: Jaccard of two tasks' experts at the end of the newest segment that has ended; None before that.
    """

    tasks: list[str]
    num_experts: int
    always_on: int | None
    pools: int | None
    segments: list[ExpertSegment]
    overlap_TT: list[list[float]] | None

    def at(self, step: int | None) -> ExpertSegment | None:
        """The segment that has a step; None: the newest that has ended, or the open one if none has."""
        if step is not None:
            found = [each for each in self.segments if each.steps[0] <= step < each.steps[1]]
            if found:
                return found[0]
        ended = [each for each in self.segments if not each.is_open]
        return (ended or self.segments)[-1] if self.segments else None


def history_of_json(written: dict[str, Any]) -> ExpertHistory:
    """The history as a trainer says or leaves it, see :mod:`trainer.experts_over_time`.

    Raises:
        ValueError: It is not of that form.
    """
    try:
        drifts = written["drift"]
        segments = [
            _segment_of_json(each, drifts[n] if n < len(drifts) else None) for n, each in enumerate(written["segments"])
        ]
        return ExpertHistory(
            tasks=[str(name) for name in written["tasks"]],
            num_experts=int(written["num_experts"]),
            always_on=int(written["always_on"]),
            pools=int(written["pools"]),
            segments=segments,
            overlap_TT=written["shared"],
        )
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"experts: not as expected: {type(error).__name__}: {error}") from error


def _segment_of_json(value: dict[str, Any], drift_T: list[float | None] | None) -> ExpertSegment:
    load_TE = np.array(value["load"], np.float64)
    uses_T, uses_E = load_TE.sum(axis=1, keepdims=True), load_TE.sum(axis=0)
    first, end = value["steps"]
    return ExpertSegment(
        steps=(int(first), int(end)),
        event_time_ms=value["event_time_ms"],
        is_open=bool(value["open"]),
        instances=value["instances"],
        load_TE=value["load"],
        share_TE=np.divide(load_TE, uses_T, out=np.zeros_like(load_TE), where=uses_T > 0),
        load_share_E=uses_E / uses_E.sum() if uses_E.any() else uses_E,
        load_skew=value["load_skew"],
        drift_T=drift_T,
    )


def history_of_lines(lines: Sequence[Line]) -> ExpertHistory:
    """What the lines of one run know: of each task the experts that it uses most.

    A segment is where neighbouring lines say the same; where it begins and ends is known to a line.
    """
    segments: list[ExpertSegment] = []
    tasks = list(lines[-1].tasks) if lines else []
    first = 0
    for n, line in enumerate(lines):
        is_last = n + 1 == len(lines) or lines[n + 1].shares is not line.shares
        if is_last:
            load_share_E = np.array(line.shares.get("load_share") or [], np.float64)
            if len(load_share_E):
                segments.append(_segment_of_line(line, (first, line.step), load_share_E, tasks))
            first = line.step
    num_experts = len(segments[-1].load_share_E) if segments else 0
    segments = [each for each in segments if len(each.load_share_E) == num_experts]
    return ExpertHistory(tasks, num_experts, None, None, segments, None)


def _segment_of_line(line: Line, steps: tuple[int, int], load_share_E: F64, tasks: Sequence[str]) -> ExpertSegment:
    share_TE = np.full((len(tasks), len(load_share_E)), np.nan)
    for t, name in enumerate(tasks):
        busiest = (line.shares.get("of_tasks") or {}).get(name) or []
        if sum(share for _, share in busiest) >= _ALL:
            share_TE[t] = 0.0
        for expert, share in busiest:
            share_TE[t, int(expert)] = share
    share_TE[:, load_share_E == 0] = 0.0
    drift = line.shares.get("drift_of_tasks") or {}
    return ExpertSegment(
        steps=steps,
        event_time_ms=line.event_time_ms,
        is_open=False,
        instances=None,
        load_TE=None,
        share_TE=share_TE,
        load_share_E=load_share_E,
        load_skew=line.experts.get("load_skew"),
        drift_T=[drift.get(name) for name in tasks] if drift else None,
    )
