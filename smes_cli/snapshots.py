"""``smes snapshots``: the model snapshots in Redis."""

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from smes.errors import SnapshotNotFound
from smes_cli.command_line import config_of
from smes_cli.console import console, number
from smes_cli.serving_decisions import history, pin, promote, rollback, unpin
from smes_cli.snapshot_diff import diff
from smes_cli.snapshot_places import none_published, snapshot_store
from smes_cli.times import utc

if TYPE_CHECKING:
    from feature_store.snapshots import SnapshotStore
    from smes_cli.config import Config

snapshots_app = typer.Typer(no_args_is_help=True, help="Model snapshots in Redis, and which of them is served.")
for _command in (pin, unpin, rollback, promote, history, diff):
    snapshots_app.command(_command.__name__)(_command)


@snapshots_app.command("list")
def snapshots_list(context: typer.Context) -> None:
    """List the snapshots that can be loaded, newest last, and what is held: which is current, pinned, rolled back."""
    from feature_store.serving_marks import ServingMarks

    config = config_of(context)
    store = snapshot_store(config)
    marks = ServingMarks.of_store(store)
    manifests, held = store.list(), store.held()
    if not manifests and not held:
        raise none_published(config)
    bases = store.bases(manifests)
    table = Table(box=None)
    for title in ("lineage", "version", "parent", "kind", "bytes", "base", "event time (UTC)", "cut at (UTC)", ""):
        table.add_column(title, overflow="fold")
    for manifest in (*manifests, *held):
        # Versions without separators: they are typed again, for `show`.
        parent = "–" if manifest.parent is None else str(manifest.parent)
        base = bases.get((manifest.lineage, manifest.version))
        cells = [str(manifest.version), parent, manifest.kind, number(manifest.total_bytes)]
        cells.append("–" if base is None else number(base.total_bytes))
        cells += [utc(manifest.event_time_ms), utc(manifest.created_ms)]
        table.add_row(manifest.lineage, *cells, ", ".join(marks.of(manifest, is_held=manifest in held)))
    console.print(table)
    for problem in marks.problems:
        console.print(problem, highlight=False, soft_wrap=True)


@snapshots_app.command("show")
def snapshots_show(
    context: typer.Context,
    version: Annotated[
        int | None, typer.Argument(help="Version; default: the current one, with --lineage the newest of that lineage.")
    ] = None,
    lineage: Annotated[str | None, typer.Option(help="Lineage; default: the current one's.")] = None,
) -> None:
    """Show a snapshot's manifest as JSON."""
    config = config_of(context)
    store = snapshot_store(config)
    if lineage is not None:
        manifest = store.get(lineage, _newest(config, store, lineage) if version is None else version)
    else:
        current = store.current()
        if current is None:
            raise none_published(config)
        manifest = current if version is None else store.get(current.lineage, version)
    console.print_json(json.dumps(json.loads(manifest.to_json())))


def _newest(config: "Config", store: "SnapshotStore", lineage: str) -> int:
    """The newest version of a lineage that can be loaded."""
    kept = store.list()
    if not kept:
        raise none_published(config)
    versions = [manifest.version for manifest in kept if manifest.lineage == lineage]
    if not versions:
        there = ", ".join(sorted({manifest.lineage for manifest in kept}))
        raise SnapshotNotFound(f"--lineage {lineage}: no snapshot of that lineage, expected one of {there}")
    return max(versions)
