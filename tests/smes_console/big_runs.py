"""A run of many tasks and experts, as the trainer's own writers leave it in a folder; its figures are drawn at random.

Letters: T tasks, E experts.
"""

from pathlib import Path
from typing import Any

import numpy as np

from smes.model.rows_config import RowCounts
from smes.rankers.ranker import ExpertLimits
from stream.left_out_features import FeatureCounts
from trainer.evaluation import TaskMetrics
from trainer.experts_over_time import ExpertsOverTime
from trainer.history import HistoryFiles, write_end
from trainer.history_line import line_of
from trainer.report import (
    ActiveExperts,
    EventCounts,
    FeedbackCounts,
    Quantiles,
    RoutingSummary,
    ScorerFigures,
    Snapshots,
    Throughput,
    TrainingReport,
)
from trainer.routing_figures import dead_experts, skew
from trainer.routing_history import Segment
from trainer.run_report import task_figures
from trainer.stretches import Stretch
from trainer.task_figures import headline
from trainer.telemetry import Experts

_START_MS = 1_700_000_000_000
_ROWS = RowCounts(in_use=9, born=9, expired=0, replaced=0, turned_away=0)


def write_big_run(folder: Path, *, tasks: int, experts: int, stretches: int) -> dict[str, Any]:
    """Write a run that has ended; its report.

    Args:
        folder: For its lines, report and experts.
        tasks: Every fourth is rare.
        experts: Every eighth is used by no task.
        stretches: Lines.
    """
    rng, names = np.random.default_rng(3), [f"task_{i:02d}" for i in range(tasks)]
    files = HistoryFiles(folder, keep=10_000)
    files.begin("big", 0, None)
    segments = [_segment(rng, tasks, experts, i) for i in range(12)]
    load_TE = segments[-1].load_TE
    routing = RoutingSummary(64, len(dead_experts(load_TE)), skew(load_TE.sum(axis=0)), 0.25, 0.5)
    shown = Experts(
        tuple((load_TE.sum(axis=0) / load_TE.sum()).tolist()), routing, 3.5, load_TE, tuple(rng.uniform(size=tasks))
    )
    for number in range(stretches):
        metrics = {name: _metrics(rng, rare=i % 4 == 0, after=number) for i, name in enumerate(names)}
        stretch = Stretch(
            number=number,
            step=10 * (number + 1),
            trained=1000 * (number + 1),
            impressions=1000,
            windows=1,
            event_time_ms=_START_MS + 60_000 * number,
            tasks=metrics,
            ranked=dict.fromkeys(names, 500.0),
        )
        files.append(
            line_of(stretch, lineage="big", wall_ms=_START_MS + 1000 * number, experts=shown, rows=_ROWS, lag=None)
        )
    figures = task_figures({name: _metrics(rng, rare=i % 4 == 0, after=9) for i, name in enumerate(names)})
    report = TrainingReport(
        schema="s",
        lineage="big",
        version=10 * stretches,
        events=EventCounts(1000 * stretches, 1000 * stretches, 0, 0, 0, 0, 0, 0, 0),
        feedback=FeedbackCounts(5, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0),
        throughput=Throughput(1.0),
        freshness_ms=Quantiles(),
        freshness_stages_ms={},
        snapshots=Snapshots(),
        scorer=ScorerFigures(),
        rows=_ROWS,
        active_experts=ActiveExperts(3.5, 4, 4, experts),
        routing=routing,
        headline=headline(figures),
        tasks=figures,
        arms={},
        arms_left_out=0,
        features=FeatureCounts(),
    ).to_dict()
    write_end(folder, report, ExpertsOverTime(names, ExpertLimits(4, experts)).values(segments, 0))
    return report


def _segment(rng: np.random.Generator, tasks: int, experts: int, number: int) -> Segment:
    load_TE = rng.integers(0, 1000, (tasks, experts)) * (rng.random((tasks, experts)) < 0.2)
    load_TE[:, ::8] = 0
    choices_PTK = rng.integers(0, experts, (16, tasks, 4)).astype(np.int32)
    return Segment(64, 4096, load_TE.astype(np.int64), choices_PTK, _START_MS + 3_600_000 * number)


def _metrics(rng: np.random.Generator, *, rare: bool, after: int) -> TaskMetrics:
    auc, base_rate = 0.5 + 0.4 * (1 - 0.98**after) + 0.02 * rng.normal(), 0.002 if rare else 0.1
    return TaskMetrics(
        examples=1000,
        positives=round(1000 * base_rate),
        base_rate=base_rate,
        auc=float(auc),
        gauc_windowed=float(auc - 0.05),
        ne=float(1.2 - auc / 2),
        ece=0.01,
        calibration=float(1 + 0.1 * rng.normal()),
    )
