"""The trainer's dashboard."""

from ops.grafana.panels import ALERTS, OF, PROCESSES, Board, Look, chart, number, parts, rate


def _trainer(name: str, labels: str = "") -> str:
    return f"smes_trainer_{name}{{{OF}{labels}}}"


_TASK = ', task=~"$task"'


def _of_task(title: str, key: str, what: str, unit: str = "none") -> Look:
    return chart(
        title,
        f"{what} Of the newest stretch of the stream, on examples that were scored before they were trained on.",
        unit,
        (_trainer(f"task_{key}", f'{_TASK}, over="window"'), "{{task}} {{instance}}"),
        least=None,
    )


TRAINER = Board(
    uid="smes-trainer",
    title="SMES: trainer",
    what="Event log, join, training, learning, experts, versions and the publish gate.",
    job="smes-trainer",
    variables=(("task", "Task", 'label_values(smes_trainer_task_examples{job=~"$job", instance=~"$instance"}, task)'),),
    rows=(
        (
            "Now",
            (
                number("Scraped", "0: this trainer cannot be scraped.", "none", f"up{{{OF}}}"),
                number("Degraded", "1: its /health/ready names a problem.", "none", _trainer("degraded"), wrong_from=1),
                number(
                    "Behind the log's end",
                    "Event time from the next record to read to the newest one, of the partition furthest behind.",
                    "s",
                    f"max by (instance) ({_trainer('lag_seconds')})",
                    wrong_from=60,
                ),
                number(
                    "Age of the newest cut",
                    "Since weights were last cut for serving.",
                    "s",
                    _trainer("cut_age_seconds"),
                    wrong_from=300,
                ),
                number(
                    "Age of the checkpoint",
                    "Since the newest checkpoint was written.",
                    "s",
                    _trainer("checkpoint_age_seconds"),
                    wrong_from=600,
                ),
                number("Steps", "Optimiser steps behind the weights.", "none", _trainer("step")),
                ALERTS,
            ),
        ),
        (
            "Event log and join",
            (
                chart(
                    "Events read and trained on",
                    "Impressions and feedback read from the log, and impressions trained on.",
                    "cps",
                    (rate(_trainer("impressions_read_total")), "impressions read {{instance}}"),
                    (rate(_trainer("feedback_read_total")), "feedback read {{instance}}"),
                    (rate(_trainer("impressions_total", ', outcome="trained"')), "trained on {{instance}}"),
                ),
                chart(
                    "Lag in event time",
                    "From the next record to read to the newest one; and from the newest example trained on, which "
                    "includes the wait for feedback.",
                    "s",
                    (_trainer("lag_seconds"), "{{topic}} {{partition}} {{instance}}"),
                    (_trainer("trained_lag_seconds"), "newest example {{instance}}"),
                ),
                chart(
                    "Lag in records",
                    "Records up to the log's end, in offsets. An Arrow record may hold thousands of events.",
                    "short",
                    (_trainer("lag_records"), "{{topic}} {{partition}} {{instance}}"),
                ),
                chart(
                    "Waiting",
                    "Impressions that wait for feedback, and feedback that waits for its impression.",
                    "short",
                    (_trainer("impressions_waiting"), "impressions {{instance}}"),
                    (_trainer("feedback_waiting"), "feedback {{instance}}"),
                ),
                chart(
                    "Impressions not trained on",
                    "By where they went.",
                    "cps",
                    (
                        rate(_trainer("impressions_total", ', outcome!="trained"'), "outcome"),
                        "{{outcome}} {{instance}}",
                    ),
                    (rate(_trainer("impressions_gaps_total")), "no longer in the log {{instance}}"),
                    (rate(_trainer("impressions_unreadable_total")), "no record of ours {{instance}}"),
                ),
                chart(
                    "Feedback",
                    "By where it went.",
                    "cps",
                    (rate(_trainer("feedback_total"), "outcome"), "{{outcome}} {{instance}}"),
                    (rate(_trainer("feedback_gaps_total")), "no longer in the log {{instance}}"),
                    (rate(_trainer("feedback_unreadable_total")), "no record of ours {{instance}}"),
                ),
                chart(
                    "Features looked up",
                    "For impressions that leave them out, by whether the store had them.",
                    "cps",
                    (rate(_trainer("features_total"), "entity", "outcome"), "{{entity}} {{outcome}} {{instance}}"),
                ),
                chart(
                    "Read position",
                    "Next record to read of each partition.",
                    "short",
                    (_trainer("position"), "{{topic}} {{partition}} {{instance}}"),
                    least=None,
                ),
                chart(
                    "What cannot be asked or understood",
                    "Looks for the log's end that failed, and fields that the schema does not know.",
                    "cps",
                    (rate(_trainer("log_end_failures_total")), "log's end {{instance}}"),
                    (rate(_trainer("unknown_fields_total")), "unknown fields {{instance}}"),
                ),
            ),
        ),
        (
            "Training",
            (
                parts(
                    "Where the time goes",
                    "Share of the training thread's time by part of its loop. All parts together are 1.",
                    "percentunit",
                    (rate(_trainer("seconds_total"), "part"), "{{part}} {{instance}}"),
                ),
                chart("Steps", "Steps per second.", "ops", (rate(_trainer("steps_total")), "{{instance}}")),
                chart(
                    "Step time",
                    "Time of one step, by part of the loop.",
                    "s",
                    (
                        f"{rate(_trainer('seconds_total'), 'part')} / on (instance) group_left () "
                        f"({rate(_trainer('steps_total'))} > 0)",
                        "{{part}} {{instance}}",
                    ),
                ),
                chart(
                    "Failed steps in a row",
                    "Steps whose loss or gradients were not finite.",
                    "none",
                    (_trainer("failed_steps_in_a_row"), "{{instance}}"),
                ),
                parts(
                    "Memory of the model and the join",
                    "Without frozen copies, activations and libraries: the process has more, see the last row.",
                    "bytes",
                    (_trainer("memory_bytes"), "{{part}} {{instance}}"),
                ),
                chart("Rows", "Ids that have a row in the table.", "short", (_trainer("rows"), "{{instance}}")),
                chart(
                    "What becomes of rows",
                    "Rows that ids got, rows given back, and ids that got none because the budget was used up.",
                    "cps",
                    (rate(_trainer("rows_born_total")), "born {{instance}}"),
                    (rate(_trainer("rows_given_back_total"), "why"), "{{why}} {{instance}}"),
                    (rate(_trainer("rows_turned_away_total")), "turned away {{instance}}"),
                ),
            ),
        ),
        (
            "Learning",
            (
                _of_task("AUC", "auc", "How well scores order examples."),
                _of_task("GAUC", "gauc_windowed", "AUC within a request or user, averaged."),
                _of_task("Normalised entropy", "ne", "Loss over that of the base rate; below 1 is better than it."),
                _of_task("Calibration", "calibration", "Mean prediction over mean label; 1 is right."),
                _of_task("Calibration error", "ece", "Expected calibration error."),
                _of_task(
                    "Base rate", "base_rate", "Share of positive labels: drift of the stream itself.", "percentunit"
                ),
                _of_task("XAUC", "xauc", "Regression: share of pairs in the order of their labels."),
                _of_task("Mean absolute error", "mae", "Regression, in the label's unit."),
                _of_task("Mean bias", "mean_bias", "Regression: mean prediction minus mean label."),
                _of_task("Examples", "examples", "Labelled examples that the other figures rest on.", "short"),
                _of_task("Positives", "positives", "Those with a positive label.", "short"),
                chart(
                    "AUC of the whole run",
                    "Over everything so far: the figure of the report.",
                    "none",
                    (_trainer("task_auc", f'{_TASK}, over="run"'), "{{task}} {{instance}}"),
                    least=None,
                ),
            ),
        ),
        (
            "Experts",
            (
                number(
                    "Dead experts",
                    "Experts that no task used in the newest segment.",
                    "none",
                    _trainer("experts_dead"),
                    wrong_from=1,
                ),
                number(
                    "Active experts",
                    "Experts executed per instance, over the run.",
                    "none",
                    _trainer("experts_active_mean"),
                ),
                parts(
                    "Load of the experts",
                    "Share of each expert of all uses in the newest segment.",
                    "percentunit",
                    (_trainer("expert_load_share"), "expert {{expert}} {{instance}}"),
                ),
                chart(
                    "Load skew",
                    "Largest load over mean load; 1 is even.",
                    "none",
                    (_trainer("expert_load_skew"), "{{instance}}"),
                ),
                chart(
                    "Experts that a task uses",
                    "In the newest segment.",
                    "none",
                    (_trainer("task_experts_used", _TASK), "{{task}} {{instance}}"),
                ),
                chart(
                    "Share of a task's busiest expert",
                    "Of all its uses in the newest segment.",
                    "percentunit",
                    (_trainer("task_expert_share_max", _TASK), "{{task}} {{instance}}"),
                ),
                chart(
                    "Routing drift of a task",
                    "How much its experts changed since the segment before; 0 is not at all.",
                    "percentunit",
                    (_trainer("task_routing_drift", _TASK), "{{task}} {{instance}}"),
                ),
                chart(
                    "Routing drift and overlap",
                    "Drift: how much a task's experts changed since the segment before. Overlap: how much two tasks "
                    "share.",
                    "percentunit",
                    (_trainer("routing_drift"), "drift {{instance}}"),
                    (_trainer("routing_overlap"), "overlap {{instance}}"),
                ),
            ),
        ),
        (
            "Versions and publish gate",
            (
                chart(
                    "Versions",
                    "Published, kept aside by the gate, and publications that failed.",
                    "cps",
                    (rate(_trainer("published_total")), "published {{instance}}"),
                    (rate(_trainer("held_total")), "held {{instance}}"),
                    (rate(_trainer("publication_failures_total")), "failed {{instance}}"),
                ),
                chart(
                    "Age of cut and checkpoint",
                    "Since the newest one of this process.",
                    "s",
                    (_trainer("cut_age_seconds"), "cut {{instance}}"),
                    (_trainer("checkpoint_age_seconds"), "checkpoint {{instance}}"),
                ),
                chart(
                    "Checkpoints that failed",
                    "Per second; the disk is full, or the folder is gone.",
                    "cps",
                    (rate(_trainer("checkpoint_failures_total")), "{{instance}}"),
                ),
                chart(
                    "Cuts judged by the gate",
                    "Passed and refused. Empty without trainer.gate.",
                    "cps",
                    (rate(_trainer("gate_cuts_total"), "outcome"), "{{outcome}} {{instance}}"),
                    (rate(_trainer("gate_alarms_total")), "alarms {{instance}}"),
                ),
                chart(
                    "Refused in a row",
                    "Cuts refused since one passed. Empty without trainer.gate.",
                    "none",
                    (_trainer("gate_refused_in_a_row"), "{{instance}}"),
                ),
                chart(
                    "Suspect stream",
                    "1 while the gate finds the stream suspect. Empty without trainer.gate.",
                    "none",
                    (_trainer("gate_suspect"), "{{instance}}"),
                ),
            ),
        ),
        PROCESSES,
    ),
)
