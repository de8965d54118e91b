"""The scorer's dashboard."""

from ops.grafana.panels import ALERTS, OF, PROCESSES, Board, chart, number, parts, quantile, rate


def _scorer(name: str, labels: str = "") -> str:
    return f"smes_scorer_{name}{{{OF}{labels}}}"


SCORER = Board(
    uid="smes-scorer",
    title="SMES: scorer",
    what="Requests, versions in service, freshness, features, skew, the store and the arms.",
    job="smes-scorer",
    rows=(
        (
            "Now",
            (
                number("Scraped", "0: this scorer cannot be scraped.", "none", f"up{{{OF}}}"),
                number(
                    "Degraded",
                    "1: its /health/ready is not ready or names a problem.",
                    "none",
                    _scorer("degraded"),
                    wrong_from=1,
                ),
                number("Version in service", "Its number within its lineage.", "none", _scorer("served_version")),
                number(
                    "Age of the version",
                    "Since the served snapshot was cut.",
                    "s",
                    _scorer("snapshot_age_seconds"),
                    wrong_from=600,
                ),
                number("Pinned", "1: an operator has pinned what is served.", "none", _scorer("pinned"), wrong_from=1),
                number(
                    "Broken things in the store",
                    "Different ones found by this scorer.",
                    "none",
                    _scorer("store_damage"),
                    wrong_from=1,
                ),
                ALERTS,
            ),
        ),
        (
            "Requests",
            (
                parts(
                    "Requests",
                    "By outcome. busy and dropped: one scorer is too few.",
                    "reqps",
                    (rate(_scorer("requests_total"), "outcome"), "{{outcome}} {{instance}}"),
                ),
                chart(
                    "Time of an answer",
                    "From a request's arrival to its answer; busy and dropped ones are left out.",
                    "s",
                    (quantile(0.5, _scorer("latency_seconds_bucket")), "p50 {{instance}}"),
                    (quantile(0.99, _scorer("latency_seconds_bucket")), "p99 {{instance}}"),
                ),
                chart(
                    "Waiting to be scored",
                    "Requests in the queue.",
                    "none",
                    (_scorer("waiting"), "{{instance}}"),
                ),
                chart(
                    "Connections ended by the scorer",
                    "limit: too many; headers: too slow or too long; unread: an answer that nobody reads.",
                    "cps",
                    (rate(_scorer("connections_cut_total"), "reason"), "{{reason}} {{instance}}"),
                ),
            ),
        ),
        (
            "Versions",
            (
                chart(
                    "Age of the version",
                    "Since the served snapshot was cut.",
                    "s",
                    (_scorer("snapshot_age_seconds"), "{{instance}}"),
                ),
                chart(
                    "Step in service",
                    "Optimiser steps behind the served version.",
                    "short",
                    (_scorer("served_step"), "{{instance}}"),
                    least=None,
                ),
                chart(
                    "Swaps and loads",
                    "Versions put into service, full snapshots loaded, loads that failed, versions that answered.",
                    "cps",
                    (rate(_scorer("swaps_total")), "swaps {{instance}}"),
                    (rate(_scorer("full_loads_total")), "full loads {{instance}}"),
                    (rate(_scorer("load_failures_total")), "failed {{instance}}"),
                    (rate(_scorer("versions_answered_total")), "answered {{instance}}"),
                ),
                chart(
                    "Refused",
                    "Things in the store that were refused, by reason.",
                    "cps",
                    (rate(_scorer("refusals_total"), "reason"), "{{reason}} {{instance}}"),
                ),
                chart(
                    "Deltas to be folded",
                    "Deltas in service that wait for requests to end, to be folded into the table.",
                    "none",
                    (_scorer("shadows"), "{{instance}}"),
                ),
                chart(
                    "Loader",
                    "1 while the thread that loads versions lives.",
                    "none",
                    (_scorer("loader_alive"), "{{instance}}"),
                ),
            ),
        ),
        (
            "Freshness",
            (
                chart(
                    "Freshness",
                    "From a feedback event's arrival to the first answer that knows it.",
                    "ms",
                    (quantile(0.5, _scorer("freshness_milliseconds_bucket")), "p50 {{instance}}"),
                    (quantile(0.99, _scorer("freshness_milliseconds_bucket")), "p99 {{instance}}"),
                ),
                parts(
                    "Freshness by stage",
                    "Mean of each stage on the way. What decides a stage: docs/operate/freshness.md.",
                    "ms",
                    (
                        f"{rate(_scorer('freshness_stage_milliseconds_sum'), 'stage')} / "
                        f"({rate(_scorer('freshness_stage_milliseconds_count'), 'stage')} > 0)",
                        "{{stage}} {{instance}}",
                    ),
                ),
                chart(
                    "Left out of freshness",
                    "Skipped versions, or arrival times, whose manifest was gone.",
                    "cps",
                    (rate(_scorer("freshness_uncounted_total")), "{{instance}}"),
                ),
            ),
        ),
        (
            "Features and skew",
            (
                number(
                    "Empty store",
                    "1: the store holds no features, though the schema has stored ones.",
                    "none",
                    _scorer("feature_store_empty"),
                    wrong_from=1,
                ),
                number(
                    "Skewed features",
                    "Differences found in the hour compared last.",
                    "none",
                    _scorer("skewed_features"),
                    wrong_from=1,
                ),
                chart(
                    "Without features",
                    "Users and items without stored features, requests scored without any, look-ups that failed, and "
                    "context that the schema does not know.",
                    "cps",
                    (rate(_scorer("unknown_users_total")), "unknown users {{instance}}"),
                    (rate(_scorer("unknown_items_total")), "unknown items {{instance}}"),
                    (rate(_scorer("scored_without_features_total")), "scored without {{instance}}"),
                    (rate(_scorer("feature_store_failures_total")), "look-ups failed {{instance}}"),
                    (rate(_scorer("ignored_context_total")), "ignored context {{instance}}"),
                ),
                chart(
                    "Skew",
                    "Distance between served and trained on, in the hour compared last: of shares, or of means in "
                    "standard deviations. Empty before the first full hour of requests.",
                    "none",
                    (_scorer("skew_size"), "{{feature}} {{figure}} {{instance}}"),
                ),
                chart(
                    "Hours compared",
                    "Hours of requests that were compared, and hours with skew.",
                    "cps",
                    (rate(_scorer("skew_comparisons_total")), "compared {{instance}}"),
                    (rate(_scorer("skew_total"), "feature", "figure"), "{{feature}} {{figure}} {{instance}}"),
                ),
            ),
        ),
        (
            "Arms (empty without scorer.arms)",
            (
                parts(
                    "Who answers",
                    "Requests answered, by arm.",
                    "reqps",
                    (rate(_scorer("arm_answers_total"), "arm"), "{{arm}} {{instance}}"),
                ),
                chart(
                    "Answered by main instead",
                    "Requests of an arm's users, because it had no model or its model failed.",
                    "reqps",
                    (rate(_scorer("arm_fallbacks_total"), "arm", "reason"), "{{arm}} {{reason}} {{instance}}"),
                ),
                chart(
                    "Requests for shadows",
                    "By outcome.",
                    "reqps",
                    (rate(_scorer("arm_shadow_requests_total"), "arm", "outcome"), "{{arm}} {{outcome}} {{instance}}"),
                ),
                chart(
                    "How far a shadow's scores are",
                    "Median distance from the scores that were answered, by task.",
                    "none",
                    (
                        quantile(0.5, _scorer("arm_score_difference_bucket"), "arm", "task"),
                        "{{arm}} {{task}} {{instance}}",
                    ),
                ),
                chart(
                    "Higher or lower",
                    "By how much a shadow's scores are higher on average, by task.",
                    "none",
                    (_scorer("arm_score_shift"), "{{arm}} {{task}} {{instance}}"),
                    least=None,
                ),
                chart(
                    "Time of a shadow",
                    "p99 of the time in which a shadow scores a request.",
                    "s",
                    (quantile(0.99, _scorer("arm_shadow_latency_seconds_bucket"), "arm"), "{{arm}} {{instance}}"),
                ),
                chart(
                    "Age of an arm's version",
                    "Since its snapshot was cut.",
                    "s",
                    (_scorer("arm_snapshot_age_seconds"), "{{arm}} {{instance}}"),
                ),
            ),
        ),
        PROCESSES,
    ),
)
