"""The report of a run: one shape for demo, training and backtest. What does not apply is None.

Imports no torch: the demo's own process reads reports without it.
"""

from dataclasses import asdict, dataclass
from typing import Any

from smes.model.rows_config import RowCounts
from stream.join.ledgers import StreamLedger
from stream.left_out_features import FeatureCounts
from trainer.arm_figures import ArmFigures
from trainer.task_figures import Headline, TaskFigures


@dataclass(frozen=True, slots=True)
class EventCounts:
    """Impressions read, and where each of them is: ``impressions`` is the sum of the others, up to ``not_finite``.

    Attributes:
        impressions: Read from the log.
        trained, waiting, late, duplicate, dead_lettered: Where they are.
        not_finite: Handed to a training step whose loss or gradients were not finite; they have dead letters, too.
        gaps: Records passed over because they are no longer in the log. They were never read.
        unreadable: What was in the log but is no record of ours. They are among ``dead_lettered``.
    """

    impressions: int
    trained: int
    waiting: int
    late: int
    duplicate: int
    dead_lettered: int
    not_finite: int
    gaps: int
    unreadable: int


@dataclass(frozen=True, slots=True)
class FeedbackCounts:
    """Feedback events read, and where each of them is: ``received`` is the sum of the others, up to ``dropped``.

    ``corrected`` is feedback that came after its task's wait and was trained on as a correction. ``dropped`` is of an
    old schema, for a task that there is no more.
    ``gaps`` and ``unreadable`` are as in :class:`EventCounts`.
    """

    received: int
    attached: int
    corrected: int
    waiting: int
    late: int
    orphaned: int
    duplicate: int
    dead_lettered: int
    dropped: int
    gaps: int
    unreadable: int


@dataclass(frozen=True, slots=True)
class Throughput:
    """Examples trained on per second of wall clock, by this process."""

    trained_per_s: float | None


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Freshness in milliseconds: from a feedback event's arrival to the first answer that knows it."""

    p50: float | None = None
    p99: float | None = None


@dataclass(frozen=True, slots=True)
class Snapshots:
    """Snapshots published, bytes of the last one, and how many versions the scorer answered with."""

    published: int | None = None
    bytes_last: int | None = None
    served: int | None = None


@dataclass(frozen=True, slots=True)
class ScorerFigures:
    """Requests to the scorer, failed ones, answers that mixed versions, and latency in milliseconds."""

    requests: int | None = None
    errors: int | None = None
    mixed_versions: int | None = None
    p50_ms: float | None = None
    p99_ms: float | None = None


@dataclass(frozen=True, slots=True)
class ActiveExperts:
    """Experts executed per instance: mean, most, the bound that the routing guarantees, and all there are."""

    mean: float | None
    max: int | None
    bound: int | None
    num_experts: int | None


@dataclass(frozen=True, slots=True)
class RoutingSummary:
    """The routing in one segment. Every value is None where there is no such figure.

    Attributes:
        segment_steps: Steps of the segment.
        dead: How many experts no task used in it.
        load_skew: Largest load over mean load of the experts that can be chosen; 1 is even.
        drift: 1 − Jaccard of a task's experts for the probe since the segment before, mean over the tasks.
        overlap: Jaccard of two tasks' experts for the probe, mean over the pairs of tasks.
    """

    segment_steps: int | None = None
    dead: int | None = None
    load_skew: float | None = None
    drift: float | None = None
    overlap: float | None = None


@dataclass(frozen=True, slots=True)
class TrainingReport:
    """Everything that a run is judged by.

    Attributes:
        schema: Hash of the schema.
        lineage: The lineage trained.
        version: Steps taken.
        ranks: How many ranks trained together; every figure is of all of them.
        events, feedback: The two ledgers.
        throughput: Speed of training.
        freshness_ms, scorer: Measured by the demo; None in a report of training alone.
        freshness_stages_ms: Likewise: stage → its median, 99th percentile and mean; else empty.
        snapshots: What was published and served.
        rows: The rows that ids have, and what became of others.
        active_experts, routing: What the routing executed; None for a ranker without experts.
        headline: Means over the dense binary tasks, and over the rare ones.
        tasks: Task name → metrics.
        arms: Arm of the scorer → how well it served, over final labels; see :mod:`trainer.arms_report`. Empty where the
            log does not say what was served.
        arms_left_out: Impressions served by arms beyond those.
        features: How often features that impressions left out were looked up in the feature store, and what came of it.
        gate: Cuts passed and refused, as :meth:`trainer.gate.PublishGate.summary` has it; None without a gate.
    """

    schema: str
    lineage: str
    version: int
    events: EventCounts
    feedback: FeedbackCounts
    throughput: Throughput
    freshness_ms: Quantiles
    freshness_stages_ms: dict[str, dict[str, float | None]]
    snapshots: Snapshots
    scorer: ScorerFigures
    rows: RowCounts
    active_experts: ActiveExperts
    routing: RoutingSummary
    headline: Headline
    tasks: dict[str, TaskFigures]
    arms: dict[str, ArmFigures]
    arms_left_out: int
    features: FeatureCounts
    gate: dict[str, Any] | None = None
    ranks: int = 1

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values under the documented keys: the one form in which reports are written."""
        return asdict(self)


_NOT_READ = ("gaps", "unreadable")  # counts beside the sum


def conservation_errors(report: dict[str, Any]) -> list[str]:
    """Which of the two ledgers of a written report do not balance, in words; empty when nothing was lost."""
    errors = []
    for ledger, total in (("events", "impressions"), ("feedback", "received")):
        counts = {name: n for name, n in report[ledger].items() if name not in _NOT_READ}
        read = counts.pop(total)
        if (accounted := sum(counts.values())) != read:
            parts = " + ".join(f"{n} {name}" for name, n in counts.items())
            errors.append(f"{ledger}: {read} {total}, but {parts} = {accounted}")
    return errors


def ledger_line(ledger: StreamLedger) -> str:
    """One line for people."""
    line = (
        f"{ledger.impressions:,} impressions ({ledger.waiting:,} waiting, {ledger.late:,} late, "
        f"{ledger.duplicate:,} duplicate, {ledger.dead_lettered:,} dead-lettered)"
    )
    kinds = (ledger.features.user, ledger.features.item)
    found, missed = sum(kind.from_store for kind in kinds), sum(kind.not_in_store for kind in kinds)
    return f"{line} · features: {found:,} from store, {missed:,} not in store" if found or missed else line
