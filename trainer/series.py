"""A trainer's figures as Prometheus reads them: ``smes_trainer_…``."""

import time
from collections.abc import Iterator
from dataclasses import asdict

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from trainer.evaluation import TaskMetrics
from trainer.log_end import LogEnd
from trainer.telemetry import Seen, Watch, problems_of

Values = dict[tuple[str, ...], float]
"""Label values → value."""

_COUNTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "steps": ("Steps taken", ()),
    "impressions_read": ("Impressions read from the log", ()),
    "impressions": ("Impressions by where they went", ("outcome",)),
    "impressions_gaps": ("Records of impressions passed over because the log no longer holds them", ()),
    "impressions_unreadable": ("Records of impressions that are none of ours", ()),
    "feedback_read": ("Feedback events read from the log", ()),
    "feedback": ("Feedback events by where they went", ("outcome",)),
    "feedback_gaps": ("Records of feedback passed over because the log no longer holds them", ()),
    "feedback_unreadable": ("Records of feedback that are none of ours", ()),
    "unknown_fields": ("Fields of good events that the schema does not know", ()),
    "features": ("Look-ups of features that impressions left out", ("entity", "outcome")),
    "seconds": ("Time of the training thread by part of its loop", ("part",)),
    "rows_born": ("Rows that ids got", ()),
    "rows_given_back": ("Rows given back, by why", ("why",)),
    "rows_turned_away": ("New ids that got no row, counted in every batch that had one", ()),
    "checkpoint_failures": ("Checkpoints that could not be written", ()),
    "published": ("Versions published", ()),
    "held": ("Versions kept aside", ()),
    "publication_failures": ("Publications that failed and were tried again", ()),
    "gate_cuts": ("Cuts judged by the publish gate", ("outcome",)),
    "gate_alarms": ("Alarms of the publish gate", ()),
}
_GAUGES = {
    "step": "Optimiser steps behind the weights, with those before a restart",
    "impressions_waiting": "Impressions that wait for feedback, or in a batch",
    "feedback_waiting": "Feedback events that wait for their impression",
    "failed_steps_in_a_row": "Steps in a row whose loss or gradients were not finite",
    "gate_refused_in_a_row": "Cuts refused since one passed",
    "gate_suspect": "1 while the publish gate finds the stream suspect",
}
_OF_TASKS = {
    "examples": "Labelled examples scored",
    "positives": "Those with a positive label",
    "base_rate": "Their share",
    "auc": "AUC",
    "gauc_windowed": "AUC within request or user and window; over a run: of its closed windows",
    "ne": "Normalised entropy",
    "ece": "Expected calibration error",
    "calibration": "Mean prediction over mean label",
    "xauc": "Share of pairs ordered as their labels",
    "mae": "Mean absolute error, in the label's unit",
    "mean_bias": "Mean prediction minus mean label, in the label's unit",
    "not_scored": "Examples without a finite score",
}


def registry_of(watch: Watch, log_end: LogEnd | None) -> CollectorRegistry:
    """All series of a trainer, with memory, processor time and open files of the process."""
    registry = CollectorRegistry()
    registry.register(TrainerSeries(watch, log_end))
    ProcessCollector(registry=registry)
    return registry


