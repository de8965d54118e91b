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

_BINARY = {"auc": "AUC", "gauc_windowed": "GAUC", "ne": "NE", "calibration": "calib."}
_REGRESSION = {"xauc": "XAUC", "mae": "MAE", "mean_bias": "bias"}


def curves(
    folder: Annotated[Path, typer.Argument(help="Folder of trainer.history.directory, or of backtest --history.")],
    last: Annotated[int, typer.Option("--last", help="So many of the newest lines.", min=1)] = 20,
    task: Annotated[
        list[str] | None, typer.Option("--task", help="Only this task; may be given several times.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the lines as they are.")] = False,
) -> None:
    """Print the newest windows of a run: how much was trained on, the metrics of each task, the experts."""
    from trainer.history import read_history

    lines = list(deque(read_history(folder), maxlen=last))
    if not lines:
        raise SmesError(f"{folder}: no line of a history yet, expected one when the first window has closed")
    known = lines[-1]["tasks"]
    if unknown := [name for name in task or () if name not in known]:
        raise ValueError(f"--task {unknown[0]}: no such task, expected one of {', '.join(known)}")
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
