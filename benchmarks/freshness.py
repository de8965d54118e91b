"""How fresh answers are, and what that is worth.

    python -m benchmarks.freshness --json freshness.json
    python -m benchmarks.freshness --value --kuairand PATH/TO/KuaiRand-Pure --plot docs/images/freshness.png

Without ``--value``: a whole system under live traffic (:mod:`benchmarks.freshness_live`), with tables of 1 and 10
million rows. With it: how much AUC and normalised entropy lose when the weights that answer are replaced less often
(:mod:`benchmarks.freshness_runs`).
"""

import argparse
from pathlib import Path

from benchmarks.figures import save
from benchmarks.freshness_live import LiveFigures, LiveSetting, run_live
from benchmarks.freshness_runs import value_runs
from benchmarks.freshness_value import plot_value, value_figures, value_json, value_table
from benchmarks.run_cache import RunCache, run_missing
from smes_cli.console import console
from smes_scorer.freshness_stages import DEPENDS_ON


def live(arguments: argparse.Namespace) -> dict[str, float]:
    """One run for each size of the table."""
    flat: dict[str, float] = {}
    for rows in arguments.rows:
        setting = LiveSetting(
            rows,
            events_per_s=arguments.events_per_s,
            seconds=arguments.seconds,
            size=arguments.size,
            snapshot_interval_s=arguments.interval_s,
        )
        print(f"{rows:,} rows, {setting}", flush=True)
        figures = run_live(setting)
        _print_live(figures)
        flat |= figures.to_json("" if rows == 1_000_000 else f"_{rows // 1_000_000}m")
    return flat


def _print_live(figures: LiveFigures) -> None:
    cores = ", ".join(f"{name} {cores:.2f}" for name, cores in figures.cores.items())
    print(
        f"  freshness p50 {figures.p50_ms:,.0f} ms, p99 {figures.p99_ms:,.0f} ms; {figures.counted:,} feedback events"
    )
    print(f"  {figures.events_per_s:,.0f} events/s; {figures.versions} versions answered; {figures.errors} errors")
    print(f"  cores: {cores}")
    for stage, (what, _) in DEPENDS_ON.items():
        print(f"  {what:28} {figures.stages_ms[stage]:8,.0f} ms in the mean")


def value(arguments: argparse.Namespace) -> dict[str, float]:
    """All runs, those that the cache has not; then the table and the plot."""
    runs = value_runs(arguments.kuairand, arguments.seeds, arguments.share)
    cache = RunCache(arguments.cache)
    run_missing(runs, cache, arguments.processes)
    names = dict.fromkeys(run.name for run in runs)
    figures = [value_figures([run for run in runs if run.name == n], cache, arguments.resamples) for n in names]
    print(value_table(figures))
    if arguments.plot is not None:
        plot_value(figures, arguments.plot)
    return value_json(figures)


def main() -> None:
    """Print the figures; ``--json FILE`` also writes them as one flat object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 10_000_000], help="of the id table")
    parser.add_argument("--events-per-s", type=float, default=5000.0, help="impressions and feedback")
    parser.add_argument("--seconds", type=float, default=60.0, help="for which the time is taken")
    parser.add_argument("--size", type=int, default=512, help="stream.batch.size")
    parser.add_argument("--interval-s", type=float, default=0.5, help="trainer.snapshot_interval_s")
    parser.add_argument("--value", action="store_true", help="what fresh weights are worth, instead")
    parser.add_argument("--kuairand", type=Path, help="a KuaiRand folder; without it, the drifting world alone")
    parser.add_argument("--seeds", type=int, default=5, help="at least 5 for a figure to quote")
    parser.add_argument("--share", type=float, default=1.0, help="of the logs; less than 1 only to try it")
    parser.add_argument("--processes", type=int, default=2, help="runs at once, each on one thread")
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--cache", type=Path, default=Path("build/freshness"), help="folder of finished runs")
    parser.add_argument("--plot", type=Path, help="write the plot of --value to this file")
    arguments = parser.parse_args()
    console.quiet = True
    figures = value(arguments) if arguments.value else live(arguments)
    save(figures, arguments.json)


if __name__ == "__main__":
    main()