class TrainerSeries(Collector):
    """The series, made from the newest copy when they are asked for.

    Args:
        watch: Has the copy.
        log_end: Knows how far behind the training is; None: that is not shown.
    """

    def __init__(self, watch: Watch, log_end: LogEnd | None) -> None:
        self._watch, self._log_end = watch, log_end

    def collect(self) -> Iterator[Metric]:
        """All families."""
        seen = self._watch.seen
        for name, values in seen.counts.items():
            what, labels = _COUNTERS[name]
            counter = CounterMetricFamily(f"smes_trainer_{name}", f"{what}, since this process began", labels=labels)
            for label_values, value in values.items():
                counter.add_metric(label_values, value)
            yield counter
        for name, values in seen.gauges.items():
            yield _gauge(name, _GAUGES[name], (), values)
        yield from _tasks(seen)
        yield from _experts(seen)
        yield _gauge("rows", "Ids that have a row", (), {(): seen.rows.in_use})
        memory: Values = {(part,): float(count) for part, count in seen.memory.items()}
        yield _gauge("memory_bytes", "Memory of some parts; the process has more", ("part",), memory)
        positions: Values = {(p.topic, str(p.partition)): float(at) for p, at in seen.positions.items()}
        yield _gauge("position", "Next record to read", ("topic", "partition"), positions)
        yield from self._times(seen)
        yield from self._lag(seen)
        problems = problems_of(self._watch, self._log_end)
        yield _gauge("degraded", "1 while /health/ready names a problem", (), {(): float(bool(problems))})

    def _times(self, seen: Seen) -> Iterator[Metric]:
        now_ms = time.time() * 1000
        still_s = max(0.0, time.monotonic() - seen.at_s)
        yield _gauge("copy_age_seconds", "Since the training thread last said how it is", (), {(): still_s})
        for name, at_ms in (("cut", seen.cut_ms), ("checkpoint", seen.checkpoint_ms)):
            if at_ms is not None:
                age_s = max(0.0, now_ms - at_ms) / 1000
                yield _gauge(f"{name}_age_seconds", f"Since the newest {name} of this process", (), {(): age_s})
        if seen.event_time_ms is not None:
            what = "Event time of the newest example trained on, Unix seconds"
            yield _gauge("event_time_seconds", what, (), {(): seen.event_time_ms / 1000})

    def _lag(self, seen: Seen) -> Iterator[Metric]:
        log_end = self._log_end
        if log_end is None:
            return
        failures = CounterMetricFamily("smes_trainer_log_end_failures", "Looks for the log's end that failed")
        failures.add_metric((), log_end.failures)
        yield failures
        lag, labels = log_end.lag, ("topic", "partition")
        if lag is None:
            return
        records: Values = {(p.topic, str(p.partition)): float(b.records) for p, b in lag.partitions.items()}
        seconds: Values = {
            (p.topic, str(p.partition)): b.seconds for p, b in lag.partitions.items() if b.seconds is not None
        }
        yield _gauge("lag_records", "Records up to the log's end, in offsets", labels, records)
        yield _gauge("lag_seconds", "Event time from the next record to read to the newest one", labels, seconds)
        if lag.newest_ms is not None and seen.event_time_ms is not None:
            behind_s = max(0, lag.newest_ms - seen.event_time_ms) / 1000
            what = "Event time from the newest example trained on to the log's end: lag, and the wait for feedback"
            yield _gauge("trained_lag_seconds", what, (), {(): behind_s})


def _tasks(seen: Seen) -> Iterator[Metric]:
    """Metrics over the run, and over the stretch that ended last."""
    over: list[tuple[str, dict[str, TaskMetrics]]] = [("run", seen.run)]
    over += [("window", seen.stretch.tasks)] if seen.stretch else []
    figures = [(task, name, asdict(metrics)) for name, tasks in over for task, metrics in tasks.items()]
    for key, what in _OF_TASKS.items():
        values: Values = {(task, name): metrics[key] for task, name, metrics in figures if metrics[key] is not None}
        yield _gauge(f"task_{key}", what, ("task", "over"), values)


def _experts(seen: Seen) -> Iterator[Metric]:
    experts = seen.experts
    if not experts.load_share:
        return
    routing = experts.routing
    shares: Values = {(str(e),): share for e, share in enumerate(experts.load_share)}
    yield _gauge("expert_load_share", "Share of all uses in the newest segment", ("expert",), shares)
    for name, what, value in (
        ("experts_dead", "Experts that no task used in that segment", routing.dead),
        ("expert_load_skew", "Largest load over mean load in that segment", routing.load_skew),
        ("routing_drift", "1 - Jaccard of a task's experts since the segment before", routing.drift),
        ("routing_overlap", "Jaccard of two tasks' experts", routing.overlap),
        ("experts_active_mean", "Experts executed per instance", experts.active_mean),
    ):
        if value is not None:
            yield _gauge(name, what, (), {(): value})
    loads = dict(zip(seen.run, experts.load_TE, strict=True))
    used: Values = {(task,): float((load_E > 0).sum()) for task, load_E in loads.items()}
    yield _gauge("task_experts_used", "Experts that the task used in that segment", ("task",), used)
    busiest: Values = {(task,): float(load_E.max() / load_E.sum()) for task, load_E in loads.items() if load_E.any()}
    what = "Share of the task's busiest expert of its uses in that segment"
    yield _gauge("task_expert_share_max", what, ("task",), busiest)
    if experts.drift:
        drifts: Values = {(task,): value for task, value in zip(seen.run, experts.drift, strict=True)}
        what = "1 - Jaccard of the task's experts since the segment before"
        yield _gauge("task_routing_drift", what, ("task",), drifts)


def _gauge(name: str, what: str, labels: tuple[str, ...], values: Values) -> GaugeMetricFamily:
    gauge = GaugeMetricFamily(f"smes_trainer_{name}", what, labels=labels)
    for label_values, value in values.items():
        gauge.add_metric(label_values, value)
    return gauge
