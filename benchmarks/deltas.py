"""What a cut costs: bytes of a delta, how long the training loop stands still, how soon the cut is in service.

    python -m benchmarks.deltas --json deltas.json
    python -m benchmarks.deltas --rows 100000 --rounds 2 --seconds 3        # another size
    python -m benchmarks.deltas --parts bytes precision

The table of :mod:`benchmarks.table_step`: 33 fields × 16 and 8 tasks. A real Valkey, a scorer in a process of its own
that follows the store, and the trainer's own loop and publisher in this one. One thread trains.

- ``bytes``: 1 % of the rows was touched (``touched_share``). ``delta_bytes_ratio``, ``delta_fp16_bytes_ratio`` and
  ``delta_int8_bytes_ratio``: the delta's bytes against those of the full snapshot in fp32.
- ``cut``: that cut. ``stall_ms``: the loop stands still; ``cut_to_service_s``: from the beginning of the cut until the
  scorer has it in service. Medians of several cuts. ``full_stall_ms``: likewise for a cut with a view of the whole
  table, of which a full snapshot is made; ``full_step_excess_ms``: by how much the longest step while that is written
  exceeds the median one; ``full_publish_s``: until the full snapshot is published.
- ``throughput``: ``cut_throughput_ratio``: steps a second with a cut every second against none, in turns, with bases
  as the defaults ask for them. The scorer is stopped: it would have a machine of its own.
- ``precision``: ``auc_loss_fp16``, ``auc_loss_int8``: by how much the mean AUC of the tasks falls when the rows serve
  in that precision (:mod:`benchmarks.delta_precision`), on ``--log`` or on the built-in synthetic log.
"""

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import cast, get_args

import numpy as np
import torch

from benchmarks.delta_precision import precision_losses
from benchmarks.figures import save, show
from benchmarks.table_step import FIELDS, SCHEMA, draw, filled_learner
from feature_store.config import SnapshotStoreConfig
from feature_store.feedback_times import FeedbackTimes
from feature_store.payload import Precision
from feature_store.snapshots import SnapshotStore, SnapshotWatcher
from smes.arrays import I64
from smes.events import ExampleBlock
from smes.model.devices import keep_freed_memory
from smes.model.frozen_model import FrozenModel
from smes.model.learner import Learner
from smes_cli.demo.local_servers import start_valkey
from smes_io.clock import wall_clock_ms
from smes_io.redis_client import connect
from smes_scorer.first_answers import FirstAnswers
from smes_scorer.hot_swap import HotSwap
from smes_scorer.loading import load_table_model
from smes_scorer.telemetry import Telemetry
from stream.block_stream import BlockStream
from stream.config import JoinConfig, MiniBatchConfig
from trainer.config import EvaluationConfig
from trainer.cuts import Cut, Payloads
from trainer.evaluation import ProgressiveEvaluation
from trainer.loop import Trainer
from trainer.publisher import Publisher
from trainer.schedule import Flags

PARTS = ("bytes", "cut", "throughput", "precision")
_PRECISIONS: tuple[Precision, ...] = get_args(Precision)
_TOUCHED = 0.01
_PATIENCE_S = 600.0
_GIB = 1024**3


class Following:
    """A scorer in a process of its own that says which version it has in service, and since when.

    Args:
        url: Of the store.
    """

    def __init__(self, url: str) -> None:
        ours, theirs = multiprocessing.get_context("spawn").Pipe()
        self._pipe: Connection = ours
        self._process = multiprocessing.get_context("spawn").Process(target=_follow, args=(url, theirs), daemon=True)
        self._process.start()

    def until(self, version: int) -> float:
        """Wait until a version is in service; since when, Unix seconds."""
        deadline_s = time.monotonic() + _PATIENCE_S
        while self._pipe.poll(max(0.0, deadline_s - time.monotonic())):
            served, since_s = cast("tuple[int, float]", self._pipe.recv())
            if served >= version:
                return since_s
        raise SystemExit(f"version {version}: not in service within {_PATIENCE_S:g} s")

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()


