"""What is counted of the arms: who answered, who fell back, and how a shadow's scores differ."""

import threading
from collections.abc import Iterator
from typing import Literal

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from smes.arrays import F64

_LATENCY_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_DIFFERENCES = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)

Outcome = Literal["scored", "dropped", "failed", "not_ready"]
"""Of a request for a shadow: scored; left out, because too many waited; its model raised or gave a score that is no
finite number; it had no model."""

Fallback = Literal["not_ready", "failed"]
"""Why a split arm did not answer: it had no model; its model raised or gave a score that is no finite number."""


class ArmTelemetry(Collector):
    """Series of the arms. Safe to share between threads.

    Args:
        registry: Where they are shown.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"smes_scorer_arm_{name}", what, ["arm", *labels], registry=registry)

        self._answers = counter("answers", "Requests answered, by arm")
        self._fallbacks = counter("fallbacks", "Requests of an arm's users that the main arm answered", "reason")
        self._shadowed = counter("shadow_requests", "Answered requests offered to a shadow, by outcome", "outcome")
        self._latency = Histogram(
            "smes_scorer_arm_shadow_latency_seconds",
            "Time in which a shadow scored a request",
            ["arm"],
            buckets=_LATENCY_BUCKETS_S,
            registry=registry,
        )
        self._lock = threading.Lock()
        self._differences: dict[tuple[str, str], _Differences] = {}
        registry.register(self)

    def answered(self, arm: str) -> None:
        """Count an answer."""
        self._answers.labels(arm).inc()

    def fell_back(self, arm: str, reason: Fallback) -> None:
        """Count an answer by the main arm instead."""
        self._fallbacks.labels(arm, reason).inc()

    def shadow(self, arm: str, outcome: Outcome) -> None:
        """Count a request for a shadow."""
        self._shadowed.labels(arm, outcome).inc()

    def shadow_took(self, arm: str, seconds: float) -> None:
        """Count how long a shadow took."""
        self._latency.labels(arm).observe(seconds)

    def differences(self, arm: str, task: str, differences: F64) -> None:
        """Count by how much a shadow's scores of a task are above those that were answered.

        Args:
            arm, task: Their names.
            differences: float64 [N], -1 … 1; a regression's in units of its largest value.
        """
        with self._lock:
            self._differences.setdefault((arm, task), _Differences()).add(differences)

    def collect(self) -> Iterator[HistogramMetricFamily | GaugeMetricFamily]:
        """The differences, by arm and task."""
        sizes = HistogramMetricFamily(
            "smes_scorer_arm_score_difference",
            "Distance of a shadow's score from the main arm's, by task; a regression's over its largest value",
            labels=["arm", "task"],
        )
        means = GaugeMetricFamily(
            "smes_scorer_arm_score_shift",
            "Mean of a shadow's scores less that of the main arm's, by task, over all that it scored",
            labels=["arm", "task"],
        )
        with self._lock:
            for names, differences in self._differences.items():
                sizes.add_metric(names, differences.buckets(), differences.sum_of_sizes)
                means.add_metric(names, differences.mean)
        yield sizes
        yield means


class _Differences:
    """A histogram of the distances, and the mean of the differences."""

    def __init__(self) -> None:
        self._counts = np.zeros(len(_DIFFERENCES) + 1, np.int64)
        self._sum = 0.0
        self.sum_of_sizes = 0.0

    @property
    def mean(self) -> float:
        """Mean of the differences, of which there is at least one."""
        return self._sum / int(self._counts.sum())

    def add(self, differences: F64) -> None:
        sizes = np.abs(differences)
        self._counts += np.bincount(np.searchsorted(_DIFFERENCES, sizes), minlength=len(self._counts))
        self._sum += float(differences.sum())
        self.sum_of_sizes += float(sizes.sum())

    def buckets(self) -> list[tuple[str, float]]:
        """(Upper bound, number of distances up to it)."""
        bounds = [*map(str, _DIFFERENCES), "+Inf"]
        return list(zip(bounds, self._counts.cumsum().tolist(), strict=True))
