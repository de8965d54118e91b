"""What the service counts: Prometheus series for ``/metrics``, and the summary for ``/v1/stats``.

Freshness and its stages are those of :mod:`smes_scorer.first_answers`.
"""

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

from smes.arrays import F64, I64
from smes_scorer.arm_telemetry import ArmTelemetry
from smes_scorer.first_answers import STAGES, FirstAnswer
from smes_scorer.recent_requests import RecentRequests
from smes_scorer.refused import Refused

_LATENCY_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_FRESHNESS_BUCKETS_MS = (100, 250, 500, 1000, 1500, 2000, 3000, 5000, 10_000, 30_000, 60_000, 300_000, 3_600_000)
_STAGE_BUCKETS_MS = (1, 5, 10, 25, 50, 100, 250, 500, 1000, 2000, 5000, 10_000, 30_000, 60_000, 300_000, 3_600_000)
_DAY_MS = 86_400_000.0

OUTCOMES = ("ok", "rejected", "not_ready", "busy", "dropped", "error")
"""2xx; 4xx, a mistake of the caller; 503, before the first snapshot; 503, too many wait; not scored because it waited
too long or its caller left; any other 5xx."""

Cut = Literal["limit", "headers", "unread"]
"""Why the service ends a connection: too many of them; headers too slow or too long; an answer that is not read."""


_COUNTERS = (
    "swaps",
    "load_failures",
    "versions_answered",
    "freshness_uncounted",
    "unknown_users",
    "unknown_items",
    "ignored_context",
    "feature_store_failures",
    "scored_without_features",
)
"""Of the summary."""


