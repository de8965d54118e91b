"""What the commands print of the tasks: tables of figures, the two lines of the headline, and who needs experts."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from smes_cli.console import console, number
from trainer.task_figures import RARE_BELOW

Figures = Mapping[str, Mapping[str, Any]]
"""Task name → figures, under the report's keys."""

_BINARY = {"auc": "AUC", "gauc_windowed": "GAUC", "ne": "NE", "calibration": "calibration"}
_REGRESSION = {"xauc": "XAUC", "mae": "MAE", "mean_bias": "mean bias"}
_OF_A_BASELINE = ("auc", "gauc_windowed", "xauc")
_TITLE = "Progressive evaluation: scored before each step; windowed GAUC"


def print_tasks(report: Mapping[str, Any], baseline: Mapping[str, Any] | None = None, *, named: str = "") -> None:
    """Print the tables of the tasks, and the headline below them.

    Args:
        report: Has ``tasks`` and ``headline``.
        baseline: The same of a ranker trained on the same batches, some of which stands beside the first.
        named: Its name.
    """
    for table in task_tables(report["tasks"], baseline and baseline["tasks"], named=named):
        console.print(table)
        console.print()
    for line in headline_lines(report["headline"], baseline and baseline["headline"], named=named):
        console.print(line, highlight=False)
    if report.get("arms"):
        console.print()
        console.print(arms_table(report["arms"]))
    if report.get("arms_left_out"):
        console.print(f"{report['arms_left_out']:,} impressions of further arms are left out", highlight=False)


def task_tables(tasks: Figures, baseline: Figures | None = None, *, named: str = "") -> list[Table]:
    """A table of the binary tasks and one of the regression tasks, where there are such, in the order of the schema.

    Args:
        tasks: The figures.
        baseline: Those of a ranker trained on the same batches, some of which stand beside the first.
        named: Its name.
    """
    regression = [name for name, m in tasks.items() if any(m[key] is not None for key in _REGRESSION)]
    kinds = [(_BINARY, [name for name in tasks if name not in regression]), (_REGRESSION, regression)]
    tables: list[Table] = []
    for columns, names in kinds:
        if not names:
            continue
        cells = {"task": names, "positives": [number(tasks[name]["positives"]) for name in names]}
        if columns is _BINARY:
            cells["base rate"] = [_share(tasks[name]["base_rate"]) for name in names]
        cells |= {title: [number(tasks[name][key]) for name in names] for key, title in columns.items()}
        for key in _OF_A_BASELINE:
            if baseline is not None and key in columns:
                cells[f"{named} {columns[key]}"] = [number(baseline[name][key]) for name in names]
        tables.append(_table(cells, title="" if tables else _TITLE))
    return tables


def headline_lines(
    headline: Mapping[str, Any], baseline: Mapping[str, Any] | None = None, *, named: str = ""
) -> list[str]:
    """A line each of the dense and of the rare tasks, where there are such.

    Args:
        headline: As in the report.
        baseline: That of a ranker trained on the same batches.
        named: Its name.
    """
    lines: list[str] = []
    for kind in ("dense", "rare"):
        if (means := headline[kind]) is None:
            continue
        bound = f"base rate {'below' if kind == 'rare' else 'from'} {RARE_BELOW:.0%}"
        beside = f"; {named}: {_means(baseline[kind])}" if baseline and baseline[kind] else ""
        lines.append(f"{kind} tasks ({len(means['tasks'])}, {bound}), mean {_means(means)}{beside}")
    return lines


def own_experts_table(report: Sequence[Mapping[str, Any]]) -> Table:
    """Which tasks need experts of their own; see :func:`smes.model.own_experts.own_experts_report`."""
    cells = {
        "task": [m["task"] for m in report],
        "positives": [number(m["positives"]) for m in report],
        "own, %": [_gain(m["own"]) for m in report],
        "shared, %": [_gain(m["shared"]) for m in report],
        "own over shared, %": [_gain(m["lead"]) for m in report],
        "cosine": [number(m["cosine"], 2) for m in report],
        "verdict": [m["verdict"] for m in report],
    }
    title = "Which tasks need experts of their own? How much of its loss a task would gain by them"
    return _table(cells, title=title, left=("task", "verdict"))


def arms_table(arms: Mapping[str, Mapping[str, Any]]) -> Table:
    """How each arm of the scorer served, task by task; below its figures how much they are above the main arm's."""
    columns = {"mean_label": "mean label", "auc": "AUC", "ne": "NE", "calibration": "calibration", "mae": "MAE"}
    tasks = next(iter(arms.values()))["tasks"]
    rows = [(task, arm, figures["tasks"][task]) for task in tasks for arm, figures in arms.items()]
    cells = {
        "task": [task for task, _, _ in rows],
        "arm": [arm for _, arm, _ in rows],
        "examples": [number(figures["examples"]) for _, _, figures in rows],
    }
    for key, title in columns.items():
        if any(figures[key] for _, _, figures in rows):
            cells[title] = [_arm_cell(figures[key]) for _, _, figures in rows]
    title = "Arms of the scorer: scores as served, 95 % intervals over users; below them, over main"
    return _table(cells, title=title, left=("task", "arm"))


def _arm_cell(figure: Mapping[str, Any] | None) -> str:
    if figure is None or figure["value"] is None:
        return "–"
    own = number(figure["value"]) + _half(figure["value"], figure["high"])
    if figure["over_main"] is None:
        return own
    return f"{own}\n{figure['over_main']:+,.4f}{_half(figure['over_main'], figure['over_main_high'])}"


def _half(value: float, high: float | None) -> str:
    return "" if high is None else f"±{high - value:,.4f}"


def _means(means: Mapping[str, Any]) -> str:
    return f"AUC {number(means['auc'])}, GAUC {number(means['gauc_windowed'])}, NE {number(means['ne'])}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.3g}%"


def _gain(gain: Mapping[str, float] | None) -> str:
    return "–" if gain is None else f"{gain['pct']:+.2f}±{gain['error_pct']:.2f}"


def _table(cells: Mapping[str, Sequence[str]], *, title: str, left: tuple[str, ...] = ("task",)) -> Table:
    """A narrow table: where the terminal is too narrow for it, titles and names are folded, but no number is."""
    lines = box.SIMPLE_HEAD if console.is_terminal else None
    table = Table(title=title, title_justify="left", box=lines, padding=(0, 1, 0, 0), show_edge=False)
    for column, values in cells.items():
        is_left = column in left
        table.add_column(
            column,
            justify="left" if is_left else "right",
            overflow="fold",
            min_width=None if is_left else max(map(len, values), default=0),
        )
    for row in zip(*cells.values(), strict=True):
        table.add_row(*row)
    return table
