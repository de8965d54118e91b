"""What several ranks learn together, against one process: ledgers, weights, kills, other numbers of ranks.

The log is filled first, then read to its end (``--flush``). So which batches come together in a step depends on the log
alone, and the same steps can be taken by one learner that gets the batches of all ranks as one.
"""

import hashlib
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import torch

from benchmarks.chaos_system import PARTITIONS, WAITING, System, read_config, read_json
from simulators.logs.reader import open_log
from simulators.merge import replay_blocks
from smes.arrays import Arrays, under
from smes.events import ExampleBlock
from smes.model.learner import Learner
from smes_cli.building import build_evaluation, build_learner
from smes_cli.compile_loops import compile_loops
from smes_cli.config import Config
from smes_cli.train_ranks import share_of_batches
from stream.codec.codec import encode_feedback, encode_impressions
from stream.dead_letters import DeadLetterWriter
from stream.example_stream import ExampleStream
from stream.log.open_log import open_event_log
from stream.sources import Share
from stream.topics import FEEDBACK, IMPRESSIONS
from trainer.checkpoints import CheckpointDirectory
from trainer.observers import fetch
from trainer.report import conservation_errors

_ROWS_PER_BLOCK = 500
_MOST_S = 2700.0
_ROUNDING, _MOST_ORDERS = 1e-4, 8


@dataclass(frozen=True)
class Ran:
    """A finished run of some ranks.

    Attributes:
        config: Its configuration.
        report: What it wrote.
        seconds: From the start of the process to its end.
    """

    config: Path
    report: dict[str, Any]
    seconds: float

    @property
    def ledger(self) -> dict[str, Any]:
        """Both ledgers, without what a second run adds."""
        return {"events": self.report["events"], "feedback": self.report["feedback"]}

    @property
    def mean_auc(self) -> float:
        """Mean of progressive AUC over the dense tasks: the report's headline."""
        return float(self.report["headline"]["dense"]["auc"])

    def auc(self) -> dict[str, float]:
        """Progressive AUC by task, of the tasks that have one."""
        return {name: task["auc"] for name, task in self.report["tasks"].items() if task["auc"] is not None}


def fill(config: Config, log: Path, limit: int, part: slice = slice(None)) -> None:
    """Append a part of a log to both topics, in order."""
    schema, partitions = config.schema_file(log).schema, config.event_log.partitions
    with (
        closing(open_event_log(config.event_log)) as event_log,
        open_log(log, config.schema_file(log), limit=limit) as r,
    ):
        for topic in (IMPRESSIONS, FEEDBACK):
            event_log.ensure_topic(topic, partitions)
        for impressions, feedback in list(replay_blocks(r, seed=4, rows_per_block=_ROWS_PER_BLOCK))[part]:
            if len(impressions):
                event_log.append(IMPRESSIONS, encode_impressions(impressions, schema, "arrow", partitions))
            if len(feedback):
                event_log.append(FEEDBACK, encode_feedback(feedback, schema, "arrow", partitions))


def train(system: System, name: str, config: Path, ranks: int, *, flush: bool = True) -> Ran:
    """Train on everything that is in the log, by so many ranks."""
    report = system.folder / f"{name}.json"
    began_s = time.monotonic()
    process = start(system, name, config, ranks, report, flush=flush)
    system.await_said(name, WAITING, process)
    system.finish(name, process, terminate=True)
    return Ran(config, read_json(report), time.monotonic() - began_s)


def start(
    system: System, name: str, config: Path, ranks: int, report: Path, *, flush: bool = True
) -> subprocess.Popen[bytes]:
    """``smes train`` by so many ranks; SIGTERM lets it read to the end."""
    workers = ["--workers", str(ranks), "--max-restarts", "1000"] if ranks > 1 else []
    end = "--flush" if flush else "--drain"
    return system.start_plain(name, config, "train", end, "--report", str(report), *workers)


def rank_processes(process: subprocess.Popen[bytes]) -> dict[int, psutil.Process]:
    """Rank → its process, of those that ``smes train --workers`` runs now."""
    found: dict[int, psutil.Process] = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            environment = child.environ()
        except psutil.Error:
            continue
        if "LOCAL_RANK" in environment and environment.get("WORLD_SIZE"):
            found[int(environment["RANK"])] = child
    return found


def merged_arrays(config: Path, prefix: str = "learner.") -> Arrays:
    """The newest checkpoint of any number of ranks, as one rank reads it: its arrays with this prefix."""
    read = read_config(config)
    folder = read.trainer.checkpoint.directory
    assert folder is not None
    schema = read.schema_file().schema
    newest = CheckpointDirectory(folder, keep=3).newest(schema=schema, model=read.model.to_dict())
    assert newest is not None, f"{folder}: no checkpoint"
    return under(prefix, newest.arrays)


