"""Where the time of a step of several ranks goes: waiting for the slowest, exchanging, computing.

Each rank is a process with one thread, on a part of the same batches. Before each message all ranks meet, and the time
of that counts as waiting; it makes a step somewhat slower than it is without the stopwatch, which is reported beside.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.chaos_system import environment
from simulators.logs.reader import open_log
from simulators.synthetic import synthesize
from smes.events import ExampleBlock
from smes.model.learner import Learner
from smes.process_group import ProcessGroupWorld
from smes.world import ALONE
from smes_cli.config import Config
from smes_io.schema_file import load_builtin
from stream.block_stream import BlockStream

NETWORK_BITS_PER_S = 10e9
_WARM_UP = 20


class TimedWorld(ProcessGroupWorld):
    """A world that says how long its ranks wait for each other, and how long messages take.

    Attributes:
        wait_s, exchange_s: So far.
        sent_bytes: By this rank to others.
        messages: Collectives.
        timed: Whether ranks meet before each message, so that waiting is told from sending.
    """

    def __init__(self, group: Any) -> None:
        super().__init__(group)
        self.wait_s = self.exchange_s = 0.0
        self.sent_bytes = self.messages = 0
        self.timed = True

    def sum(self, tensors: Sequence[Tensor]) -> None:
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        self.sent_bytes += 2 * size * (self.size - 1) // self.size  # as a ring sends them
        super().sum(tensors)

    def trade(self, values: Tensor, going: Sequence[int], coming: Sequence[int]) -> Tensor:
        away = len(values) - going[self.rank]
        self.sent_bytes += away * (values.numel() // max(1, len(values))) * values.element_size()
        return super().trade(values, going, coming)

    def _done(self, start: Callable[[], Any]) -> None:
        self.messages += 1
        if not self.timed:
            super()._done(start)
            return
        begin_s = time.perf_counter()
        self.wait_for_all_untimed()
        met_s = time.perf_counter()
        super()._done(start)
        self.wait_s += met_s - begin_s
        self.exchange_s += time.perf_counter() - met_s

    def wait_for_all_untimed(self) -> None:
        self._group.barrier().wait()


def batches(config: Config, log: Path, limit: int, size: int) -> list[ExampleBlock]:
    """The first impressions of a log as batches of examples."""
    from simulators.merge import replay_blocks

    schema_file = config.schema_file(log)
    with open_log(log, schema_file, limit=limit) as reader:
        stream = BlockStream(schema_file.schema, config.stream.join, config.stream.batch, replay_blocks(reader, 0))
        examples = []
        while not stream.ended:
            stream.poll(0)
            while (batch := stream.next_batch()) is not None:
                examples.append(batch.to_train_on())
    whole = ExampleBlock.concat(examples)
    return [whole.take(slice(i, i + size)) for i in range(0, len(whole) - size + 1, size)]


def run_rank(rank: int, size: int, store: Path, log: Path, limit: int, batch: int) -> dict[str, float]:
    """Train as one rank on its part of every batch; milliseconds a step, by part."""
    torch.set_num_threads(1)
    config = Config(schema="synthetic")
    world: Any = ALONE
    if size > 1:
        torch_dist: Any = dist
        group = torch_dist.ProcessGroupGloo(torch_dist.FileStore(str(store), size), rank, size, timedelta(seconds=60))
        world = TimedWorld(group)
        del group  # the world lets go of it at the end
    schema, device = load_builtin("synthetic").schema, torch.device("cpu")
    learner = Learner(schema, config.model, config.optimizer, config.rows, device=device, world=world)
    share = -(-batch // size)
    parts = [each.take(slice(rank * share, (rank + 1) * share)) for each in batches(config, log, limit, batch)]
    for part in parts[:_WARM_UP]:
        learner.step(learner.prepare(part))
    rest = parts[_WARM_UP:]
    half = len(rest) // 2
    plain_s = _time(learner, rest[:half], world, timed=False)
    if size > 1:
        world.wait_s = world.exchange_s = 0.0
        world.sent_bytes = world.messages = 0
    timed_s = _time(learner, rest[half:], world, timed=True)
    steps = len(rest) - half
    figures = {"step_ms": 1e3 * plain_s / half, "timed_step_ms": 1e3 * timed_s / steps}
    if size > 1:
        figures |= {
            "wait_ms": 1e3 * world.wait_s / steps,
            "exchange_ms": 1e3 * world.exchange_s / steps,
            "sent_bytes": world.sent_bytes / steps,
            "messages": world.messages / steps,
        }
        world.close()  # a group that is there when the interpreter ends may abort it
    return figures


def _time(learner: Any, parts: Sequence[ExampleBlock], world: Any, *, timed: bool) -> float:
    if world is not ALONE:
        world.timed = timed
    began_s = time.perf_counter()
    for part in parts:
        learner.step(learner.prepare(part))
    return time.perf_counter() - began_s


def run_steps(
    sizes: Sequence[int] = (1, 2), *, rounds: int = 5, limit: int = 60_000, batch: int = 1024
) -> dict[str, float]:
    """Interleaved rounds of each number of ranks; medians over rounds, of the slower rank."""
    found: dict[int, list[dict[str, float]]] = {n: [] for n in sizes}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "world.parquet")
        synthesize(log, limit, seed=1)
        for number in range(rounds):
            for n in sizes:
                store = Path(folder, f"store-{number}-{n}")
                found[n].append(_ranks(n, store, log, limit, batch))
    figures: dict[str, float] = {}
    for n, each in found.items():
        for name in each[0]:
            figures[f"{name}_{n}"] = statistics.median(one[name] for one in each)
        if n > 1:
            figures[f"compute_ms_{n}"] = statistics.median(
                one["timed_step_ms"] - one["wait_ms"] - one["exchange_ms"] for one in each
            )
            figures[f"network_ms_{n}"] = 1e3 * 8 * figures[f"sent_bytes_{n}"] / NETWORK_BITS_PER_S
            figures[f"step_ratio_{n}"] = statistics.median(
                one["step_ms"] / alone["step_ms"] for one, alone in zip(each, found[sizes[0]], strict=True)
            )
    return figures


def _ranks(size: int, store: Path, log: Path, limit: int, batch: int) -> dict[str, float]:
    options = ["--size", str(size), "--store", str(store), "--log", str(log), "--limit", str(limit)]
    command = [sys.executable, "-P", "-m", "benchmarks.scale_steps", *options, "--batch", str(batch)]
    here = Path(__file__).resolve().parents[1]
    running = [
        subprocess.Popen(
            [*command, "--rank", str(rank)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment() | {"PYTHONPATH": str(here)},
        )
        for rank in range(size)
    ]
    found = []
    for process in running:
        output, _ = process.communicate(timeout=600)
        if process.returncode:
            raise RuntimeError(f"a rank of {size} ended with status {process.returncode}")
        found.append(json.loads(output.splitlines()[-1]))
    return {name: statistics.mean(each[name] for each in found) for name in found[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("rank", "size", "limit", "batch"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("store", "log"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    of = parser.parse_args()
    print(json.dumps(run_rank(of.rank, of.size, of.store, of.log, of.limit, of.batch)))


if __name__ == "__main__":
    main()
