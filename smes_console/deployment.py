"""What several pages need of a deployment: the state of its store and of its event log, and what is wrong with it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from smes.errors import EventLogError, EventLogUnavailable
from smes_console.sources import Reached, Sources
from smes_io.clock import wall_clock_ms
from stream.topics import DEAD_LETTERS, FEEDBACK, IMPRESSIONS

if TYPE_CHECKING:
    from stream.log.event_log import EventLog

_LETTERS_FRESH_S = 10.0

_OLD_CUTS, _OLD_S = 30, 60.0
"""A version in service is old beyond so many snapshot intervals, and beyond so many seconds."""


def store_state(sources: Sources) -> Reached[dict[str, Any]]:
    """The store of snapshots: ``publisher``, ``current`` (the newest published), ``pinned`` and ``held``."""

    def state() -> dict[str, Any]:
        store = sources.snapshots()
        publisher, manifest, decision = store.publisher(), store.current(), store.pins.decision()
        gate = manifest.metrics.get("gate") if manifest else None
        return {
            "publisher": {"name": publisher.name, "since_ms": publisher.since_ms} if publisher else None,
            "current": None
            if manifest is None
            else {
                "lineage": manifest.lineage,
                "version": manifest.version,
                "step": manifest.step,
                "created_ms": manifest.created_ms,
                "event_time_ms": manifest.event_time_ms,
                "total_bytes": manifest.total_bytes,
                "kind": manifest.kind,
                "positions": manifest.positions,
                "refused_in_a_row": gate.get("refused_in_a_row") if isinstance(gate, dict) else None,
            },
            "pinned": decision is not None and decision.pins,
            "held": len(store.held()),
        }

    return sources.look("snapshots", state)


def log_state(sources: Sources) -> Reached[dict[str, Any]]:
    """The event log: topic → ``begin`` and ``end``, each partition (decimal digits) → offset."""

    def state() -> dict[str, Any]:
        with sources.event_log("ends") as log:
            return {topic: _ends(log, topic) for topic in (IMPRESSIONS, FEEDBACK)}

    return sources.look("event log", state)


def letters_state(sources: Sources) -> Reached[dict[str, dict[str, int]]]:
    """``begin`` and ``end`` of the topic of dead letters, up to ten seconds old.

    The trainer makes the topic with the first letter. Until then they are empty, and Kafka takes its time to say so.
    """

    def state() -> dict[str, dict[str, int]]:
        with sources.event_log("letters") as log:
            try:
                return _ends(log, DEAD_LETTERS)
            except EventLogUnavailable:
                raise
            except EventLogError:
                return {"begin": {}, "end": {}}

    return sources.look("dead letters, counted", state, fresh_s=_LETTERS_FRESH_S, waits=False)


def _ends(log: "EventLog", topic: str) -> dict[str, dict[str, int]]:
    return {
        name: {str(place.partition): offset for place, offset in offsets.items()}
        for name, offsets in (("begin", log.begin(topic)), ("end", log.end(topic)))
    }


def kept(topic: dict[str, dict[str, int]]) -> int:
    """Records of a topic that are still in the log; ``topic`` as of :func:`log_state`."""
    return sum(topic["end"].values()) - sum(topic["begin"].values())


def unread(log: dict[str, Any], positions: dict[str, dict[str, int]]) -> dict[str, int]:
    """Topic → records beyond the positions.

    Args:
        log: As of :func:`log_state`.
        positions: Topic → partition → next record to read.
    """
    return {
        topic: sum(max(0, end - read.get(partition, 0)) for partition, end in log[topic]["end"].items())
        for topic, read in positions.items()
        if topic in log
    }


def read_so_far(current: dict[str, Any], trainer: dict[str, Any] | None) -> dict[str, dict[str, int]]:
    """Up to where the log was read: topic → partition → next record.

    A version's positions are those of its cut, and without a step there is no cut. So where the trainer has taken no
    step since, its own positions count: what it read meanwhile (dead letters, impressions that wait) changed no weight.

    Args:
        current: The newest version; ``lineage``, ``step`` and ``positions`` of it.
        trainer: ``/v1/stats`` of the trainer; None: not known.
    """
    if trainer is not None and (trainer["lineage"], trainer["step"]) == (current["lineage"], current["step"]):
        return dict(trainer["positions"])
    return dict(current["positions"])


def in_service(sources: Sources) -> dict[str, Any]:
    """Lineage, version and age of the version in service, as the scorer says; else of the newest published.

    ``source`` is ``scorer``, ``snapshots`` or None.
    """
    scorer = sources.scorer().value
    if scorer and scorer.get("version") is not None:
        age_ms = scorer.get("snapshot_age_ms")
        return {"source": "scorer", "lineage": scorer["lineage"], "version": scorer["version"], "age_ms": age_ms}
    store = store_state(sources).value
    if store and (current := store["current"]):
        age_ms = max(0, wall_clock_ms() - current["created_ms"])
        return {
            "source": "snapshots",
            "lineage": current["lineage"],
            "version": current["version"],
            "age_ms": age_ms,
        }
    return {"source": None, "lineage": None, "version": None, "age_ms": None}


@dataclass(frozen=True, slots=True)
class Alarm:
    """Something that is wrong.

    Attributes:
        source: ``event log``, ``snapshots``, ``trainer`` or ``scorer``.
        text: What, in one line.
        since_ms: Since when it is known, Unix milliseconds; None where that is not known.
    """

    source: str
    text: str
    since_ms: int | None = None


def alarms(sources: Sources) -> list[Alarm]:
    """What is wrong with the deployment now; empty if nothing is."""
    store, log, scorer, ready, trainer = sources.together(
        lambda: store_state(sources),
        lambda: log_state(sources),
        sources.scorer,
        sources.scorer_ready,
        sources.trainer_brief,
    )
    looks = {"event log": log, "snapshots": store, "scorer": scorer}
    if sources.places.trainer_url is not None:
        looks["trainer"] = trainer
    found = [Alarm(name, look.problem, look.since_ms) for name, look in looks.items() if look.problem is not None]
    if store.value is not None:
        found += _of_store(sources, store.value, log.value, trainer.value)
    if ready.value is not None and scorer.problem is None:
        status = ready.value.get("status")
        found += [Alarm("scorer", f"is {status}")] if status != "ready" else []
        found += [
            Alarm("scorer", f"{name}: {text}") for name, text in (ready.value.get("problems") or {}).items() if text
        ]
    if trainer.value is not None:
        problems = trainer.value.get("problems") or {}
        found += [Alarm("trainer", f"{name}: {text}") for name, text in problems.items()]
    return found


def _of_store(
    sources: Sources, store: dict[str, Any], log: dict[str, Any] | None, trainer: dict[str, Any] | None
) -> list[Alarm]:
    found = []
    if store["publisher"] is None:
        found.append(Alarm("trainer", "none holds the lease, expected a running `smes train`"))
    if store["held"]:
        found.append(Alarm("snapshots", f"{store['held']} held, see Versions"))
    current = store["current"]
    if current is None:
        return [*found, Alarm("snapshots", "none was published yet")]
    age_s = max(0.0, (wall_clock_ms() - current["created_ms"]) / 1000)
    beyond = sum(unread(log, read_so_far(current, trainer)).values()) if log else 0
    interval_s = sources.places.snapshot_interval_s
    if text := stale(age_s, beyond, interval_s):
        found.append(Alarm("snapshots", text, current["created_ms"] + round(oldest_s(interval_s) * 1000)))
    return found


def oldest_s(snapshot_interval_s: float) -> float:
    """How old the newest version may be while there is something to train on, seconds."""
    return max(_OLD_S, _OLD_CUTS * snapshot_interval_s)


def stale(age_s: float, beyond: int, snapshot_interval_s: float) -> str | None:
    """That the newest version is too old, in words; None if it is not, or nothing is left to train on.

    Args:
        age_s: Its age.
        beyond: Records that it has not read.
        snapshot_interval_s: Seconds between two cuts.
    """
    most_s = oldest_s(snapshot_interval_s)
    if not beyond or age_s <= most_s:
        return None
    return f"the newest is {age_s:,.0f} s old and {beyond:,} records are unread, expected at most {most_s:,.0f} s"
