"""Several processes that answer from one table: memory, errors, mixed versions, and how many answers they bring.

A service of some workers (``scorer.processes``) in processes of its own, a real Valkey, and callers in a further one
that ask while a version is published every second, on ever new connections, so that all workers answer. Every answer is
compared with the scores of the version that it names: ``mixed_versions`` counts those that differ. ``pss_ratio`` is the
proportional memory of all processes of the service, over that of a scorer of one process under the same load: of each,
the median of samples taken while versions are published. Proportional memory (``Pss`` in ``smaps_rollup``) counts a
page that n processes have as one n-th in each, so the sum counts it once; of libraries that other processes of the
machine have loaded, too, it counts a part, which is ``file`` here.

Run: ``python -m benchmarks.serve_workers [--rows N] [--workers N] [--json FILE]``.
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
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import psutil

from benchmarks.figures import save, show
from benchmarks.serving_load import load
from benchmarks.swap_world import ITEMS, REQUESTS, SwapWorld
from benchmarks.swaps import Answers, Bench
from feature_store.config import SnapshotStoreConfig
from feature_store.snapshots import SnapshotStore
from smes.arrays import F32
from smes_cli.demo.local_servers import start_valkey
from smes_cli.demo.processes import spawn, stop
from smes_io.redis_client import connect

_SERVE = """
import json, sys
from smes.schema import Schema
from smes_scorer.config import ScorerConfig
config = ScorerConfig(port=0, processes=int(sys.argv[3]))
if config.processes == 1:
    from smes_scorer.service import serve
else:
    from smes_scorer.processes.supervisor import serve_by_processes as serve
serve(config, Schema.from_dict(json.loads(sys.argv[1])), redis_url=sys.argv[2],
      on_listening=lambda url: print(url, flush=True))
"""
_PATIENCE_S = 600.0
_PARTS = ("Pss", "Pss_Anon", "Pss_File", "Pss_Shmem")
_ASKED_PER_CONNECTION = 8


@dataclass
class Proportional:
    """Proportional memory of a service's processes, sampled.

    Attributes:
        samples: MiB by part, of all processes together.
    """

    process: psutil.Process
    samples: list[dict[str, float]] = field(default_factory=list)

    def sample(self) -> None:
        """Take one."""
        total = dict.fromkeys(_PARTS, 0.0)
        for one in (self.process, *self.process.children(recursive=True)):
            text = Path(f"/proc/{one.pid}/smaps_rollup").read_text()
            for part, value in (line.split()[:2] for line in text.splitlines()[1:]):
                if part.rstrip(":") in total:
                    total[part.rstrip(":")] += int(value) / 1024
        self.samples.append(total)

    def median(self, part: str) -> float:
        """MiB."""
        return statistics.median(sample[part] for sample in self.samples)


def call(url: str, bodies: list[bytes], threads: int, tasks: int, control: Connection) -> None:
    """Ask with some threads from one message until the next. Runs in a process of its own."""
    rows: list[tuple[float, int, int, F32]] = []
    ended, lock = threading.Event(), threading.Lock()

    def ask(first: int) -> None:
        decoder, number = msgspec.json.Decoder(), first
        while not ended.is_set():
            with httpx.Client(base_url=url, timeout=60, headers={"content-type": "application/json"}) as http:
                for _ in range(_ASKED_PER_CONNECTION):
                    begin_s, request, version = time.perf_counter(), number % REQUESTS, -1
                    scores: F32 = np.zeros((ITEMS, tasks), np.float32)
                    try:
                        answer = http.post("/v1/score", content=bodies[request])
                        if answer.status_code == 200:
                            body = decoder.decode(answer.content)
                            scores = np.array([list(item["scores"].values()) for item in body["items"]], np.float32)
                            version = body["version"]
                    except httpx.HTTPError as error:
                        print(f"no answer: {error!r}", file=sys.stderr)
                    with lock:
                        rows.append((time.perf_counter() - begin_s, request, version, scores))
                    number += 1
                    time.sleep(0.02)

    control.send("ready")
    control.recv()
    running = [threading.Thread(target=ask, args=(first,)) for first in range(threads)]
    for thread in running:
        thread.start()
    control.recv()
    ended.set()
    for thread in running:
        thread.join()
    control.send(tuple(np.array(column) for column in zip(*rows, strict=True)))


def asked(url: str, world: SwapWorld, threads: int, meanwhile: Callable[[], object]) -> Answers:
    """What callers got while something went on."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    bodies = [world.body(request) for request in range(REQUESTS)]
    process = context.Process(target=call, args=(url, bodies, threads, world.schema.num_tasks, theirs), daemon=True)
    process.start()
    ours.recv()
    ours.send("begin")
    meanwhile()
    ours.send("end")
    answers = Answers(*ours.recv())
    process.join()
    return answers


