"""``smes curves``: the newest lines of a run's metrics over time, as a table."""

import json
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from smes.errors import SmesError
from smes_cli.console import console, number
from smes_cli.times import utc

_LAST = 20
_BINARY = {"auc": "AUC", "gauc_windowed": "GAUC", "ne": "NE", "calibration": "calib."}
_REGRESSION = {"xauc": "XAUC", "mae": "MAE", "mean_bias": "bias"}


def curves(
    folder: Annotated[Path, typer.Argument(help="Folder of trainer.history.directory, or of backtest --history.")],
    last: Annotated[
        int | None,
        typer.Option("--last", help="So many of the newest lines; default: 20, for TensorBoard all of them.", min=1),
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option("--task", help="Only this task; may be given several times.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the lines as they are.")] = False,
    tensorboard: Annotated[
        Path | None,
        typer.Option(
            "--tensorboard",
            help="Write event files for TensorBoard below this folder, instead of printing: one for each lineage, in "
            "place of what was written there before (needs smes-online[tensorboard]).",
        ),
    ] = None,
) -> None:
    """Print the newest windows of a run: how much was trained on, the metrics of each task, the experts."""
    from trainer.history import read_history

    if as_json and tensorboard is not None:
        raise ValueError("--json --tensorboard: expected at most one of the two")
    most = _LAST if last is None and tensorboard is None else last
    lines = list(deque(read_history(folder), maxlen=most))
    if not lines:
        raise SmesError(f"{folder}: no line of a history yet, expected one when the first window has closed")
    known = lines[-1]["tasks"]
    if unknown := [name for name in task or () if name not in known]:
        raise ValueError(f"--task {unknown[0]}: no such task, expected one of {', '.join(known)}")
    if tensorboard is not None:
        from smes_cli.curves_tensorboard import write_tensorboard

        for lineage, count in write_tensorboard(tensorboard, lines, task).items():
            console.print(f"{tensorboard / lineage}: {count:,} lines", highlight=False, soft_wrap=True)
        return
    if as_json:
        for line in lines:
            print(json.dumps(line))  # noqa: T201 - as they are: a terminal would fold them
        return
    for name in task or known:
        console.print(_table(name, lines))
        console.print()


def _table(name: str, lines: list[dict[str, Any]]) -> Table:
    figures = [line["tasks"].get(name, {}) for line in lines]
    of_regression = any(each.get(key) is not None for each in figures for key in _REGRESSION)
    columns = _REGRESSION if of_regression else _BINARY
    table = Table(title=name, box=None)
    table.title_justify = "left"
    for title in ("event time", "step", "impressions", "positives", *columns.values(), "dead", "drift", "rows", "lag"):
        table.add_column(title, justify="right", overflow="fold")
    for line, each in zip(lines, figures, strict=True):
        table.add_row(
            *_cells(line), number(each.get("positives")), *(number(each.get(key)) for key in columns), *_state(line)
        )
    return table


def _cells(line: dict[str, Any]) -> Iterator[str]:
    yield utc(line["event_time_ms"])
    yield number(line["step"])
    yield number(line["impressions"])


def _state(line: dict[str, Any]) -> Iterator[str]:
    yield number(line["experts"]["dead"])
    yield number(line["experts"]["drift"])
    yield number(line["rows"]["in_use"])
    yield number(line["lag"] and line["lag"]["records"])
