"""The report: one shape for the demo and the backtest; what does not apply is None."""

from typing import TYPE_CHECKING, Any

from stream.join.ledgers import StreamLedger

if TYPE_CHECKING:
    from trainer.loop import Trainer


def training_report(trainer: "Trainer", *, seconds: float, trained: int) -> dict[str, Any]:
    """Everything that the trainer knows; the scorer's parts are None.

    Args:
        trainer: After its last step.
        seconds: How long this process has been training.
        trained: Examples that this process has trained on (not counting those before a restart).
    """
    trainer.settle()
    ledger = trainer.stream.assembler.ledger()
    tally, limits = trainer.experts, trainer.learner.expert_limits
    return {
        "schema": trainer.learner.schema.hash,
        "lineage": trainer.lineage,
        "version": trainer.learner.step_number,
        "events": {
            "impressions": ledger.impressions,
            "trained": trainer.trained,
            "waiting": ledger.waiting,
            "late": ledger.late,
            "duplicate": ledger.duplicate,
            "dead_lettered": ledger.dead_lettered,
        },
        "feedback": {
            "received": ledger.feedback,
            "attached": ledger.attached,
            "waiting": ledger.feedback_waiting,
            "late": ledger.feedback_late,
            "orphaned": ledger.orphaned,
            "duplicate": ledger.feedback_duplicate,
            "dead_lettered": ledger.feedback_dead_lettered,
        },
        "throughput": {"trained_per_s": trained / seconds if seconds > 0 else None},
        "freshness_ms": {"p50": None, "p99": None},
        "snapshots": {"published": None, "bytes_last": None, "served": None},
        "scorer": {"requests": None, "errors": None, "mixed_versions": None, "p50_ms": None, "p99_ms": None},
        "active_experts": {
            "mean": tally.mean,
            "max": tally.max,
            "bound": limits.bound if limits else None,
            "num_experts": limits.num_experts if limits else None,
        },
        "routing": tally.routing(),
        "tasks": {
            name: {
                "positives": metrics.positives,
                "auc": metrics.auc,
                "gauc_windowed": metrics.gauc_windowed,
                "ne": metrics.ne,
                "ece": metrics.ece,
            }
            for name, metrics in trainer.evaluation.report().items()
        },
    }


def conservation_errors(report: dict[str, Any]) -> list[str]:
    """Which of the two ledgers do not balance, in words; empty when nothing was lost."""
    errors = []
    for ledger, total in (("events", "impressions"), ("feedback", "received")):
        counts = dict(report[ledger])
        read = counts.pop(total)
        if (accounted := sum(counts.values())) != read:
            parts = " + ".join(f"{n} {name}" for name, n in counts.items())
            errors.append(f"{ledger}: {read} {total}, but {parts} = {accounted}")
    return errors


def ledger_line(ledger: StreamLedger) -> str:
    """One line for people."""
    return (
        f"{ledger.impressions:,} impressions ({ledger.waiting:,} waiting, {ledger.late:,} late, "
        f"{ledger.duplicate:,} duplicate, {ledger.dead_lettered:,} dead-lettered)"
    )
