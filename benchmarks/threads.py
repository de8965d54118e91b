"""Training speed with one and two threads of torch, while other processes leave the cores alone and while they do not.

    python -m benchmarks.threads

Each figure is of a process of its own, because torch keeps its threads. Rounds are interleaved.
"""

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

_BATCH, _FIELDS, _TASKS = 256, 10, 8


def measure(threads: int, seconds: float) -> float:
    """Examples a second that the default model trains on, with so many threads, in this process."""
    import numpy as np
    import torch

    from smes import Feature, Learner, ModelConfig, OptimizerConfig, Schema, Task
    from smes.events import ExampleBlock
    from smes.model.devices import keep_freed_memory

    torch.set_num_threads(threads)
    keep_freed_memory()
    tasks, fields = (Task(f"t{i}") for i in range(_TASKS)), (Feature(f"f{i}") for i in range(_FIELDS))
    schema = Schema("threads", tuple(tasks), tuple(fields))
    learner = Learner(schema, ModelConfig(), OptimizerConfig(), device=torch.device("cpu"))
    rng, blocks = np.random.default_rng(0), []
    for _ in range(20):
        block = ExampleBlock.empty(schema, _BATCH)
        block.ids[:] = rng.integers(0, 1000, block.ids.shape)
        block.labels[:] = rng.random(block.labels.shape) < 0.1
        blocks.append(block)
    for block in blocks:
        learner.step(learner.prepare(block))
    start, steps = time.perf_counter(), 0
    while time.perf_counter() < start + seconds:
        learner.step(learner.prepare(blocks[steps % len(blocks)]))
        steps += 1
    return steps * _BATCH / (time.perf_counter() - start)


def _burn() -> None:
    while True:
        pass


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """So many processes that never wait, for as long as the block runs."""
    burning = [multiprocessing.Process(target=_burn, daemon=True) for _ in range(processes)]
    for process in burning:
        process.start()
    try:
        yield
    finally:
        for process in burning:
            process.terminate()


def main(rounds: int = 3, seconds: float = 4.0) -> None:
    """Print the figures of every round."""
    cores = os.cpu_count() or 1
    for others in (0, cores):
        with busy(others):
            for _ in range(rounds):
                rates = {}
                for threads in (1, 2):
                    command = [sys.executable, "-m", "benchmarks.threads", str(threads), str(seconds)]
                    rates[threads] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                speeds = ", ".join(f"{threads} threads {rate:,.0f}/s" for threads, rate in rates.items())
                print(f"{others} busy processes, load {os.getloadavg()[0]:.1f}: {speeds}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(measure(int(sys.argv[1]), float(sys.argv[2])))
    else:
        main()
