"""What a swap costs those who ask: p99 of answers with a swap every second and without, errors, mixed versions, memory.

A scorer in a process of its own, a real Valkey, and callers in a third process that ask at a fixed rate and time each
answer from when it was due. Every answer is compared with the scores of the version that it names: ``mixed_versions``
counts those that differ. Phases with and without swaps take turns. ``serving_bytes_ratio`` is the most memory that the
scorer took at any time (swaps, and the replacement of the table by that of another lineage) beyond what it takes with
next to no weights, over the bytes of the weights.

Run: ``python -m benchmarks.swaps [--rows N] [--json FILE]``.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import httpx
import msgspec
import numpy as np
from numpy.typing import NDArray

from benchmarks.figures import save, show
from benchmarks.swap_world import ITEMS, REQUESTS, SwapWorld
from feature_store.config import SnapshotStoreConfig
from feature_store.pieces import Payload
from feature_store.snapshots import SnapshotStore
from smes.arrays import F32, I64
from smes_cli.demo.local_servers import start_valkey
from smes_cli.demo.processes import spawn, stop
from smes_io.redis_client import connect

_SERVE = """
import json, sys
from smes.schema import Schema
from smes_scorer.config import ScorerConfig
from smes_scorer.service import serve
serve(ScorerConfig(port=0), Schema.from_dict(json.loads(sys.argv[1])), redis_url=sys.argv[2],
      on_listening=lambda url: print(url, flush=True))
