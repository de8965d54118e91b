"""Rates and latencies of the last seconds, against lists that a plain loop keeps, under a clock that the test moves."""

import numpy as np
import pytest

from smes_scorer.recent_requests import RecentRequests


def test_rates_and_quantiles_are_of_the_last_whole_seconds() -> None:
    now_s = [100.25]
    recent = RecentRequests(("ok", "error", "busy"), over_s=4, monotonic_s=lambda: now_s[0])
    rng, sent = np.random.default_rng(0), []

    assert recent.summary()["rates"] == dict.fromkeys(("requests", "ok", "error", "busy"))
    for step in range(200):
        now_s[0] += rng.choice([0.0, 0.05, 0.4, 7.0], p=[0.3, 0.4, 0.28, 0.02])
        outcome = str(rng.choice(["ok", "error", "busy"]))
        latency_ms = None if outcome == "busy" else float(rng.exponential(5))
        recent.add(outcome, latency_ms)
        sent.append((int(now_s[0]), outcome, latency_ms))

        second = int(now_s[0])
        seconds = min(4, second - 100)
        of = [one for one in sent if second - 4 <= one[0] < second]
        latencies = [latency for _, _, latency in of if latency is not None]
        summary = recent.summary()
        if seconds:
            expected = {name: sum(one[1] == name for one in of) / seconds for name in ("ok", "error", "busy")}
            assert summary["rates"] == {"requests": len(of) / seconds, **expected}, step
        quantiles = [None, None] if not latencies else np.quantile(latencies, [0.5, 0.99]).tolist()
        assert summary["recent_latency_ms"] == {
            "p50": pytest.approx(quantiles[0]),
            "p99": pytest.approx(quantiles[1]),
            "count": len(latencies),
        }
