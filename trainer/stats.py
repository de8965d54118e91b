"""What a trainer answers about itself as JSON: ``/v1/stats`` and ``/v1/history``."""

import json
import resource
import time
from pathlib import Path
from typing import Any

from smes.model.learner import Learner
from smes_io.clock import wall_clock_ms
from trainer.experts_over_time import ExpertsOverTime
from trainer.log_end import Lag, LogEnd
from trainer.recent_lines import RecentLines
from trainer.telemetry import Seen, Watch, problems_of

_PATIENCE_S = 1.0  # for the first report: the training thread makes it after its next step or read
_EXPERTS = "experts"


class TrainerStats:
    """Makes the answers, on the thread of whoever asks.

    Args:
        watch: Has the newest copy.
        log_end: Knows how far behind the training is; None: nobody does.
        lines: The newest lines of the run's metrics over time.
        lineage: The lineage trained.
    """

    def __init__(self, watch: Watch, log_end: LogEnd | None, lines: RecentLines, lineage: str) -> None:
        learner: Learner = watch.trainer.learner
        self._watch, self._log_end, self._lines, self._lineage = watch, log_end, lines, lineage
        self._experts = ExpertsOverTime([task.name for task in learner.schema.tasks], learner.expert_limits)
        # Steps of before the routing was counted, as from a snapshot: nothing is on its way before the first step.
        counted = sum(segment.steps for segment in watch.trainer.experts.history.segments)
        self._first_step = watch.seen.step - counted

    def stats(self, query: dict[str, str]) -> str:
        """All figures.

        Args:
            query: ``without``: ``experts`` leaves these out, which are the longest part.

        Raises:
            ValueError: The query is none of these.
        """
        _only(query, "without")
        if query.get("without", _EXPERTS) != _EXPERTS:
            raise ValueError(f"without={query['without']}: expected {_EXPERTS}")
        seen = self._watch.ask(_PATIENCE_S)
        lag = None if self._log_end is None else self._log_end.lag
        now_ms = wall_clock_ms()
        body = json.dumps(
            {
                "report": seen.report,
                "report_at_ms": seen.report_ms,
                "at_ms": seen.at_ms,
                "copy_age_s": max(0.0, time.monotonic() - seen.at_s),
                "lineage": self._lineage,
                "step": seen.step,
                "event_time_ms": seen.event_time_ms,
                "positions": _by_topic({(p.topic, p.partition): at for p, at in seen.positions.items()}),
                "lag": None if lag is None else _lag(lag, seen),
                "rates": {"over_s": seen.lately.over_s, **_nested(seen.lately.rates)},
                "step_ms": seen.lately.step_ms,
                "memory": {"rss": _resident_bytes(), "cuda": _cuda_bytes(), **seen.memory},
                "cut_age_s": _age_s(seen.cut_ms, now_ms),
                "checkpoint_age_s": _age_s(seen.checkpoint_ms, now_ms),
                "stretch": None if seen.stretch is None else seen.stretch.number,
                "problems": problems_of(self._watch, self._log_end),
            },
            allow_nan=False,
        )
        if "without" in query:
            return body
        return f'{body[:-1]}, "{_EXPERTS}": {self._experts.text(seen.segments, self._first_step)}}}'

    def history(self, query: dict[str, str]) -> str:
        """Lines of the metrics over time; see :meth:`trainer.recent_lines.RecentLines.text`.

        Args:
            query: ``after``, ``last``: whole numbers.

        Raises:
            ValueError: The query is none of these.
        """
        _only(query, "after", "last")
        return self._lines.text(_whole("after", query, -1), _whole("last", query, 1))


def _only(query: dict[str, str], *names: str) -> None:
    if unknown := sorted(query.keys() - set(names)):
        raise ValueError(f"{unknown[0]}: expected {' or '.join(names)}")


def _whole(name: str, query: dict[str, str], least: int) -> int | None:
    text = query.get(name)
    if text is None:
        return None
    try:
        value = int(text)
    except ValueError:
        raise ValueError(f"{name}={text}: expected a whole number") from None
    if value < least:
        raise ValueError(f"{name}={text}: expected at least {least}")
    return value


def _lag(lag: Lag, seen: Seen) -> dict[str, Any]:
    behind_ms = None
    if lag.newest_ms is not None and seen.event_time_ms is not None:
        behind_ms = max(0, lag.newest_ms - seen.event_time_ms)
    figures = {
        (source.topic, source.partition): {"records": each.records, "seconds": each.seconds, "end": each.end}
        for source, each in lag.partitions.items()
    }
    return {
        "records": lag.records,
        "seconds": lag.seconds,
        "trained_seconds": None if behind_ms is None else behind_ms / 1000,
        "newest_ms": lag.newest_ms,
        "partitions": _by_topic(figures),
    }


def _by_topic(values: dict[tuple[str, int], Any]) -> dict[str, dict[str, Any]]:
    """Topic → partition → value."""
    nested: dict[str, dict[str, Any]] = {}
    for (topic, partition), value in sorted(values.items(), key=lambda item: item[0]):
        nested.setdefault(topic, {})[str(partition)] = value
    return nested


def _nested(rates: dict[str, float]) -> dict[str, Any]:
    """``steps`` → rate; ``events`` and ``feedback`` → column → rate."""
    nested: dict[str, Any] = {}
    for name, rate in rates.items():
        ledger, _, column = name.partition(".")
        if column:
            nested.setdefault(ledger, {})[column] = rate
        else:
            nested[name] = rate
    return nested


def _age_s(at_ms: int | None, now_ms: int) -> float | None:
    return None if at_ms is None else max(0, now_ms - at_ms) / 1000


def _resident_bytes() -> int:
    """Resident memory of this process now (Linux), else its peak."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _cuda_bytes() -> int | None:
    """Memory that torch has allocated on the GPU; None without one in use."""
    import torch

    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch ships no type for it
    return int(torch.cuda.memory_allocated()) if in_use else None