class QuantileSketch:
    """Quantiles of a stream of positive numbers in bounded memory, exact to half a percent.

    Values are counted in buckets whose bounds grow by 1 %.

    Safe to share between threads.

    Args:
        smallest: Values below count as this, > 0.
        largest: Values above count as this.
    """

    _GROWTH = math.log(1.01)

    def __init__(self, smallest: float, largest: float) -> None:
        if not 0 < smallest < largest:
            raise ValueError(f"bounds {smallest} … {largest}, expected 0 < smallest < largest")
        self._smallest = smallest
        self._largest = largest
        self._counts = np.zeros(self._bucket(np.array([largest]))[0] + 1, np.int64)
        self._lock = threading.Lock()

    @property
    def count(self) -> int:
        """Total weight added."""
        return int(self._counts.sum())

    def add(self, values: F64, weights: I64 | None = None) -> None:
        """Count values, each ``weights`` times (default once)."""
        buckets = self._bucket(values)
        with self._lock:
            np.add.at(self._counts, buckets, 1 if weights is None else weights)

    def add_one(self, value: float) -> None:
        """Count one value; without NumPy's loops, which would let go of Python's lock and wait to have it again."""
        clipped = min(max(value, self._smallest), self._largest)
        bucket = min(int(math.log(clipped / self._smallest) / self._GROWTH), len(self._counts) - 1)
        with self._lock:
            self._counts[bucket] += 1

    def counts(self) -> list[tuple[int, int]]:
        """(Bucket, weight) of all buckets that have some, for :meth:`add_counts` of a sketch with the same bounds."""
        with self._lock:
            buckets = np.flatnonzero(self._counts)
            return list(zip(buckets.tolist(), self._counts[buckets].tolist(), strict=True))

    def add_counts(self, counts: Sequence[tuple[int, int]]) -> None:
        """Count what another sketch has counted."""
        with self._lock:
            for bucket, weight in counts:
                self._counts[bucket] += weight

    def quantile(self, q: float) -> float | None:
        """The smallest value with at least a share ``q`` of the weight at or below it; None when empty."""
        cumulative = self._counts.cumsum()
        if cumulative[-1] == 0:
            return None
        bucket = int(np.searchsorted(cumulative, max(1, math.ceil(q * cumulative[-1]))))
        return self._smallest * math.exp((bucket + 0.5) * self._GROWTH)

    def _bucket(self, values: F64) -> I64:
        clipped = np.clip(values, self._smallest, self._largest)
        return np.floor(np.log(clipped / self._smallest) / self._GROWTH).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Median and 99th percentile in milliseconds (None without values), and the number of values."""

    p50: float | None
    p99: float | None
    count: int

    @classmethod
    def of(cls, sketch: QuantileSketch) -> "Quantiles":
        """The quantiles of a sketch."""
        return cls(sketch.quantile(0.5), sketch.quantile(0.99), sketch.count)


class Telemetry:
    """The service's Prometheus registry and all series in it. Safe to share between threads."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)

        def counter(name: str, what: str) -> Counter:
            return Counter(f"smes_scorer_{name}", what, registry=self.registry)

        self._requests = Counter(
            "smes_scorer_requests", "Requests to POST /v1/score by outcome", ["outcome"], registry=self.registry
        )
        for outcome in OUTCOMES:
            self._requests.labels(outcome)
        self._cuts = Counter(
            "smes_scorer_connections_cut",
            "Connections that the service ended, by reason",
            ["reason"],
            registry=self.registry,
        )
        for reason in get_args(Cut):
            self._cuts.labels(reason)
        self.waiting = Gauge("smes_scorer_waiting", "Requests that wait to be scored", registry=self.registry)
        self._latency = Histogram(
            "smes_scorer_latency_seconds",
            "From a scoring request's arrival to its answer; busy and dropped ones are left out",
            buckets=_LATENCY_BUCKETS_S,
            registry=self.registry,
        )
        self._latency_ms = QuantileSketch(0.01, 1e6)
        self._recent = RecentRequests(OUTCOMES)
        self._freshness = _WeightedHistogram(_FRESHNESS_BUCKETS_MS)
        self._stages = {stage: _WeightedHistogram(_STAGE_BUCKETS_MS) for stage in STAGES}
        self.registry.register(_FreshnessSeries(self._freshness, self._stages))
        self.served_version = Gauge("smes_scorer_served_version", "Version being served", registry=self.registry)
        self.served_step = Gauge(
            "smes_scorer_served_step", "Optimiser steps behind the served version", registry=self.registry
        )
        self.snapshot_age_s = Gauge(
            "smes_scorer_snapshot_age_seconds", "Since the served snapshot was cut", registry=self.registry
        )
        self.degraded = Gauge(
            "smes_scorer_degraded", "1 while /health/ready is not ready or names a problem", registry=self.registry
        )
        self.loader_alive = Gauge(
            "smes_scorer_loader_alive", "1 while the thread that loads versions lives", registry=self.registry
        )
        self.store_damage = Gauge(
            "smes_scorer_store_damage", "Different broken things found in the store", registry=self.registry
        )
        self.refused = Refused()
        self.registry.register(self.refused)
        self.pinned = Gauge(
            "smes_scorer_pinned", "1 while an operator has pinned what is served", registry=self.registry
        )
        self.arms = ArmTelemetry(self.registry)
        self.swaps = counter("swaps", "Snapshots put into service")
        self.full_loads = counter("full_loads", "Full snapshots loaded: at the start, and where no delta led on")
        self.shadows = Gauge(
            "smes_scorer_shadows", "Deltas in service that wait to be folded into the table", registry=self.registry
        )
        self.load_failures = counter("load_failures", "Attempts to load a snapshot that failed")
        self.versions_answered = counter("versions_answered", "Versions that have answered at least once")
        self.freshness_uncounted = counter(
            "freshness_uncounted", "Skipped versions, or arrival times, that freshness had to leave out"
        )
        self.unknown_users = counter("unknown_users", "Requests whose user has no stored features")
        self.unknown_items = counter("unknown_items", "Requested items without stored features")
        self.ignored_context = counter("ignored_context", "Context values that the schema has no context feature for")
        self.feature_store_failures = counter("feature_store_failures", "Feature look-ups that failed")
        self.no_features = Gauge(
            "smes_scorer_feature_store_empty",
            "1 while the store holds no features, though the schema has stored ones",
            registry=self.registry,
        )
        self.skew_compared = counter("skew_comparisons", "Hours of requests compared with what was trained on")
        self.skew_now = Gauge(
            "smes_scorer_skewed_features", "Differences found in the hour compared last", registry=self.registry
        )
        figure = ("feature", "figure")
        self.skew_found = Counter(
            "smes_scorer_skew", "Hours in which served and trained on differ", figure, registry=self.registry
        )
        self.skew_size = Gauge(
            "smes_scorer_skew_size",
            "Distance in the hour compared last: of shares, or of means in standard deviations",
            figure,
            registry=self.registry,
        )
        self.scored_without_features = counter("scored_without_features", "Requests scored without stored features")

    def request(self, status: int, latency_s: float) -> None:
        """Count one answered scoring request."""
        outcome = _outcome(status)
        self._requests.labels(outcome).inc()
        self._recent.add(outcome, latency_s * 1000)
        self._latency.observe(latency_s)
        self._latency_ms.add_one(latency_s * 1000)

    def unscored(self, outcome: Literal["busy", "dropped"]) -> None:
        """Count a scoring request that was not scored because of the load. The latencies do not show it."""
        self._requests.labels(outcome).inc()
        self._recent.add(outcome)

    def cut(self, reason: Cut) -> None:
        """Count a connection that the service ended."""
        self._cuts.labels(reason).inc()

    def first_answer(self, answer: FirstAnswer) -> None:
        """Count a version that answered for the first time, and the freshness of its feedback."""
        self.versions_answered.inc()
        self._freshness.add(answer.freshness_ms, answer.count)
        for stage, spans_ms in zip(STAGES, answer.stages_ms.T, strict=True):
            self._stages[stage].add(spans_ms, answer.count)

    def requests(self) -> dict[str, int]:
        """Outcome → number of requests."""
        return {outcome: self.value("requests_total", {"outcome": outcome}) for outcome in OUTCOMES}

    def value(self, name: str, labels: dict[str, str] | None = None) -> int:
        """The current value of a counter, by its name without the prefix."""
        return int(self.registry.get_sample_value(f"smes_scorer_{name}", labels) or 0)

    def summary(self) -> dict[str, object]:
        """All counters and quantiles as plain data, times in milliseconds; rates are of the last ten seconds."""
        by_outcome = self.requests()
        return {
            "requests": sum(by_outcome.values()),
            "errors": by_outcome["error"],
            "outcomes": by_outcome,
            "waiting": self.value("waiting"),
            "latency_ms": asdict(Quantiles.of(self._latency_ms)),
            **self._recent.summary(),
            "freshness_ms": asdict(Quantiles.of(self._freshness.sketch)),
            "freshness_stages_ms": {stage: asdict(StageFigures.of(one)) for stage, one in self._stages.items()},
            **{name: self.value(f"{name}_total") for name in _COUNTERS},
        }

    def state(self) -> dict[str, Any]:
        """What :meth:`summary` is made of, as JSON may hold it, for :meth:`add_state` of another process."""
        return {
            "outcomes": self.requests(),
            "waiting": self.value("waiting"),
            "latency_ms": self._latency_ms.counts(),
            "recent": self._recent.state(),
            "freshness": self._freshness.state(),
            "stages": {stage: one.state() for stage, one in self._stages.items()},
            "counters": {name: self.value(f"{name}_total") for name in _COUNTERS},
        }

    def add_state(self, state: Mapping[str, Any]) -> None:
        """Count what another process of the same machine has counted, so that the summary is of both."""
        for outcome, count in state["outcomes"].items():
            self._requests.labels(outcome).inc(count)
        self.waiting.inc(state["waiting"])
        self._latency_ms.add_counts(state["latency_ms"])
        self._recent.add_state(state["recent"])
        self._freshness.add_state(state["freshness"])
        for stage, one in state["stages"].items():
            self._stages[stage].add_state(one)
        for name, count in state["counters"].items():
            getattr(self, name).inc(count)


