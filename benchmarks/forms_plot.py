"""Plots what the steps from the paper's form of SMES to the default have given, from the tables of docs/experiments.

Nothing is measured here: the figures are read from the pages that have them, so picture and pages cannot differ.

Run: ``python -m benchmarks.forms_plot docs/images/smes-forms-measured.png``. Needs matplotlib.
"""

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAGES = Path(__file__).resolve().parents[1] / "docs" / "experiments"
_BLUE, _ORANGE, _GREY = "#0072B2", "#E69F00", "#999999"

FORMS = {
    "the paper's form, E = 64, 2 + 1 (`paper_e64`)": "the paper's form",
    "one group of all tasks": "one group for all tasks",
    "`mmoe`, 10 experts": "MMoE, a dense ranker",
    "routers on the encoder": "groups, but routers on the encoder",
    "no groups: 2 for all tasks + 2 for each, routers per task": "no groups, a router per task",
    "a router per task, selection per group": "groups, but a router per task",
    "SMES (`smes_e256`)": "a router per group, on the raw input",
}
"""Row of the table in ``worlds.md`` → how the plot names it."""

STEPS = {
    "the default before": "before",
    "smaller, learning rate 0.002": "smaller",
    "learning: gradient factor, prior, linear part at 0.03": "+ rare tasks learn more",
    "trunk [64] on the encoder, experts of width 64": "+ trunk, wider experts",
    "encoder of 96, experts without norm": "+ no norm",
    "borrowing": "+ borrowing",
    "routers on raw input, 64 experts, encoder 64: the default now": "the default now",
}
"""Row of the first table in ``rare-tasks.md`` → how the plot names it."""


def column(page: str, heading: str, rows: dict[str, str], name: str) -> dict[str, float]:
    """One column of the first table under a heading that has it.

    Args:
        page: Name of the page in ``docs/experiments``.
        heading: The heading.
        rows: First cell of each row wanted, without asterisks → its name in the answer.
        name: Of the column.

    Raises:
        ValueError: There is no such column or row.
    """
    text = (PAGES / page).read_text(encoding="utf-8").partition(f"\n{heading}\n")[2]
    table = [[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in re.findall(r"^\|.*\|$", text, re.M)]
    cells = {row[0].replace("**", ""): row for row in reversed(table)}  # the first of equal ones counts
    if not table or name not in table[0]:
        raise ValueError(f"{page}, {heading}: expected a table with a column {name!r}")
    place = table[0].index(name)
    if missing := [row for row in rows if row not in cells]:
        raise ValueError(f"{page}, {heading}: no row {missing[0]!r}")
    return {short: float(cells[row][place].strip("*")) for row, short in rows.items()}


def measured() -> tuple[dict[str, float], dict[str, float]]:
    """GAUC of forms in the world ``conflict``, and AUC of rare tasks by step, as the pages have them."""
    forms = column("worlds.md", "## One thing changed at a time", FORMS, "GAUC")
    steps = column("rare-tasks.md", "## What was wrong, and what the default does now", STEPS, "rare")
    return forms, steps


def plot(path: Path) -> None:
    """Write the picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    forms, steps = measured()
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    colours = [_GREY if name.startswith("MMoE") else _BLUE for name in forms]
    _points(left, forms, colours, "World “conflict”: GAUC")
    _points(right, steps, [_ORANGE] * len(steps), "KuaiRand-Pure: mean AUC of rare tasks")
    FigureCanvasAgg(figure).print_png(str(path), metadata={"Software": None})


def _points(axes: "Axes", values: dict[str, float], colours: list[str], title: str) -> None:
    figures = list(values.values())
    axes.hlines(range(len(values)), min(figures), figures, color=colours, linewidth=2, alpha=0.5)
    axes.scatter(figures, range(len(values)), color=colours, s=40, zorder=2)
    for place, value in enumerate(figures):
        axes.text(value, place, f"   {value:.3f}", va="center", fontsize=8)
    axes.set_yticks(range(len(values)), list(values))
    axes.invert_yaxis()
    axes.set_xlim(min(figures) - 0.01, max(figures) + 0.025)
    axes.set_title(title, fontsize=9, loc="left")
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    plot(Path(sys.argv[1]))