def largest_difference(got: Arrays, learner: Learner) -> float:
    """The largest difference of a weight, dense or of a row, between a checkpoint and a learner. Rows go by key."""
    expected = {name: tensor.numpy() for name, tensor in learner.state().items()}
    worst = 0.0
    for name, wanted in expected.items():
        if name.startswith("dense.") and np.issubdtype(wanted.dtype, np.floating) and wanted.size:
            worst = max(worst, float(np.abs(got[name].astype(np.float64) - wanted).max()))
    served = learner.serving_state()
    width = sum(served[name].shape[1] for name in ("table.embedding", "table.wide") if name in served)
    mine, theirs = _rows(got, width), _rows(expected, width)
    assert np.array_equal(mine[0], theirs[0]), "other rows were born"
    return max(worst, float(np.abs(mine[1].astype(np.float64) - theirs[1]).max()))


def _rows(state: Arrays, width: int) -> tuple[Any, Any]:
    """Keys in order, and the weights of their rows, without accumulators."""
    used = np.ones(len(state["table.keys"]), np.bool_)
    used[state["rows.free"]] = False
    keys, weights = state["table.keys"][used], state["table.records"][used, :width]
    order = np.argsort(keys)
    return keys[order], weights[order]


def joint_batches(config: Config, ranks: int) -> Iterator[ExampleBlock]:
    """The batches of all ranks, step by step as one: what one rank with the whole batch would get."""
    streams = []
    with closing(open_event_log(config.event_log)) as log:
        for rank in range(ranks):
            letters, share = DeadLetterWriter(log), Share(rank, ranks)
            place: Any = SimpleNamespace(rank=rank, size=ranks)
            of_rank = share_of_batches(config.stream, place)
            streams.append(ExampleStream(config.schema_file().schema, of_rank, log, letters, share=share))
        for flush in (False, True):  # all read to the end before the first one closes its windows
            taken = [_drained(stream, flush=flush) for stream in streams]
            for step in range(max(map(len, taken))):
                yield ExampleBlock.concat([batches[step] for batches in taken if step < len(batches)])


def _drained(stream: ExampleStream, *, flush: bool) -> list[ExampleBlock]:
    if flush:
        stream.flush()
    else:
        end = stream.end()
        while not stream.has_reached(end):
            stream.poll(0.2)
    batches = []
    while (batch := stream.next_batch()) is not None:
        batches.append(batch)
    return batches


def train_as_one(config: Config, ranks: int, order: int = 0) -> tuple[Learner, dict[str, float]]:
    """A learner that gets the joint batches of so many ranks, and its progressive AUC by task.

    Args:
        config: Of the ranks.
        ranks: How many.
        order: Of the examples within each batch; 0: that of the ranks, others: seeds of a shuffle. It changes nothing
            but the rounding of sums.
    """
    torch.set_num_threads(1)
    schema = config.schema_file().schema
    learner = build_learner(config, schema)
    evaluation = build_evaluation(config, learner)
    for step, examples in enumerate(joint_batches(config, ranks)):
        if order:
            examples = examples.take(np.random.default_rng((order, step)).permutation(len(examples)))
        batch, closings = examples.to_train_on(), examples.closings()
        if len(batch):
            evaluation.before_step(batch)
            result = learner.step(learner.prepare(batch))
            evaluation.after_step(batch, fetch(result))
        if len(closings):
            learner.observe_closed(closings)
    found = {name: task.auc for name, task in evaluation.report().items()}
    return learner, {name: auc for name, auc in found.items() if auc is not None}


def auc_difference(got: dict[str, float], wanted: dict[str, float]) -> float:
    """The largest difference of a task's AUC."""
    assert got.keys() == wanted.keys(), (got.keys(), wanted.keys())
    return max(abs(auc - wanted[name]) for name, auc in got.items())


def run_equal(system: System, log: Path, limit: int, ranks: Sequence[int]) -> dict[str, Any]:
    """So many ranks over one log: their ledger against one process's, their weights against one learner's.

    Where two experts are as good as equal for an example, rounding decides which one is chosen, and from there the
    weights are others. The order of the examples within a batch decides the rounding of one learner. So where the ranks
    have gone another way than the learner with the ranks' order, learners with other orders are tried.
    """
    one_config = _prepared(system, log, limit)
    one = train(system, "train-1", one_config, 1)
    figures: dict[str, Any] = {"impressions": one.report["events"]["impressions"], "seconds_1_rank": one.seconds}
    balanced, worst, worst_auc = not conservation_errors(one.report), 0.0, 0.0
    for n in ranks:
        config = system.write_config(f"ranks-{n}", log_namespace=one_config.stem)
        many = train(system, f"train-{n}", config, n)
        got, order, differences = merged_arrays(config), 0, []
        while True:
            learner, aucs = train_as_one(read_config(config), n, order)
            differences.append(largest_difference(got, learner))
            if differences[-1] <= _ROUNDING or order == _MOST_ORDERS:
                break
            order += 1
        difference, of_auc = min(differences), auc_difference(many.auc(), aucs)
        same = many.ledger == one.ledger and not conservation_errors(many.report)
        figures |= {
            f"seconds_{n}_ranks": many.seconds,
            f"ledger_equal_{n}": same,
            f"max_abs_diff_{n}": difference,
            f"max_abs_diff_in_the_ranks_order_{n}": differences[0],
            f"orders_tried_{n}": len(differences),
            f"auc_diff_{n}": of_auc,
            f"auc_diff_to_one_process_{n}": abs(many.mean_auc - one.mean_auc),
            f"steps_{n}": learner.step_number,
        }
        if not same:
            figures[f"ledger_{n}"] = many.ledger
            figures["ledger_1"] = one.ledger
        balanced, worst, worst_auc = balanced and same, max(worst, difference), max(worst_auc, of_auc)
    return figures | {"ledger_balanced": balanced, "max_abs_diff": worst, "auc_diff": worst_auc}