class _WeightedHistogram:
    """Counts of weighted values in milliseconds; the client library's histogram takes one value at a time.

    Args:
        bounds_ms: Upper bounds of the buckets.
    """

    def __init__(self, bounds_ms: Sequence[int]) -> None:
        self.sketch = QuantileSketch(1.0, 30 * _DAY_MS)
        self._bounds_ms = bounds_ms
        self._counts = np.zeros(len(bounds_ms) + 1, np.int64)
        self._sum_ms = 0.0
        self._lock = threading.Lock()

    def add(self, values_ms: I64, weights: I64) -> None:
        self.sketch.add(values_ms.astype(np.float64), weights)
        with self._lock:
            np.add.at(self._counts, np.searchsorted(self._bounds_ms, values_ms), weights)
            self._sum_ms += float(values_ms.astype(np.float64) @ weights)  # a product may be beyond 64 bits

    def now(self) -> tuple[list[tuple[str, float]], float]:
        """(Upper bound and number of values up to it, for each bucket; sum of the values)."""
        bounds = [*(str(float(bound)) for bound in self._bounds_ms), "+Inf"]
        with self._lock:
            return list(zip(bounds, self._counts.cumsum().tolist(), strict=True)), self._sum_ms

    def state(self) -> dict[str, Any]:
        """What was counted, for :meth:`add_state` of one with the same bounds."""
        with self._lock:
            return {"sketch": self.sketch.counts(), "counts": self._counts.tolist(), "sum_ms": self._sum_ms}

    def add_state(self, state: Mapping[str, Any]) -> None:
        """Count what another one has counted."""
        self.sketch.add_counts(state["sketch"])
        with self._lock:
            self._counts += np.array(state["counts"], np.int64)
            self._sum_ms += state["sum_ms"]

    @property
    def mean_ms(self) -> float | None:
        """None without values."""
        buckets, sum_ms = self.now()
        return sum_ms / buckets[-1][1] if buckets[-1][1] else None


