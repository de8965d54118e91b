"""What the page *Flow* shows: where everything is on its way from event to answer, and how fast it moves."""

from typing import Any

from fastapi import APIRouter

from smes_console.deployment import kept, letters_state, log_state, store_state, unread
from smes_console.runs import Runs
from smes_console.sources import Reached, Sources
from smes_io.clock import wall_clock_ms
from smes_scorer.freshness_stages import DEPENDS_ON
from trainer.report import conservation_errors

_OF_REPORT = ("events", "feedback", "snapshots", "rows", "features", "gate")


def router(sources: Sources, runs: Runs) -> APIRouter:
    """``/api/flow``."""
    routes = APIRouter(prefix="/api/flow")

    @routes.get("")
    def flow() -> dict[str, Any]:
        """Trainer, event log, store and scorer, each with its ``problem``; figures are named as in the report."""
        trainer, log, letters, store, scorer = sources.together(
            sources.trainer_brief,
            lambda: log_state(sources),
            lambda: letters_state(sources),
            lambda: store_state(sources),
            sources.scorer,
        )
        return {
            "at_ms": wall_clock_ms(),
            "trainer": _trainer(runs, trainer),
            "log": _log(sources, log, trainer, store),
            "letters": {**letters.state(), "kept": None if letters.value is None else kept(letters.value)},
            "store": {**store.state(), **(store.value or {})},
            "scorer": {**scorer.state(), **(scorer.value or {})},
            "stages": [{"stage": name, "what": what, "why": why} for name, (what, why) in DEPENDS_ON.items()],
        }

    return routes


def _trainer(runs: Runs, trainer: Reached[dict[str, Any]]) -> dict[str, Any]:
    """What a trainer says; where none answers, the report of a run that has ended, if it left one."""
    values = dict(trainer.value or {})
    report, ended = values.pop("report", None), False
    if report is None and trainer.problem is not None:
        report = runs.report_of_ended()
        ended = report is not None
    return {
        **trainer.state(),
        **values,
        "ended": ended,
        "report": {name: report.get(name) for name in _OF_REPORT} if report else None,
        "unaccounted": conservation_errors(report) if report else None,
    }


def _log(
    sources: Sources, log: Reached[dict[str, Any]], trainer: Reached[dict[str, Any]], store: Reached[dict[str, Any]]
) -> dict[str, Any]:
    """The topics; ``unread`` counts records beyond the trainer's positions, else beyond those of the newest version."""
    positions = (trainer.value or {}).get("positions")
    if not positions and store.value and store.value["current"]:
        positions = store.value["current"]["positions"]
    return {
        **log.state(),
        "topics": log.value,
        "unread": unread(log.value, positions) if log.value and positions else None,
    }
