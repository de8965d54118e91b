"""What is printed of the tasks: whole names and numbers, at 100 columns, in a pipe, and with 40 tasks."""

import io
import re
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from smes_cli.console import console, number
from smes_cli.task_tables import arms_table, headline_lines, own_experts_table, task_tables

BINARY: dict[str, Any] = {
    "positives": 1_234_567,
    "base_rate": 0.00123,
    "auc": 0.7261,
    "gauc_windowed": 0.6312,
    "ne": 0.8749,
}
BINARY |= {"calibration": 1.0213, "ece": 0.0101, "xauc": None, "mae": None, "mean_bias": None}
WATCH: dict[str, Any] = {
    **dict.fromkeys(BINARY),
    "positives": 162_268,
    "xauc": 0.6718,
    "mae": 13.4567,
    "mean_bias": -0.2345,
}
GAIN = {"pct": -12.345, "error_pct": 10.017}
SHOWN = ("1,234,567", "0.123%", "0.7261", "0.6312", "0.8749", "1.0213")


def printed(*tables: Table, width: int) -> list[str]:
    screen = Console(width=width, file=io.StringIO(), markup=False, emoji=False)
    for table in tables:
        screen.print(table)
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue().splitlines()


@pytest.mark.parametrize("baseline", [False, True])
@pytest.mark.parametrize("width", [80, 100])
def test_forty_tasks_fit_a_terminal(width: int, baseline: bool) -> None:
    tasks: dict[str, Any] = {f"task_{t:02d}": BINARY for t in range(40)} | {"watch_time": WATCH}
    lines = printed(*task_tables(tasks, tasks if baseline else None, named="shared_bottom"), width=width)
    assert max(map(len, lines)) <= width
    for t in range(40):
        (row,) = [line for line in lines if line.startswith(f"task_{t:02d}")]
        assert row.split()[1:] == [*SHOWN, *(SHOWN[2:4] if baseline else ())]
    (row,) = [line for line in lines if line.startswith("watch")]
    assert row.split()[1:5] == ["162,268", "0.6718", "13.4567", "-0.2345"]


def test_a_log_without_regression_tasks_has_one_table_and_one_without_binary_tasks_too() -> None:
    assert len(task_tables({"click": BINARY})) == len(task_tables({"watch": WATCH})) == 1
    assert len(task_tables({"click": BINARY, "watch": WATCH})) == 2


def test_a_task_named_like_markup_keeps_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    nothing: dict[str, Any] = dict.fromkeys(BINARY)
    for table in task_tables({"bold[red]:smile:": nothing}):
        console.print(table)
    assert "bold[red]:smile:" in capsys.readouterr().out


def test_no_cell_is_cut_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    name = "a_task_whose_name_is_longer_than_that_of_any_other_" * 3
    tasks: dict[str, Any] = {name: BINARY | {"positives": 10**9}, name[::-1]: WATCH | {"mae": 1e9}}
    for table in task_tables(tasks, tasks, named="shared_bottom"):
        console.print(table)
    said = capsys.readouterr().out
    assert {name, name[::-1], number(10**9), number(1e9)} <= set(re.split(r"\s+", said))
    assert "…" not in said


def test_the_headline_says_which_tasks_are_rare_and_what_a_baseline_has() -> None:
    dense = {"tasks": ["click", "like"], "auc": 0.7, "gauc_windowed": 0.6, "ne": 0.9}
    rare = {"tasks": ["follow"], "auc": 0.65, "gauc_windowed": None, "ne": 1.01}
    assert headline_lines({"dense": dense, "rare": rare}, {"dense": rare, "rare": dense}, named="mmoe") == [
        "dense tasks (2, base rate from 1%), mean AUC 0.7000, GAUC 0.6000, NE 0.9000; "
        "mmoe: AUC 0.6500, GAUC –, NE 1.0100",
        "rare tasks (1, base rate below 1%), mean AUC 0.6500, GAUC –, NE 1.0100; "
        "mmoe: AUC 0.7000, GAUC 0.6000, NE 0.9000",
    ]
    assert headline_lines({"dense": None, "rare": None}) == []
    assert len(headline_lines({"dense": dense, "rare": None}, {"dense": None, "rare": None}, named="mmoe")) == 1


@pytest.mark.parametrize("width", [80, 100])
def test_who_needs_experts_fits_a_terminal(width: int) -> None:
    task = {"positives": 162_268, "own": GAIN, "shared": GAIN, "lead": None, "cosine": -0.123}
    report = [{**task, "task": f"task_{t:02d}", "verdict": "too few positives to tell"} for t in range(40)]
    lines = printed(own_experts_table(report), width=width)
    assert max(map(len, lines)) <= width
    rows = [line.split() for line in lines if "162,268" in line]
    assert len(rows) == 40
    assert rows[7][:7] == ["task_07", "162,268", "-12.35±10.02", "-12.35±10.02", "–", "-0.12", "too"]


def _figure(value: float | None, half: float | None, over_main: float | None = None) -> dict[str, float | None]:
    """A figure of an arm as reports have it; the difference has twice the interval."""
    own = value is not None and half is not None
    return {
        "value": value,
        "high": value + half if value is not None and half is not None else None,
        "over_main": over_main,
        "over_main_high": over_main + 2 * half if own and over_main is not None and half is not None else None,
    }


def test_the_arms_stand_side_by_side_with_their_difference_to_the_main_one() -> None:
    def click(auc: float, over_main: float | None) -> dict[str, Any]:
        figures = {"examples": 12_345, "mean_label": _figure(0.31, 0.0123), "auc": _figure(auc, 0.003, over_main)}
        return {**figures, "ne": _figure(0.9, None), "calibration": _figure(None, None), "mae": None}

    arms = {"main": {"tasks": {"click": click(0.7412, None)}}, "b": {"tasks": {"click": click(0.7433, 0.0021)}}}

    lines = printed(arms_table(arms), width=120)
    above = next(n for n, line in enumerate(lines) if line.lstrip().startswith("task"))
    title, head, lines = " ".join(lines[:above]), lines[above], lines[above + 1 :]

    assert "95 % intervals over users" in title
    assert head.split() == ["task", "arm", "examples", "mean", "label", "AUC", "NE", "calibration"]
    cells = [line.split() for line in lines if line.strip()]
    assert cells == [
        ["click", "main", "12,345", "0.3100±0.0123", "0.7412±0.0030", "0.9000", "–"],
        ["click", "b", "12,345", "0.3100±0.0123", "0.7433±0.0030", "0.9000", "–"],
        ["+0.0021±0.0060"],
    ]
