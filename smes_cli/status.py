"""``smes status``: one screen of a deployment: what runs, lag, freshness, version, alarms."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import typer

from smes.errors import SmesError
from smes_cli.command_line import EXIT_CHECK_FAILED, ReportPath, SchemaOfEvents, ScorerUrl, config_of
from smes_cli.console import console, number, write_report
from smes_cli.times import utc

if TYPE_CHECKING:
    from smes_cli.config import Config

_TIMEOUT_S = 2.0

Section = dict[str, Any]


def status(
    context: typer.Context,
    schema: SchemaOfEvents = None,
    url: ScorerUrl = None,
    report: ReportPath = None,
) -> None:
    """Say what runs: trainer, event log, snapshots, scorer, and what is wrong. Exits with 3 if something is."""
    found = deployment_status(config_of(context, schema), url)
    write_report(found, report)
    for name, section in found.items():
        if name != "alarms":
            of = " (records)" if name == "event log" and "problem" not in section else ""
            console.print(f"{name:<14}{_line(section)}{of}", highlight=False, soft_wrap=True)
    for alarm in found["alarms"]:
        console.print(f"alarm         {alarm}", style="bold red", highlight=False, soft_wrap=True)
    if found["alarms"]:
        raise typer.Exit(EXIT_CHECK_FAILED)
    console.print("no alarm", highlight=False)


def deployment_status(config: "Config", url: str | None = None) -> dict[str, Any]:
    """The sections ``trainer``, ``event log``, ``dead letters``, ``snapshots`` and ``scorer``, and the ``alarms``.

    What cannot be reached within two seconds has a ``problem`` instead of figures, which is an alarm, too.

    Args:
        config: Where everything is.
        url: Base URL of the scorer; None: the configured one.
    """
    config = replace(
        config,
        event_log=replace(config.event_log, connect_timeout_s=min(_TIMEOUT_S, config.event_log.connect_timeout_s)),
        feature_store=replace(config.feature_store, timeout_s=min(_TIMEOUT_S, config.feature_store.timeout_s)),
    )
    snapshots = _tried(lambda: _snapshots(config))
    positions = _read_so_far(config, snapshots)
    events = _tried(lambda: _event_log(config, positions))
    letters = {"kept": events.pop("dead letters")} if "dead letters" in events else {}
    scorer = _tried(lambda: _scorer(config, url))
    publisher = snapshots.pop("publisher", None)
    trainer = {"publishes": publisher} if publisher else {}
    reached = {"event log": events, "snapshots": snapshots}
    alarms = [f"{name}: {section['problem']}" for name, section in reached.items() if "problem" in section]
    alarms += [] if trainer or "problem" in snapshots else ["trainer: none holds the lease, expected a `smes train`"]
    unread = sum(events.get(f"unread {topic}", 0) for topic in ("impressions", "feedback", "examples"))
    alarms += _alarms(config, snapshots, scorer, unread)
    return {
        "trainer": trainer,
        "event log": events,
        "dead letters": letters,
        "snapshots": snapshots,
        "scorer": scorer,
        "alarms": alarms,
    }


def _tried(section: Callable[[], Section]) -> Section:
    try:
        return section()
    except SmesError as error:
        return {"problem": str(error)}


def _snapshots(config: "Config") -> Section:
    from smes_cli.snapshot_places import snapshot_store
    from smes_io.clock import wall_clock_ms

    store = snapshot_store(config)
    publisher = store.publisher()
    found: Section = {"publisher": f"{publisher.name}, since {utc(publisher.since_ms)} UTC" if publisher else None}
    manifest = store.current()
    if manifest is None:
        return found | {"published": 0}
    decision, gate = store.pins.decision(), manifest.metrics.get("gate")
    return found | {
        "lineage": manifest.lineage,
        "version": manifest.version,
        "age_s": max(0.0, (wall_clock_ms() - manifest.created_ms) / 1000),
        "event_time": utc(manifest.event_time_ms),
        "pinned": decision is not None and decision.pins,
        "held": len(store.held()),
        "refused_in_a_row": gate.get("refused_in_a_row") if isinstance(gate, dict) else None,
        "positions": manifest.positions,
        "step": manifest.step,
    }


def _read_so_far(config: "Config", snapshots: Section) -> dict[str, dict[str, int]]:
    """Up to where the log was read; takes out of the section what only this needs."""
    from smes_cli.console_command import places_of
    from smes_console.deployment import read_so_far
    from smes_console.sources import Sources

    current = {name: snapshots.pop(name, None) for name in ("positions", "step")}
    if current["positions"] is None:
        return {}
    places = places_of(config)
    trainer = None
    if places.trainer_url is not None:
        with closing(Sources(places)) as sources:
            trainer = sources.trainer_brief().value
    return read_so_far({**current, "lineage": snapshots["lineage"]}, trainer)


def _event_log(config: "Config", positions: dict[str, dict[str, int]]) -> Section:
    """How much lies in the log, and how much of it is unread."""
    from stream.log.open_log import open_event_log
    from stream.topics import DEAD_LETTERS, EXAMPLES, FEEDBACK, IMPRESSIONS

    found: Section = {}
    with closing(open_event_log(config.event_log)) as log:
        for topic in (IMPRESSIONS, FEEDBACK, *((EXAMPLES,) if EXAMPLES in positions else ())):
            ends, read = log.end(topic), positions.get(topic, {})
            found[topic] = sum(ends.values()) - sum(log.begin(topic).values())
            if topic in positions:
                found[f"unread {topic}"] = sum(max(0, end - read.get(str(p.partition), 0)) for p, end in ends.items())
        try:
            found["dead letters"] = sum(log.end(DEAD_LETTERS).values()) - sum(log.begin(DEAD_LETTERS).values())
        except SmesError:
            found["dead letters"] = 0  # the trainer makes the topic with the first letter
    return found


def _scorer(config: "Config", url: str | None) -> Section:
    from smes_cli.freshness import ask_scorer

    where, ready = ask_scorer(config, url, "/health/ready", also=(503,))
    _, stats = ask_scorer(config, url, "/v1/stats")
    fresh = stats.get("freshness_ms", {})
    return {
        "status": ready.get("status"),
        "url": where,
        "version": ready.get("version"),
        "requests": stats.get("requests"),
        "errors": stats.get("errors"),
        "freshness_p50_ms": fresh.get("p50"),
        "freshness_p99_ms": fresh.get("p99"),
        "problems": {name: text for name, text in (ready.get("problems") or {}).items() if text},
    }


def _alarms(config: "Config", snapshots: Section, scorer: Section, unread: int) -> list[str]:
    from smes_console.deployment import stale

    found = []
    if text := stale(snapshots.get("age_s", 0.0), unread, config.trainer.snapshot_interval_s):
        found.append(f"snapshots: {text}")
    if snapshots.get("published") == 0:
        found.append("snapshots: none was published yet")
    if snapshots.get("held"):
        found.append(f"snapshots: {snapshots['held']} held, see `smes snapshots list`")
    if "problem" in scorer:
        found.append(f"scorer: {scorer['problem']}")
    elif scorer["status"] != "ready":
        found.append(f"scorer: {scorer['status']}")
        found += [f"scorer: {name}: {text}" for name, text in scorer["problems"].items()]
    return found


def _line(section: Section) -> str:
    if "problem" in section:
        return "no answer"
    shown = [f"{key} {_value(value)}" for key, value in section.items() if value is not None and key != "problems"]
    return " · ".join(shown) or "–"


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return number(value, 1) if isinstance(value, (int, float)) else str(value)
