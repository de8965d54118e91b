"""Chaos: kills, outages, stops, a full disk, a clock that jumps, and what must hold whatever happens.

    python -m benchmarks.chaos --eventlog redis --json chaos.json
    KAFKA_HOME=… python -m benchmarks.chaos --eventlog kafka --parts kills outages

Every part starts servers of its own: the event log with 4 partitions, and a Valkey for the snapshots. ``smes train``,
``serve`` and ``replay`` are processes. All moments are drawn from ``--seed``. docs/experiments/chaos.md says what
each part does,
what its figures mean and what was measured. The exit status is 1 if something did not hold.
"""

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.chaos_faults import plan
from benchmarks.chaos_gate import run_gate
from benchmarks.chaos_kills import Replayed, run_kills
from benchmarks.chaos_malformed import run_malformed
from benchmarks.chaos_outages import run_outages
from benchmarks.chaos_rollback import run_rollback
from benchmarks.chaos_soak import run_soak
from benchmarks.chaos_system import EventLogKind, System
from benchmarks.figures import save
from simulators.synthetic import synthesize
from smes_cli.console import console

Figures = dict[str, Any]
PARTS = ("kills", "outages", "malformed", "rollback", "gate")
MORE_PARTS = ("soak",)


def run(arguments: argparse.Namespace, folder: Path) -> Figures:
    """The chosen parts, each in a folder of its own; figure → value."""
    kafka_home = os.environ.get("KAFKA_HOME")
    if arguments.eventlog == "kafka" and kafka_home is None:
        raise SystemExit("--eventlog kafka: expected KAFKA_HOME, the folder of a Kafka distribution")
    figures: Figures = {"eventlog": arguments.eventlog, "seed": arguments.seed}
    for part in arguments.parts:
        print(f"== {part}", flush=True)
        began_s = time.monotonic()
        with ExitStack() as stack:
            home = folder / part
            home.mkdir(parents=True)

            def system(home: Path = home, stack: ExitStack = stack) -> System:
                kind: EventLogKind = arguments.eventlog
                return System(kind, home, stack, None if kafka_home is None else Path(kafka_home))

            found = RUNS[part](system, arguments, home)
        found["minutes"] = round((time.monotonic() - began_s) / 60, 2)
        figures[part] = found
        _print(found)
    return figures | summary(figures)


def _kills(system: Callable[[], System], arguments: argparse.Namespace, home: Path) -> Figures:
    replayed = _replayed(arguments, home)
    return run_kills(system(), replayed, kills=arguments.kills, life_s=arguments.life_s, seed=arguments.seed)


def _outages(system: Callable[[], System], arguments: argparse.Namespace, home: Path) -> Figures:
    faults = plan(arguments.seed, time_scale=arguments.time_scale)
    return run_outages(system(), _replayed(arguments, home), faults, seed=arguments.seed)


def _malformed(system: Callable[[], System], arguments: argparse.Namespace, home: Path) -> Figures:
    return run_malformed(system(), home, impressions=arguments.malformed, seed=arguments.seed)


def _rollback(system: Callable[[], System], arguments: argparse.Namespace, home: Path) -> Figures:
    return run_rollback(system(), _replayed(arguments, home), rounds=arguments.rounds)


def _gate(system: Callable[[], System], arguments: argparse.Namespace, home: Path) -> Figures:
    return run_gate(system(), _replayed(arguments, home, arguments.gate_limit), rounds=arguments.rounds)


def _soak(system: Callable[[], System], arguments: argparse.Namespace, home: Path) -> Figures:
    return run_soak(system(), minutes=arguments.minutes, events_per_s=arguments.events_per_s, seed=arguments.seed)


RUNS: Mapping[str, Callable[[Callable[[], System], argparse.Namespace, Path], Figures]] = {
    "kills": _kills,
    "outages": _outages,
    "malformed": _malformed,
    "rollback": _rollback,
    "gate": _gate,
    "soak": _soak,
}


def summary(figures: Figures) -> Figures:
    """The figures by which a run is judged, over all of its parts that have them."""
    parts = [value for value in figures.values() if isinstance(value, dict)]

    def of_all(name: str) -> list[Any]:
        return [part[name] for part in parts if name in part]

    flat: Figures = {}
    for name in ("digests_equal", "audit_balanced"):
        if found := of_all(name):
            flat[name] = all(found)
    if found := of_all("scorer_errors"):
        flat["scorer_errors"] = sum(found)
    alone = (
        "kills", "malformed", "malformed_dead_lettered", "good", "good_trained", "rollback_s", "gate_throughput_ratio",
        "rss_growth_pct", "redis_growth_pct", "descriptors_growth", "threads_growth",
    )  # fmt: skip
    for name in alone:
        if found := of_all(name):
            flat[name] = found[-1]
    return flat


def _replayed(arguments: argparse.Namespace, home: Path, limit: int | None = None) -> Replayed:
    """The log of a part, and how much of it."""
    limit = limit or arguments.limit
    if arguments.kuairand is not None:
        return Replayed(arguments.kuairand, limit, "kuairand")
    log = home / "world.parquet"
    synthesize(log, limit, arguments.seed)
    return Replayed(log, limit, "synthetic")


def _print(figures: Figures) -> None:
    for name, value in figures.items():
        if name != "happened":
            print(f"{name:36} {value}", flush=True)


def holds(figures: Figures) -> list[str]:
    """What did not hold, in words.

    The times and the memory of a run on a busy machine say little, so that they are judged by who reads them.
    """
    expected = {"digests_equal": True, "audit_balanced": True, "scorer_errors": 0}
    for name, of in (("malformed_dead_lettered", "malformed"), ("good_trained", "good")):
        if of in figures:
            expected[name] = figures[of]
    return [
        f"{name}: {figures[name]}, expected {value}"
        for name, value in expected.items()
        if name in figures and figures[name] != value
    ]


def parsed(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--eventlog", choices=("redis", "kafka"), default="redis")
    parser.add_argument("--parts", nargs="+", choices=(*PARTS, *MORE_PARTS), default=list(PARTS))
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--kills", type=int, default=20, help="of the trainer")
    parser.add_argument("--life-s", type=float, default=6.0, help="longest life of a trainer before its kill")
    parser.add_argument("--limit", type=int, default=40_000, help="impressions that are replayed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--time-scale", type=float, default=1.0, help="of outages; less than 1 only to try it")
    parser.add_argument("--malformed", type=int, default=10_000, help="good impressions among as many malformed ones")
    parser.add_argument("--rounds", type=int, default=5, help="of rollback and gate")
    parser.add_argument("--gate-limit", type=int, default=200_000, help="impressions that the part gate trains on")
    parser.add_argument("--minutes", type=float, default=30.0, help="of soak")
    parser.add_argument("--events-per-s", type=float, default=500.0, help="of soak")
    parser.add_argument("--kuairand", type=Path, help="replay this KuaiRand folder instead of the synthetic log")
    parser.add_argument("--folder", type=Path, help="keep what the processes wrote here")
    return parser.parse_args(argv)


def main() -> int:
    """Run the parts, write the figures, and say what did not hold."""
    arguments = parsed(sys.argv[1:])
    console.quiet = True
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that everything is ended
    if arguments.folder is not None:
        figures = run(arguments, arguments.folder)
    else:
        with tempfile.TemporaryDirectory(prefix="smes-chaos-") as folder:
            figures = run(arguments, Path(folder))
    save(figures, arguments.json)
    wrong = holds(figures)
    for text in wrong:
        print(f"does not hold: {text}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
