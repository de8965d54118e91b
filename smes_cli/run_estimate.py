"""How much time and memory a run over a log will take: from a few timed seconds of it."""

import time
from dataclasses import asdict, dataclass
from typing import Any

from simulators.logs.profile import LogProfile
from simulators.logs.reader import LogReader, row_bytes
from simulators.merge import replay_blocks
from smes.events import ExampleBlock
from smes.model.devices import keep_freed_memory
from smes.model.table_layout import RecordLayout, column_groups
from smes_cli.backtest import resident_mib
from smes_cli.building import build_evaluation, build_learner
from smes_cli.config import Config
from stream.block_stream import BlockStream
from trainer.loop import Trainer
from trainer.observers import Observer, StepFigures
from trainer.schedule import Flags

FEWEST = 2_000
"""Impressions below which nothing is measured: such a log is done in no time."""

_WARM_STEPS = 6
_BUDGET_S = 2.0
_INDEX_BYTES = 64  # a row's key, age and place in the index
_SPARE = 1.5  # tables grow ahead of what they hold


@dataclass(frozen=True, slots=True)
class RunEstimate:
    """What ``smes backtest`` on the log will take on this machine, as configured. An estimate.

    Attributes:
        impressions_per_s: Measured over ``measured`` impressions, with join and evaluation, after the first steps.
        measured: How many impressions that was.
        per_batch: Impressions of a mini-batch, on average.
        seconds: For all impressions, with reading the log.
        rows: Rows of the table at the end.
        resident_mib: Memory at the end.
    """

    impressions_per_s: float
    measured: int
    per_batch: float
    seconds: float
    rows: int
    resident_mib: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


class _Clock(Observer):
    """When each step ended, and how many impressions were trained on by then."""

    def __init__(self) -> None:
        self.trained = 0
        self.marks: list[tuple[float, int]] = []

    def after_step(self, examples: ExampleBlock, figures: StepFigures) -> None:
        """Note the time."""
        self.trained += examples.num_impressions
        self.marks.append((time.monotonic(), self.trained))

    @property
    def warm_s(self) -> float:
        """Seconds since the first steps, which also compile."""
        return self.marks[-1][0] - self.marks[_WARM_STEPS - 1][0] if len(self.marks) > _WARM_STEPS else 0.0


def estimate_run(config: Config, reader: LogReader, found: LogProfile, reading_s: float) -> RunEstimate | None:
    """Train on the log's beginning for about two seconds, with weights that are thrown away.

    Args:
        config: Model, stream and evaluation of the run.
        reader: The log.
        found: Its profile.
        reading_s: How long reading it took.

    Returns:
        None if the log is too short to measure.
    """
    if found.impressions < FEWEST:
        return None
    keep_freed_memory()
    schema = reader.schema
    learner, clock = build_learner(config, schema), _Clock()
    stream = BlockStream(schema, config.stream.join, config.stream.batch, replay_blocks(reader, rows_per_block=1024))
    trainer = Trainer(learner, stream, build_evaluation(config, learner), Flags(), observers=[clock])
    started_s = time.monotonic()

    def enough() -> bool:
        ended = stream.ended and stream.upcoming() is None
        return ended or clock.warm_s > _BUDGET_S or time.monotonic() - started_s > 10 * _BUDGET_S

    trainer.run(enough)
    trainer.settle()
    if len(clock.marks) <= _WARM_STEPS:
        return None
    (begin_s, before), (end_s, after) = clock.marks[_WARM_STEPS - 1], clock.marks[-1]
    rate = (after - before) / max(end_s - begin_s, 1e-9)
    rules = config.rows
    rows = sum(found.vocabularies.values())
    if rules.budget is not None and not rules.vocabularies:
        rows = min(rows, rules.budget)
    width = RecordLayout(column_groups(config.model, config.optimizer, schema.num_tasks)).width
    more = max(rows - learner.num_rows, 0) * (4 * width + _INDEX_BYTES) * _SPARE
    return RunEstimate(
        impressions_per_s=rate,
        measured=after - before,
        per_batch=after / len(clock.marks),
        seconds=reading_s + found.impressions / rate,
        rows=rows,
        resident_mib=resident_mib() + (more + _waiting(reader, found) * 2 * row_bytes(schema)) / 2**20,
    )


def _waiting(reader: LogReader, found: LogProfile) -> float:
    """Impressions that wait for feedback at a time, on average."""
    ledger = reader.ledger
    first, last = ledger.first_event_ms, ledger.last_event_ms
    if first is None or last is None or last <= first:
        return float(found.impressions)
    return min(found.impressions * reader.schema.max_window_ms / (last - first), found.impressions)