@dataclass(frozen=True, slots=True)
class StageFigures:
    """Median, 99th percentile and mean of a stage of freshness in milliseconds; None without values."""

    p50: float | None
    p99: float | None
    mean: float | None

    @classmethod
    def of(cls, histogram: _WeightedHistogram) -> "StageFigures":
        """The figures of a histogram."""
        return cls(histogram.sketch.quantile(0.5), histogram.sketch.quantile(0.99), histogram.mean_ms)


class _FreshnessSeries(Collector):
    """The histograms of freshness and of its stages, as Prometheus reads them."""

    def __init__(self, freshness: _WeightedHistogram, stages: Mapping[str, _WeightedHistogram]) -> None:
        self._freshness, self._stages = freshness, stages

    def collect(self) -> Iterator[HistogramMetricFamily]:
        buckets, sum_ms = self._freshness.now()
        yield HistogramMetricFamily(
            "smes_scorer_freshness_milliseconds",
            "From a feedback's arrival in the event log to the first answer by a version trained on it",
            buckets=buckets,
            sum_value=sum_ms,
        )
        stages = HistogramMetricFamily(
            "smes_scorer_freshness_stage_milliseconds",
            "What freshness is made of: from the end of the stage before to the end of this one",
            labels=["stage"],
        )
        for stage, histogram in self._stages.items():
            stages.add_metric([stage], *histogram.now())
        yield stages


def _outcome(status: int) -> str:
    if status < 400:
        return "ok"
    if status < 500:
        return "rejected"
    return "not_ready" if status == 503 else "error"
