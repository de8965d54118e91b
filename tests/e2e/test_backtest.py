"""``smes backtest``: the demo's report from one process, the same again for the same seed, and true to the files.

Guarantee shown: every row of the log that is no duplicate is trained on exactly once, counted independently.
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
    one, two = (backtest(world, limit=1500, seed=3).report for _ in range(2))
    assert {key: value for key, value in one.items() if key not in TIMED} == {
        key: value for key, value in two.items() if key not in TIMED
    }
    assert one["lineage"] != two["lineage"]


def test_the_routing_over_time_is_written_and_holds_every_impression(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("trainer.routing_history.FIRST_STEPS", 4)
    routing, report = tmp_path / "routing.json", tmp_path / "report.json"
    assert run(["backtest", str(world), "--routing", str(routing), "--report", str(report)]) == 0
    assert "routing in the last 4 steps: " in capsys.readouterr().out
    told = read_json(routing)
    smes = Config().model.smes
    assert (set(told["tasks"]), told["num_experts"]) == (SYNTHETIC_TASKS, smes.num_experts)
    stretches = told["stretches"]
    assert sum(stretch["instances"] for stretch in stretches) == 4000
    for stretch in stretches:
        uses = {sum(of_task) for of_task in stretch["load"]}
        assert uses == {stretch["instances"] * smes.stages((0,)).per_task}
    assert len(stretches) > 2
    newest = [stretch for stretch in stretches if stretch["overlap"]][-1]
    drift = sum(newest["drift"]) / len(newest["drift"])
    summary = read_json(report)["routing"]
    assert (summary["dead"], summary["load_skew"]) == (len(newest["dead"]), newest["load_skew"])
    assert summary["drift"] == pytest.approx(drift, abs=1e-4)
    assert 0 < drift < 1


def test_a_stopped_backtest_reports_what_it_has_done(world: Path) -> None:
    asked = iter(range(6))
    report = backtest(world, should_stop=lambda: next(asked, None) is None).report
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
    report = result.report
    assert (report["events"]["impressions"], report["events"]["trained"]) == (limit, limit)
    names = ("click", "long_view", "like", "follow")
    assert [report["tasks"][name]["positives"] for name in names] == positives
    assert result.baseline is not None
    assert result.baseline.keys() == report["tasks"].keys()
    for ranker in (report["tasks"], result.baseline):
        assert ranker["click"]["auc"] > 0.6
        assert ranker["long_view"]["auc"] > 0.6


def test_another_schema_goes_through_backtest_and_replay_by_its_schema_file_alone(
    shop: Shop, redis_url: str, namespace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report_path, schema = tmp_path / "backtest.json", str(shop.schema)
    assert run(["backtest", str(shop.folder), "--schema", schema, "--report", str(report_path)]) == 0
    assert "1 exact duplicates dropped; rows rejected: none" in capsys.readouterr().out
    report = read_json(report_path)
    assert_documented(report, {"opened", "bought", "rating"})
    assert (report["events"]["impressions"], report["events"]["trained"]) == (shop.visits, shop.visits)
    assert report["feedback"]["received"] == report["feedback"]["attached"] == shop.feedback
    assert {name: task["positives"] for name, task in report["tasks"].items()} == shop.positives
    assert report["tasks"]["opened"]["auc"] > 0.5

    path = write_config(tmp_path, redis_url, namespace, schema=schema, trainer={"checkpoint": {"directory": None}})
    replayed = tmp_path / "replay.json"
    assert run(["-c", str(path), "replay", str(shop.folder), "--report", str(replayed)]) == 0
    told = read_json(replayed)
    assert (told["impressions"], told["feedback"], told["duplicates"]) == (shop.visits, shop.feedback, 1)
    trained = drain(read_config(path))
    assert (trained["events"]["impressions"], trained["feedback"]["received"]) == (shop.visits, shop.feedback)
    with connect(redis_url, 20.0) as client:
        assert client.hget(f"{namespace}:log:topics", "impressions") == b"2"
