"""``smes snapshots``: the model snapshots in Redis."""

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from smes.errors import SnapshotNotFound
from smes_cli.command_line import config_of
from smes_cli.console import console, number

if TYPE_CHECKING:
    from feature_store.snapshots import SnapshotStore
    from smes_cli.config import Config

snapshots_app = typer.Typer(no_args_is_help=True, help="Model snapshots in Redis.")


@snapshots_app.command("list")
def snapshots_list(context: typer.Context) -> None:
    """List the snapshots that can be loaded, newest last, and the bases that deltas can be loaded from."""
    config = config_of(context)
    store = _snapshot_store(config)
    current = store.pointer()
    manifests = store.list()
    if not manifests:
        raise _none_published(config)
    bases = store.bases(manifests)
    table = Table(box=None)
    for title in ("lineage", "version", "parent", "kind", "bytes", "base", "event time (UTC)", "cut at (UTC)", ""):
        table.add_column(title, overflow="fold")
    for manifest in manifests:
        mark = "current" if current == f"{manifest.lineage}:{manifest.version}" else ""
        # Versions without separators: they are typed again, for `show`.
        parent = "–" if manifest.parent is None else str(manifest.parent)
        base = bases.get((manifest.lineage, manifest.version))
        cells = [str(manifest.version), parent, manifest.kind, number(manifest.total_bytes)]
        cells.append("–" if base is None else number(base.total_bytes))
        table.add_row(manifest.lineage, *cells, _utc(manifest.event_time_ms), _utc(manifest.created_ms), mark)
    console.print(table)


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
    store = _snapshot_store(config)
    if lineage is not None:
        manifest = store.get(lineage, _newest(config, store, lineage) if version is None else version)
    else:
        current = store.current()
        if current is None:
            raise _none_published(config)
        manifest = current if version is None else store.get(current.lineage, version)
    console.print_json(json.dumps(json.loads(manifest.to_json())))


def _newest(config: "Config", store: "SnapshotStore", lineage: str) -> int:
    """The newest version of a lineage that can be loaded."""
    kept = store.list()
    if not kept:
        raise _none_published(config)
    versions = [manifest.version for manifest in kept if manifest.lineage == lineage]
    if not versions:
        there = ", ".join(sorted({manifest.lineage for manifest in kept}))
        raise SnapshotNotFound(f"--lineage {lineage}: no snapshot of that lineage, expected one of {there}")
    return max(versions)


def _snapshot_store(config: "Config") -> "SnapshotStore":
    from feature_store.signing import Signer
    from feature_store.snapshots import SnapshotStore
    from smes_io.redis_client import connect

    place = config.feature_store
    signer = Signer.of(place.signing, place.namespace)
    client = connect(place.redis_url, place.timeout_s, access=place.redis_access, namespace=place.namespace)
    return SnapshotStore(client, place.namespace, place.snapshots, signer=signer)


def _none_published(config: "Config") -> SnapshotNotFound:
    from smes_io.redis_client import masked

    place = config.feature_store
    return SnapshotNotFound(
        f"no snapshot was published yet in Redis at {masked(place.redis_url)}, namespace {place.namespace}"
    )


def _utc(unix_ms: int | None) -> str:
    if unix_ms is None:
        return "–"
    return datetime.fromtimestamp(unix_ms / 1000, UTC).isoformat(sep=" ", timespec="seconds").removesuffix("+00:00")
