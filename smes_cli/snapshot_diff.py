"""``smes snapshots diff``: what lies between two versions: metrics, rows, dense weights, routing."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table

from smes.errors import SnapshotNotFound
from smes_cli.command_line import ReportPath, config_of
from smes_cli.console import console, number, write_report
from smes_cli.serving_decisions import Version
from smes_cli.snapshot_places import Lineage, none_published, snapshot_store, typed_version

if TYPE_CHECKING:
    from feature_store.differences import Distance, VersionDifference
    from feature_store.manifest import Manifest
    from feature_store.snapshots import SnapshotStore

_FIGURES = ("examples", "positives", "auc", "gauc_windowed", "ne", "calibration", "xauc", "mae", "mean_bias")
_MOST_TENSORS = 10


def diff(context: typer.Context, a: Version, b: Version, lineage: Lineage = None, report: ReportPath = None) -> None:
    """Compare two versions, held ones too: metrics, rows, dense weights, routing. Loads both."""
    from feature_store.differences import difference

    config = config_of(context)
    store = snapshot_store(config)
    if not store.list() and not store.held():
        raise none_published(config)
    first, second = (_found(store, text, lineage) for text in (a, b))
    weights = difference(store, first, second)
    result = {
        "a": _described(first),
        "b": _described(second),
        "tasks": _tasks(first, second),
        "rows": {
            "before": weights.rows_before,
            "after": weights.rows_after,
            "added": weights.added,
            "removed": weights.removed,
            "changed": weights.changed,
            "columns": {name: asdict(distance) for name, distance in weights.columns.items()},
        },
        "dense": {
            "in_all": weights.dense_in_all and asdict(weights.dense_in_all),
            "tensors": {name: asdict(distance) for name, distance in weights.dense.items()},
            "in_one_only": list(weights.dense_other),
        },
        "experts": _experts(first, second),
    }
    for table in _tables(result):
        console.print(table)
        console.print()
    _print_weights(weights)
    write_report(result, report)


def _found(store: "SnapshotStore", text: str, lineage: str | None) -> "Manifest":
    version, lineage = typed_version(text, lineage)
    if lineage is None:
        served = store.to_serve()
        if served is None:
            raise SnapshotNotFound(f"version {version}: nothing is in service, expected LINEAGE:VERSION")
        lineage = served.lineage
    return store.get(lineage, version)


def _described(manifest: "Manifest") -> dict[str, Any]:
    return {
        "lineage": manifest.lineage,
        "version": manifest.version,
        "step": manifest.step,
        "event_time_ms": manifest.event_time_ms,
        "held": manifest.held,
    }


def _tasks(a: "Manifest", b: "Manifest") -> dict[str, dict[str, list[Any]]]:
    """Task → figure → its value in A and in B; figures that neither has are left out."""
    before, after = (_mapping(m.metrics.get("tasks")) for m in (a, b))
    found: dict[str, dict[str, list[Any]]] = {}
    for task in [*before, *(name for name in after if name not in before)]:
        one, two = _mapping(before.get(task)), _mapping(after.get(task))
        pairs = {name: [_plain(one.get(name)), _plain(two.get(name))] for name in _FIGURES}
        found[task] = {name: pair for name, pair in pairs.items() if pair != [None, None]}
    return found


def _experts(a: "Manifest", b: "Manifest") -> dict[str, Any]:
    """Figures of the routing as ``name → [in A, in B]``, and how far the load on the experts moved."""
    before, after = (_mapping(m.metrics.get("experts")) for m in (a, b))
    flat_a, flat_b = dict(_flat(before)), dict(_flat(after))
    figures = {
        name: [flat_a.get(name), flat_b.get(name)] for name in [*flat_a, *(n for n in flat_b if n not in flat_a)]
    }
    load_a, load_b = before.get("load_share"), after.get("load_share")
    moved = None
    if isinstance(load_a, list) and isinstance(load_b, list) and load_a and len(load_a) == len(load_b):
        moved = sum(abs(x - y) for x, y in zip(load_a, load_b, strict=True)) / 2
    return {"figures": figures, "load_share": [load_a, load_b], "load_moved": moved}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + name, value


def _tables(result: Mapping[str, Any]) -> Iterator[Table]:
    names = [f"{result[side]['lineage']}:{result[side]['version']}" for side in ("a", "b")]
    if result["tasks"]:
        table = _table("Metrics at each cut", "task", "figure", *names, "difference")
        for task, figures in result["tasks"].items():
            for figure, pair in figures.items():
                table.add_row(task, figure, *_cells(pair))
        yield table
    figures = result["experts"]["figures"]
    if figures:
        table = _table("Routing", "figure", *names, "difference")
        for figure, pair in figures.items():
            table.add_row(figure, *_cells(pair))
        if result["experts"]["load_moved"] is not None:
            for i, pair in enumerate(zip(*result["experts"]["load_share"], strict=True)):
                table.add_row(f"load of expert {i}", *_cells(pair))
            table.add_row("load that moved", "", "", number(result["experts"]["load_moved"]))
        yield table


def _print_weights(weights: "VersionDifference") -> None:
    before, after = number(weights.rows_before), number(weights.rows_after)
    counts = f"{number(weights.added)} added, {number(weights.removed)} removed, {number(weights.changed)} changed"
    console.print(f"rows: {before} → {after}: {counts}", highlight=False)
    table = _table("Distance between the weights", "weights", "rms", "largest", "relative")
    for name, distance in weights.columns.items():
        table.add_row(f"{name}, of changed rows", *_distance(distance))
    if weights.dense_in_all is not None:
        table.add_row("dense, in all", *_distance(weights.dense_in_all))
    farthest = sorted(weights.dense.items(), key=lambda pair: -(pair[1].relative or 0.0))[:_MOST_TENSORS]
    for name, distance in farthest:
        table.add_row(name, *_distance(distance))
    console.print(table)
    if more := len(weights.dense) - len(farthest):
        console.print(f"{more} more dense tensors are nearer", highlight=False)
    if weights.dense_other:
        names = ", ".join(weights.dense_other)
        console.print(f"in one version only, or of another shape: {names}", highlight=False, soft_wrap=True)


def _table(title: str, *columns: str) -> Table:
    table = Table(box=None, title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _cells(pair: Any) -> list[str]:
    one, two = pair
    gap = None if one is None or two is None else two - one
    return [number(one), number(two), "–" if gap is None else f"{gap:+,}" if isinstance(gap, int) else f"{gap:+,.4f}"]


def _distance(distance: "Distance") -> list[str]:
    relative = "–" if distance.relative is None else f"{distance.relative:.2%}"
    return [f"{distance.rms:.3g}", f"{distance.largest:.3g}", relative]


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _plain(value: Any) -> float | None:
    """A number of a manifest, which may hold anything."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
