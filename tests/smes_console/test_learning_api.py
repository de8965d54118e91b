"""What Learning and Experts say is what the run wrote, however few points are asked for and wherever it comes from."""

import json
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry

from feature_store.snapshots import SnapshotStore
from smes.metrics import BinaryTally
from smes_cli.seen import end_history, write_history
from smes_console.curves import curve_of, parts_of
from smes_console.history_lines import FolderLines, Line, line_of_json
from smes_io.redis_client import connect
from tests.running import until
from tests.smes_console.consoles import console, places_on
from tests.smes_scorer.made_payloads import version_payload
from tests.trainer.small_world import fill, make_trainer, open_log, train_to_the_end
from trainer.config import HistoryConfig, HttpConfig
from trainer.evaluation import ProgressiveEvaluation
from trainer.history import HistoryFiles, read_history, write_end
from trainer.http import TrainerServer
from trainer.loop import Trainer
from trainer.recent_lines import RecentLines
from trainer.routing_figures import routing_report
from trainer.routing_history import RoutingHistoryConfig
from trainer.run_report import report_so_far, training_report
from trainer.stats import TrainerStats
from trainer.stretches import Stretches
from trainer.telemetry import Watch

ONE_POINT = {"together": 4096, "points": 10}
BINARY = ("gauc_windowed", "ne", "calibration", "base_rate")


@dataclass(frozen=True)
class Run:
    """A run that has ended."""

    trainer: Trainer
    stretches: Stretches
    folder: Path
    lines: list[dict[str, Any]]
    report: dict[str, Any]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """4,000 impressions, trained on; its folder has lines, report and experts."""
    torch.set_num_threads(1)
    folder, log, made = tmp_path_factory.mktemp("run"), open_log(), list[Stretches]()
    fill(log, 4000)

    def over_time(evaluation: ProgressiveEvaluation) -> Stretches:
        made.append(Stretches(evaluation, every_examples=150))
        return made[0]

    trainer = make_trainer(log, None, over_time=over_time, routing=RoutingHistoryConfig(first_steps=8, probe=64))
    write_history(HistoryConfig(), folder, trainer, made[0])
    train_to_the_end(trainer)
    trainer.settle()
    made[0].end()
    report = training_report(trainer, seconds=1, trained=trainer.trained).to_dict()
    end_history(folder, trainer, report)
    return Run(trainer, made[0], folder, list(read_history(folder)), json.loads(json.dumps(report)))


@pytest.fixture
def http(run: Run, redis_url: str, namespace: str, tmp_path: Path) -> Iterator[httpx.Client]:
    """A console that knows the folder alone."""
    with console(places_on(redis_url, namespace, history=run.folder, trainer_url=None), tmp_path) as client:
        yield client


def asked(http: httpx.Client, page: str = "learning", /, **query: Any) -> dict[str, Any]:
    return dict(http.get(f"/api/{page}", params=query).raise_for_status().json())


def values_of(answer: dict[str, Any], task: str) -> list[float | None]:
    return list(answer["curves"]["run"]["values"][task]["y"])


@contextmanager
def answering(run: Run, lines: RecentLines) -> Iterator[TrainerServer]:
    """The trainer of a run as if it still ran."""
    trainer = run.trainer
    watch = Watch(trainer, run.stretches, report=lambda: report_so_far(trainer, seconds=1, trained=trainer.trained))
    server, stop = TrainerServer(HttpConfig(port=0)), threading.Event()

    def look() -> None:
        while not stop.wait(0.02):
            watch.look_if_due()

    thread = threading.Thread(target=look)
    server.start()
    server.show(CollectorRegistry(), dict, TrainerStats(watch, None, lines, trainer.lineage))
    thread.start()
    try:
        yield server
    finally:
        stop.set()
        thread.join()
        server.stop()


# ---- Learning


