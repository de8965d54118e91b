"""What the page *experts* shows: which task uses which expert, over time, and how evenly."""

from typing import Annotated, Any

from fastapi import APIRouter, Query

from smes_console.expert_segments import ExpertHistory, history_of_json, history_of_lines
from smes_console.history_lines import Line, runs_of
from smes_console.runs import Runs
from smes_console.sources import Sources

_Object = dict[str, Any]
_OF_REPORT = ("lineage", "version", "active_experts", "routing")


def router(sources: Sources, runs: Runs) -> APIRouter:
    """Everything under ``/api/experts``."""
    routes = APIRouter(prefix="/api/experts")

    @routes.get("")
    def experts(step: Annotated[int | None, Query(ge=0)] = None, seen: str | None = None) -> _Object:
        """The segments of the run, the overlap of its tasks, and the map of one segment.

        Args:
            step: The map is of the segment that has this step; None: of the newest that has ended.
            seen: ``key`` of an answer: ``experts`` is null if it would be the same.
        """
        (said, state), (report, _) = sources.together(runs.experts, runs.report)
        history, problem = _history(said)
        if history is None or not history.segments:
            found = runs.watched()
            of_lines = history_of_lines(list(runs_of(found.lines).values())[-1]) if found.lines else None
            if of_lines is not None and of_lines.segments:
                newest = found.lines[-1]
                history, state = of_lines, {**state, "kind": "lines", "at_ms": newest.wall_ms}
                report = report or _of_line(newest)
        chosen = None if history is None else history.at(step)
        key = _key(history, None if chosen is None else chosen.steps)
        return {
            "key": key,
            "source": {**state, "problem": problem or state["problem"]},
            "report": None if report is None else {name: report.get(name) for name in _OF_REPORT},
            "experts": None if history is None or seen == key else _experts(history, step),
        }

    return routes


def _of_line(line: Line) -> _Object:
    """What of a report a line knows."""
    active = {"mean": line.experts.get("active_mean")}
    return {"lineage": line.lineage, "version": line.step, "active_experts": active, "routing": line.experts}


def _history(said: _Object | None) -> tuple[ExpertHistory | None, str | None]:
    if said is None:
        return None, None
    try:
        return history_of_json(said), None
    except ValueError as error:
        return None, str(error)


def _key(history: ExpertHistory | None, steps: tuple[int, int] | None) -> str:
    if history is None:
        return "none"
    ends = [(each.steps, each.instances, each.is_open) for each in history.segments[-1:]]
    return f"{history.num_experts}:{len(history.tasks)}:{len(history.segments)}:{ends}:{steps}"


def _experts(history: ExpertHistory, step: int | None) -> _Object:
    chosen = history.at(step)
    return {
        "tasks": history.tasks,
        "num_experts": history.num_experts,
        "always_on": history.always_on,
        "pools": history.pools,
        "segments": [each.summary() for each in history.segments],
        "overlap": history.overlap_TT,
        "map": None if chosen is None else chosen.map(),
    }
