"""The routing under the lens: what ``smes backtest --routing FILE`` wrote, as a table and as heat maps.

    smes backtest PATH/TO/LOG --routing routing.json
    python -m benchmarks.routing routing.json --plot routing.png

The plot: tasks × experts in the newest whole stretch, then each task's load over time; overlap between tasks; skew,
dead experts and drift over time. Needs matplotlib (the ``bench`` extra) for the plot only.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.routing_plots import plot_routing


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, or 2 where the file is none of a ranker with experts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("routing", type=Path, help="what smes backtest --routing wrote")
    parser.add_argument("--plot", type=Path, help="write the heat maps here, as PNG")
    options = parser.parse_args(arguments)
    report: dict[str, Any] = json.loads(options.routing.read_text(encoding="utf-8"))
    if not report["stretches"]:
        print(f"{options.routing}: no stretches, expected the routing of a ranker with experts", file=sys.stderr)
        return 2
    for line in table(report):
        print(line)
    if options.plot:
        plot_routing(report, options.plot)
        print(f"wrote {options.plot}")
    return 0


def table(report: dict[str, Any]) -> list[str]:
    """A line a stretch: what it was, how the load lay, and how far the routers moved in it."""
    lines = [f"{'until':>12} {'steps':>6} {'dead':>5} {'skew':>6} {'worst task':>22} {'overlap':>8} {'drift':>6}"]
    until = 0
    for stretch in report["stretches"]:
        until += stretch["instances"]
        of_tasks = [(skew, name) for skew, name in zip(stretch["load_skew_of_tasks"], report["tasks"], strict=True)]
        worst, name = max(of_tasks)
        lines.append(
            f"{until:12,} {stretch['steps']:6} {len(stretch['dead']):5} {stretch['load_skew']:6.2f} "
            f"{name[:15]:>15} {worst:6.2f} {_cell(mean_overlap(stretch)):>8} {_cell(_mean(stretch['drift'])):>6}"
        )
    return lines


def mean_overlap(stretch: dict[str, Any]) -> float | None:
    """Over the pairs of tasks; None for one task, or while the stretch is open."""
    matrix = stretch["overlap"] or []
    return _mean([value for t, row in enumerate(matrix) for value in row[t + 1 :]])


def _mean(values: list[float] | None) -> float | None:
    return sum(values) / len(values) if values else None


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    raise SystemExit(main())
