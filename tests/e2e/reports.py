"""The report as it is documented, written out."""

from typing import Any

SECTIONS = {
    "schema": None,
    "lineage": None,
    "version": None,
    "events": {"impressions", "trained", "waiting", "late", "duplicate", "dead_lettered"},
    "feedback": {"received", "attached", "waiting", "late", "orphaned", "duplicate", "dead_lettered"},
    "throughput": {"trained_per_s"},
    "freshness_ms": {"p50", "p99"},
    "snapshots": {"published", "bytes_last", "served"},
    "scorer": {"requests", "errors", "mixed_versions", "p50_ms", "p99_ms"},
    "active_experts": {"mean", "max", "bound", "num_experts"},
    "routing": {"stretch_steps", "dead", "load_skew", "drift", "overlap"},
    "tasks": None,
}
OF_A_TASK = {"positives", "auc", "gauc_windowed", "ne", "ece"}


def assert_documented(report: dict[str, Any], tasks: set[str]) -> None:
    """Exactly the documented keys at every level, and both ledgers balance."""
    assert report.keys() == SECTIONS.keys()
    for section, keys in SECTIONS.items():
        if keys is not None:
            assert report[section].keys() == keys, section
    assert report["tasks"].keys() == tasks
    for name, metrics in report["tasks"].items():
        assert metrics.keys() == OF_A_TASK, name
    events, feedback = report["events"], report["feedback"]
    assert events["impressions"] == sum(n for key, n in events.items() if key != "impressions")
    assert feedback["received"] == sum(n for key, n in feedback.items() if key != "received")
    experts = report["active_experts"]
    if events["trained"]:
        assert 1 <= experts["mean"] <= experts["max"] <= experts["bound"] <= experts["num_experts"]
