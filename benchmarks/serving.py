"""Requests a second and their times: the scorer beside a plain FastAPI + PyTorch service of the same model.

    python -m benchmarks.serving --json serving.json
    python -m benchmarks.serving --rounds 1 --seconds 2       # a look

Each service is a process of its own with one thread for a request's products; a real Valkey holds snapshots and
features; the load is in this process (:mod:`benchmarks.serving_load`). 8 tasks, 33 id fields, the default model. In
every round both services are asked in turns: closed loop over 1, 8 and 64 connections with 50 and 500 items, closed
loop while a version comes every second, and open loop at a part of the rate that the closed one reached. Figures are
medians over the rounds, with the least and the greatest beside them (`_min`, `_max`):

- `rps_50`, `plain_rps_50`: answers a second, 50 items, 8 connections; `rps_vs_plain`, the median of the rounds' ratios.
- `p99_64_ms`, `refused_64`: 50 items, 64 connections, of the answers 200; the share that was answered 503.
- `p50_500_ms`: 500 items, one connection.
- `cRATE_iITEMS_…`, `swaps_…`, `open_…`, and the same with `plain_`: all others.
- `load_share`: processor time of the load over all time, at most.
"""

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from benchmarks.figures import save, show
from benchmarks.serving_load import load
from benchmarks.serving_plain import fill
from benchmarks.serving_world import ITEMS, USERS, ServingWorld
from feature_store.entities import EntityStore
from feature_store.snapshots import SnapshotStore
from smes_cli.demo.local_servers import start_valkey
from smes_cli.demo.processes import spawn, stop
from smes_io.redis_client import connect

_SERVE = """
import sys
from benchmarks.serving_world import schema
from smes_scorer.config import ScorerConfig
from smes_scorer.service import serve
serve(ScorerConfig(port=0), schema(), redis_url=sys.argv[1], on_listening=lambda url: print(url, flush=True))
"""
CONNECTIONS, COUNTS = (1, 8, 64), (50, 500)
_OPEN_SHARE = 0.6
_CHANGED_ROWS = 2_000
_PATIENCE_S = 60.0
_BODIES = 400


