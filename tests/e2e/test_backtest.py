"""``smes backtest``: the report of the demo from one process, the same for the same seed, and true to the files.

Guarantee shown: each row of the log, except duplicates, is trained on exactly once, as an independent count shows.
"""

from pathlib import Path
from typing import Any

import duckdb
import pytest

from simulators.synthetic import synthesize
from smes_cli.__main__ import run
from smes_cli.backtest import BacktestResult, run_backtest
from smes_cli.config import Config
from smes_io.redis_client import connect
from tests.e2e.reports import assert_documented
from tests.e2e.shop import Shop
from tests.integration.training import drain
from tests.running import read_config, read_json, write_config
from trainer.routing_history import RoutingHistoryConfig

SYNTHETIC_TASKS = {"click", "long_view", "watch_time", "like", "profile_enter", "comment", "follow", "forward"}
TIMED = ("lineage", "throughput")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("backtest") / "world.parquet"
    synthesize(path, 4000, seed=7)
    return path


def backtest(log: Path, config: Config | None = None, **options: Any) -> BacktestResult:
    defaults: dict[str, Any] = {"limit": None, "seed": 0, "baseline": None, "should_stop": lambda: False}
    return run_backtest(config or Config(), log, **{**defaults, **options})


def test_the_report_is_the_demos_with_nulls_for_what_does_not_apply(world: Path, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    assert run(["-q", "backtest", str(world), "--report", str(path)]) == 0
    report = read_json(path)
    assert_documented(report, SYNTHETIC_TASKS)
    for section in ("freshness_ms", "snapshots", "scorer"):
        assert set(report[section].values()) == {None}, section
    events = report["events"]
    assert (events["impressions"], events["trained"], events["waiting"], events["late"]) == (4000, 4000, 0, 0)
    feedback = report["feedback"]
    assert feedback["attached"] == feedback["received"] > 4000
    positives = duckdb.sql(
        f"SELECT sum(click), sum(long_view), sum(forward), count(*) FILTER (watch_time_s > 0) FROM '{world}'"
    ).fetchall()[0]
    names = ("click", "long_view", "forward", "watch_time")
    assert tuple(report["tasks"][name]["positives"] for name in names) == positives


def test_the_same_seed_gives_the_same_report(world: Path) -> None:
    one, two = (backtest(world, limit=1500, seed=3).report.to_dict() for _ in range(2))
    assert {key: value for key, value in one.items() if key not in TIMED} == {
        key: value for key, value in two.items() if key not in TIMED
    }
    assert one["lineage"] != two["lineage"]


@pytest.fixture(scope="module")
def routed(world: Path) -> BacktestResult:
    """A backtest whose routing history has segments of four steps at first."""
    return backtest(world, routing=RoutingHistoryConfig(first_steps=4))


def test_the_routing_over_time_holds_every_impression(routed: BacktestResult) -> None:
    smes = Config().model.smes
    segments = routed.routing["segments"]

    assert (set(routed.routing["tasks"]), routed.routing["num_experts"]) == (SYNTHETIC_TASKS, smes.experts.num)
    assert len(segments) > 2
    assert sum(segment["instances"] for segment in segments) == 4000
    for segment in segments:
        uses = {sum(of_task) for of_task in segment["load"]}
        assert uses == {segment["instances"] * smes.stages((0,)).per_router}


def test_the_report_summarises_the_newest_segment_that_has_ended(routed: BacktestResult) -> None:
    newest = [segment for segment in routed.routing["segments"] if segment["overlap"]][-1]
    drift = sum(newest["drift"]) / len(newest["drift"])

    summary = routed.report.routing

    assert (summary.segment_steps, summary.dead) == (newest["steps"], len(newest["dead"]))
    assert summary.load_skew == newest["load_skew"]
    assert summary.drift == pytest.approx(drift, abs=1e-4)
    assert 0 < drift < 1


def test_the_command_writes_the_routing_and_prints_a_line_of_it(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, routing = tmp_path / "smes.yaml", tmp_path / "routing.json"
    config.write_text("stream: {batch: {size: 32}}")

    status = run(["-c", str(config), "backtest", str(world), "--limit", "2000", "--routing", str(routing)])

    assert status == 0
    printed, written = capsys.readouterr().out, read_json(routing)
    assert "routing in the last 32 steps: " in printed
    assert sum(segment["instances"] for segment in written["segments"]) == 2000
    assert "Which tasks need experts of their own?" in printed
    assert {task["task"] for task in written["own_experts"]} == SYNTHETIC_TASKS
    for task in written["own_experts"]:
        assert task["task"] in task["group"]
        assert task["own"]["error_pct"] >= 0
        assert -1 <= task["cosine"] <= 1
        assert task["verdict"] in printed


def test_finding_out_who_needs_experts_changes_nothing_of_the_report(world: Path) -> None:
    alone, watched = (backtest(world, limit=1500, own_experts=asked) for asked in (False, True))
    assert alone.own_experts is None
    assert watched.own_experts is not None
    assert alone.routing == watched.routing
    one, other = alone.report.to_dict(), watched.report.to_dict()
    assert {key: one[key] for key in one if key not in TIMED} == {key: other[key] for key in one if key not in TIMED}


def test_regression_tasks_have_figures_of_their_own(world: Path) -> None:
    tasks = backtest(world, limit=3000).report.tasks
    watch, click = tasks["watch_time"], tasks["click"]

    assert watch.xauc is not None
    assert 0 < watch.xauc < 1
    assert watch.mae is not None
    assert watch.mean_bias is not None
    assert abs(watch.mean_bias) <= watch.mae
    assert (watch.auc, click.xauc, click.mae, click.mean_bias) == (None, None, None, None)


def test_a_stopped_backtest_reports_what_it_has_done(world: Path) -> None:
    asked = iter(range(6))
    report = backtest(world, should_stop=lambda: next(asked, None) is None).report.to_dict()
    assert_documented(report, SYNTHETIC_TASKS)
    assert 0 < report["events"]["trained"] < 4000


@pytest.mark.kuairand
@pytest.mark.timeout(400)
def test_kuairand_is_counted_as_duckdb_counts_it(kuairand_dir: Path) -> None:
    log = f"read_csv('{kuairand_dir}/log_standard_*.csv', all_varchar = true)"
    rows = duckdb.sql(f"SELECT count(*) FROM {log}").fetchall()[0][0]
    distinct = f"(SELECT DISTINCT * FROM {log})"
    unique = duckdb.sql(f"SELECT count(*) FROM {distinct}").fetchall()[0][0]
    # Up to a moment, so that no tie at the limit leaves a choice of which rows are the first.
    until_ms = duckdb.sql(f"SELECT time_ms FROM {distinct} ORDER BY time_ms::BIGINT LIMIT 1 OFFSET 30000").fetchall()[
        0
    ][0]
    limit, *positives = duckdb.sql(
        "SELECT count(*), sum(is_click::INT), sum(long_view::INT), sum(is_like::INT), sum(is_follow::INT) "
        f"FROM {distinct} WHERE time_ms::BIGINT < {until_ms}"
    ).fetchall()[0]
    assert 25_000 < limit <= 30_000
    result = backtest(kuairand_dir, limit=limit, baseline="linear")
    assert result.duplicates_dropped == rows - unique
    report = result.report.to_dict()
    assert (report["events"]["impressions"], report["events"]["trained"]) == (limit, limit)
    names = ("click", "long_view", "like", "follow")
    assert [report["tasks"][name]["positives"] for name in names] == positives
    assert result.baseline is not None
    assert result.baseline["tasks"].keys() == report["tasks"].keys()
    for ranker in (report, result.baseline):
        assert ranker["tasks"]["click"]["auc"] > 0.6
        assert ranker["tasks"]["long_view"]["auc"] > 0.6
        assert set(ranker["headline"]["dense"]["tasks"]) == {"click", "long_view", "like", "profile_enter"}
        assert set(ranker["headline"]["rare"]["tasks"]) == {"comment", "follow", "forward", "hate"}


def test_another_schema_goes_through_backtest_and_replay_by_its_schema_file_alone(
    shop: Shop, redis_url: str, namespace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report_path, schema = tmp_path / "backtest.json", str(shop.schema)
    assert run(["backtest", str(shop.folder), "--schema", schema, "--report", str(report_path)]) == 0
    assert "1 exact duplicates dropped, 0 rejected" in capsys.readouterr().out
    report = read_json(report_path)
    assert_documented(report, {"opened", "bought", "rating"})
    assert (report["events"]["impressions"], report["events"]["trained"]) == (shop.visits, shop.visits)
    assert report["feedback"]["received"] == report["feedback"]["attached"] == shop.feedback
    assert {name: task["positives"] for name, task in report["tasks"].items()} == shop.positives
    assert report["tasks"]["opened"]["auc"] > 0.5

    path = write_config(tmp_path, redis_url, namespace, schema=schema, trainer={"checkpoint": {"directory": None}})
    replayed = tmp_path / "replay.json"
    assert run(["-c", str(path), "replay", str(shop.folder), "--report", str(replayed)]) == 0
    sent = read_json(replayed)
    assert (sent["impressions"], sent["feedback"], sent["duplicates"]) == (shop.visits, shop.feedback, 1)
    trained = drain(read_config(path))
    assert (trained["events"]["impressions"], trained["feedback"]["received"]) == (shop.visits, shop.feedback)
    with connect(redis_url, 20.0) as client:
        assert client.hget(f"{{{namespace}}}:log:topics", "impressions") == b"2"
