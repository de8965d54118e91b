"""What the stream around the training step costs: training on given batches against a whole backtest.

Both do the same steps on the same examples, progressive evaluation included. ``train_per_s`` takes ready-made batches;
``backtest_per_s`` is ``smes backtest``: it reads, sorts and de-duplicates the log, draws the delays, joins and batches.
``step_only_per_s`` leaves out the frozen scores of the windowed GAUC too, and ``backtest_share`` is what the backtest
reaches of it. Repeats are interleaved; medians are printed.

``--against FOLDER`` times whole backtests in processes by turns, of this checkout and of the one in FOLDER, and adds
how many times as fast this one is: by the clock (``backtest_speedup``) and in processor time.

Run: ``python -m benchmarks.pipeline [LOG] [--json FILE] [--limit N] [--repeats N] [--against FOLDER]``; LOG is a
KuaiRand folder or a synthetic log, by default a synthetic one that is made first.
"""

import argparse
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.figures import save, show
from simulators.logs.reader import open_log
from simulators.merge import replay_blocks
from simulators.synthetic import synthesize
from smes.events import ExampleBlock
from smes.schema import Schema
from smes_cli.backtest import run_backtest
from smes_cli.building import build_evaluation, build_learner, warm_up
from smes_cli.config import Config
from smes_cli.console import console
from stream.block_stream import BlockStream
from trainer.observers import fetch


def given_batches(config: Config, log: Path, limit: int | None) -> tuple[Schema, list[ExampleBlock]]:
    """Every mini-batch that a backtest of the log trains on."""
    schema_file = config.schema_file(log)
    schema = schema_file.schema
    batches: list[ExampleBlock] = []
    with open_log(log, schema_file, limit=limit) as reader:
        stream = BlockStream(schema, config.stream.join, config.stream.batch, replay_blocks(reader, 0))
        while not stream.ended:
            stream.poll(0)
            while (batch := stream.next_batch()) is not None:
                batches.append(batch)
    return schema, batches


def train(config: Config, schema: Schema, batches: list[ExampleBlock], *, evaluate: bool) -> int:
    """Score and train on every batch; the number of examples."""
    learner = build_learner(config, schema)
    evaluation = build_evaluation(config, learner)
    for examples in batches:
        batch = learner.prepare(examples)
        if evaluate:
            evaluation.before_step(examples)
        result = learner.step(batch)
        if evaluate:
            evaluation.after_step(examples, fetch(result))
    return sum(len(examples) for examples in batches)


def run(config: Config, log: Path, limit: int | None, repeats: int) -> dict[str, float]:
    """Median examples per second of each contender, and the backtest's share of training alone."""
    schema, batches = given_batches(config, log, limit)
    warm_up(config, schema)

    def backtest() -> int:
        result = run_backtest(config, log, limit=limit, seed=0, baseline=None, should_stop=lambda: False)
        return result.report.events.trained

    contenders: dict[str, Callable[[], int]] = {
        "step_only_per_s": lambda: train(config, schema, batches, evaluate=False),
        "train_per_s": lambda: train(config, schema, batches, evaluate=True),
        "backtest_per_s": backtest,
    }
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, contender in contenders.items():
            gc.collect()
            start_s = time.perf_counter()
            examples = contender()
            rates[name].append(examples / (time.perf_counter() - start_s))
            assert examples == sum(len(batch) for batch in batches), "a contender trained on other examples"
    figures = {name: statistics.median(values) for name, values in rates.items()}
    return {
        **figures,
        "backtest_share": _ratio(rates["backtest_per_s"], rates["step_only_per_s"]),
        "backtest_vs_train": _ratio(rates["backtest_per_s"], rates["train_per_s"]),
        "examples": float(sum(len(batch) for batch in batches)),
        "peak_resident_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def against(log: Path, limit: int, repeats: int, other: Path) -> dict[str, float]:
    """How many times as fast a whole backtest by this checkout is as one by another, in processes by turns."""
    here = Path(__file__).resolve().parent.parent
    seconds: dict[Path, list[dict[str, float]]] = {here: [], other.resolve(): []}
    for _ in range(repeats):
        for checkout, measured in seconds.items():
            measured.append(_child(checkout, log, limit))
    ours, theirs = seconds.values()
    assert {m["trained"] for m in ours} == {m["trained"] for m in theirs}, "the two trained on other examples"
    return {
        "backtest_speedup": _ratio([m["clock_s"] for m in theirs], [m["clock_s"] for m in ours]),
        "backtest_processor_speedup": _ratio([m["processor_s"] for m in theirs], [m["processor_s"] for m in ours]),
        "backtest_s": statistics.median(m["clock_s"] for m in ours),
        "other_backtest_s": statistics.median(m["clock_s"] for m in theirs),
    }


def _child(checkout: Path, log: Path, limit: int) -> dict[str, float]:
    command = [sys.executable, "-P", str(Path(__file__).with_name("pipeline_child.py")), str(log.resolve()), str(limit)]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    done = subprocess.run(command, cwd=checkout, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    seconds: dict[str, float] = json.loads(done.stdout)
    return seconds


def _ratio(above: list[float], below: list[float]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def main() -> None:
    """Print the figures; ``--json FILE`` also writes them as one flat object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", nargs="?", type=Path, help="KuaiRand folder or synthetic log; default: one is made")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--limit", type=int, default=60_000, help="impressions")
    parser.add_argument("--repeats", type=int, default=5, help="at least 5 for a figure to quote")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="another checkout, to time whole backtests with")
    arguments = parser.parse_args()
    console.quiet = True
    with tempfile.TemporaryDirectory() as folder:
        log, config = arguments.log, Config()
        if log is None:
            log = Path(folder) / "world.parquet"
            synthesize(log, arguments.limit, seed=0)
        figures = run(config, log, arguments.limit, arguments.repeats)
        if arguments.against is not None:
            figures |= against(log, arguments.limit, arguments.repeats, arguments.against)
    show(figures)
    save(figures, arguments.json)


if __name__ == "__main__":
    main()