@contextmanager
def service(argv: list[str], log: Path) -> Iterator[str]:
    """URL of a service in a process of its own, once it answers."""
    process = spawn([sys.executable, *argv], log=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        deadline_s = time.monotonic() + _PATIENCE_S
        while not (lines := [line for line in log.read_text().splitlines() if line.startswith("http")]):
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(f"a service did not start:\n{log.read_text()}")
            time.sleep(0.05)
        yield lines[-1]
    finally:
        stop(process)


class Swaps:
    """Publishes a version every second while it is entered."""

    def __init__(self, store: SnapshotStore, world: ServingWorld) -> None:
        self._store, self._world, self._version = store, world, 0
        self.publish()

    def publish(self) -> None:
        """Publish the next version: the first is full, the others are deltas."""
        self._version += 1
        first = self._version == 1
        self._store.publish(
            self._world.payload(self._version, None if first else _CHANGED_ROWS).joined(),
            lineage="a",
            version=self._version,
            schema_hash=self._world.schema.hash,
            step=self._version,
            created_ms=int(time.time() * 1000),
            applies_to=None if first else {self._version - 1},
        )

    @contextmanager
    def every_second(self) -> Iterator[None]:
        """Publish meanwhile."""
        ended = threading.Event()

        def run() -> None:
            while not ended.wait(1.0):
                self.publish()

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


class Rounds:
    """Measures both services, and keeps each figure of each round."""

    def __init__(self, ours: str, plain: str, world: ServingWorld, swaps: Swaps, seconds: float) -> None:
        self._urls = {"": ours, "plain_": plain}
        self._bodies = {items: world.bodies(_BODIES, items) for items in COUNTS}
        self._swaps, self._seconds = swaps, seconds
        self.figures: dict[str, list[float]] = {}

    def _note(self, name: str, value: float) -> None:
        self.figures.setdefault(name, []).append(value)

    def _ask(self, kind: str, name: str, items: int, connections: int, rate: float | None = None) -> float:
        answers = load(self._urls[kind], self._bodies[items], connections, self._seconds, rate)
        if answers.failed:
            raise RuntimeError(f"{kind}{name}: {answers.failed} answers that are neither 200 nor 503")
        asked = len(answers.seconds) + answers.refused
        self._note(f"{kind}{name}_rps", answers.rate)
        self._note(f"{kind}{name}_p50_ms", answers.quantile_ms(0.5))
        self._note(f"{kind}{name}_p99_ms", answers.quantile_ms(0.99))
        self._note(f"{kind}{name}_refused", answers.refused / max(1, asked))
        self._note("load_share", answers.processor_s / answers.took_s)
        return answers.rate

    def run(self, turn: int) -> None:
        """One round."""
        kinds = list(self._urls)[:: 1 if turn % 2 == 0 else -1]
        rates: dict[str, float] = {}
        for items in COUNTS:
            for connections in CONNECTIONS:
                for kind in kinds:
                    rate = self._ask(kind, f"c{connections}_i{items}", items, connections)
                    if (items, connections) == (50, 8):
                        rates[kind] = rate
        self._note("rps_vs_plain", rates[""] / rates["plain_"])
        with self._swaps.every_second():
            self._ask("", "swaps_c8_i50", 50, 8)
        for kind in kinds:
            self._ask(kind, "open_i50", 50, 64, _OPEN_SHARE * rates[kind])

    def summary(self) -> dict[str, float]:
        """All figures, flat."""
        named = {
            "rps_50": "c8_i50_rps",
            "plain_rps_50": "plain_c8_i50_rps",
            "p99_64_ms": "c64_i50_p99_ms",
            "refused_64": "c64_i50_refused",
            "p50_500_ms": "c1_i500_p50_ms",
            "plain_p50_500_ms": "plain_c1_i500_p50_ms",
        }
        rounds = {**{name: self.figures[of] for name, of in named.items()}, **self.figures}
        load_share = max(rounds.pop("load_share"))
        out: dict[str, float] = {}
        for name, values in rounds.items():
            out |= {name: statistics.median(values), f"{name}_min": min(values), f"{name}_max": max(values)}
        return out | {"load_share": load_share}


def run(rounds: int, seconds: float) -> dict[str, float]:
    """All figures."""
    world = ServingWorld()
    with tempfile.TemporaryDirectory() as name, start_valkey(Path(name)) as valkey:
        folder, client = Path(name), connect(valkey.url, 60.0)
        world.fill(EntityStore(client, world.schema))
        fill(client, world, "user", USERS)
        fill(client, world, "item", ITEMS)
        swaps = Swaps(SnapshotStore(client), world)
        with (
            service(["-c", _SERVE, valkey.url], folder / "ours.log") as ours,
            service(["-m", "benchmarks.serving_plain", valkey.url], folder / "plain.log") as plain,
        ):
            _until_ready(ours)
            measured = Rounds(ours, plain, world, swaps, seconds)
            for url in (ours, plain):
                load(url, world.bodies(_BODIES, 50), 8, min(2.0, seconds))
            for turn in range(rounds):
                measured.run(turn)
        client.close()
    return measured.summary()


def _until_ready(url: str) -> None:
    deadline_s = time.monotonic() + _PATIENCE_S
    with httpx.Client(base_url=url, timeout=60) as http:
        while (health := http.get("/health/ready")).status_code != 200:
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"the scorer was not ready within {_PATIENCE_S} s: {health.text}")
            time.sleep(0.05)


def main() -> None:
    """Print the figures; ``--json FILE`` also writes them as one flat object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--rounds", type=int, default=7, help="rounds")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each phase of a round")
    arguments = parser.parse_args()
    figures = run(arguments.rounds, arguments.seconds)
    show(figures)
    save(figures, arguments.json)


if __name__ == "__main__":
    main()