def _prepared(system: System, log: Path, limit: int, name: str = "one") -> Path:
    config = system.write_config(name)
    read = read_config(config)
    compile_loops(read, read.schema_file().schema)
    fill(read, log, limit)
    return config


def run_kills(system: System, log: Path, limit: int, *, kills: int, seed: int, ranks: int = 2) -> dict[str, Any]:
    """Any rank is killed at seeded moments; it must end as the run that was never killed."""
    undisturbed = _prepared(system, log, limit, "undisturbed")
    calm = train(system, "train-undisturbed", undisturbed, ranks)
    config = system.write_config("killed", log_namespace=undisturbed.stem)
    rng = np.random.default_rng(seed)
    report = system.folder / "killed.json"
    process = start(system, "train-killed", config, ranks, report)
    killed: list[int] = []
    steps: list[int] = []
    deadline_s = time.monotonic() + _MOST_S
    seen = 0
    while len(killed) < kills and process.poll() is None and time.monotonic() < deadline_s:
        try:
            system.await_said("train-killed", WAITING, process, after=seen)
        except Exception:  # noqa: BLE001 - it has ended; said below
            break
        seen = system.written("train-killed")
        time.sleep(float(rng.random()) * 1.5)
        running = rank_processes(process)
        victim = int(rng.integers(ranks))
        if victim not in running:
            continue
        steps.append(_newest_step(config))
        running[victim].send_signal(signal.SIGKILL)
        killed.append(victim)
        print(f"  kill {len(killed)}: rank {victim}, newest checkpoint of step {steps[-1]}", flush=True)
    if process.poll() is None:
        system.await_said("train-killed", WAITING, process, after=seen)
        system.finish("train-killed", process, terminate=True)
    found = read_json(report)
    return {
        "kills": len(killed),
        "killed_ranks": killed,
        "killed_at_steps": steps,
        "ledger_equal": {k: found[k] for k in ("events", "feedback")} == calm.ledger,
        "digests_equal": rank_digests(config) == rank_digests(undisturbed) != [],
        "ranks": ranks,
    }


def _newest_step(config: Path) -> int:
    folder = read_config(config).trainer.checkpoint.directory
    assert folder is not None
    return max((int(path.name.split("-")[1]) for path in folder.glob("step-*")), default=-1)


def rank_digests(config: Path) -> list[str]:
    """A digest of the state of all ranks, as one rank would read it, array by array."""
    arrays = merged_arrays(config, "")
    return [
        f"{name} {hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()}"
        for name, array in sorted(arrays.items())
    ]


def run_resize(system: System, log: Path, limit: int, ranks: Sequence[int] = (2, 4, 1)) -> dict[str, Any]:
    """A third of the log by 2 ranks, the next by 4, the rest by 1, each from the checkpoint before."""
    whole = _prepared(system, log, limit, "whole")
    one = train(system, "train-whole", whole, 1)
    config = system.write_config("resized")
    blocks = -(-limit // _ROWS_PER_BLOCK) + 1
    third = -(-blocks // len(ranks))
    ran = None
    for i, n in enumerate(ranks):
        fill(read_config(config), log, limit, slice(i * third, (i + 1) * third if i + 1 < len(ranks) else None))
        ran = train(system, f"train-resized-{i}-{n}", config, n, flush=i + 1 == len(ranks))
    assert ran is not None
    return {
        "ranks": list(ranks),
        "ledger_balanced": not conservation_errors(ran.report) and ran.ledger == one.ledger,
        "ledger": ran.ledger,
        "ledger_of_one": one.ledger,
        "auc_diff": abs(ran.mean_auc - one.mean_auc),
        "auc_diff_of_a_task": auc_difference(ran.auc(), one.auc()),
    }


assert PARTITIONS == 4, "what the figures say"