@pytest.mark.parametrize("axis", ["event_time", "wall_time", "impressions"])
def test_the_lines_are_what_was_written_and_one_point_of_all_is_the_report(
    run: Run, http: httpx.Client, axis: str
) -> None:
    key = {"event_time": "event_time_ms", "wall_time": "wall_ms", "impressions": "trained"}[axis]
    each = asked(http, axis=axis, metric="ne", together=1)
    assert each["sources"]["history"] | {"where": None} == {
        "kind": "folder",
        "where": None,
        "lines": len(run.lines),
        "problem": None,
        "since_ms": None,
    }
    assert (each["report"], each["sources"]["report"]["kind"]) == (run.report, "folder")
    assert {k: each["newest"][k] for k in ("step", "trained", "lineage")} == {
        k: run.lines[-1][k] for k in ("step", "trained", "lineage")
    }
    grid = each["curves"]["run"]["grids"]["1"]
    if not grid["breaks"]:  # by the wall clock of a busy machine a line may come late
        assert grid["x"] == [line[key] for line in run.lines]
        assert values_of(each, "click") == pytest.approx([line["tasks"]["click"]["ne"] for line in run.lines], abs=1e-6)
    for metric in BINARY:
        point = asked(http, axis=axis, metric=metric, **ONE_POINT)
        for task in ("click", "like"):
            got = [value for value in values_of(point, task) if value is not None]
            if len(got) == 1:
                assert got[0] == pytest.approx(run.report["tasks"][task][metric], abs=2e-6), (metric, task)
    errors = asked(http, axis=axis, metric="ne", **ONE_POINT)
    watch = [value for value in values_of(errors, "watch") if value is not None]
    assert len(watch) > 1 or watch[0] == pytest.approx(run.report["tasks"]["watch"]["mae"], rel=1e-5)
    assert axis == "wall_time" or len(watch) == 1
    assert asked(http, axis=axis, metric="ne", **ONE_POINT, seen=errors["key"])["curves"] is None


def test_points_of_many_stretches_are_the_metrics_of_their_examples_together() -> None:
    rng, chance = np.random.default_rng(1), random.Random(1)
    stretches, lines, number = [], [], 0
    for _ in range(70):
        n = chance.choice((40, 400, 900))
        logit = rng.normal(-2, 1.5, n)
        p, label = 1 / (1 + np.exp(-logit)), rng.random(n) < 1 / (1 + np.exp(-0.8 * logit))
        tally = BinaryTally()
        tally.add(p.astype(np.float32), label.astype(np.float32))
        report = tally.report()
        number += 1 if chance.random() < 0.93 else chance.randint(2, 6)  # some are missing
        stretches.append((number, p, label))
        task = {
            "examples": n,
            "positives": report.positives,
            "ranked": n,
            "base_rate": report.positives / n,
            "auc": report.auc,
            "ne": report.ne,
            "calibration": report.calibration,
        }
        line = {"stretch": number, "step": number, "lineage": "a", "trained": number, "tasks": {"t": task}}
        made = line_of_json(json.dumps(line).encode())
        assert made is not None
        lines.append(made)
    for together in (1, 4, 16):
        parts = parts_of(lines, "impressions", 1000, at_least=together)
        groups = grouped([number for number, _, _ in stretches], together)
        assert [len(group) for group in groups] == np.diff([*parts.starts, len(lines)]).tolist()
        got = {figure: curve_of(parts, figure, "t") for figure in ("auc", "ne", "calibration", "base_rate")}
        points = [n for n in range(len(parts.listed_x())) if n not in set(parts.breaks())]
        assert len(points) == len(groups)
        assert parts.listed_x() == sorted(parts.listed_x())
        for n, group in zip(points, groups, strict=True):
            tally, pairs, ordered = BinaryTally(), 0, 0.0
            for _, p, label in (stretches[each] for each in group):
                tally.add(p.astype(np.float32), label.astype(np.float32))
                above = p[label][:, None] - p[~label][None]
                pairs, ordered = pairs + above.size, ordered + (above > 0).sum() + (above == 0).sum() / 2
            report = tally.report()
            wanted = {
                "auc": ordered / pairs,
                "ne": report.ne,
                "calibration": report.calibration,
                "base_rate": report.positives / report.examples,
            }
            for figure, value in wanted.items():
                curve = got[figure]
                assert curve is not None
                assert curve[n] == pytest.approx(value, abs=3e-3 if figure == "auc" else 2e-6), figure