@contextmanager
def service(world: SwapWorld, redis_url: str, folder: Path, workers: int) -> Iterator[tuple[psutil.Process, str]]:
    """(process, URL) of a service."""
    log = folder / f"scorer-{time.monotonic_ns()}.log"
    argv = [sys.executable, "-P", "-c", _SERVE, json.dumps(world.schema.to_dict()), redis_url, str(workers)]
    process = spawn(argv, log=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        deadline_s = time.monotonic() + _PATIENCE_S
        while not any(line.startswith("http") for line in log.read_text().splitlines()):
            assert time.monotonic() < deadline_s, f"the service did not start: {log.read_text()}"
            time.sleep(0.05)
        url = next(line for line in log.read_text().splitlines() if line.startswith("http"))
        yield psutil.Process(process.pid), url
    finally:
        stop(process)
        sys.stderr.write("".join(line for line in log.open() if not line.startswith("http")))


def measured(
    store: SnapshotStore, world: SwapWorld, redis_url: str, folder: Path, workers: int, arguments: argparse.Namespace
) -> tuple[Proportional, Answers]:
    """Memory and answers of a service while a version is published every second."""
    changed = round(arguments.rows * arguments.changed)
    lineage = f"w{workers}"
    with service(world, redis_url, folder, workers) as (process, url), httpx.Client(base_url=url, timeout=60) as http:
        bench, memory = Bench(store, world, http), Proportional(process)
        bench.replace(lineage)
        deltas = bench.deltas(arguments.seconds, changed)

        def swap() -> None:
            ended = threading.Event()

            def sample() -> None:
                while not ended.wait(1.0):
                    memory.sample()

            sampling = threading.Thread(target=sample)
            sampling.start()
            bench.every_second(deltas)
            ended.set()
            sampling.join()

        answers = asked(url, world, arguments.threads, swap)
        bench.until_served()
        return memory, answers


def rates(store: SnapshotStore, redis_url: str, folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Answers of one and of two processes, a second and by processor time; in turns, a small table and no swaps."""
    world = SwapWorld(20_000)
    bodies = [world.body(number) for number in range(REQUESTS)]
    rate: dict[int, list[float]] = {1: [], 2: []}
    took: dict[int, list[float]] = {1: [], 2: []}
    for number in range(arguments.rounds):
        for workers in (1, 2):
            with service(world, redis_url, folder, workers) as (process, url), httpx.Client(base_url=url) as http:
                Bench(store, world, http).replace(f"r{workers}-{number}")
                load(url, bodies, arguments.connections, 2.0)  # until all is warm
                before_s = _processor_s(process)
                answers = load(url, bodies, arguments.connections, arguments.rate_seconds)
                assert not answers.failed, answers
                rate[workers].append(answers.rate)
                took[workers].append(1000 * (_processor_s(process) - before_s) / len(answers.seconds))
    figures: dict[str, float] = {}
    for name, of in (("answers_per_s", rate), ("processor_ms_per_answer", took)):
        figures |= {f"{name}_{workers}_workers": statistics.median(of[workers]) for workers in of}
        figures[f"{name}_ratio"] = statistics.median(two / one for one, two in zip(of[1], of[2], strict=True))
    return figures


def _processor_s(process: psutil.Process) -> float:
    """Processor time of all processes of a service that run."""
    times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return float(sum(each.user + each.system for each in times))


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    world = SwapWorld(arguments.rows)
    weights = world.weights_bytes
    config = SnapshotStoreConfig(retain_bytes=3 * weights)
    figures: dict[str, Any] = {"rows": arguments.rows, "workers": arguments.workers, "weights_mib": weights / 2**20}
    with tempfile.TemporaryDirectory() as name, start_valkey(Path(name)) as valkey:
        store = SnapshotStore(connect(valkey.url, 60.0), config=config)
        of: dict[int, Proportional] = {}
        for workers in (1, arguments.workers):
            memory, answers = measured(store, world, valkey.url, Path(name), workers, arguments)
            of[workers] = memory
            for part in _PARTS:
                figures[f"{part.lower()}_mib_{workers}_workers"] = memory.median(part)
            figures[f"p50_ms_{workers}_workers"] = 1000 * float(np.quantile(answers.seconds, 0.5))
            figures[f"p99_ms_{workers}_workers"] = 1000 * float(np.quantile(answers.seconds, 0.99))
        figures |= {
            "pss_ratio": of[arguments.workers].median("Pss") / of[1].median("Pss"),
            "answers": len(answers.seconds),
            "errors": answers.errors,
            "mixed_versions": answers.mixed(world.scores),
            "versions_answered": len(np.unique(answers.version[answers.version >= 0])),
        }
        if arguments.rounds:
            figures |= rates(store, valkey.url, Path(name), arguments)
    return figures


def main() -> None:
    """Print the figures; ``--json FILE`` also writes them as one flat object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--rows", type=int, default=10_000_000, help="rows of the table")
    parser.add_argument("--workers", type=int, default=3, help="processes that answer, beside the one that loads")
    parser.add_argument("--changed", type=float, default=0.01, help="share of the rows that a version changes")
    parser.add_argument("--seconds", type=int, default=20, help="how long a version is published every second")
    parser.add_argument("--threads", type=int, default=4, help="callers while versions are published")
    parser.add_argument("--rounds", type=int, default=3, help="of the comparison of one and two workers; 0: none")
    parser.add_argument("--rate-seconds", type=float, default=6.0, help="how long each is asked as much as it answers")
    parser.add_argument("--connections", type=int, default=16, help="connections of that")
    arguments = parser.parse_args()
    figures = run(arguments)
    show(figures)
    save(figures, arguments.json)


if __name__ == "__main__":
    main()
