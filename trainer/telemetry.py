"""What a trainer shows of itself: copied by its thread once a second at most, read by scrapes at any time.

The training thread never waits for a scrape: it makes a new :class:`Seen`, which nobody changes, and replaces the last
one. Counters count from the start of this process, and never go down: Prometheus would take that for a restart.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from smes.events import ExampleBlock
from smes.model.rows_config import RowCounts
from stream.log.event_log import Positions, TopicPartition
from trainer.evaluation import TaskMetrics
from trainer.log_end import LogEnd
from trainer.loop import Trainer
from trainer.observers import Observer, StepFigures
from trainer.report import RoutingSummary
from trainer.run_report import training_counts
from trainer.stretches import Stretch, Stretches

_EVERY_S = 1.0
STILL_S = 10.0
"""After so many seconds without a step and without a read the training thread counts as standing still."""


@dataclass(frozen=True, slots=True)
class Experts:
    """The experts now.

    Attributes:
        load_share: Share of each expert of all uses in the newest segment that has ended; empty without experts.
        routing: Figures of that segment.
        active_mean: Experts executed per instance, of the whole run.
    """

    load_share: tuple[float, ...]
    routing: RoutingSummary
    active_mean: float | None


def experts_of(trainer: Trainer) -> Experts:
    """The experts of a trainer. Call it on the training thread."""
    history = trainer.experts.history
    segments = history.closed or history.segments
    load_E = segments[-1].load_TE.sum(axis=0) if segments else None
    shares = () if load_E is None or not load_E.any() else tuple((load_E / load_E.sum()).tolist())
    return Experts(shares, trainer.experts.routing(), trainer.experts.mean)


@dataclass(frozen=True, slots=True)
class Seen:
    """A trainer at one moment.

    Attributes:
        at_s: When, seconds of ``time.monotonic``.
        step, event_time_ms: Of the trainer.
        positions: Next record to read.
        counts: Name → label values → count from the start of this process.
        gauges: Likewise, what may go down.
        rows, experts, gate: Of the trainer; no gate: None.
        run: Task name → metrics of the whole run; the GAUC is that of the closed windows.
        stretch: The stretch that ended last; None before the first.
        cut_ms, checkpoint_ms: When the newest ones were taken and written; None before the first of this process.
        problems: What is wrong with what.
    """

    at_s: float
    step: int
    event_time_ms: int | None
    positions: Positions
    counts: dict[str, dict[tuple[str, ...], float]]
    gauges: dict[str, dict[tuple[str, ...], float]]
    rows: RowCounts
    experts: Experts
    gate: dict[str, Any] | None
    run: dict[str, TaskMetrics]
    stretch: Stretch | None
    cut_ms: int | None
    checkpoint_ms: int | None
    problems: dict[str, str]


class Watch(Observer):
    """Copies what is shown, once a second at most.

    Attributes:
        seen: The newest copy.

    Args:
        trainer: Whose state; its checkpoint, if any, is restored already.
        stretches: Its metrics over time.
        every_s: Seconds between two copies.
        monotonic: Seconds of a clock that never goes back.
    """

    def __init__(
        self,
        trainer: Trainer,
        stretches: Stretches,
        *,
        every_s: float = _EVERY_S,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._trainer, self._stretches, self._every_s, self._monotonic = trainer, stretches, every_s, monotonic
        self._base = self._counted()
        self._counts: dict[str, dict[tuple[str, ...], float]] = {}
        self._due_s = monotonic()
        self.seen = self._look()

    def after_step(self, examples: ExampleBlock, figures: StepFigures) -> None:
        """Look if it is time to."""
        self.look_if_due()

    def after_failed_step(self, examples: ExampleBlock) -> None:
        """Look if it is time to."""
        self.look_if_due()

    def after_read(self) -> None:
        """Look if it is time to."""
        self.look_if_due()

    def look_if_due(self) -> None:
        """Copy what is shown, if the last copy is old. Call it on the training thread."""
        if self._monotonic() >= self._due_s:
            self.seen = self._look()
            self._due_s = self._monotonic() + self._every_s

    def positions(self) -> Positions:
        """Next record to read of every partition, as of the newest copy."""
        return self.seen.positions

    def problems(self) -> dict[str, str]:
        """What is wrong with what, now. From any thread."""
        problems, still_s = dict(self.seen.problems), self._monotonic() - self.seen.at_s
        if still_s > STILL_S:
            problems["training"] = f"no step and no read for {still_s:.0f} s"
        return problems

    def _look(self) -> Seen:
        trainer = self._trainer
        counted = self._counted()
        for name, values in counted.items():
            before = self._counts.setdefault(name, {})
            for labels, value in values.items():
                began = self._base.get(name, {}).get(labels, 0)
                before[labels] = max(before.get(labels, 0.0), value - began)
        gate, writer = trainer.gated.gate.summary() if trainer.gated else None, trainer.writer
        return Seen(
            at_s=self._monotonic(),
            step=trainer.learner.step_number,
            event_time_ms=trainer.event_time_ms,
            positions={
                TopicPartition(topic, int(partition)): position
                for topic, positions in trainer.stream.positions_by_topic().items()
                for partition, position in positions.items()
            },
            counts={name: dict(values) for name, values in self._counts.items()},
            gauges=self._gauges(gate),
            rows=trainer.learner.row_counts,
            experts=experts_of(trainer),
            gate=gate,
            run=trainer.evaluation.of_closed_windows(),
            stretch=self._stretches.last,
            cut_ms=trainer.cut_ms,
            checkpoint_ms=None if writer is None else writer.saved_ms,
            problems=_problems(trainer, gate),
        )

    def _counted(self) -> dict[str, dict[tuple[str, ...], float]]:
        """Name → label values → what the run has counted, with what was counted before a restart."""
        trainer = self._trainer
        ledger, rows, publisher = trainer.stream.ledger(), trainer.learner.row_counts, trainer.publisher
        events, feedback = (asdict(counts) for counts in training_counts(trainer))
        counted: dict[str, dict[tuple[str, ...], float]] = {
            "steps": {(): trainer.learner.step_number},
            "impressions_read": {(): events.pop("impressions")},
            "feedback_read": {(): feedback.pop("received")},
            "unknown_fields": {(): ledger.unknown_fields},
            "seconds": {(part,): seconds for part, seconds in trainer.times.seconds.items()},
            "rows_born": {(): rows.born},
            "rows_given_back": {("expired",): rows.expired, ("replaced",): rows.replaced},
            "rows_turned_away": {(): rows.turned_away},
            "checkpoint_failures": {(): trainer.writer.failures if trainer.writer else 0},
            "published": {(): publisher.published if publisher else 0},
            "held": {(): publisher.held if publisher else 0},
            "publication_failures": {(): publisher.failures if publisher else 0},
        }
        for topic, counts in (("impressions", events), ("feedback", feedback)):
            del counts["waiting"]
            counted |= {
                f"{topic}_gaps": {(): counts.pop("gaps")},
                f"{topic}_unreadable": {(): counts.pop("unreadable")},
            }
            counted[topic] = {(outcome,): count for outcome, count in counts.items()}
        counted["features"] = {
            (entity, outcome): count
            for entity, look_ups in asdict(ledger.features).items()
            for outcome, count in look_ups.items()
        }
        if trainer.gated:
            gate = trainer.gated.gate.summary()
            counted["gate_cuts"] = {("passed",): gate["passed"], ("refused",): gate["refused"]}
            counted["gate_alarms"] = {(): gate["alarms"]}
        return counted

    def _gauges(self, gate: dict[str, Any] | None) -> dict[str, dict[tuple[str, ...], float]]:
        trainer = self._trainer
        ledger = trainer.stream.ledger()
        gauges: dict[str, dict[tuple[str, ...], float]] = {
            "step": {(): trainer.learner.step_number},
            "impressions_waiting": {(): ledger.waiting},
            "feedback_waiting": {(): ledger.feedback_waiting},
            "failed_steps_in_a_row": {(): trainer.failed.in_a_row},
        }
        if gate is not None:
            gauges["gate_refused_in_a_row"] = {(): gate["refused_in_a_row"]}
            gauges["gate_suspect"] = {(): float(gate["suspect"])}
        return gauges


def _problems(trainer: Trainer, gate: dict[str, Any] | None) -> dict[str, str]:
    problems = {}
    if trainer.failed.in_a_row:
        problems["steps"] = f"{trainer.failed.in_a_row} in a row failed: loss or gradients are not finite"
    if (
        gate is not None
        and trainer.gated is not None
        and gate["refused_in_a_row"] >= trainer.gated.gate.config.max_refusals
    ):
        problems["gate"] = f"{gate['refused_in_a_row']} cuts refused in a row: {gate['reason']}"
    return problems


def problems_of(watch: Watch, log_end: LogEnd | None) -> dict[str, str]:
    """What is wrong with what: empty where all is well. From any thread."""
    problems = watch.problems()
    if log_end is not None and log_end.problem is not None:
        problems["event log"] = log_end.problem
    return problems
