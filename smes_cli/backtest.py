"""``smes backtest``: join → batches → progressive evaluation → training in one process, at full speed."""

import resource
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from simulators.ahead import Ahead
from simulators.logs.ledger import LogLedger
from simulators.logs.reader import open_log
from simulators.merge import replay_blocks
from smes.events import ExampleBlock
from smes.model.corrections import Corrections, sharing_groups
from smes.model.devices import keep_freed_memory
from smes.model.learner import Learner
from smes.model.own_experts import own_experts_report
from smes.schema import Schema
from smes_cli.building import build_evaluation, build_learner
from smes_cli.config import Config
from smes_cli.console import Advance, console, load_line, progress
from smes_cli.primed_start import empty_folder
from smes_cli.seen import end_history, write_history
from stream.block_stream import BlockStream
from trainer.checkpoints import CheckpointDirectory
from trainer.evaluation import ProgressiveEvaluation
from trainer.loop import Trainer
from trainer.observers import Observer, StepFigures, fetch
from trainer.report import TrainingReport
from trainer.routing_figures import routing_report
from trainer.routing_history import RoutingHistoryConfig
from trainer.run_report import task_figures, training_report
from trainer.schedule import Flags
from trainer.stretches import Stretches
from trainer.task_figures import headline

_MEMORY_EVERY = 250_000  # impressions


@dataclass(frozen=True, slots=True)
class BacktestResult:
    """What a backtest found.

    Attributes:
        report: The report of the configured ranker.
        baseline: ``tasks`` and ``headline``, as in a report, of a second ranker on the same batches, if one was named.
        memory_mib: (impressions trained on, resident MiB then) along the way.
        duplicates_dropped: Rows of the log that the reader dropped as exact duplicates.
        rejected: Reason → rows that the reader could not use.
        ledger: What the reader found in the log.
        expert_load: The load on the experts, in one line for people.
        routing: The routing over time; see :func:`trainer.routing_figures.routing_report`.
        own_experts: Which tasks would gain from experts of their own, if that was asked for; see
            :func:`smes.model.own_experts.own_experts_report`.
    """

    report: TrainingReport
    baseline: dict[str, Any] | None
    memory_mib: list[tuple[int, float]]
    duplicates_dropped: int
    rejected: dict[str, int]
    ledger: LogLedger
    expert_load: str
    routing: dict[str, Any]
    own_experts: list[dict[str, Any]] | None

    def figures(self) -> dict[str, Any]:
        """The report with the log's ledger, as ``--report`` has it."""
        return self.report.to_dict() | {"log": self.ledger.to_dict()}


class _Baseline(Observer):
    """A second ranker that is evaluated and trained on the same batches."""

    def __init__(self, config: Config, schema: Schema, ranker: str) -> None:
        model = replace(config.model, ranker=ranker)  # type: ignore[arg-type]  # ModelConfig checks the name
        self._learner = build_learner(config, schema, model)
        self._evaluation = build_evaluation(config, self._learner)

    def before_step(self, examples: ExampleBlock) -> None:
        """Score the batch, then train on it."""
        self._evaluation.before_step(examples)
        result = self._learner.step(self._learner.prepare(examples))
        self._evaluation.after_step(examples, fetch(result))

    def after_closing(self, examples: ExampleBlock) -> None:
        """Count impressions whose final labels have come."""
        self._learner.observe_closed(examples)
        self._evaluation.after_closing(examples)

    def report(self) -> dict[str, Any]:
        """``tasks`` and ``headline``, as in a report."""
        tasks = task_figures(self._evaluation.report())
        return {
            "tasks": {name: asdict(figures) for name, figures in tasks.items()},
            "headline": asdict(headline(tasks)),
        }


class _MemorySamples(Observer):
    """Samples the resident memory along the way."""

    def __init__(self) -> None:
        self.samples: list[tuple[int, float]] = []
        self._trained = 0

    def after_step(self, examples: ExampleBlock, figures: StepFigures) -> None:
        """Take a sample every so many impressions."""
        self._trained += examples.num_impressions
        if self._trained >= _MEMORY_EVERY * (len(self.samples) + 1):
            self.take()

    def take(self) -> None:
        """Take a sample now."""
        self.samples.append((self._trained, resident_mib()))


class _Progress(Observer):
    """Moves a progress bar on."""

    def __init__(self, advance: Advance) -> None:
        self._advance = advance
        self._trained, self._started_s = 0, time.monotonic()

    def after_step(self, examples: ExampleBlock, figures: StepFigures) -> None:
        """Show impressions trained on, and how many a second."""
        self._trained += examples.num_impressions
        rate = self._trained / (time.monotonic() - self._started_s)
        self._advance(self._trained, f"{rate:,.0f} impressions/s")


