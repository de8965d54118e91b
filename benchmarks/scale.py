"""Past one machine: what several ranks, workers and hosts do, against one process.

    KAFKA_HOME=… python -m benchmarks.scale --json scale.json
    python -m benchmarks.scale --parts resize network steps --eventlog redis

docs/scale.md says what each part does, what its figures mean and what was measured. The keys of ``--json`` are flat:
those of the table of requirements by their own names, all others with the part before them. The exit status is 1 if
something did not hold.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import flink_examples, serve_workers
from benchmarks.chaos_system import EventLogKind, System
from benchmarks.figures import save
from benchmarks.scale_network import run_network
from benchmarks.scale_ranks import run_equal, run_kills, run_resize
from benchmarks.scale_steps import run_steps
from simulators.synthetic import synthesize

Figures = dict[str, Any]


def run(of: argparse.Namespace, folder: Path) -> Figures:
    """The chosen parts; figure → value."""
    log = folder / "world.parquet"
    synthesize(log, of.limit, seed=of.seed)
    home = Path(os.environ.get("KAFKA_HOME", Path(__file__).resolve().parents[2] / "shared" / "kafka"))
    kafka_home = str(home) if (home / "libs").is_dir() else None
    if kafka_home is None and of.eventlog == "kafka":
        raise SystemExit("--eventlog kafka: expected KAFKA_HOME, the folder of a Kafka distribution")
    of.eventlog = of.eventlog or ("kafka" if kafka_home else "redis")
    if kafka_home is not None:
        os.environ["KAFKA_HOME"] = kafka_home
    figures: Figures = {"eventlog": of.eventlog, "seed": of.seed, "limit": of.limit}
    for part in of.parts:
        print(f"== {part}", flush=True)
        began_s = time.monotonic()
        with ExitStack() as stack:
            place = folder / part
            place.mkdir()

            def system(
                kind: EventLogKind = of.eventlog, name: str = "", home: Path = place, stack: ExitStack = stack
            ) -> System:
                inside = home / name if name else home
                inside.mkdir(exist_ok=True)
                return System(kind, inside, stack, None if kafka_home is None else Path(kafka_home))

            found = PARTS[part](system, of, log, place)
        found["minutes"] = round((time.monotonic() - began_s) / 60, 2)
        for name, value in found.items():
            print(f"  {name:34} {value}", flush=True)
        figures |= {name if name in _NAMED else f"{part}_{name}": value for name, value in found.items()}
    for name, parts in (("ledger_balanced", ("equal", "resize")), ("digests_equal", ("kills", "network"))):
        measured = [figures[f"{part}_{name}"] for part in parts if f"{part}_{name}" in figures]
        figures |= {name: all(measured)} if measured else {}
    if "equal_auc_diff" in figures:
        figures["auc_diff"] = figures["equal_auc_diff"]
    return figures | {"failed": failed(figures)}


def _equal(system: Callable[..., System], of: argparse.Namespace, log: Path, home: Path) -> Figures:
    return run_equal(system(), log, of.limit, (2, 4))


def _kills(system: Callable[..., System], of: argparse.Namespace, log: Path, home: Path) -> Figures:
    kinds: list[EventLogKind] = ["redis", "kafka"] if of.eventlog == "kafka" else ["redis"]
    found = {kind: run_kills(system(kind, kind), log, of.limit, kills=of.kills, seed=of.seed) for kind in kinds}
    flat = {f"{name}_{kind}": value for kind, figures in found.items() for name, value in figures.items()}
    return flat | {"digests_equal": all(figures["digests_equal"] for figures in found.values())}


def _resize(system: Callable[..., System], of: argparse.Namespace, log: Path, home: Path) -> Figures:
    return run_resize(system(), log, of.limit)


def _network(system: Callable[..., System], of: argparse.Namespace, log: Path, home: Path) -> Figures:
    return run_network(home, log, of.limit)


def _steps(system: Callable[..., System], of: argparse.Namespace, log: Path, home: Path) -> Figures:
    return dict(run_steps(rounds=of.rounds))


def _workers(system: Callable[..., System], of: argparse.Namespace, log: Path, home: Path) -> Figures:
    options = {"workers": 3, "changed": 0.01, "seconds": 20, "threads": 4, "rounds": 0}
    return serve_workers.run(argparse.Namespace(rows=of.rows, **options))


def _flink(system: Callable[..., System], of: argparse.Namespace, log: Path, home: Path) -> Figures:
    if of.flink_python is None:
        return {"measured": False, "why_not": "--flink-python names no environment with PyFlink"}
    options = argparse.Namespace(flink_python=of.flink_python, limit=20_000, seed=of.seed)
    return {"measured": True} | flink_examples.run(options, home)


PARTS: dict[str, Callable[..., Figures]] = {
    "equal": _equal,
    "kills": _kills,
    "resize": _resize,
    "network": _network,
    "steps": _steps,
    "workers": _workers,
    "flink": _flink,
}

_NAMED = frozenset({"max_abs_diff", "pss_ratio", "flink_records_equal"})


def failed(figures: Figures) -> list[str]:
    """Which figures do not hold what is asked; those that were not measured are left out."""
    wanted: dict[str, Callable[[Any], bool]] = {
        "equal_ledger_balanced": bool,
        "max_abs_diff": lambda value: value <= 1e-4,
        "equal_auc_diff": lambda value: value <= 0.0005,
        "kills_digests_equal": bool,
        "network_digests_equal": bool,
        "resize_ledger_balanced": bool,
        "resize_auc_diff": lambda value: value <= 0.001,
        "network_mixed_cuts": lambda value: value == 0,
        "pss_ratio": lambda value: value <= 1.3,
        "workers_errors": lambda value: value == 0,
        "workers_mixed_versions": lambda value: value == 0,
        "flink_records_equal": bool,
        "network_went_on_after_the_cut": bool,
    }
    return [name for name, holds in wanted.items() if name in figures and not holds(figures[name])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--eventlog", choices=["redis", "kafka"], help="default: kafka where there is one")
    parser.add_argument("--limit", type=int, default=40_000, help="impressions")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=10_000_000, help="of the table that workers share")
    parser.add_argument("--flink-python", help="Python of an environment with apache-flink 2.2")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", type=Path, help="an empty folder for everything; default: a temporary one")
    of = parser.parse_args()
    with ExitStack() as stack:
        folder = of.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        figures = run(of, folder)
    save(figures, of.json)
    if figures["failed"]:
        print("failed:", ", ".join(figures["failed"]))
        sys.exit(1)


if __name__ == "__main__":
    main()
