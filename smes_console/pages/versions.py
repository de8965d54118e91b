"""What the page *Versions* shows: the snapshots that can be loaded, what was decided about them, and deciding.

A decision is first asked for with ``dry_run``: the answer says what would happen, for the question that the page puts.
"""

import json
from dataclasses import fields
from typing import Annotated, Any, Literal

from fastapi import APIRouter, HTTPException
from pydantic import BaseModel, ConfigDict, Field

from feature_store.manifest import LARGEST_INTEGER, MAX_REASON, Manifest, member
from feature_store.pins import Decision
from feature_store.serving_marks import ServingMarks
from feature_store.snapshots import SnapshotStore
from smes.errors import FeatureStoreUnavailable, SmesError
from smes_console.sources import Reached, Sources
from smes_io.clock import wall_clock_ms
from trainer.task_figures import TaskFigures, headline

_FRESH_S = 2.0
_LOOK = "versions"
_FIGURES = tuple(each.name for each in fields(TaskFigures))
_MEANS = ("auc", "ne")  # a cut has no GAUC: its windows end later
_SHOWN = (*_MEANS, "calibration", "xauc", "mae")
_LINE = r"^[^\x00-\x1f\x7f-\x9f]*$"  # terminals show it, too, and would obey control characters

Lineage = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,128}$")]
Version = Annotated[int, Field(ge=0, le=LARGEST_INTEGER)]


