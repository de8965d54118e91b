"""``smes backtest``: join → batches → progressive evaluation → training in one process, at full speed."""

import resource
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from simulators.logs.reader import open_log
from simulators.merge import replay_blocks
from smes.model.devices import keep_freed_memory
from smes.model.learner import Learner
from smes.schema import Schema
from smes_cli.building import build_evaluation, build_learner
from smes_cli.config import Config
from smes_cli.console import load_line, progress
from stream.block_stream import BlockStream
from trainer.evaluation import ProgressiveEvaluation
from trainer.loop import Trainer
from trainer.report import training_report
from trainer.routing_figures import routing_report
from trainer.schedule import Flags

_MEMORY_EVERY = 250_000  # impressions


@dataclass(frozen=True, slots=True)
class BacktestResult:
    """What a backtest found.

    Attributes:
        report: Of the configured ranker, as documented.
        baseline: Metrics per task of a second ranker on the same batches, if one was asked for.
        memory_mib: (impressions trained on, resident MiB then) along the way.
        duplicates_dropped: Rows of the log that the reader left out as exact duplicates.
        rejected: Reason → rows that it could not use.
        expert_load: How the load lies on the experts, for people.
        routing: The routing over time; see :func:`trainer.routing_figures.routing_report`.
    """

    report: dict[str, Any]
    baseline: dict[str, dict[str, Any]] | None
    memory_mib: list[tuple[int, float]]
    duplicates_dropped: int
    rejected: dict[str, int]
    expert_load: str
    routing: dict[str, Any]


class _Baseline:
    """A second ranker that sees the same batches."""

    def __init__(self, config: Config, schema: Schema, ranker: str) -> None:
        self._learner: Learner = build_learner(config, schema, replace(config.model, ranker=ranker))
        self._evaluation: ProgressiveEvaluation = build_evaluation(config, self._learner)

    def step(self, trainer: Trainer) -> None:
        examples = trainer.stream.assembler.ready[0]
        self._evaluation.before_step(examples)
        result = self._learner.step(self._learner.prepare(examples))
        self._evaluation.after_step(examples, result.scores.cpu().numpy())

    def tasks(self) -> dict[str, dict[str, Any]]:
        return {name: {"auc": m.auc, "gauc_windowed": m.gauc_windowed} for name, m in self._evaluation.report().items()}


def run_backtest(
    config: Config,
    log: Path,
    *,
    limit: int | None,
    seed: int,
    baseline: str | None,
    should_stop: Callable[[], bool],
    evaluate: Callable[[Config, Learner], ProgressiveEvaluation] = build_evaluation,
) -> BacktestResult:
    """Replay a log through join, evaluation and training.

    Args:
        config: Schema, stream, model, optimiser and evaluation are used.
        log: A folder or file; see :func:`simulators.logs.reader.open_log`.
        limit: Only the first so many impressions.
        seed: Of the feedback delays.
        baseline: Name of a second ranker that trains on the same batches, for comparison.
        should_stop: Asked between two steps; a stopped backtest reports what it has done.
        evaluate: Builds the evaluation of the configured ranker; a benchmark gives one that keeps what it scored.

    Raises:
        LogError: The log cannot be read as its schema file says.
        ValueError: No schema is named, or the configuration does not fit the machine.
    """
    keep_freed_memory()
    schema_file = config.schema_file(log)
    schema = schema_file.schema
    learner = build_learner(config, schema)
    with ExitStack() as stack:
        reader = stack.enter_context(open_log(log, schema_file, limit=limit))
        stream = BlockStream(schema, config.stream.join, config.stream.batch, replay_blocks(reader, seed))
        trainer = Trainer(learner, stream, evaluate(config, learner), Flags())
        other = _Baseline(config, schema, baseline) if baseline else None
        advance = stack.enter_context(progress("backtest", reader.total))
        memory: list[tuple[int, float]] = []
        started_s = time.monotonic()
        while not stream.exhausted and not should_stop():
            stream.poll(0)
            while stream.assembler.ready and not should_stop():
                if other is not None:
                    other.step(trainer)
                trainer.step()
            advance(trainer.trained, f"{trainer.trained / (time.monotonic() - started_s):,.0f} impressions/s")
            if trainer.trained >= _MEMORY_EVERY * (len(memory) + 1):
                memory.append((trainer.trained, resident_mib()))
        trainer.settle()
        seconds = time.monotonic() - started_s
        memory.append((trainer.trained, resident_mib()))
        tasks = [task.name for task in schema.tasks]
        return BacktestResult(
            training_report(trainer, seconds=seconds, trained=trainer.trained),
            other.tasks() if other is not None else None,
            memory,
            reader.duplicates,
            reader.rejected,
            load_line(trainer.experts.load_share, trainer.experts.load_skew),
            routing_report(trainer.experts.history, learner.expert_limits, tasks),
        )


def resident_mib() -> float:
    """Resident memory of this process now (Linux), else its peak, in MiB."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
