"""The report of a run, from the state of its trainer."""

from trainer.evaluation import TaskMetrics
from trainer.loop import Trainer
from trainer.report import (
    ActiveExperts,
    EventCounts,
    FeedbackCounts,
    Quantiles,
    ScorerFigures,
    Snapshots,
    Throughput,
    TrainingReport,
)
from trainer.task_figures import TaskFigures, headline


def training_report(trainer: Trainer, *, seconds: float, trained: int) -> TrainingReport:
    """Everything that the trainer knows at the end of a run; the scorer's parts are None.

    Args:
        trainer: After its last step.
        seconds: How long this process has been training.
        trained: Examples that this process has trained on, without those before a restart.
    """
    trainer.settle()
    return report_so_far(trainer, seconds=seconds, trained=trained)


def report_so_far(trainer: Trainer, *, seconds: float, trained: int) -> TrainingReport:
    """The report while the run goes on. It changes nothing; metrics are without the step whose result has not come.

    Args:
        trainer: Between two steps.
        seconds, trained: As of :func:`training_report`.
    """
    ledger, publisher = trainer.stream.ledger(), trainer.publisher
    tally, limits = trainer.experts, trainer.learner.expert_limits
    events, feedback = training_counts(trainer)
    tasks = task_figures(trainer.evaluation.report())
    return TrainingReport(
        schema=trainer.learner.schema.hash,
        lineage=trainer.lineage,
        version=trainer.learner.step_number,
        events=events,
        feedback=feedback,
        throughput=Throughput(trained / seconds if seconds > 0 else None),
        freshness_ms=Quantiles(),
        freshness_stages_ms={},
        snapshots=Snapshots(publisher.published, publisher.bytes_last) if publisher else Snapshots(),
        scorer=ScorerFigures(),
        rows=trainer.row_counts,
        active_experts=ActiveExperts(
            mean=tally.mean,
            max=tally.max,
            bound=limits.bound if limits else None,
            num_experts=limits.num_experts if limits else None,
        ),
        routing=trainer.routing_now(),
        headline=headline(tasks),
        tasks=tasks,
        arms=trainer.arms.report(),
        arms_left_out=trainer.arms.left_out,
        features=ledger.features,
        gate=trainer.gated.gate.summary() if trainer.gated else None,
        ranks=trainer.ranks,
    )


def training_counts(trainer: Trainer) -> tuple[EventCounts, FeedbackCounts]:
    """The two ledgers of a trainer."""
    ledger = trainer.stream.ledger()
    events = EventCounts(
        impressions=ledger.impressions,
        trained=trainer.trained,
        waiting=ledger.waiting,
        late=ledger.late,
        duplicate=ledger.duplicate,
        dead_lettered=ledger.dead_lettered,
        not_finite=trainer.not_finite,
        gaps=ledger.gaps,
        unreadable=ledger.unreadable,
    )
    feedback = FeedbackCounts(
        received=ledger.feedback,
        attached=ledger.attached,
        corrected=ledger.corrected,
        waiting=ledger.feedback_waiting,
        late=ledger.feedback_late,
        orphaned=ledger.orphaned,
        duplicate=ledger.feedback_duplicate,
        dead_lettered=ledger.feedback_dead_lettered,
        dropped=ledger.feedback_dropped,
        gaps=ledger.feedback_gaps,
        unreadable=ledger.feedback_unreadable,
    )
    return events, feedback


def task_figures(metrics: dict[str, TaskMetrics]) -> dict[str, TaskFigures]:
    """The metrics that a report shows, by task name."""
    return {
        name: TaskFigures(
            positives=task.positives,
            base_rate=task.base_rate,
            auc=task.auc,
            gauc_windowed=task.gauc_windowed,
            ne=task.ne,
            calibration=task.calibration,
            ece=task.ece,
            xauc=task.xauc,
            mae=task.mae,
            mean_bias=task.mean_bias,
        )
        for name, task in metrics.items()
    }
