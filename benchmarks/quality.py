"""SMES against its peers: quality and cost, over several seeds, with intervals.

    python -m benchmarks.quality --log PATH/TO/KuaiRand-Pure --tune --seeds 2 --jobs 2
    python -m benchmarks.quality --log PATH/TO/KuaiRand-Pure --seeds 5 --jobs 2 --json log.json --plot log.png
    python -m benchmarks.quality --world all --seeds 5 --jobs 2 --json worlds.json --plot worlds.png
    python -m benchmarks.quality --world rare --seeds 5 --jobs 2 --json rare.json
    python -m benchmarks.quality --world segments --rankers smes_e256,mmoe --seeds 1 --impressions 262144

Rankers and their settings are in ``quality.yaml``; what --tune chose is in ``quality_chosen.yaml``. Without --log and
--world: the folder that KUAIRAND_HOME names. Runs are kept in --cache, so that an interrupted comparison goes on where
it was. A run's key holds all its settings, but not the version of the code: use another folder after a code change.
Intervals are of 95 %, by a paired bootstrap over users; those of AUC and entropy on KuaiRand over users and positives.
They do not cover what another world seed or another stream would change.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from benchmarks import kuairand_report, quality_plots, world_report
from benchmarks.kuairand_quality import log_figures
from benchmarks.kuairand_runs import LogRun
from benchmarks.kuairand_tuning import tune_log
from benchmarks.quality_config import (
    CHOSEN_FILE,
    DEFAULT_FILE,
    Chosen,
    Comparison,
    QualityConfig,
    load_chosen,
    load_quality,
    save_chosen,
    settings_of,
)
from benchmarks.rare_worlds import RARE_WORLDS
from benchmarks.run_cache import Run, RunCache, run_missing
from benchmarks.world_quality import runs_of, world_figures
from benchmarks.world_runs import Stream, TruthRun
from benchmarks.world_tuning import tune_worlds
from benchmarks.worlds import WORLDS
from smes.errors import SmesError

_MAIN = "main"
_WORLD_HELP = "a synthetic world with known truth; `all` without rare tasks, or all with (`rare`)"


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, or 2 where something was asked that cannot be done."""
    options = _parser().parse_args(arguments)
    try:
        config, chosen = load_quality(options.config), load_chosen(options.chosen)
        (_worlds if options.world else _log)(config, chosen, options)
    except (ValueError, SmesError) as error:
        print(f"benchmarks/quality.py: {error}", file=sys.stderr)
        return 2
    return 0


def _worlds(config: QualityConfig, chosen: Chosen, options: argparse.Namespace) -> None:
    worlds = {"all": list(WORLDS), "rare": list(RARE_WORLDS)}.get(options.world, [options.world])
    which = "rare_worlds" if worlds[0] in RARE_WORLDS else "worlds"
    comparison: Comparison = getattr(config, which)
    cache, tuned = RunCache(options.cache), chosen.get(which, {})
    names = _ranker_names(comparison, options.rankers)
    streams = [Stream(world, options.world_seed, options.impressions) for world in worlds]
    if options.tune:
        best = tune_worlds(comparison, names, streams, cache, options.jobs)
        save_chosen({**chosen, which: {**tuned, **best}}, options.chosen)
        return
    runs = [runs_of(comparison, names, stream, options.seeds, tuned) for stream in streams]
    everything: list[Run] = [*(TruthRun(stream) for stream in streams), *(run for of_world in runs for run in of_world)]
    run_missing(everything, cache, options.jobs)
    figures = [world_figures(of_world, cache, options.resamples) for of_world in runs]
    for one in figures:
        print(world_report.markdown(comparison, one))
    _write_json(options.json, world_report.flat_figures(comparison, figures, options.seeds))
    if options.plot:
        quality_plots.plot_worlds(comparison, figures, options.plot)


def _log(config: QualityConfig, chosen: Chosen, options: argparse.Namespace) -> None:
    comparison, cache = config.kuairand, RunCache(options.cache)
    names = _ranker_names(comparison, options.rankers)
    log = options.log or Path(os.environ.get("KUAIRAND_HOME", ""))
    if not log.name or not log.is_dir():
        raise ValueError(f"--log {str(log)!r}: expected a KuaiRand folder, named here or by KUAIRAND_HOME")
    if options.tune:
        best = tune_log(comparison, names, log, options.seeds, cache, options.jobs)
        save_chosen({**chosen, "kuairand": {**chosen.get("kuairand", {}), **best}}, options.chosen)
        return
    tuned = chosen.get("kuairand", {})
    runs = [
        LogRun(name, settings_of(comparison, name, tuned), log, options.limit, seed)
        for seed in range(options.seeds)
        for name in names
    ]
    run_missing(runs, cache, options.jobs)
    figures = log_figures(runs, cache, options.resamples)
    print(kuairand_report.markdown(comparison, figures))
    _write_json(options.json, kuairand_report.flat_figures(comparison, figures))
    if options.plot:
        quality_plots.plot_log(comparison, figures, options.plot)


def _ranker_names(comparison: Comparison, asked: tuple[str, ...]) -> tuple[str, ...]:
    """Those asked for; ``main`` stands for all but the ablations."""
    headline = (comparison.smes, comparison.paper, comparison.linear, *comparison.dense)
    return comparison.without(tuple(n for name in asked for n in (headline if name == _MAIN else (name,))))


def _write_json(path: Path | None, flat: world_report.Flat) -> None:
    if path is not None:
        path.write_text(json.dumps(flat, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--log", type=Path, help="a KuaiRand folder: -Pure, -1K or -27K")
    where.add_argument("--world", choices=[*WORLDS, "all", *RARE_WORLDS, "rare"], help=_WORLD_HELP)
    parser.add_argument("--limit", type=int, help="only the first so many impressions of the log")
    parser.add_argument("--impressions", type=int, default=2_097_152, help="of each world")
    parser.add_argument("--world-seed", type=int, default=0, help="of everything in a world but the models")
    parser.add_argument("--seeds", type=int, default=5, help="model seeds 0, 1, …")
    parser.add_argument("--rankers", type=_words, default=(), help="only these, by comma; `main` for all but ablations")
    parser.add_argument("--tune", action="store_true", help="try every ranker's trials, on data kept for that")
    parser.add_argument("--jobs", type=int, default=1, help="single-threaded processes")
    parser.add_argument("--resamples", type=int, default=2_000, help="of the bootstrap")
    parser.add_argument("--cache", type=Path, default=Path(".quality-cache"), help="folder of finished runs")
    parser.add_argument("--config", type=Path, default=DEFAULT_FILE, help="what is compared")
    parser.add_argument("--chosen", type=Path, default=CHOSEN_FILE, help="what --tune writes and others read")
    parser.add_argument("--json", type=Path, help="also write the figures, one flat object")
    parser.add_argument("--plot", type=Path, help="also plot, as PNG; needs matplotlib")
    return parser


def _words(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


if __name__ == "__main__":
    sys.exit(main())
