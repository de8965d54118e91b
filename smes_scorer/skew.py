"""Training/serving skew: are the features that requests bring distributed like those that are trained on?

The trainer's manifests say how the features of each hour of event time were distributed (``metrics.features``), the
scorer measures the requests of the same hour by its clock. When both have an hour complete, it is compared, once. See
:mod:`smes.feature_figures`.

Letters: N items, W id columns, F numeric columns.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from smes.arrays import F32, I64, Bool
from smes.feature_figures import HOUR_MS, Difference, FeatureFigure, HourlySums, differences, figures_of
from smes.schema import Schema
from smes_io.clock import wall_clock_ms
from smes_scorer.config import SkewConfig
from smes_scorer.telemetry import Telemetry

_EVERY_S = 0.25
_KEPT_HOURS = 240  # a trainer says how an hour was when its attribution windows are over
_NAMED = 3
_logger = logging.getLogger(__name__)


class ServedFeatures:
    """Measures requests, four a second at most, and compares whole hours of them. Safe to share between threads.

    Args:
        schema: The features.
        config: What counts as skew.
        telemetry: Counts it.
        now_ms: Wall clock in Unix milliseconds.
        monotonic_s: Clock of the four a second.
    """

    def __init__(
        self,
        schema: Schema,
        config: SkewConfig,
        telemetry: Telemetry,
        *,
        now_ms: Callable[[], int] = wall_clock_ms,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._telemetry = config, telemetry
        self._now_ms, self._monotonic_s = now_ms, monotonic_s
        self._of_item = {f.name: f.source == "item" for f in schema.features}
        self._lock = threading.Lock()
        self._hours = HourlySums(schema, _KEPT_HOURS)
        self._next_s = float("-inf")
        self._compared = -1
        self.problem: str | None = None
        """What differed in the last hour that was compared, None if nothing did."""

    def wants(self) -> bool:
        """Whether the next request is to be measured."""
        if self._monotonic_s() < self._next_s:
            return False
        with self._lock:
            now_s = self._monotonic_s()
            if now_s < self._next_s:
                return False
            self._next_s = now_s + _EVERY_S
        return True

    def add(self, ids_NW: I64, numerics_NF: F32, now_ms: int, known_NW: Bool | None) -> None:
        """Measure a request: a user with N items.

        Args:
            ids_NW: int64 [N, W].
            numerics_NF: float32 [N, F].
            now_ms: When it was asked, Unix milliseconds.
            known_NW: bool [N, W], which ids the model has a row for; None: not known.
        """
        with self._lock:
            sums = self._hours.of(now_ms // HOUR_MS)
            if sums is not None:
                sums.add_request(ids_NW, numerics_NF, known_NW)

    def compare(self, metrics: Mapping[str, Any]) -> None:
        """Compare what a manifest says of hours with the requests of the same hours. Never raises."""
        try:
            trained = figures_of(metrics.get("features"))
        except ValueError as error:
            _logger.warning("the figures of features in a snapshot's metrics cannot be read: %s", error)
            return
        with self._lock:
            self._hours.of(self._now_ms() // HOUR_MS)  # ends the hours before
            both = [(hour, self._hours.done[hour][1]) for hour in sorted(trained) if hour in self._hours.done]
        for hour, served in both:
            if hour > self._compared:
                self._compared = hour
                self._compare_hour(hour, served, trained[hour])

    def _compare_hour(self, hour: int, served: dict[str, FeatureFigure], trained: dict[str, FeatureFigure]) -> None:
        self._telemetry.skew_compared.inc()
        found: list[Difference] = []
        for difference in differences(served, trained):
            self._telemetry.skew_size.labels(difference.feature, difference.figure).set(difference.size)
            if self._counts(difference):
                self._telemetry.skew_found.labels(difference.feature, difference.figure).inc()
                found.append(difference)
        self._telemetry.skew_now.set(len(found))
        self.problem = _words(hour, found) if found else None
        if self.problem:
            _logger.warning("training/serving skew: %s", self.problem)

    def _counts(self, difference: Difference) -> bool:
        """Whether a difference is neither chance nor small."""
        if difference.feature in self._config.ignored or difference.errors < self._config.deviations:
            return False
        if self._of_item[difference.feature]:
            # The items that are shown are chosen among those that are asked for: only their fill rate is compared.
            return difference.figure == "fill" and difference.size >= 2 * self._config.share
        return difference.size >= (self._config.mean if difference.figure == "mean" else self._config.share)


def _words(hour: int, found: list[Difference]) -> str:
    """The largest differences of an hour."""
    at = datetime.fromtimestamp(hour * HOUR_MS / 1000, UTC).strftime("%Y-%m-%dT%H:00Z")
    largest = sorted(found, key=lambda difference: -difference.size)[:_NAMED]
    told = [f"{one.feature} {one.figure} {one.served:.4g} served, {one.trained:.4g} trained on" for one in largest]
    if len(found) > _NAMED:
        told.append(f"and {len(found) - _NAMED} more")
    return f"served and trained on differ in the hour {at}: {', '.join(told)}"