"""
_PATIENCE_S = 600.0
_SAMPLE_S = 0.01
_TOLERANCE = 2e-5
_FEW_ROWS = 2000


@dataclass(frozen=True)
class Answers:
    """What the callers got. Letters: A answers.

    Attributes:
        seconds: float64 [A], from when each was due to when it was there.
        request: int64 [A], which of the requests.
        version: int64 [A], -1 where there was none.
        scores: float32 [A, N, T].
    """

    seconds: NDArray[np.float64]
    request: I64
    version: I64
    scores: F32

    @property
    def errors(self) -> int:
        """Requests without an answer."""
        return int((self.version < 0).sum())

    def mixed(self, expected: Callable[[int], F32]) -> int:
        """How many answers differ from the scores of the version that they name. Those are float32 [Q, N, T]."""
        count = 0
        for version in np.unique(self.version[self.version >= 0]):
            of_version = self.version == version
            right = expected(int(version))[self.request[of_version]]
            count += int((np.abs(self.scores[of_version] - right).max(axis=(1, 2)) > _TOLERANCE).sum())
        return count


def call(url: str, bodies: list[bytes], rate: float, tasks: int, control: Connection) -> None:
    """Ask at a fixed rate from one message until the next; None ends it. Runs in a process of its own."""
    decoder = msgspec.json.Decoder()
    with httpx.Client(base_url=url, timeout=60) as http:
        control.send("ready")
        while control.recv() is not None:
            rows: list[tuple[float, int, int, F32]] = []
            begin_s = time.perf_counter()
            while not control.poll():
                number = len(rows)
                due_s = begin_s + number / rate
                time.sleep(max(0.0, due_s - time.perf_counter()))
                request = number % REQUESTS
                answer = http.post("/v1/score", content=bodies[request], headers={"content-type": "application/json"})
                took_s = time.perf_counter() - due_s
                if answer.status_code != 200:
                    rows.append((took_s, request, -1, np.zeros((ITEMS, tasks), np.float32)))
                    continue
                body = decoder.decode(answer.content)
                scores = np.array([list(item["scores"].values()) for item in body["items"]], np.float32)
                rows.append((took_s, request, body["version"], scores))
            control.recv()
            control.send(tuple(np.array(column) for column in zip(*rows, strict=True)))


class Callers:
    """The process that asks."""

    def __init__(self, url: str, world: SwapWorld, rate: float) -> None:
        context = multiprocessing.get_context("spawn")
        self._control, theirs = context.Pipe()
        bodies = [world.body(request) for request in range(REQUESTS)]
        arguments = (url, bodies, rate, world.schema.num_tasks, theirs)
        self._process = context.Process(target=call, args=arguments, daemon=True)
        self._process.start()
        self._control.recv()

    def ask(self, meanwhile: Callable[[], object]) -> Answers:
        """Let them ask as long as this takes."""
        self._control.send("begin")
        meanwhile()
        self._control.send("end")
        return Answers(*self._control.recv())

    def close(self) -> None:
        """End the process."""
        self._control.send(None)
        self._process.join()


class Memory:
    """The most resident memory of a process since :meth:`begin`, sampled."""

    def __init__(self, pid: int) -> None:
        self._status = Path(f"/proc/{pid}/status")
        self._ended = threading.Event()
        self._peak = 0
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    @property
    def resident(self) -> int:
        """Bytes now."""
        line = next(line for line in self._status.read_text().splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) * 1024

    def begin(self) -> None:
        """Forget the peak."""
        self._peak = 0

    @property
    def peak(self) -> int:
        """Bytes."""
        return max(self._peak, self.resident)

    def end(self) -> None:
        """Stop sampling."""
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._ended.wait(_SAMPLE_S):
            self._peak = max(self._peak, self.resident)


class Bench:
    """A scorer, its store and its callers."""

    def __init__(self, store: SnapshotStore, world: SwapWorld, http: httpx.Client) -> None:
        self._store = store
        self._http = http
        self.world = world
        self._lineage = "a"
        self._version = 0

    def replace(self, lineage: str) -> None:
        """Publish the full snapshot of another lineage, and wait until it serves."""
        self._lineage, self._version = lineage, 1
        self._published(self.world.full(lineage, 1), None)
        self.until_served()

    def deltas(self, count: int, rows: int) -> list[Payload]:
        """The next deltas, made beforehand: what the trainer does is not measured here."""
        return [self.world.delta(self._lineage, self._version + 1 + number, rows) for number in range(count)]

    def publish(self, delta: Payload) -> None:
        """Publish the next delta."""
        self._version += 1
        self._published(delta, self._version - 1)

    def until_served(self) -> None:
        """Wait for the version that was published last."""
        deadline_s = time.monotonic() + _PATIENCE_S
        expected = (self._lineage, self._version)
        while True:
            health = self._http.get("/health/ready").json()
            if (health.get("lineage"), health.get("version")) == expected:
                return
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"version {expected} was not served within {_PATIENCE_S} s: {health}")
            time.sleep(0.02)

    def _published(self, payload: Payload, after: int | None) -> None:
        self._store.publish(
            payload,
            lineage=self._lineage,
            version=self._version,
            schema_hash=self.world.schema.hash,
            step=self._version,
            created_ms=int(time.time() * 1000),
            applies_to=None if after is None else {after},
        )

    def every_second(self, deltas: list[Payload]) -> None:
        """Publish deltas, one a second."""
        begin_s = time.monotonic()
        for number, delta in enumerate(deltas, 1):
            self.publish(delta)
            time.sleep(max(0.0, begin_s + number - time.monotonic()))

    def in_succession(self, deltas: list[Payload]) -> None:
        """Publish deltas, each as soon as the one before serves."""
        for delta in deltas:
            self.publish(delta)
            self.until_served()


@contextmanager
def scorer(world: SwapWorld, redis_url: str, folder: Path) -> Iterator[tuple[int, str]]:
    """(process id, URL) of a scorer."""
    log = folder / "scorer.log"
    argv = [sys.executable, "-P", "-c", _SERVE, json.dumps(world.schema.to_dict()), redis_url]
    process = spawn(argv, log=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        deadline_s = time.monotonic() + _PATIENCE_S
        while not (lines := log.read_text().splitlines()) or not lines[-1].startswith("http"):
            assert time.monotonic() < deadline_s, f"the scorer did not start: {lines}"
            time.sleep(0.05)
        yield _python_below(process.pid), lines[-1]
    finally:
        stop(process)


def _python_below(pid: int) -> int:
    """The process itself: what starts it may stay as its parent."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(children[0]) if children else pid