def _follow(url: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    with connect(url, 60.0) as client:
        store, watcher = SnapshotStore(client), SnapshotWatcher(client, poll_s=1.0)
        swap = HotSwap(store, watcher, SCHEMA, load_table_model, FirstAnswers(), Telemetry(), poll_s=1.0)
        swap.start()
        told = -1
        while True:
            served = swap.served
            if served is not None and served.manifest.version != told:
                told = served.manifest.version
                pipe.send((told, time.time()))
            time.sleep(0.001)


@contextmanager
def publishing(learner: Learner) -> Iterator[tuple[Trainer, str]]:
    """A trainer that publishes into a Valkey of its own, and the Valkey's address."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(start_valkey(folder))
        client = stack.enter_context(connect(server.url, 60.0))
        # Only as much as the newest chain and one before need.
        store = SnapshotStore(client, config=SnapshotStoreConfig(retain_bytes=_GIB))
        evaluation = ProgressiveEvaluation(
            SCHEMA,
            EvaluationConfig(),
            freeze=lambda: FrozenModel.freeze(learner),
            thaw=lambda state: FrozenModel.thaw(learner, state),
        )
        trainer = Trainer(
            learner, BlockStream(SCHEMA, JoinConfig(), MiniBatchConfig(max_wait_s=None), iter(())), evaluation, Flags()
        )
        model = learner.config.to_dict()
        trainer.publish_to(lambda name: Publisher(store, SCHEMA, model, name, now_ms=wall_clock_ms), None)
        yield trainer, server.url
        assert trainer.publisher is not None
        trainer.publisher.close()


def batches_of(ids: list[I64]) -> list[ExampleBlock]:
    """Examples with these ids and random labels."""
    rng = np.random.default_rng(3)
    blocks = []
    for ids_BW in ids:
        block = ExampleBlock.empty(SCHEMA, len(ids_BW))
        block.ids[:] = ids_BW
        block.labels[:] = rng.random(block.labels.shape) < 0.1
        block.label_mask[:] = True
        blocks.append(block)
    return blocks


class Steps:
    """Takes steps on batches, in turn.

    Args:
        learner: Learns.
        batches: What it learns from.
    """

    def __init__(self, learner: Learner, batches: list[ExampleBlock]) -> None:
        self._learner, self._batches, self.taken = learner, batches, 0

    def step(self) -> float:
        """One step; how long it took, in seconds."""
        started_s = time.perf_counter()
        self._learner.step(self._learner.prepare(self._batches[self.taken % len(self._batches)]))
        self.taken += 1
        return time.perf_counter() - started_s

    def touch(self, rows: int) -> None:
        """As many steps as touch about so many rows, where ids are drawn all alike."""
        for _ in range(max(1, round(rows / (FIELDS * len(self._batches[0]))))):
            self.step()


def delta_bytes(learner: Learner, steps: Steps, rows: int) -> dict[str, float]:
    """Bytes of a delta and of the full snapshot."""
    learner.skip_delta()
    steps.touch(round(_TOUCHED * rows))
    with _cut_of(learner) as (cut, touched, full_rows):
        result: dict[str, float] = {"touched_share": touched / full_rows}
        for precision in _PRECISIONS:
            payloads = Payloads(SCHEMA, learner.config.to_dict(), "a", precision)
            if precision == "fp32":
                result["full_bytes"] = payloads.full(cut).total_bytes
            name = "" if precision == "fp32" else f"_{precision}"
            result[f"delta{name}_bytes"] = payloads.delta(cut).total_bytes
            result[f"delta{name}_bytes_ratio"] = result[f"delta{name}_bytes"] / result["full_bytes"]
    return result


@contextmanager
def _cut_of(learner: Learner) -> Iterator[tuple[Cut, int, int]]:
    delta, view = learner.take_delta(), learner.full_view()
    cut = Cut(
        step=learner.step_number,
        dense=view.dense,
        deltas=(delta,),
        view=view,
        positions={},
        event_time_ms=None,
        metrics={},
        cut_ms=wall_clock_ms(),
        feedback=FeedbackTimes.concat([]),
    )
    try:
        yield cut, len(delta), view.num_rows
    finally:
        view.close()


def cuts(learner: Learner, steps: Steps, rows: int, rounds: int) -> dict[str, float]:
    """Stalls and the time to service, of deltas and of full snapshots."""
    usual_s = median(steps.step() for _ in range(20))
    with publishing(learner) as (trainer, url):
        publisher = trainer.publisher
        assert publisher is not None
        until(lambda: publisher.published == 1)  # the first one, taken when publishing began
        following = Following(url)
        try:
            following.until(learner.step_number)
            stall_s, service_s = [], []
            for _ in range(rounds):
                steps.touch(round(_TOUCHED * rows))
                begun_s, started_s = time.time(), time.perf_counter()
                trainer.cut()
                stall_s.append(time.perf_counter() - started_s)
                service_s.append(following.until(learner.step_number) - begun_s)
        finally:
            following.close()
        full_s, longest_s, publish_s = [], [], []
        for _ in range(max(1, rounds // 3)):
            steps.touch(round(_TOUCHED * rows))
            published, started_s = publisher.published, time.perf_counter()
            publisher.offer(trainer.take_cut(full=True))
            full_s.append(time.perf_counter() - started_s)
            beside_s = [0.0]
            while publisher.published == published:
                beside_s.append(steps.step())
            publish_s.append(time.perf_counter() - started_s)
            longest_s.append(max(beside_s) - usual_s)
    return {
        "step_ms": 1e3 * usual_s,
        "stall_ms": 1e3 * median(stall_s),
        "stall_max_ms": 1e3 * max(stall_s),
        "cut_to_service_s": median(service_s),
        "cut_to_service_max_s": max(service_s),
        "full_stall_ms": 1e3 * median(full_s),
        "full_step_excess_ms": 1e3 * median(longest_s),
        "full_publish_s": median(publish_s),
    }


def throughput(learner: Learner, steps: Steps, rounds: int, seconds: float) -> dict[str, float]:
    """Steps a second without cuts and with one every second, in turns."""
    rates: dict[bool, list[float]] = {False: [], True: []}
    with publishing(learner) as (trainer, _):
        publisher = trainer.publisher
        assert publisher is not None
        until(lambda: publisher.published == 1)
        for _ in range(rounds):
            for with_cuts in (False, True):
                trainer.cut()  # what was touched without cuts is not counted to those
                until(lambda: not publisher.has_waiting and not publisher.wants_base)
                rates[with_cuts].append(_rate(steps, trainer.cut if with_cuts else lambda: None, seconds))
        published, bases = publisher.published, publisher.bases
    return {
        "steps_per_s": median(rates[False]),
        "steps_per_s_with_cuts": median(rates[True]),
        "cut_throughput_ratio": median(w / o for w, o in zip(rates[True], rates[False], strict=True)),
        "published": published,
        "bases": bases,
    }


def _rate(steps: Steps, each_second: Callable[[], None], seconds: float) -> float:
    before, started_s = steps.taken, time.perf_counter()
    due_s = started_s + 1.0
    while (now_s := time.perf_counter()) < started_s + seconds:
        if now_s >= due_s:
            each_second()
            due_s += 1.0
        steps.step()
    return (steps.taken - before) / (time.perf_counter() - started_s)


def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition.

    Raises:
        SystemExit: It took too long.
    """
    deadline_s = time.monotonic() + _PATIENCE_S
    while not condition():
        if time.monotonic() > deadline_s:
            raise SystemExit(f"waited for longer than {_PATIENCE_S:g} s")
        time.sleep(0.01)


def measure(options: argparse.Namespace) -> dict[str, float]:
    """The flat object that ``--json`` writes."""
    result: dict[str, float] = {"rows": options.rows}
    if {"bytes", "cut", "throughput"} & set(options.parts):
        learner = filled_learner(options.rows)
        alike = Steps(learner, batches_of(draw(options.rows, 64, 1, seed=1)))
        alike.step()  # weights without a step are not published
        if "bytes" in options.parts:
            result |= delta_bytes(learner, alike, options.rows)
        if "cut" in options.parts:
            result |= cuts(learner, alike, options.rows, options.rounds)
        if "throughput" in options.parts:
            popular = Steps(learner, batches_of(draw(options.rows, 512, 3, seed=2)))
            result |= throughput(learner, popular, options.rounds, options.seconds)
    if "precision" in options.parts:
        result |= precision_losses(options.log, options.impressions)
    return result


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.deltas", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=10.0, help="of a round with or without cuts")
    parser.add_argument("--log", type=Path, help="for the precision: a folder that smes backtest reads")
    parser.add_argument("--impressions", type=int, default=400_000, help="of that log")
    parser.add_argument("--json", type=Path, help="write all figures here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    result = measure(options)
    show(result)
    save(result, options.json)


if __name__ == "__main__":
    main()