class Asked(BaseModel):
    """A decision about serving that somebody asks for.

    Attributes:
        action: What to do.
        version, lineage: With what; default: as of :class:`feature_store.operator.Operator`.
        why, by: The reason, and who decides, for the history.
        dry_run: Only say what would happen.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    action: Literal["pin", "unpin", "rollback", "promote"]
    version: Version | None = None
    lineage: Lineage | None = None
    why: Annotated[str, Field(max_length=MAX_REASON, pattern=_LINE)] = ""
    by: Annotated[str, Field(max_length=300, pattern=_LINE)] = ""
    dry_run: bool = False


def router(sources: Sources) -> APIRouter:
    """Everything under ``/api/versions``."""
    routes = APIRouter(prefix="/api/versions")

    def found() -> Reached[dict[str, Any]]:
        return sources.look(_LOOK, lambda: _versions(sources.snapshots()), fresh_s=_FRESH_S)

    @routes.get("")
    def versions(of: str = "dense") -> dict[str, Any]:
        """All versions, the newest first, and the decisions, the newest first.

        Args:
            of: Whose figures: ``dense`` or ``rare`` for the report's headline rows, or ``task:`` and a task's name.
        """
        looked, scorer, trainer = sources.together(found, sources.scorer, sources.trainer)
        serving, report = scorer.value or {}, (trainer.value or {}).get("report") or {}
        value = dict(looked.value or {})
        rows = value.pop("versions", [])
        figures = {
            "tasks": [name.removeprefix("task:") for name in rows[0]["figures"]][2:] if rows else [],
            "versions": [{**row, "figures": row["figures"].get(of)} for row in rows],
        }
        return {
            **looked.state(),
            "at_ms": looked.at_ms,
            **value,
            **figures,
            "scorer": {
                **scorer.state(),
                "lineage": serving.get("lineage"),
                "version": serving.get("version"),
                "arms": _arms(serving.get("arms") or {}, report.get("arms") or {}),
            },
        }

    @routes.get("/one")
    def one(lineage: Lineage, version: Version) -> dict[str, Any]:
        """Everything that is known of one version."""
        name = member(lineage, version)
        found = sources.look(f"version {name}", lambda: _one(sources.snapshots(), lineage, version))
        return {**found.state(), "at_ms": found.at_ms, "name": name, **(found.value or {})}

    @routes.post("/decide")
    def decide(asked: Asked) -> dict[str, Any]:
        """Decide what is served, or say what a decision would do."""
        try:
            decided = _decide(sources.snapshots(), asked)
        except FeatureStoreUnavailable as error:
            raise HTTPException(503, detail=str(error)) from error
        except (SmesError, ValueError) as error:
            raise HTTPException(409, detail=str(error)) from error
        if not asked.dry_run:
            sources.forget(_LOOK)
        return decided

    return routes


def _versions(store: SnapshotStore) -> dict[str, Any]:
    marks = ServingMarks.of_store(store)
    listed, held = store.list(), store.held()
    bases, publisher = store.bases(listed), store.publisher()
    rows = [_row(manifest, marks, bases, is_held=False) for manifest in listed]
    rows += [_row(manifest, marks, bases, is_held=True) for manifest in held]
    rows.sort(key=lambda row: (row["published_ms"], row["version"]), reverse=True)
    return {
        "publisher": None if publisher is None else {"name": publisher.name, "since_ms": publisher.since_ms},
        "current": marks.current,
        "serves": marks.serves,
        "pinned": marks.pinned,
        "problems": list(marks.problems),
        "versions": rows,
        "decisions": [_decision(each) for each in reversed(store.decisions())],
    }


def _row(
    manifest: Manifest, marks: ServingMarks, bases: dict[tuple[str, int], Manifest], *, is_held: bool
) -> dict[str, Any]:
    base = bases.get((manifest.lineage, manifest.version))
    name = member(manifest.lineage, manifest.version)
    return {
        "name": name,
        "lineage": manifest.lineage,
        "version": manifest.version,
        "parent": manifest.parent,
        "step": manifest.step,
        "kind": manifest.kind,
        "precision": manifest.precision,
        "total_bytes": manifest.total_bytes,
        "base_bytes": None if base is None else base.total_bytes,
        "event_time_ms": manifest.event_time_ms,
        "created_ms": manifest.created_ms,
        "published_ms": manifest.published_ms,
        "current": name == marks.current,
        "serves": name == marks.serves,
        "pinned": name == marks.serves and marks.pinned,
        "rolled_back": name in marks.rolled_back,
        "is_held": is_held,
        "held": manifest.held,
        "gate": _verdict(manifest, is_held=is_held),
        "figures": _figures(manifest),
    }


def _verdict(manifest: Manifest, *, is_held: bool) -> str:
    """What the gate said of a version: ``passed``, ``refused``, ``promoted`` (refused, but put into service), or none.

    ``none`` means that there was no gate.
    """
    if manifest.held is not None:
        return "refused" if is_held else "promoted"
    return "passed" if isinstance(manifest.metrics.get("gate"), dict) else "none"


def _figures(manifest: Manifest) -> dict[str, dict[str, Any] | None]:
    """The report's two headline rows as of this version, ``dense`` and ``rare``, and ``task:`` with a name → figures.

    They are of all that the lineage has trained on up to the version. None where the manifest has none.
    """
    try:
        tasks = dict(manifest.metrics.get("tasks") or {})
        figures = {name: TaskFigures(**{key: task.get(key) for key in _FIGURES}) for name, task in tasks.items()}
        rows = headline(figures)
    except (AttributeError, TypeError, ValueError):  # a store's manifest may hold anything
        return {"dense": None, "rare": None}
    shown: dict[str, dict[str, Any] | None] = {
        "dense": None if rows.dense is None else {key: getattr(rows.dense, key) for key in _MEANS},
        "rare": None if rows.rare is None else {key: getattr(rows.rare, key) for key in _MEANS},
    }
    return shown | {f"task:{name}": {key: getattr(task, key) for key in _SHOWN} for name, task in figures.items()}


def _one(store: SnapshotStore, lineage: str, version: int) -> dict[str, Any]:
    manifest = store.get(lineage, version)
    problem, way = None, []
    try:
        for part in store.chain(manifest):
            way.append({"name": member(part.lineage, part.version), "kind": part.kind, "bytes": part.total_bytes})
    except SmesError as error:
        problem = str(error)
    values = json.loads(manifest.to_json())
    values["chunks"] = len(manifest.chunks)
    values["feedback_arrivals"] = sum(row[1] for row in manifest.feedback_arrivals)
    return {"manifest": values, "loads": way, "loads_problem": problem}


def _decide(store: SnapshotStore, asked: Asked) -> dict[str, Any]:
    operator = store.operator
    rest: dict[str, Any] = {"why": asked.why, "by": asked.by or "console", "dry_run": asked.dry_run}
    before = store.rolled_back()
    match asked.action:
        case "pin":
            if asked.version is None:
                raise ValueError("pin: expected a version")
            decision = operator.pin(asked.version, asked.lineage, **rest)
        case "unpin":
            decision = operator.unpin(**rest)
        case "rollback":
            decision = operator.rollback(asked.version, asked.lineage, **rest)
        case "promote":
            decision = operator.promote(asked.version, asked.lineage, **rest)
    return {
        "dry_run": asked.dry_run,
        "at_ms": wall_clock_ms(),
        "decision": _decision(decision),
        "rolls_back": list(operator.rolls_back(decision)),
        "was_rolled_back": decision.name in before,
    }


def _decision(decision: Decision) -> dict[str, Any]:
    return {
        "number": decision.number,
        "action": decision.action,
        "name": decision.name,
        "lineage": decision.lineage,
        "version": decision.version,
        "before": decision.before,
        "effect": decision.effect,
        "why": decision.why,
        "by": decision.by,
        "at_ms": decision.at_ms,
    }


def _arms(arms: dict[str, Any], report: dict[str, Any]) -> list[dict[str, Any]]:
    """The scorer's arms, as its ``/v1/stats`` and the trainer's report have them; the main one is of the report alone.

    Args:
        arms: Name → what serves.
        report: Name → how well it served, over final labels.
    """
    return [{"name": name, **arms.get(name, {}), "served": report.get(name)} for name in {**report, **arms}]