def run(arguments: argparse.Namespace) -> dict[str, float]:
    """All figures."""
    world, small = SwapWorld(arguments.rows), SwapWorld(_FEW_ROWS)
    config = SnapshotStoreConfig(retain_bytes=8 * world.weights_bytes)
    with tempfile.TemporaryDirectory() as name, start_valkey(Path(name)) as valkey:
        client = connect(valkey.url, 60.0)
        with scorer(world, valkey.url, Path(name)) as (pid, url), httpx.Client(base_url=url, timeout=60) as http:
            memory, callers = Memory(pid), Callers(url, world, arguments.rate)
            store = SnapshotStore(client, config=config)
            Bench(store, small, http).replace("small")
            callers.ask(partial(time.sleep, 5))
            empty = memory.resident
            bench = Bench(store, world, http)
            figures = _measured(bench, callers, memory, arguments, empty)
            callers.close()
            memory.end()
            stats = http.get("/v1/stats").json()
            figures |= {"swaps": float(stats["swaps"]), "refused": float(stats["load_failures"])}
    return figures


def _measured(
    bench: Bench, callers: Callers, memory: Memory, arguments: argparse.Namespace, empty: int
) -> dict[str, float]:
    bench.replace("a")
    callers.ask(partial(time.sleep, 5))
    changed = round(arguments.rows * arguments.changed)
    phases: dict[bool, list[Answers]] = {False: [], True: []}
    memory.begin()
    for number in range(2 * arguments.pairs):
        swaps = number % 2 == 1
        if swaps:
            phase = callers.ask(partial(bench.every_second, bench.deltas(arguments.phase_s, changed)))
        else:
            phase = callers.ask(partial(time.sleep, arguments.phase_s))
        phases[swaps].append(phase)
    bench.until_served()
    many = callers.ask(partial(bench.in_succession, bench.deltas(arguments.swaps, _FEW_ROWS)))
    swapping = memory.peak
    memory.begin()
    beside = callers.ask(partial(bench.replace, "b"))
    replacing = memory.peak
    answers = [*phases[False], *phases[True], many]
    p99 = {swaps: [float(np.quantile(phase.seconds, 0.99)) for phase in of] for swaps, of in phases.items()}
    pooled = {swaps: np.concatenate([phase.seconds for phase in of]) for swaps, of in phases.items()}
    weights = bench.world.weights_bytes
    return {
        "p99_swap_ratio": float(np.quantile(pooled[True], 0.99) / np.quantile(pooled[False], 0.99)),
        "p99_ms": 1000 * float(np.quantile(pooled[False], 0.99)),
        "p99_with_swaps_ms": 1000 * float(np.quantile(pooled[True], 0.99)),
        "p50_ms": 1000 * float(np.quantile(pooled[False], 0.5)),
        "p50_with_swaps_ms": 1000 * float(np.quantile(pooled[True], 0.5)),
        "p99_swap_ratio_median_of_pairs": statistics.median(b / a for a, b in zip(p99[False], p99[True], strict=True)),
        "errors": float(sum(each.errors for each in [*answers, beside])),
        "mixed_versions": float(sum(each.mixed(bench.world.scores) for each in answers)),
        "answers": float(sum(len(each.seconds) for each in answers)),
        "versions_answered": float(len(np.unique(np.concatenate([each.version for each in answers])))),
        "serving_bytes_ratio": (max(swapping, replacing) - empty) / weights,
        "swapping_bytes_ratio": (swapping - empty) / weights,
        "weights_mib": weights / 2**20,
        "rows": float(arguments.rows),
    }


def main() -> None:
    """Print the figures; ``--json FILE`` also writes them as one flat object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--rows", type=int, default=10_000_000, help="rows of the table")
    parser.add_argument(
        "--changed", type=float, default=0.01, help="share of the rows that a delta changes each second"
    )
    parser.add_argument("--rate", type=float, default=20.0, help="requests a second, of 100 items each")
    parser.add_argument("--pairs", type=int, default=8, help="phases without and with a swap every second")
    parser.add_argument("--phase-s", type=int, default=10, help="length of a phase")
    parser.add_argument("--swaps", type=int, default=1000, help="swaps of 2,000 rows in quick succession")
    arguments = parser.parse_args()
    figures = run(arguments)
    show(figures)
    save(figures, arguments.json)


if __name__ == "__main__":
    main()