def grouped(numbers: list[int], together: int) -> list[list[int]]:
    """Indices of the stretches of each point, by a plain loop: groups of equal number, cut where some are missing."""
    groups: list[list[int]] = []
    for n, number in enumerate(numbers):
        follows = n > 0 and number == numbers[n - 1] + 1
        if not follows or number // together != numbers[n - 1] // together:
            groups.append([])
        groups[-1].append(n)
    first = groups[-1][0]
    if len(groups) > 1 and len(groups[-1]) < together and numbers[first] == numbers[first - 1] + 1:
        groups[-2:] = [groups[-2] + groups[-1]]
    return groups


def test_learning_opens_with_gauc_where_ten_windows_have_closed_else_with_auc(
    redis_url: str, namespace: str, tmp_path: Path
) -> None:
    files = HistoryFiles(tmp_path / "history", keep=100)
    with console(places_on(redis_url, namespace, history=tmp_path / "history", trainer_url=None), tmp_path) as http:
        for n in range(30):
            place = {"stretch": n, "step": n, "lineage": "a", "trained": n}
            files.append({**place, "windows": n % 2, "tasks": {"t": {"auc": 0.5}}})
            if n == 18:  # nine windows
                until(lambda: asked(http)["sources"]["history"]["lines"] == 19, "the lines")
                assert asked(http)["curves"]["metric"] == "auc"
                assert asked(http, metric="gauc_windowed")["curves"]["metric"] == "gauc_windowed"
        until(lambda: asked(http)["curves"]["metric"] == "gauc_windowed", "enough windows")


def test_what_is_asked_of_a_running_trainer_is_what_its_folder_says(
    run: Run, http: httpx.Client, redis_url: str, namespace: str, tmp_path: Path
) -> None:
    of_folder = asked(http, together=1)
    some = RecentLines(run.lines[:5])
    with answering(run, some) as server:
        url = f"http://127.0.0.1:{server.port}"
        with console(places_on(redis_url, namespace, trainer_url=url), tmp_path) as live:
            first = asked(live, together=1)
            assert (first["sources"]["history"]["kind"], first["newest"]["step"]) == ("trainer", run.lines[4]["step"])
            for line in run.lines[5:]:
                some.add(line)
            until(lambda: asked(live, together=1)["newest"]["step"] == run.lines[-1]["step"], "the later lines")
            of_trainer = asked(live, together=1)
            assert of_trainer["curves"] == of_folder["curves"]
            same = ("headline", "tasks", "events", "feedback", "active_experts", "version", "lineage")
            assert {k: of_trainer["report"][k] for k in same} == {k: of_folder["report"][k] for k in same}
            said, written = asked(live, "experts"), asked(http, "experts")
            assert (said["source"]["kind"], written["source"]["kind"]) == ("trainer", "folder")
            assert said["experts"] == written["experts"]
            # Another process has taken the trainer's place, and begins anew.
            server.show(
                CollectorRegistry(),
                dict,
                TrainerStats(
                    Watch(run.trainer, run.stretches, report=lambda: report_so_far(run.trainer, seconds=1, trained=0)),
                    None,
                    RecentLines([line | {"lineage": "another"} for line in run.lines[:2]]),
                    "another",
                ),
            )
            until(lambda: asked(live)["newest"]["lineage"] == "another", "the lines of the other one")
            assert asked(live)["sources"]["history"]["lines"] == 2