def run_backtest(
    config: Config,
    log: Path,
    *,
    limit: int | None,
    seed: int,
    baseline: str | None,
    should_stop: Callable[[], bool],
    max_rejected: float | None = None,
    evaluate: Callable[[Config, Learner], ProgressiveEvaluation] | None = None,
    routing: RoutingHistoryConfig | None = None,
    own_experts: bool = False,
    checkpoint: Path | None = None,
    history: Path | None = None,
) -> BacktestResult:
    """Replay a log through join, evaluation and training: the loop of ``smes train``, without servers.

    The log is read, and frozen copies of the weights score, on threads beside the training.

    Args:
        config: Schema, stream, model, optimiser and evaluation are used.
        log: A folder or file; see :func:`simulators.logs.reader.open_log`.
        limit: Only the first so many impressions.
        seed: Seed of the feedback delays.
        baseline: Name of a second ranker that trains on the same batches, for comparison.
        should_stop: Asked between two steps; a stopped backtest reports what it has done.
        max_rejected: Largest share of unusable rows of the log; None for the schema file's.
        evaluate: Builds the evaluation of the configured ranker; a benchmark gives one that keeps the scores. None:
            the usual one, whose frozen copies score on a thread of their own.
        routing: How finely the routing's history is kept; None for the default.
        own_experts: Whether to find out which tasks would gain from experts of their own, which takes some time.
        checkpoint: An empty folder for a checkpoint from which a live training can go on (``smes train --from``). It is
            of the end of the log. If the log has ids of its own, it may also be of where the backtest was stopped, and
            impressions whose windows were open wait in it; the report is of after they were trained on, too.
        history: Folder for the metrics over time (:mod:`trainer.history`); the last line has the rest of the log. The
            report and the experts over time are written there, too.

    Raises:
        LogError: The log cannot be read as its schema file says.
        ValueError: No schema is named, the configuration does not fit the machine, or ``checkpoint`` has one already.
        CheckpointError: The disk refused the checkpoint.
    """
    keep_freed_memory()
    schema_file = config.schema_file(log)
    schema, names = schema_file.schema, [task.name for task in schema_file.schema.tasks]
    learner = build_learner(config, schema)
    corrections = _corrections(config, learner) if own_experts else None
    with ExitStack() as stack:
        folder = None if checkpoint is None else empty_folder(checkpoint, "an empty folder for the checkpoint")
        if folder is not None:
            stack.enter_context(folder.locked())
        reader = stack.enter_context(open_log(log, schema_file, limit=limit, max_rejected=max_rejected))
        own_ids = reader.spec.impression_id is not None
        pairs = Ahead(replay_blocks(reader, seed), stack.enter_context(_thread("smes-read")))
        stream = BlockStream(
            schema,
            config.stream.join,
            config.stream.batch,
            pairs,
            own_ids=own_ids,
            stays_open=folder is not None and own_ids,
        )
        if evaluate is None:
            evaluation = build_evaluation(config, learner, stack.enter_context(_thread("smes-frozen-scores")))
        else:
            evaluation = evaluate(config, learner)
        other = _Baseline(config, schema, baseline) if baseline else None
        memory, bar = _MemorySamples(), _Progress(stack.enter_context(progress("backtest", reader.total)))
        observers = [memory, bar] if other is None else [other, memory, bar]
        over_time = config.trainer.history
        stretches = Stretches(evaluation, every_examples=over_time.every_examples) if history is not None else None
        trainer = Trainer(
            learner, stream, evaluation, Flags(), routing=routing, observers=observers, stretches=stretches
        )
        if history is not None and stretches is not None:
            write_history(over_time, history, trainer, stretches)
        started_s = time.monotonic()
        trainer.run(lambda: (stream.ended and stream.upcoming() is None) or should_stop())
        pairs.wait()
        if folder is not None:
            _write_checkpoint(trainer, stream, folder, own_ids=own_ids)
            if stream.ended:
                _train_on_the_rest(trainer, stream)
        trainer.settle()
        if stretches is not None:
            stretches.end()
        seconds = time.monotonic() - started_s
        memory.take()
        result = BacktestResult(
            training_report(trainer, seconds=seconds, trained=trainer.trained),
            other.report() if other is not None else None,
            memory.samples,
            reader.duplicates,
            reader.rejected,
            reader.ledger,
            load_line(trainer.experts.load_share, trainer.experts.load_skew),
            routing_report(trainer.experts.history, learner.expert_limits, names),
            None if corrections is None else own_experts_report(corrections.sums, names),
        )
        if history is not None:
            end_history(history, trainer, result.figures())
        return result


def _thread(name: str) -> ThreadPoolExecutor:
    """One thread beside the training, with as many threads of torch as the training has."""
    return ThreadPoolExecutor(1, name, initializer=lambda: torch.set_num_threads(torch.get_num_threads()))


def _write_checkpoint(trainer: Trainer, stream: BlockStream, folder: CheckpointDirectory, *, own_ids: bool) -> None:
    """Write the state in which a live training can take over, if there is one."""
    why = None
    if not trainer.learner.step_number:
        why = "no step was taken"
    elif not (own_ids or stream.ended):
        # What waits would be lost: no live event could reach it, and its own feedback was not read.
        why = "stopped before the end of a log without ids (log.impression_id)"
    if why is not None:
        console.print(f"{why}: no checkpoint in {folder.directory}", highlight=False)
        return
    path = folder.save(trainer.view())
    waiting = stream.ledger().waiting
    console.print(f"checkpoint {path}: {waiting:,} impressions wait in it for feedback", highlight=False)


def _train_on_the_rest(trainer: Trainer, stream: BlockStream) -> None:
    """Close the open windows and train on what waits."""
    stream.flush()
    while trainer.step():
        pass


def _corrections(config: Config, learner: Learner) -> Corrections:
    """Corrections that watch a learner of the configured model."""
    groups = sharing_groups(learner.schema, config.model)
    corrections = Corrections(learner.schema, groups, config.optimizer, config.model.rare)
    learner.watch(corrections)
    return corrections


def resident_mib() -> float:
    """Resident memory of this process now (Linux), else its peak, in MiB."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
