"""What is written of a stretch of the stream: a line of :mod:`trainer.history`.

Letters: T tasks, E experts.
"""

from dataclasses import asdict
from typing import Any

import numpy as np

from smes.arrays import I64
from smes.model.rows_config import RowCounts
from trainer.log_end import Lag
from trainer.stretches import Stretch
from trainer.telemetry import Experts

_MOST_SHARES = 120
"""Of experts, of all tasks together: a line of 40 tasks and 256 experts then stays below 18 KB."""
_FEWEST_SHARES = 3  # of a task


def line_of(
    stretch: Stretch, *, lineage: str, wall_ms: int, experts: Experts, rows: RowCounts, lag: Lag | None
) -> dict[str, Any]:
    """What is written of a stretch. Experts, rows and lag are those of the moment of writing.

    ``experts`` has, beside the figures of :class:`trainer.report.RoutingSummary`: ``load_share``, the share of each
    expert of all uses in the newest segment that has ended; ``of_tasks``, task name → ``[expert, share]`` of the
    experts that the task uses most in it, the busiest first; ``drift_of_tasks``, task name → its drift, empty before
    two segments have ended.

    Args:
        stretch: See :class:`trainer.stretches.Stretch`.
        lineage: The lineage trained.
        wall_ms: The time, Unix milliseconds.
        experts, rows: Of the trainer.
        lag: How far behind the log's end; None where nobody looks.
    """
    return {
        "stretch": stretch.number,
        "step": stretch.step,
        "lineage": lineage,
        "wall_ms": wall_ms,
        "event_time_ms": stretch.event_time_ms,
        "trained": stretch.trained,
        "impressions": stretch.impressions,
        "windows": stretch.windows,
        "tasks": {
            name: {**asdict(metrics), "ranked": round(stretch.ranked[name])} for name, metrics in stretch.tasks.items()
        },
        "experts": {
            **asdict(experts.routing),
            "active_mean": experts.active_mean,
            "load_share": [round(share, 5) for share in experts.load_share],
            "of_tasks": dict(zip(stretch.tasks, _busiest(experts.load_TE), strict=False)),
            "drift_of_tasks": dict(zip(stretch.tasks, [round(each, 5) for each in experts.drift], strict=False)),
        },
        "rows": asdict(rows),
        "lag": None if lag is None else {"records": lag.records, "seconds": lag.seconds},
    }


def _busiest(load_TE: I64) -> list[list[list[float]]]:
    """The experts that each task uses most, with their shares. A list of each of the T tasks; empty without experts."""
    most = max(_FEWEST_SHARES, _MOST_SHARES // max(1, len(load_TE)))
    found = []
    for load_E in load_TE:
        order = np.argsort(-load_E, kind="stable")[:most]
        total = max(1, int(load_E.sum()))
        found.append([[int(e), round(float(load_E[e]) / total, 4)] for e in order if load_E[e]])
    return found