def test_other_runs_and_the_version_in_service_stand_beside(
    run: Run, redis_url: str, namespace: str, tmp_path: Path
) -> None:
    folder, later = tmp_path / "history", tmp_path / "later"
    files = HistoryFiles(folder, keep=1000)
    for line in run.lines:
        files.append(line | {"lineage": "before"})
    for n, line in enumerate(run.lines):
        files.append(line | {"lineage": "root" if n < 6 else "root.fork", "stretch": line["stretch"] + 3 * (n > 9)})
    HistoryFiles(later, keep=1000).append(run.lines[0] | {"wall_ms": run.lines[-1]["wall_ms"] + 10**9})
    cut = run.lines[7]
    with connect(redis_url, 5.0) as client:
        SnapshotStore(client, namespace).publish(
            version_payload(7, {"lineage": "root.fork", "version": str(cut["step"]), "schema_hash": "made"}),
            lineage="root.fork",
            version=cut["step"],
            schema_hash="made",
            step=cut["step"],
            created_ms=cut["wall_ms"],
            positions={},
            event_time_ms=cut["event_time_ms"],
            metrics={"tasks": {"click": {"auc": 0.625}}},
        )
    baselines = {"same": run.folder, "later": later, "away": tmp_path / "away"}
    places = places_on(redis_url, namespace, history=folder, trainer_url=None, baselines=baselines)
    with console(places, tmp_path) as http:
        found = asked(http, axis="impressions", together=1)
        curves = found["curves"]
        assert [change["lineage"] for change in curves["run"]["lineage_changes"]] == ["root.fork"]
        assert curves["run"]["lineage_changes"][0]["x"] == run.lines[6]["trained"]
        assert curves["run"]["gaps"] == [{"x": run.lines[10]["trained"], "missing": 3}]
        grid = curves["run"]["grids"]["1"]
        assert grid["breaks"] == [10]
        assert values_of(found, "click")[10] is None
        by_name = {each["name"]: each for each in curves["compared"]}
        assert list(by_name) == ["earlier run before", "same", "later", "away"]
        for name in ("earlier run before", "same"):
            assert by_name[name]["is_beside"]
            assert [value for value in by_name[name]["difference"]["tasks"].values() if value is not None] == [0.0] * 3
        assert by_name["same"]["values"]["click"]["y"] == [
            y for n, y in enumerate(values_of(found, "click")) if n != 10
        ]
        assert "no such folder" in by_name["away"]["problem"]
        assert found["service"]["x"] == pytest.approx(cut["trained"])
        assert found["service"]["tasks"] == {"click": {"auc": 0.625}}
        of_time = asked(http, axis="event_time")
        assert of_time["service"]["x"] == cut["event_time_ms"]
        assert {each["name"]: each["is_beside"] for each in asked(http, axis="wall_time")["curves"]["compared"]} == {
            "earlier run before": True,
            "same": True,
            "later": False,
            "away": False,
        }
        # Only a part of x: the curve of that part, and what leads to it and on from it.
        trained = [line["trained"] for line in run.lines]
        part = asked(http, axis="impressions", together=1, **{"from": trained[3], "to": trained[5]})["curves"]["run"]
        x = [each for each in part["grids"]["1"]["x"] if each in trained]
        assert x == trained[trained.index(x[0]) : trained.index(x[-1]) + 1]
        assert (x[0] < trained[3], x[-1] > trained[5]) == (True, True)
        for end, others in ((x[0], run.lines[2::-1]), (x[-1], run.lines[6:])):
            with_window = [line["trained"] for line in others if line["windows"]]
            assert end == (with_window or [others[0]["trained"]])[0], "to where every metric has a value"


def test_files_are_followed_as_they_grow_shrink_and_are_replaced(tmp_path: Path) -> None:
    chance, reader = random.Random(5), FolderLines(tmp_path)
    files, number = HistoryFiles(tmp_path, keep=12), 0
    rest = {"wall_ms": 1, "event_time_ms": 1, "impressions": 1, "trained": 1, "experts": {}, "rows": {}, "lag": None}

    def said(lines: list[Line]) -> list[tuple[str, int]]:
        return [(line.lineage, line.stretch) for line in lines]

    for _ in range(150):
        if chance.random() < 0.1:  # a trainer goes on from a checkpoint
            number = max(0, number - chance.randint(0, 5))
            files = HistoryFiles(tmp_path, keep=12)
            files.begin("a", number, number)
        else:
            files.append({**rest, "stretch": number, "step": number, "lineage": "a", "tasks": {"t": {"auc": 0.5}}})
            number += 1
        newest = max(tmp_path.glob("*.jsonl"), default=None)
        if newest is not None and chance.random() < 0.2:
            whole = newest.read_text()
            with newest.open("a") as file:
                file.write('{"stretch": 99')  # a line that is being written
            assert said(reader.read()) == [(line["lineage"], line["stretch"]) for line in read_history(tmp_path)]
            newest.write_text(whole)
        assert said(reader.read()) == [(line["lineage"], line["stretch"]) for line in read_history(tmp_path)]
    assert reader.read()[-1].task("t")["auc"] == 0.5


