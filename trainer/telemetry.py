"""What a trainer shows of itself: copied by its thread once a second at most, read by scrapes at any time.

The training thread never waits for a scrape: it makes a new :class:`Seen`, which nobody changes, and replaces the last
one. Counters count from the start of this process, and never go down: Prometheus would take that for a restart. The
report is costly, so it is made only while somebody asks for it, and so seldom that it takes a twentieth of the time.

Letters: T tasks, E experts.
"""

import math
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from smes.arrays import I64, prefixed, under
from smes.events import ExampleBlock
from smes.model.rows_config import RowCounts
from smes_io.clock import wall_clock_ms
from stream.log.event_log import Positions, TopicPartition
from trainer.evaluation import TaskMetrics
from trainer.log_end import LogEnd
from trainer.loop import Trainer
from trainer.observers import Observer, StepFigures
from trainer.recent_rates import RecentCounts
from trainer.report import RoutingSummary, TrainingReport
from trainer.routing_history import Segment
from trainer.run_report import training_counts
from trainer.stretches import Stretch, Stretches

_EVERY_S = 1.0
_ASKED_S = 10.0  # so long after somebody asked for the report it is made
_SECONDS = "seconds."
_TIMES_AS_LONG = 20  # the pause after a report, in times of what it took
STILL_S = 10.0
"""After so many seconds without a step and without a read the training thread counts as standing still."""


@dataclass(frozen=True, slots=True)
class Experts:
    """The experts now.

    Attributes:
        load_share: Share of each expert of all uses in the newest segment that has ended; empty without experts.
        routing: Figures of that segment.
        active_mean: Experts executed per instance, of the whole run.
        load_TE: int64, instances that each task sent to each expert in that segment. [0, 0] without experts.
        drift: Of each task since the segment before; empty where there is none.
    """

    load_share: tuple[float, ...]
    routing: RoutingSummary
    active_mean: float | None
    load_TE: I64
    drift: tuple[float, ...]


def experts_of(trainer: Trainer) -> Experts:
    """The experts of a trainer. Call it on the training thread."""
    history = trainer.experts.history
    segments = history.closed or history.segments
    load_TE = segments[-1].load_TE if segments else np.zeros((0, 0), np.int64)
    load_E, drift_T = load_TE.sum(axis=0), trainer.experts.drift()
    shares = tuple((load_E / load_E.sum()).tolist()) if load_E.any() else ()
    drift = () if drift_T is None else tuple(drift_T.tolist())
    return Experts(shares, trainer.experts.routing(), trainer.experts.mean, load_TE, drift)


@dataclass(frozen=True, slots=True)
class Lately:
    """What happened over the last ten seconds, or since the start of the process if that is less.

    Attributes:
        over_s: Seconds looked back.
        rates: Name → events per second: ``steps``; ``events.NAME`` and ``feedback.NAME`` for every column of the two
            ledgers. ``waiting`` may fall.
        step_ms: Part of the loop → mean milliseconds of a step; empty without a step.
    """

    over_s: float
    rates: dict[str, float]
    step_ms: dict[str, float]


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
        at_ms: When, Unix milliseconds.
        memory: Part → bytes.
        lately: What happened over the last ten seconds.
        report, report_ms: As ``--report`` would have it, and of when that is; None where nobody asks for it.
        segments: Of the routing's history, the open one included; empty where nobody asks for the report.
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
    at_ms: int
    memory: dict[str, int]
    lately: Lately
    report: dict[str, Any] | None
    report_ms: int | None
    segments: tuple[Segment, ...]


