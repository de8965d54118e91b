"""SMES against its peers: quality and cost, over several seeds, with intervals.

    python -m benchmarks.quality --world all --seeds 5 --jobs 2 --json worlds.json --plot worlds.png
    python -m benchmarks.quality --world segments --rankers smes_e256,mmoe --seeds 1 --impressions 262144
    python -m benchmarks.quality --world all --tune

Rankers and their settings are in ``quality.yaml``. Runs are kept in ``--cache``, so that an interrupted comparison goes
on where it was. Their keys say everything that a run was told, but not which code ran it: after a change of the code,
take another folder. Intervals are of 95 %, by a paired bootstrap over users; they do not hold what another world seed
or another stream would change.
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks import world_report
from benchmarks.quality_config import (
    CHOSEN_FILE,
    DEFAULT_FILE,
    Chosen,
    QualityConfig,
    load_chosen,
    load_quality,
    save_chosen,
)
from benchmarks.quality_plots import plot_worlds
from benchmarks.run_cache import Run, RunCache, run_missing
from benchmarks.world_quality import runs_of, world_figures
from benchmarks.world_runs import Stream, TruthRun
from benchmarks.world_tuning import tune_worlds
from benchmarks.worlds import WORLDS


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, or 2 where something was asked that cannot be done."""
    options = _parser().parse_args(arguments)
    try:
        config, chosen = load_quality(options.config), load_chosen(options.chosen)
        _worlds(config, chosen, options)
    except ValueError as error:
        print(f"benchmarks/quality.py: {error}", file=sys.stderr)
        return 2
    return 0


def _worlds(config: QualityConfig, chosen: Chosen, options: argparse.Namespace) -> None:
    comparison, cache = config.worlds, RunCache(options.cache)
    names = comparison.without(options.rankers)
    worlds = list(WORLDS) if options.world == "all" else [options.world]
    streams = [Stream(world, options.world_seed, options.impressions) for world in worlds]
    if options.tune:
        best = tune_worlds(comparison, names, streams, cache, options.jobs)
        save_chosen({**chosen, "worlds": {**chosen.get("worlds", {}), **best}}, options.chosen)
        return
    runs = [runs_of(comparison, names, stream, options.seeds, chosen.get("worlds", {})) for stream in streams]
    everything: list[Run] = [*(TruthRun(stream) for stream in streams), *(run for of_world in runs for run in of_world)]
    run_missing(everything, cache, options.jobs)
    figures = [world_figures(of_world, cache, options.resamples) for of_world in runs]
    for one in figures:
        print(world_report.markdown(comparison, one))
    if options.json:
        flat = world_report.flat_figures(comparison, figures, options.seeds)
        options.json.write_text(json.dumps(flat, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        plot_worlds(comparison, figures, options.plot)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", required=True, choices=[*WORLDS, "all"], help="synthetic worlds with known truth")
    parser.add_argument("--impressions", type=int, default=2_097_152, help="of each world")
    parser.add_argument("--world-seed", type=int, default=0, help="of everything in a world but the models")
    parser.add_argument("--seeds", type=int, default=5, help="model seeds 0, 1, …")
    parser.add_argument("--rankers", type=_names, default=(), help="only these, by comma")
    parser.add_argument("--tune", action="store_true", help="try every ranker's trials, on data kept for that")
    parser.add_argument("--jobs", type=int, default=1, help="single-threaded processes")
    parser.add_argument("--resamples", type=int, default=2_000, help="of the bootstrap")
    parser.add_argument("--cache", type=Path, default=Path(".quality-cache"), help="folder of finished runs")
    parser.add_argument("--config", type=Path, default=DEFAULT_FILE, help="what is compared")
    parser.add_argument("--chosen", type=Path, default=CHOSEN_FILE, help="what --tune writes and others read")
    parser.add_argument("--json", type=Path, help="also write the figures, one flat object")
    parser.add_argument("--plot", type=Path, help="also plot, as PNG; needs matplotlib")
    return parser


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


if __name__ == "__main__":
    sys.exit(main())
