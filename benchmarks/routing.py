"""Figures of the routing, as a table and as heat maps: of a backtest, or of a ranker in a synthetic world.

    smes backtest PATH/TO/LOG --routing routing.json
    python -m benchmarks.routing routing.json --plot routing.png
    python -m benchmarks.routing --world segments --ranker smes_e256 --impressions 262144 --plot segments.png

The plot: tasks × experts in the newest segment that has ended, and over time; overlap between tasks; skew, dead
experts and drift over time. How to read them: docs/concepts/architecture.md. The plot needs matplotlib (the
``bench`` extra).
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality_config import (
    CHOSEN_FILE,
    DEFAULT_FILE,
    Settings,
    build_config,
    load_chosen,
    load_quality,
    settings_of,
)
from benchmarks.routing_plots import plot_routing
from benchmarks.world_runs import BATCH, Stream
from benchmarks.worlds import WORLDS, World
from smes.model.learner import Learner
from trainer.routing_figures import routing_report
from trainer.routing_history import RoutingHistory


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, or 2 for arguments that are wrong."""
    options = _parser().parse_args(arguments)
    try:
        report = _of_world(options) if options.world else json.loads(options.routing.read_text(encoding="utf-8"))
        if not report["segments"]:
            what = options.ranker if options.world else options.routing
            raise ValueError(f"{what}: no segments, expected the routing of a ranker with experts")
    except (OSError, ValueError) as error:
        print(f"benchmarks/routing.py: {error}", file=sys.stderr)
        return 2
    for line in table(report):
        print(line)
    if options.json:
        options.json.write_text(json.dumps(report) + "\n", encoding="utf-8")
    if options.plot:
        plot_routing(report, options.plot)
    return 0


def world_routing(settings: Settings, ranker: str, stream: Stream, seed: int) -> dict[str, Any]:
    """Train a ranker in a world; its routing over time.

    Args:
        settings: Of the ranker, dotted.
        ranker: Its name, for errors.
        stream: Which world, and how much of it.
        seed: Of the first weights.
    """
    config, world = build_config(settings, ranker), World(WORLDS[stream.world], stream.world_seed)
    learner = Learner(world.schema, config.model, config.optimizer, device=torch.device("cpu"), seed=seed)
    history = RoutingHistory()

    def close_if_due() -> None:
        if history.is_full(pending=False) and (choices := learner.choices(*history.probe)) is not None:
            history.close(choices.numpy())

    for examples, _ in world.stream(stream.impressions, BATCH):
        close_if_due()
        load = learner.step(learner.prepare(examples)).expert_load
        if load is not None:
            history.add(examples, load.numpy())
    close_if_due()
    return routing_report(history, learner.expert_limits, [task.name for task in world.schema.tasks])


def table(report: dict[str, Any]) -> list[str]:
    """A line per segment: its size, its load, and how far the routers moved in it."""
    lines = [f"{'until':>12} {'steps':>6} {'dead':>5} {'skew':>6} {'worst task':>22} {'overlap':>8} {'drift':>6}"]
    until = 0
    for segment in report["segments"]:
        until += segment["instances"]
        worst, name = max(zip(segment["load_skew_of_tasks"], report["tasks"], strict=True))
        lines.append(
            f"{until:12,} {segment['steps']:6} {len(segment['dead']):5} {segment['load_skew']:6.2f} "
            f"{name[:15]:>15} {worst:6.2f} {_cell(mean_overlap(segment)):>8} {_cell(_mean(segment['drift'])):>6}"
        )
    return lines


def mean_overlap(segment: dict[str, Any]) -> float | None:
    """Over the pairs of tasks; None for one task, or while the segment is open."""
    matrix = segment["overlap"] or []
    return _mean([value for t, row in enumerate(matrix) for value in row[t + 1 :]])


def _of_world(options: argparse.Namespace) -> dict[str, Any]:
    comparison = load_quality(options.config).worlds
    if options.ranker not in comparison.rankers:
        raise ValueError(f"--ranker {options.ranker!r}: expected one of {', '.join(comparison.rankers)}")
    settings = settings_of(comparison, options.ranker, load_chosen(options.chosen).get("worlds", {}))
    stream = Stream(options.world, options.world_seed, options.impressions)
    return world_routing(settings, options.ranker, stream, options.seed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("routing", type=Path, nargs="?", help="what smes backtest --routing wrote")
    where.add_argument("--world", choices=WORLDS, help="instead: train in this world, as benchmarks.quality does")
    parser.add_argument("--ranker", default="smes_e256", help="in a world: a ranker of the comparison there")
    parser.add_argument("--impressions", type=int, default=2_097_152, help="of the world")
    parser.add_argument("--world-seed", type=int, default=0, help="of everything in the world but the model")
    parser.add_argument("--seed", type=int, default=0, help="of the model")
    parser.add_argument("--config", type=Path, default=DEFAULT_FILE, help="what is compared")
    parser.add_argument("--chosen", type=Path, default=CHOSEN_FILE, help="what tuning chose")
    parser.add_argument("--json", type=Path, help="also write the routing over time")
    parser.add_argument("--plot", type=Path, help="also write the heat maps, as PNG; needs matplotlib")
    return parser


def _mean(values: list[float] | None) -> float | None:
    return sum(values) / len(values) if values else None


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    sys.exit(main())
