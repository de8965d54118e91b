"""What the page *learning* shows: metrics of each task over time, against other runs and the version in service."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Query

from smes_console.curves import Axis, Parts, counts_of, curve_of, enough, parts_of, positions_of, whole
from smes_console.deployment import in_service
from smes_console.history_lines import Line, runs_of
from smes_console.runs import Found, Runs
from smes_console.sources import Sources
from trainer.lineages import root_of
from trainer.task_figures import RARE_BELOW

Metric = Literal["gauc_windowed", "auc", "ne", "calibration", "ece", "base_rate"]

OF_REGRESSION: dict[str, str | None] = {
    "gauc_windowed": "xauc",
    "auc": "xauc",
    "ne": "mae",
    "calibration": "mean_bias",
    "ece": "mae",
    "base_rate": None,
}
"""What is shown of a regression task beside a metric of binary tasks: the order, the size of errors, or the bias."""

_BASE_RATE_POINTS, _FEW_POSITIVES = 32, 30
_SIMILAR = 0.1  # numbers of windows
_FEW_WINDOWS = 10  # stretches with a closed window: fewer draw no curve of GAUC
_EARLIER_RUNS = 3  # of the same folder
_MANIFEST_FRESH_S = 30.0
_Object = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Question:
    """What curves are asked for.

    Attributes:
        metric: Of binary tasks; regression tasks have the one of :data:`OF_REGRESSION`.
        axis: What x is.
        points: About so many of a curve at most.
        within: Only this range of x; None: all.
        at_least: Stretches that a point is made of at least; 0: as many as a task needs for some fifty positives.
    """

    metric: str
    axis: Axis
    points: int
    within: tuple[float, float] | None
    at_least: int

    def parts(self, lines: Sequence[Line], at_least: int = 1) -> Parts:
        """Which lines of a run make which points."""
        return parts_of(lines, self.axis, self.points, self.within, at_least)


def router(sources: Sources, runs: Runs) -> APIRouter:
    """Everything under ``/api/learning``."""
    routes = APIRouter(prefix="/api/learning")

    @routes.get("")
    def learning(
        metric: Metric | None = None,
        axis: Axis = "event_time",
        low: Annotated[float | None, Query(alias="from")] = None,
        high: Annotated[float | None, Query(alias="to")] = None,
        points: Annotated[int, Query(ge=10, le=2000)] = 240,
        together: Annotated[int, Query(ge=0, le=4096)] = 0,
        seen: str | None = None,
    ) -> _Object:
        """Curves of every task, the report of the run, its newest stretch and the version in service.

        Args:
            metric: Of binary tasks; regression tasks have the one of :data:`OF_REGRESSION`. None: GAUC, or AUC while
                GAUC has too few points for a curve.
            axis: What x is: Unix milliseconds, or impressions.
            low, high: Only this range of x.
            points: About so many of a curve at most.
            together: Stretches that a point is made of at least; 0: as many as a task needs for some fifty positives.
            seen: ``key`` of an answer to the same question: ``curves`` is null if they are still the same.
        """
        found, _, others, (report, report_state) = sources.together(
            runs.watched, lambda: in_service(sources), runs.baselines, runs.report
        )
        served = _service(sources)
        grouped = runs_of(found.lines)
        *earlier, main = grouped.values() if grouped else [[]]
        key = _key(found, others, served)
        within = None if low is None or high is None else (low, high)
        question = Question(metric or _metric_with_points(main), axis, points, within, together)
        return {
            "key": key,
            "sources": {
                "history": found.state(),
                "report": report_state,
                "snapshots": {"problem": served["problem"], "since_ms": served["since_ms"]},
            },
            "tasks": _tasks(main, report),
            "report": report,
            "newest": _newest(main),
            "service": _placed(served["version"], main, axis),
            "curves": None if seen == key else _curves(main, earlier[-_EARLIER_RUNS:], others, question),
        }

    return routes


def _key(found: Found, others: dict[str, Found], served: _Object) -> str:
    """What curves depend on, beside the question."""
    version = served["version"] or {}
    parts = [version.get("lineage"), version.get("version"), found.kind]
    for each in (found, *others.values()):
        newest = each.lines[-1] if each.lines else None
        parts += [len(each.lines), newest and newest.lineage, newest and newest.stretch, newest and newest.wall_ms]
    return ":".join(str(part) for part in parts)


def _metric_with_points(lines: Sequence[Line]) -> Metric:
    """GAUC, which has a point where a window of the evaluation has closed; AUC while these are few."""
    return "gauc_windowed" if sum(line.windows > 0 for line in lines) >= _FEW_WINDOWS else "auc"


def _tasks(lines: Sequence[Line], report: _Object | None) -> list[_Object]:
    """The tasks of the newest line, else those of the report: their kind, and how dense they are over the whole run."""
    of_report = (report or {}).get("tasks") or {}
    names = lines[-1].tasks if lines else tuple(of_report)
    tasks = []
    for name in names:
        figures = of_report.get(name) or {}
        of_line = lines[-1].task(name) if lines else {}
        is_regression = any(figures.get(key) is not None or of_line.get(key) is not None for key in ("mae", "xauc"))
        rate = figures.get("base_rate")
        if rate is None and lines and not is_regression:
            rate = whole(lines, name, "base_rate")
        density = None if rate is None or is_regression else ("rare" if rate < RARE_BELOW else "dense")
        tasks.append(
            {
                "name": name,
                "kind": "regression" if is_regression else "binary",
                "density": density,
                "base_rate": None if is_regression else rate,
            }
        )
    return tasks


def _newest(lines: Sequence[Line]) -> _Object | None:
    if not lines:
        return None
    line = lines[-1]
    return {
        "step": line.step,
        "lineage": line.lineage,
        "wall_ms": line.wall_ms,
        "event_time_ms": line.event_time_ms,
        "trained": line.trained,
        "routing": {key: line.experts.get(key) for key in ("dead", "load_skew", "active_mean")},
    }


def _service(sources: Sources) -> _Object:
    """The version in service with its metrics: ``version`` (None without one), ``problem``, ``since_ms``."""
    served = in_service(sources)
    lineage, version = served["lineage"], served["version"]
    if version is None:
        look = sources.scorer() if sources.places.scorer_url else None
        return {"version": None, "problem": look.problem if look else None, "since_ms": look.since_ms if look else None}

    def manifest() -> _Object:
        found = sources.snapshots().get(lineage, version)
        return {
            "created_ms": found.created_ms,
            "event_time_ms": found.event_time_ms,
            "step": found.step,
            "tasks": found.metrics.get("tasks") or {},
        }

    look_up = sources.look(f"snapshot {lineage}:{version}", manifest, fresh_s=_MANIFEST_FRESH_S)
    said = look_up.value or {"created_ms": None, "event_time_ms": None, "step": version, "tasks": {}}
    return {
        "version": {"lineage": lineage, "version": version, **said},
        "problem": look_up.problem,
        "since_ms": look_up.since_ms,
    }


def _placed(version: _Object | None, lines: Sequence[Line], axis: Axis) -> _Object | None:
    """The version in service with ``x``, where its cut lies on the curve; None where that is not known."""
    if version is None:
        return None
    x: float | None = version["event_time_ms"] if axis == "event_time" else version["created_ms"]
    is_of_run = bool(lines) and root_of(version["lineage"]) == root_of(lines[-1].lineage)
    if axis == "impressions":
        x = None
        if is_of_run and lines[0].step <= version["step"]:
            steps = np.array([line.step for line in lines], np.float64)
            x = float(np.interp(version["step"], steps, [float(line.trained) for line in lines]))
    return {**version, "x": x if is_of_run else None, "is_of_run": is_of_run}


def _curves(main: list[Line], earlier: Sequence[list[Line]], others: dict[str, Found], question: Question) -> _Object:
    parts = question.parts(main)
    names = main[-1].tasks if main else ()
    compared = [
        _compared(f"earlier run {root_of(lines[-1].lineage)}", "earlier", lines, main, question) for lines in earlier
    ]
    for name, found in others.items():
        _, newest = [("", []), *runs_of(found.lines).items()][-1]
        curve = _compared(name, "baseline", newest, main, question)
        compared.append({**curve, "where": found.where, "problem": found.problem})
    return {
        "metric": question.metric,
        "of_regression": OF_REGRESSION[question.metric],
        "axis": question.axis,
        "run": {
            "lineage": main[-1].lineage if main else None,
            "lineage_changes": parts.lineage_changes(),
            "gaps": parts.gaps(),
            **_of_tasks(main, question, names),
        },
        "compared": compared,
        "base_rates": _base_rates(parts_of(main, question.axis, _BASE_RATE_POINTS, question.within), names),
        "routing": _routing(parts),
    }


def _of_tasks(lines: Sequence[Line], question: Question, names: Sequence[str]) -> _Object:
    """The curves of tasks: ``grids`` name → ``x`` and stretches of points, ``values`` task → ``grid`` and ``y``."""
    grids: dict[str, Parts] = {}
    values = {}
    for name in names:
        at_least = question.at_least or enough(lines, name)
        grid = str(at_least)
        if grid not in grids:
            grids[grid] = question.parts(lines, at_least)
        curve = curve_of(grids[grid], question.metric, name)
        if curve is None and (counterpart := OF_REGRESSION[question.metric]) is not None:
            curve = curve_of(grids[grid], counterpart, name)
        if curve is not None:
            values[name] = {"grid": grid, "y": curve}
    return {
        "grids": {
            grid: {
                "x": parts.listed_x(),
                "breaks": parts.breaks(),
                "stretches_a_point": parts.stretches_a_point,
                "newest": parts.newest,
            }
            for grid, parts in grids.items()
        },
        "values": values,
    }


def _compared(name: str, kind: str, lines: list[Line], main: list[Line], question: Question) -> _Object:
    """The curves of another run, and by how much the watched one differs where both have trained as much."""
    names = lines[-1].tasks if lines else ()
    is_beside = bool(lines and main) and _overlap(lines, main, question.axis)
    return {
        "name": name,
        "kind": kind,
        "lineage": lines[-1].lineage if lines else None,
        "is_beside": is_beside,
        **_of_tasks(lines if is_beside else [], question, names),
        "difference": _difference(main, lines, question.metric),
    }


def _overlap(one: Sequence[Line], other: Sequence[Line], axis: Axis) -> bool:
    """Whether two runs have a part of an axis in common."""
    spans = []
    for lines in (one, other):
        x = positions_of(lines, axis)
        x = x[np.isfinite(x)]
        if not len(x):
            return False
        spans.append((x[0], x[-1]))
    (low, high), (other_low, other_high) = spans
    return bool(low <= other_high and other_low <= high)


def _difference(main: Sequence[Line], other: Sequence[Line], metric: str) -> _Object | None:
    """By how much a figure of each task is larger in the watched run, over the impressions that both have trained on.

    ``from`` and ``to`` are those impressions. GAUC is not compared where the numbers of windows differ: then they are
    in ``windows``.
    """
    if not main or not other:
        return None
    low = max(main[0].trained - main[0].impressions, other[0].trained - other[0].impressions)
    high = min(main[-1].trained, other[-1].trained)
    ours, theirs = ([line for line in lines if low < line.trained <= high] for lines in (main, other))
    windows = [sum(line.windows for line in lines) for lines in (ours, theirs)]
    # The longer a window, the older are the weights that its GAUC is by.
    is_alike = metric != "gauc_windowed" or abs(windows[0] - windows[1]) <= _SIMILAR * max(windows)
    tasks: dict[str, float | None] = {}
    for name in main[-1].tasks:
        figures = (metric if is_alike else None, OF_REGRESSION[metric])
        tasks[name] = next((value for f in figures if f and (value := _minus(ours, theirs, name, f)) is not None), None)
    return {"from": low, "to": high, "windows": None if is_alike else windows, "tasks": tasks}


def _minus(ours: Sequence[Line], theirs: Sequence[Line], task: str, figure: str) -> float | None:
    one, other = whole(ours, task, figure), whole(theirs, task, figure)
    return None if one is None or other is None else one - other


def _base_rates(parts: Parts, names: Sequence[str]) -> _Object:
    """``x``, and ``tasks`` name → share of positives at each point (``y``), that of all (``rate``), and its ``spread``.

    The spread is the mean of the squared differences from the rate of the whole curve, in units of what chance alone
    would make of them: about 1 where nothing moves, whatever the rate and the number of examples. Tasks with few
    positives at a point are left out.
    """
    tasks = {}
    for name in names:
        values = curve_of(parts, "base_rate", name)
        examples, positives = counts_of(parts, name)
        if values is None or not 0 < positives.sum() < examples.sum() or positives.mean() < _FEW_POSITIVES:
            continue
        rate, some = positives.sum() / examples.sum(), examples > 0
        spread = ((positives - examples * rate)[some] ** 2 / (examples[some] * rate * (1 - rate))).mean()
        tasks[name] = {"y": values, "rate": rate, "spread": round(float(spread), 2)}
    return {"x": parts.listed_x(), "breaks": parts.breaks(), "tasks": tasks}


def _routing(parts: Parts) -> _Object:
    """``drift`` of the routing at the end of each point ``x``; null where something is missing."""
    drift = [line.experts.get("drift") for line in parts.ends()]
    values = np.array([np.nan if value is None else value for value in drift], np.float64)
    return {"x": parts.listed_x(), "breaks": parts.breaks(), "drift": parts.listed(values)}
