"""The documented keys of a report, and checks of what it says."""

from typing import Any

NOT_READ = {"gaps", "unreadable"}  # beside the sum of a ledger
SECTIONS = {
    "schema": None,
    "lineage": None,
    "version": None,
    "events": {"impressions", "trained", "waiting", "late", "duplicate", "dead_lettered", "not_finite", *NOT_READ},
    "feedback": {
        "received",
        "attached",
        "corrected",
        "waiting",
        "late",
        "orphaned",
        "duplicate",
        "dead_lettered",
        "dropped",
        *NOT_READ,
    },
    "throughput": {"trained_per_s"},
    "freshness_ms": {"p50", "p99"},
    "freshness_stages_ms": None,
    "snapshots": {"published", "bytes_last", "served"},
    "scorer": {"requests", "errors", "mixed_versions", "p50_ms", "p99_ms"},
    "rows": {"in_use", "born", "expired", "replaced", "turned_away"},
    "active_experts": {"mean", "max", "bound", "num_experts"},
    "routing": {"segment_steps", "dead", "load_skew", "drift", "overlap"},
    "headline": {"dense", "rare"},
    "tasks": None,
    "arms": None,
    "arms_left_out": None,
    "features": {"user", "item"},
    "gate": None,
    "ranks": None,
}
SYNTHETIC_TASKS = {"click", "long_view", "watch_time", "like", "profile_enter", "comment", "follow", "forward"}
OF_A_BINARY_TASK = {"base_rate", "auc", "gauc_windowed", "ne", "calibration", "ece"}
OF_A_TASK = {"positives", *OF_A_BINARY_TASK, "xauc", "mae", "mean_bias"}
OF_A_HEADLINE = {"tasks", "auc", "gauc_windowed", "ne"}


def assert_documented(report: dict[str, Any], tasks: set[str]) -> None:
    """Exactly the documented keys at every level, both ledgers balance, and the numbers of experts are in order."""
    assert report.keys() - {"log"} == SECTIONS.keys()
    if (log := report.get("log")) is not None:  # the ledger of the log that a command was given
        assert log["rows"] == log["usable"] + log["duplicates"] + log["rejected"]
    for section, keys in SECTIONS.items():
        if keys is not None:
            assert report[section].keys() == keys, section
    assert report["tasks"].keys() == tasks
    for name, metrics in report["tasks"].items():
        assert metrics.keys() == OF_A_TASK, name
    for kind, means in report["headline"].items():
        if means is None:
            continue
        assert means.keys() == OF_A_HEADLINE, kind
        assert all((report["tasks"][name]["base_rate"] < 0.01) == (kind == "rare") for name in means["tasks"])
    events, feedback, experts = report["events"], report["feedback"], report["active_experts"]
    rows = report["rows"]
    assert rows["in_use"] == rows["born"] - rows["expired"] - rows["replaced"]
    assert events["impressions"] == sum(n for key, n in events.items() if key not in {"impressions", *NOT_READ})
    assert feedback["received"] == sum(n for key, n in feedback.items() if key not in {"received", *NOT_READ})
    if events["trained"]:
        assert 1 <= experts["mean"] <= experts["max"] <= experts["bound"] <= experts["num_experts"]
    else:
        assert (experts["mean"], experts["max"]) == (None, None)
