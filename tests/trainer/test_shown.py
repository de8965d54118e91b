"""What a trainer shows on a page: bounded, made only while somebody asks, and no bit of the training changes."""

import json
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from smes.rankers.ranker import ExpertLimits
from stream.log.memory_log import InMemoryLog
from tests.trainer.small_world import SCHEMA, fill, make_trainer, open_log
from trainer.evaluation import ProgressiveEvaluation, TaskMetrics
from trainer.experts_over_time import ExpertsOverTime
from trainer.history_line import line_of
from trainer.loop import Trainer
from trainer.recent_lines import MOST_LINES, RecentLines
from trainer.recent_rates import RecentCounts
from trainer.report import RoutingSummary
from trainer.routing_figures import overlap, routing_report
from trainer.routing_history import RoutingHistoryConfig, Segment
from trainer.run_report import report_so_far, training_report
from trainer.stats import TrainerStats
from trainer.stretches import Stretch, Stretches
from trainer.telemetry import Experts, Watch

ROUTING = RoutingHistoryConfig(first_steps=4, most_segments=4, probe=16)


@pytest.fixture(scope="module")
def log() -> InMemoryLog:
    """2,000 impressions."""
    torch.set_num_threads(1)
    log = open_log()
    fill(log, 2000)
    return log


class Clock:
    """A clock that goes on when it is told to."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def make(log: InMemoryLog, checkpoints: Path | None = None) -> tuple[Trainer, Stretches]:
    made: list[Stretches] = []

    def over_time(evaluation: ProgressiveEvaluation) -> Stretches:
        made.append(Stretches(evaluation, every_examples=300))
        return made[0]

    return make_trainer(log, checkpoints, over_time=over_time, routing=ROUTING), made[0]


def watched(
    trainer: Trainer, stretches: Stretches, clock: Clock, cost_s: float = 0.0
) -> tuple[Watch, list[dict[str, Any]]]:
    """Its watch, which counts the reports that it makes; each takes so long by the clock."""
    reports: list[dict[str, Any]] = []

    def report() -> Any:
        clock.now_s += cost_s
        made = report_so_far(trainer, seconds=1, trained=trainer.trained)
        reports.append(made.to_dict())
        return made

    watch = Watch(trainer, stretches, report=report, monotonic=clock)
    trainer.observe(watch)
    return watch, reports


def rest(trainer: Trainer) -> None:
    """Let it find nothing to train on, as the loop does."""
    trainer._results.deliver()
    for observer in trainer._observers:
        observer.after_read()


def train(trainer: Trainer, after: Callable[[], object] = lambda: None) -> None:
    while trainer.step() or trainer.stream.poll(0):
        after()
    rest(trainer)


def test_a_report_every_time_changes_no_bit_and_at_rest_is_the_last_one(log: InMemoryLog, tmp_path: Path) -> None:
    plain, _ = make(log)
    train(plain)
    trainer, stretches = make(log, tmp_path)
    clock = Clock()
    watch, reports = watched(trainer, stretches, clock)
    full = []

    def shown() -> dict[str, Any]:
        assert watch.seen.report is not None
        return watch.seen.report

    def after() -> None:
        clock.now_s += 60
        watch.ask(0)
        if trainer.learner.step_number % ROUTING.first_steps == 0:  # as at rest, with the open segment full
            rest(trainer)
            full.append(trainer.experts.history.is_full(pending=False))
            now = report_so_far(trainer, seconds=1, trained=1)
            assert trainer.experts.history.is_full(pending=False) == full[-1], "it is still open"
            assert now.to_dict() == shown() | {"throughput": asdict(now.throughput)}

    train(trainer, after)
    assert any(full)
    assert len(reports) > 20
    assert {name: n for name, n in shown()["events"].items() if n} == {
        "impressions": 2000,
        "trained": trainer.trained,
        "waiting": 2000 - trainer.trained,
    }
    last = shown()
    assert last == training_report(trainer, seconds=1, trained=trainer.trained).to_dict()
    assert training_report(plain, seconds=1, trained=plain.trained).to_dict() == last | {"lineage": plain.lineage}
    one, other = (t.experts.history.state() for t in (plain, trainer))
    assert all(np.array_equal(one[name], array) for name, array in other.items())
    state = plain.learner.state()
    assert all(torch.equal(state[name], tensor) for name, tensor in trainer.learner.state().items())


def test_no_report_unless_asked_and_a_slow_one_takes_a_twentieth(log: InMemoryLog) -> None:
    trainer, stretches = make(log)
    clock = Clock()
    watch, reports = watched(trainer, stretches, clock, cost_s=0.5)
    stats = TrainerStats(watch, None, RecentLines(), trainer.lineage)

    def passes(seconds: float) -> None:
        for _ in range(round(seconds / 0.1)):
            clock.now_s += 0.1
            watch.look_if_due()

    passes(30)
    assert not reports
    answers: list[dict[str, Any]] = []
    asker = threading.Thread(target=lambda: answers.append(json.loads(stats.stats({}))))
    asker.start()
    while not reports:  # the asker waits for it
        watch.look_if_due()
    asker.join(10)
    assert answers[0]["report"] == reports[0]
    for _ in range(11):
        watch.ask(0)
        passes(3)
    assert len(reports) == 1 + 3, "33 seconds, and a pause of 10 s after each of half a second"
    passes(11)
    made = len(reports)
    passes(30)
    assert len(reports) == made
    assert watch.seen.report is None
    assert watch.problems() == {}
    clock.now_s += 11
    assert "training" in watch.problems()
    watch.look_if_due(moved=False)
    assert "training" in watch.problems(), "a copy while it waits for a server is no step"


def test_experts_over_time_are_the_routing_report_and_the_text_is_made_once(log: InMemoryLog) -> None:
    trainer, stretches = make(log)
    names = [task.name for task in SCHEMA.tasks]
    clock = Clock()
    watched(trainer, stretches, clock)
    over_time = ExpertsOverTime(names, trainer.learner.expert_limits)
    lengths = set()

    def check() -> None:
        history = trainer.experts.history
        found, wanted = (
            over_time.values(history.segments, 7),
            routing_report(history, trainer.learner.expert_limits, names),
        )
        at = 7
        for segment, figures in zip(found["segments"], wanted["segments"], strict=True):
            assert segment["steps"] == [at, at + figures["steps"]]
            at += figures["steps"]
            assert {k: segment[k] for k in ("load", "dead", "instances", "load_skew")} == {
                k: figures[k] for k in ("load", "dead", "instances", "load_skew")
            }
        assert found["drift"] == [figures["drift"] for figures in wanted["segments"]]
        ended = [figures["overlap"] for figures in wanted["segments"] if figures["overlap"] is not None]
        assert found["shared"] == (ended[-1] if ended else None)
        times = [segment["event_time_ms"] for segment in found["segments"]]
        assert times == sorted(times)
        lengths.add(len(found["segments"]))

    train(trainer, check)
    assert max(lengths) == ROUTING.most_segments, "neighbours were merged"
    assert trainer.experts.history.segments[-1].event_time_ms == trainer.event_time_ms
    fresh, segments = ExpertsOverTime(names, trainer.learner.expert_limits), trainer.experts.history.segments
    assert fresh.text(segments, 7) == over_time.text(segments, 7), "what was kept is what it would be made of"
    assert ExpertsOverTime(names, None).values((), 0)["segments"] == []
    # A checkpoint of before the times were kept.
    state = trainer.experts.history.state()
    del state["event_time_ms"]
    trainer.experts.history.load_state(state)
    assert {s["event_time_ms"] for s in over_time.values(trainer.experts.history.segments, 0)["segments"]} == {None}


def test_lines_and_statistics_of_40_tasks_and_256_experts_are_bounded() -> None:
    T, E, P, K = 40, 256, 64, 8
    rng = np.random.default_rng(0)
    names = [f"task_of_{t:02d}" for t in range(T)]
    load_TE = rng.integers(0, 100_000, (T, E))
    load_TE[:, 9] = 0
    load_TE[3] = 0
    figures = TaskMetrics(123_456_789, 1_234_567, *rng.random(6).tolist())
    stretch = Stretch(
        number=123_456,
        step=12_345_678,
        trained=1_234_567_890,
        impressions=262_144,
        windows=1,
        event_time_ms=1_764_310_000_000,
        tasks=dict.fromkeys(names, figures),
        ranked=dict.fromkeys(names, 250_000.0),
    )
    share_E = load_TE.sum(axis=0) / load_TE.sum()
    routing = RoutingSummary(131_072, 1, *rng.random(3).tolist())
    experts = Experts(tuple(share_E.tolist()), routing, 12.3456789, load_TE, tuple(rng.random(T).tolist()))
    rows: Any = make_trainer(open_log(), None).learner.row_counts
    line = line_of(stretch, lineage="0123456789ab", wall_ms=1_764_310_000_000, experts=experts, rows=rows, lag=None)

    lines = RecentLines()
    lines.add(line)
    assert len(lines.text()) < 18_000
    of_tasks = line["experts"]["of_tasks"]
    busiest = of_tasks["task_of_05"]
    assert busiest[0] == [int(load_TE[5].argmax()), round(load_TE[5].max() / load_TE[5].sum(), 4)]
    assert [share for _, share in busiest] == sorted((share for _, share in busiest), reverse=True)
    assert of_tasks["task_of_03"] == [], "it used none"
    assert line["experts"]["drift_of_tasks"]["task_of_39"] == round(experts.drift[39], 5)

    for number in range(1, 1500):
        lines.add(line | {"stretch": number})
    kept = json.loads(lines.text())
    assert 900 < len(kept["lines"]) < MOST_LINES, "16 MiB"
    assert kept["next"] == 1499 == kept["lines"][-1]["stretch"]
    assert kept["first"] == kept["lines"][0]["stretch"]
    assert [each["stretch"] for each in json.loads(lines.text(1490, 3))["lines"]] == [1497, 1498, 1499]
    assert json.loads(lines.text(1499)) == {"lines": [], "next": 1499, "first": kept["first"]}
    assert json.loads(lines.text(5000))["next"] == 1499, "who asks for more is told where it ends"
    assert json.loads(RecentLines().text(4)) == {"lines": [], "next": 4, "first": None}

    choices = np.stack([np.stack([rng.choice(E, K, replace=False) for _ in range(T)]) for _ in range(4)])
    segment = Segment(4096, 10**7, load_TE, np.repeat(choices, P // 4, axis=0).astype(np.int32), 1_764_310_000_000)
    segments = [replace(segment) for _ in range(31)]
    over_time = ExpertsOverTime(names, ExpertLimits(bound=100, num_experts=E, num_fixed=2))
    text = over_time.text(segments, 0)
    assert len(text) < 3_000_000
    shared = json.loads(text)["shared"]
    np.testing.assert_allclose(shared, overlap(choices), atol=1e-5)


def test_rates_are_of_the_last_ten_seconds() -> None:
    recent = RecentCounts(0.0, {"n": 5})
    assert recent.since(0.0, {"n": 5}) == (0.0, {"n": 0})
    for second in range(1, 31):
        over_s, more = recent.since(float(second), {"n": 5 + 3 * second})
    assert (over_s, more) == (10.0, {"n": 30})
    for second in range(31, 42):
        over_s, more = recent.since(float(second), {"n": 95})
    assert (over_s, more) == (10.0, {"n": 0})
    assert recent.since(100.0, {"n": 100, "new": 4}) == (59.0, {"n": 5, "new": 4})