# ---- Experts


def test_the_experts_are_those_of_the_routing_history(run: Run, http: httpx.Client) -> None:
    trainer = run.trainer
    tasks = [task.name for task in trainer.learner.schema.tasks]
    wanted = routing_report(trainer.experts.history, trainer.learner.expert_limits, tasks)
    assert len(wanted["segments"]) > 3
    found = asked(http, "experts")
    experts = found["experts"]
    assert (experts["tasks"], experts["num_experts"]) == (tasks, wanted["num_experts"])
    assert (experts["always_on"], experts["pools"]) == (wanted["always_on"], wanted["pools"])
    assert found["report"]["routing"] == run.report["routing"]
    begins = 0
    for segment, other in zip(experts["segments"], wanted["segments"], strict=True):
        load_E = np.array(other["load"]).sum(axis=0)
        assert (segment["from"], segment["to"]) == (begins, begins + other["steps"])
        assert (segment["instances"], segment["dead"]) == (other["instances"], other["dead"])
        assert segment["load_share"] == pytest.approx((load_E / load_E.sum()).tolist(), abs=1e-6)
        assert segment["load_skew"] == pytest.approx(other["load_skew"])
        if other["drift"] is not None:
            assert segment["drift_of_tasks"] == other["drift"]
        at = asked(http, "experts", step=begins + 1)["experts"]["map"]
        assert at["load"] == other["load"]
        assert np.array(at["shares"]) * np.array(other["load"]).sum(axis=1, keepdims=True) == pytest.approx(
            np.array(other["load"]), rel=1e-3
        )
        begins += other["steps"]
    ended = [each for each in wanted["segments"] if each["overlap"] is not None]
    assert experts["overlap"] == ended[-1]["overlap"]
    assert experts["map"]["load"] == ended[-1]["load"]
    assert asked(http, "experts", seen=found["key"])["experts"] is None


def test_without_the_trainer_the_lines_say_what_they_know(
    run: Run, redis_url: str, namespace: str, tmp_path: Path
) -> None:
    folder = tmp_path / "history"
    files = HistoryFiles(folder, keep=100)
    with console(places_on(redis_url, namespace, history=folder, trainer_url=None), tmp_path) as http:
        nothing = asked(http, "experts")
        assert (nothing["experts"], nothing["source"]["kind"]) == (None, None)
        assert "expected one when the run has ended" in nothing["source"]["problem"]
        assert "no line yet" in asked(http)["sources"]["history"]["problem"]
        some = {"load_share": [0.5, 0.5, 0.0], "of_tasks": {"a": [[0, 0.7]], "b": [[1, 0.6], [0, 0.4]]}, "dead": 1}
        files.append({"stretch": 0, "step": 4, "lineage": "x", "tasks": {"a": {}, "b": {}}, "experts": some})
        files.append({"stretch": 1, "step": 9, "lineage": "x", "tasks": {"a": {}, "b": {}}, "experts": some})
        until(lambda: asked(http, "experts")["source"]["kind"] == "lines", "the lines are seen")
        found = asked(http, "experts")
        assert found["experts"]["map"] == {
            "from": 0,
            "to": 9,
            "shares": [[0.7, None, 0.0], [0.4, 0.6, 0.0]],
            "load": None,
        }
        assert [(each["to"], each["dead"]) for each in found["experts"]["segments"]] == [(9, [2])]
        assert found["report"]["routing"]["dead"] == 1
        # A dense ranker has none, which is no error; what is no such file is said.
        write_end(folder, {"tasks": {}}, {"tasks": ["a"], "num_experts": 0, "always_on": 0, "pools": 0, "segments": []})
        until(lambda: "not as expected" in asked(http, "experts")["source"]["problem"], "what is wrong with it", 20)
        (folder / "experts.json").write_text(json.dumps([1]))
        until(lambda: "expected an object" in asked(http, "experts")["source"]["problem"], "the other error", 20)
        for wrong in ({"metric": "loss"}, {"points": 0}, {"axis": "steps"}):
            assert http.get("/api/learning", params=wrong).status_code == 422
