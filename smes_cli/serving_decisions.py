"""``smes snapshots pin``, ``unpin``, ``rollback``, ``promote`` and ``history``: which snapshot is served, and why."""

import getpass
import socket
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from smes_cli.command_line import config_of
from smes_cli.console import console
from smes_cli.snapshot_places import Lineage, snapshot_store, typed_version
from smes_cli.times import utc

if TYPE_CHECKING:
    from feature_store.pins import Decision


def _default_user() -> str:
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a user without a name, as in some containers
        user = "unknown"
    return f"{user}@{socket.gethostname()}"


Version = Annotated[str, typer.Argument(help="VERSION, or LINEAGE:VERSION.", show_default=False)]
Why = Annotated[str, typer.Option("--why", help="The reason, for the history; at most 1,000 characters.")]
By = Annotated[str | None, typer.Option("--by", help="Who decides, for the history; default: user@host.")]


def pin(context: typer.Context, version: Version, lineage: Lineage = None, why: Why = "", by: By = None) -> None:
    """Keep a version in service, whatever is published, until the next decision."""
    number, lineage = typed_version(version, lineage)
    store = snapshot_store(config_of(context))
    _say(store.operator.pin(number, lineage, why=why, by=by or _default_user()))


def unpin(context: typer.Context, why: Why = "", by: By = None) -> None:
    """Follow what the trainer publishes again, from the current snapshot on."""
    store = snapshot_store(config_of(context))
    decision = store.operator.unpin(why=why, by=by or _default_user())
    _say(decision)
    if decision.name in store.rolled_back():
        console.print(f"{decision.name} was rolled back before, and is in service again", highlight=False)


def rollback(
    context: typer.Context,
    version: Annotated[
        str | None,
        typer.Argument(
            help="VERSION, or LINEAGE:VERSION; default: the version published before the one in service that was not "
            "rolled back."
        ),
    ] = None,
    lineage: Lineage = None,
    why: Why = "",
    by: By = None,
) -> None:
    """Go back to an earlier version and stay there; what was published after it counts as rolled back."""
    number, lineage = (None, lineage) if version is None else typed_version(version, lineage)
    store = snapshot_store(config_of(context))
    _say(store.operator.rollback(number, lineage, why=why, by=by or _default_user()))


def promote(
    context: typer.Context,
    version: Annotated[
        str | None,
        typer.Argument(help="VERSION, or LINEAGE:VERSION, held or not; default: the one that was held last."),
    ] = None,
    lineage: Lineage = None,
    why: Why = "",
    by: By = None,
) -> None:
    """Put a version into service until the next publication; it ends a pin. A held one is published with that."""
    number, lineage = (None, lineage) if version is None else typed_version(version, lineage)
    store = snapshot_store(config_of(context))
    _say(store.operator.promote(number, lineage, why=why, by=by or _default_user()))


def history(context: typer.Context) -> None:
    """Show what was decided about serving: when, who, what, why. The newest 200 decisions, newest last."""
    store = snapshot_store(config_of(context))
    decisions = store.decisions()
    if not decisions:
        console.print("nothing was decided yet: scorers serve the current snapshot", highlight=False)
        return
    table = Table(box=None)
    for title in ("when (UTC)", "who", "what", "version", "in service before", "why"):
        table.add_column(title, overflow="fold")
    for decision in decisions:
        cells = [decision.by, decision.action, decision.name, decision.before or "–", decision.why]
        table.add_row(utc(decision.at_ms), *cells)
    console.print(table)


def _say(decision: "Decision") -> None:
    before = f"; before: {decision.before}" if decision.before else ""
    console.print(f"{decision.effect}{before}", highlight=False, soft_wrap=True)