class Watch(Observer):
    """Copies what is shown, once a second at most.

    Attributes:
        seen: The newest copy.
        trainer: As given.

    Args:
        trainer: Whose state; its checkpoint, if any, is restored already.
        stretches: Its metrics over time.
        report: Makes the report so far.
        every_s: Seconds between two copies.
        monotonic: Seconds of a clock that never goes back.
    """

    def __init__(
        self,
        trainer: Trainer,
        stretches: Stretches,
        *,
        report: Callable[[], TrainingReport],
        every_s: float = _EVERY_S,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.trainer = self._trainer = trainer
        self._stretches, self._report, self._every_s, self._monotonic = stretches, report, every_s, monotonic
        self._base = self._counted()
        self._counts: dict[str, dict[tuple[str, ...], float]] = {}
        self._recent = RecentCounts(monotonic(), self._ledgers())
        self._due_s = self._moved_s = monotonic()
        self._asked_s = -math.inf
        self._reported: tuple[dict[str, Any], int] | None = None
        self._report_due_s = self._due_s
        self._looked = threading.Condition()
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

    def look_if_due(self, *, moved: bool = True) -> None:
        """Copy what is shown, if the last copy is old. Call it on the training thread, between two steps.

        Args:
            moved: Whether a step or a read has ended; else the thread waits for a server.
        """
        now_s = self._monotonic()
        if moved:
            self._moved_s = now_s
        if now_s >= self._due_s or (self.seen.report is None and self._is_asked(now_s)):
            self.seen = self._look()
            self._due_s = self._monotonic() + self._every_s
            with self._looked:
                self._looked.notify_all()

    def ask(self, timeout_s: float) -> Seen:
        """The newest copy, and from now on for ten seconds copies with a report. From any thread.

        Args:
            timeout_s: So long it waits for the first one with a report.
        """
        self._asked_s = self._monotonic()
        with self._looked:
            self._looked.wait_for(lambda: self.seen.report is not None, timeout_s)
        return self.seen

    def _is_asked(self, now_s: float) -> bool:
        return now_s - self._asked_s < _ASKED_S

    def positions(self) -> Positions:
        """Next record to read of every partition, as of the newest copy."""
        return self.seen.positions

    def problems(self) -> dict[str, str]:
        """What is wrong with what, now. From any thread."""
        problems, still_s = dict(self.seen.problems), self._monotonic() - self._moved_s
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
        now_s = self._monotonic()
        self._report_if_asked(now_s)
        report, report_ms = self._reported or (None, None)
        return Seen(
            at_s=now_s,
            step=trainer.learner.step_number,
            event_time_ms=trainer.event_time_ms,
            positions={
                TopicPartition(topic, int(partition)): position
                for topic, positions in trainer.stream.positions_by_topic().items()
                for partition, position in positions.items()
            },
            counts={name: dict(values) for name, values in self._counts.items()},
            gauges=self._gauges(gate),
            rows=trainer.row_counts,
            experts=experts_of(trainer),
            gate=gate,
            run=trainer.evaluation.of_closed_windows(),
            stretch=self._stretches.last,
            cut_ms=trainer.cut_ms,
            checkpoint_ms=None if writer is None else writer.saved_ms,
            problems=_problems(trainer, gate),
            at_ms=wall_clock_ms(),
            memory={**asdict(trainer.memory), "join": trainer.stream.join_nbytes},
            lately=self._lately(now_s),
            report=report,
            report_ms=report_ms,
            segments=trainer.experts.history.segments if report else (),
        )

    def _report_if_asked(self, now_s: float) -> None:
        """Make the report if somebody asks and the last one is old; forget it if nobody does."""
        if not self._is_asked(now_s):
            self._reported, self._report_due_s = None, now_s
        elif now_s >= self._report_due_s:
            self._reported = self._report().to_dict(), wall_clock_ms()
            ended_s = self._monotonic()
            self._report_due_s = ended_s + _TIMES_AS_LONG * (ended_s - now_s)

    def _ledgers(self) -> dict[str, float]:
        """Every column of the two ledgers, the steps, and the seconds of the loop's parts, under names of their own."""
        events, feedback = training_counts(self._trainer)
        return {
            "steps": self._trainer.learner.step_number,
            **prefixed("events.", asdict(events)),
            **prefixed("feedback.", asdict(feedback)),
            **prefixed(_SECONDS, self._trainer.times.seconds),
        }

    def _lately(self, now_s: float) -> Lately:
        over_s, more = self._recent.since(now_s, self._ledgers())
        seconds = under(_SECONDS, more)
        rates = {name: n / over_s if over_s > 0 else 0.0 for name, n in more.items() if not name.startswith(_SECONDS)}
        steps = more["steps"]
        return Lately(over_s, rates, {part: 1000 * s / steps for part, s in seconds.items()} if steps > 0 else {})

    def _counted(self) -> dict[str, dict[tuple[str, ...], float]]:
        """Name → label values → what the run has counted, with what was counted before a restart."""
        trainer = self._trainer
        ledger, rows, publisher = trainer.stream.ledger(), trainer.row_counts, trainer.publisher
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
