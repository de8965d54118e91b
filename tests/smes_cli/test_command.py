"""The ``smes`` command as users see it: exit codes, one-line errors, plain output, and serving from start to stop.

Every error is one line that names the cause, within a bounded time and with the documented exit code. A scorer that is
started before anything was trained becomes ready, swaps snapshots, and stops cleanly.
"""

import json
import shutil
import signal
import socket
import sys
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml

from simulators.logs.reader import open_log
from simulators.synthetic import synthesize
from smes.schema import MISSING
from smes_cli.__main__ import run
from smes_cli.config import Config
from smes_cli.demo.processes import spawn, stop
from smes_io.schema_file import builtin_path
from tests.integration.training import Pairs, drain, fill_servers, read_pairs, snapshots_of
from tests.running import (
    DEADLINE_S,
    environment,
    read_config,
    read_json,
    start_smes,
    until,
    until_log_says,
    write_config,
)
from tests.smes_scorer.made_payloads import loaded_from

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("command") / "world.parquet"
    synthesize(path, 2500, seed=6)
    return path


@pytest.fixture
def nobody() -> str:
    """``host:port`` where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def error_line(captured: Captured) -> str:
    """The command's error: the only line on standard error beside warnings, without colours and traceback."""
    err = captured.readouterr().err
    *others, line = err.splitlines()
    assert all(" WARNING " in other for other in others), err
    assert "\x1b" not in err
    assert "Traceback" not in err
    return line


def test_help_is_a_success_and_names_every_command(capsys: Captured) -> None:
    assert run(["--help"]) == 0
    text = capsys.readouterr().out
    for word in (
        "init",
        "demo",
        "check",
        "backtest",
        "replay",
        "synthesize",
        "train",
        "serve",
        "features",
        "snapshots",
    ):
        assert word in text
    assert "Exit codes: 0" in text
    for command in (["demo"], ["replay"], ["features", "load"], ["snapshots", "show"]):
        assert run([*command, "--help"]) == 0
        assert "Usage: smes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["backtest"], "Missing argument"),
        (["demo", "--limit", "0"], "Invalid value for '--limit'"),
        (["demo", "--eventlog", "pulsar"], "Invalid value for '--eventlog'"),
        (["replay", "x", "--limit", "-1"], "Invalid value for '--limit'"),
        (["serve", "--port", "70000"], "Invalid value for '--port'"),
    ],
)
def test_wrong_arguments_are_status_2(capsys: Captured, arguments: list[str], message: str) -> None:
    assert run(arguments) == 2
    # On a narrow page, in a box: words are looked for in order, whatever is between them.
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("event_log: {kin: kafka}", "event_log.kin: 'kafka' is an unknown key, expected one of kind, "),
        ("trainer: {snapshot_interval_s: 0}", "trainer.snapshot_interval_s: 0, expected more than 0"),
        ("trainer: {device: tpu}", "trainer.device: 'tpu', expected one of auto, cpu, cuda"),
        ("stream: {events_per_read: many}", "stream.events_per_read: 'many'"),
        ("schema: nowhere.yaml", "nowhere.yaml: expected a readable"),
        ("{", "expected YAML"),
    ],
)
def test_a_wrong_configuration_is_one_line_and_status_2(
    capsys: Captured, tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "smes.yaml"
    path.write_text(text)
    assert run(["-c", str(path), "train"]) == 2
    assert message in error_line(capsys)


def test_a_missing_configuration_is_named(capsys: Captured, tmp_path: Path) -> None:
    assert run(["-c", str(tmp_path / "none.yaml"), "train"]) == 2

    assert "none.yaml" in error_line(capsys)


def test_a_wrong_variable_is_named(capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMES_TRAINER__SEED", "soon")
    monkeypatch.chdir(tmp_path)

    assert run(["train"]) == 2

    assert "SMES_TRAINER__SEED: trainer.seed: 'soon', expected an integer" in error_line(capsys)


def test_a_missing_log_is_status_1(capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    assert run(["backtest", str(tmp_path / "nowhere")]) == 1

    assert f"{tmp_path / 'nowhere'}: no such file or folder, expected a log" in error_line(capsys)


def test_a_log_without_a_schema_is_status_2(capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    assert run(["backtest", str(tmp_path)]) == 2

    assert "expected a schema file: name one with --schema" in error_line(capsys)


@pytest.mark.parametrize("command", ["backtest", "replay"])
def test_a_log_that_is_not_there_is_status_1_and_named(
    capsys: Captured, tmp_path: Path, redis_url: str, namespace: str, command: str
) -> None:
    path = write_config(tmp_path, redis_url, namespace)

    assert run(["-c", str(path), command, str(tmp_path / "none.parquet")]) == 1

    assert "none.parquet: no such file" in error_line(capsys)


@pytest.mark.parametrize("command", ["backtest", "replay"])
def test_a_log_without_a_column_is_status_1_and_named(
    capsys: Captured, tmp_path: Path, redis_url: str, namespace: str, command: str
) -> None:
    path = write_config(tmp_path, redis_url, namespace)
    log = tmp_path / "log.csv"
    log.write_text("user_id,item_id\n1,2\n")

    assert run(["-c", str(path), command, str(log)]) == 1

    line = error_line(capsys)
    assert "log.csv" in line
    assert "event_time_ms" in line or "impression_id" in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--speed", "abc"], "--speed 'abc': expected a number or max"),
        (["--speed", "0"], "ReplayConfig.speed: 0.0, expected more than 0 or max"),
        (["--rate", "0"], "ReplayConfig.rate: 0.0, expected more than 0, or null"),
        (["--rate", "5", "--speed", "2"], "ReplayConfig.rate: 5.0 beside speed 2.0, expected one of them"),
        (["--schema", "kuairand", "--by-request"], "replay.by_request: schema 'kuairand' names no column for the ids"),
    ],
)
def test_what_a_replay_cannot_do_is_status_2(
    capsys: Captured, tmp_path: Path, redis_url: str, namespace: str, world: Path, options: list[str], message: str
) -> None:
    path = write_config(tmp_path, redis_url, namespace)
    assert run(["-c", str(path), "replay", str(world), *options]) == 2
    assert message in error_line(capsys)


@pytest.mark.parametrize(
    "command", [["train"], ["replay", "WORLD"], ["features", "load", "WORLD"], ["snapshots", "list"], ["serve"]]
)
def test_a_redis_that_is_away_is_named_within_a_bounded_wait(
    capsys: Captured, tmp_path: Path, nobody: str, world: Path, command: list[str]
) -> None:
    short: dict[str, Any] = {
        "event_log": {"connect_timeout_s": 0.5},
        "feature_store": {"timeout_s": 0.5},
        "scorer": {"redis_timeout_s": 0.5},
    }
    path = write_config(tmp_path, f"redis://:secret@{nobody}/0", "away", **short)
    started_s = time.monotonic()
    assert run(["-c", str(path), *(str(world) if word == "WORLD" else word for word in command)]) == 1
    assert time.monotonic() - started_s < DEADLINE_S
    line = error_line(capsys)
    assert nobody in line
    assert "within 0.5 s" in line
    assert "secret" not in line


def test_a_feature_store_that_is_away_is_named_though_the_event_log_is_there(
    capsys: Captured, tmp_path: Path, redis_url: str, namespace: str, nobody: str
) -> None:
    away = {"redis_url": f"redis://{nobody}/0", "timeout_s": 0.5}
    path = write_config(tmp_path, redis_url, namespace, feature_store=away)
    assert run(["-c", str(path), "train"]) == 1
    assert f"Redis at redis://{nobody}/0 gave no answer within 0.5 s" in error_line(capsys)


@pytest.mark.parametrize("command", [["train"], ["replay", "WORLD"]])
def test_a_kafka_that_is_away_is_named_within_a_bounded_wait(
    capsys: Captured, tmp_path: Path, redis_url: str, nobody: str, world: Path, command: list[str]
) -> None:
    path = write_config(tmp_path, redis_url, "away", kafka=nobody, event_log={"connect_timeout_s": 0.5})
    started_s = time.monotonic()
    assert run(["-c", str(path), *(str(world) if word == "WORLD" else word for word in command)]) == 1
    assert time.monotonic() - started_s < DEADLINE_S
    line = error_line(capsys)
    assert f"Kafka at {nobody}" in line
    assert "within 0.5 s" in line


def test_kafka_for_the_demo_has_to_be_somewhere(
    capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KAFKA_HOME", raising=False)
    monkeypatch.delenv("KAFKA_BOOTSTRAP", raising=False)
    monkeypatch.chdir(tmp_path)
    assert run(["-q", "demo", "--limit", "50", "--eventlog", "kafka"]) == 2
    assert "--eventlog kafka: expected KAFKA_BOOTSTRAP (brokers that run) or KAFKA_HOME" in error_line(capsys)


def test_an_interrupt_is_status_130_and_leaves_no_half_written_file(tmp_path: Path) -> None:
    # If the tests run in the background, SIGINT is ignored, and children inherit that.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from smes_cli.__main__ import main; main()"
    )
    argv = [sys.executable, "-P", "-c", code, "synthesize", str(tmp_path / "big.parquet"), "--impressions", "900000000"]
    process = spawn(argv, log=tmp_path / "log", env=environment(), cwd=tmp_path)
    partial = tmp_path / "big.parquet.partial"
    until(lambda: process.poll() is not None or (partial.exists() and partial.stat().st_size > 0), "the first rows")
    process.send_signal(signal.SIGINT)
    assert process.wait(DEADLINE_S) == 130
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_init_writes_a_configuration_that_works(
    capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    assert run(["init"]) == 0

    assert capsys.readouterr().out == "wrote smes.yaml\n"
    assert isinstance(read_config(Path("smes.yaml")), Config)
    assert yaml.safe_load(Path("smes.yaml").read_text())["schema"] == "synthetic"


def test_init_replaces_no_file(capsys: Captured, tmp_path: Path) -> None:
    path = tmp_path / "smes.yaml"
    path.write_text("mine")

    assert run(["init", str(path)]) == 2

    assert "smes.yaml: exists already, expected a new file (or --force)" in error_line(capsys)
    assert path.read_text() == "mine"


def test_init_replaces_a_file_by_force(tmp_path: Path) -> None:
    path = tmp_path / "smes.yaml"
    path.write_text("mine")

    assert run(["init", str(path), "--force"]) == 0

    assert isinstance(read_config(path), Config)


def test_init_where_no_file_can_be_written_is_status_1(capsys: Captured, tmp_path: Path) -> None:
    path = tmp_path / "no" / "folder.yaml"

    assert run(["init", str(path)]) == 1

    assert f"{path}: cannot be written: No such file or directory" in error_line(capsys)


def test_backtest_prints_plain_text_when_piped(capsys: Captured, tmp_path: Path, world: Path) -> None:
    path = write_config(tmp_path, "redis://unused:1/0", "unused")
    report = tmp_path / "report.json"

    assert run(["-c", str(path), "backtest", str(world), "--limit", "300", "--report", str(report)]) == 0

    printed = capsys.readouterr()
    assert "\x1b" not in printed.out + printed.err
    assert "long_view" in printed.out
    assert "impressions 300" in printed.out
    assert read_json(report)["events"]["impressions"] == 300


def test_backtest_prints_nothing_when_quiet(capsys: Captured, tmp_path: Path, world: Path) -> None:
    path = write_config(tmp_path, "redis://unused:1/0", "unused")

    assert run(["-q", "-c", str(path), "backtest", str(world), "--limit", "300"]) == 0

    assert capsys.readouterr() == ("", "")


def test_a_report_that_cannot_be_written_is_status_1(capsys: Captured, tmp_path: Path, world: Path) -> None:
    path = write_config(tmp_path, "redis://unused:1/0", "unused")

    assert run(["-c", str(path), "backtest", str(world), "--limit", "5", "--report", "/no/such/folder/r.json"]) == 1

    assert "/no/such/folder/r.json: cannot be written" in error_line(capsys)


def test_a_limit_of_nothing_is_an_empty_report(capsys: Captured, tmp_path: Path, world: Path) -> None:
    path = write_config(tmp_path, "redis://unused:1/0", "unused")
    report = tmp_path / "report.json"
    assert run(["-c", str(path), "backtest", str(world), "--limit", "0", "--report", str(report)]) == 0
    events = read_json(report)["events"]
    assert set(events.values()) == {0}
    assert "impressions 0" in capsys.readouterr().out


def test_replay_reports_what_it_appended(
    capsys: Captured, tmp_path: Path, redis_url: str, namespace: str, world: Path
) -> None:
    path = write_config(tmp_path, redis_url, namespace)
    report = tmp_path / "replay.json"
    arguments = ["replay", str(world), "--limit", "400", "--codec", "json", "--seed", "4", "--report", str(report)]
    assert run(["-c", str(path), *arguments]) == 0
    reported = read_json(report)
    feedback = sum(len(received) for _, received in limited(read_pairs(read_config(path), world), 400))
    assert (reported["impressions"], reported["feedback"], reported["finished"]) == (400, feedback, True)
    assert f"400 impressions and {feedback:,} feedback events appended" in capsys.readouterr().out
    trained = drain(read_config(path))
    assert (trained["events"]["impressions"], trained["feedback"]["received"]) == (400, feedback)


def limited(pairs: Pairs, impressions: int) -> Pairs:
    """The first so many impressions (a multiple of the pairs' size) and all feedback on them."""
    kept = np.concatenate([block.impression_id for block, _ in pairs])[:impressions]
    return [(i.take(np.isin(i.impression_id, kept)), f.take(np.isin(f.impression_id, kept))) for i, f in pairs]


def test_snapshots_none_yet_then_real_ones(
    capsys: Captured, tmp_path: Path, redis_url: str, namespace: str, world: Path
) -> None:
    path = write_config(tmp_path, redis_url, namespace)
    config = read_config(path)
    for command in ("list", "show"):
        assert run(["-c", str(path), "snapshots", command]) == 1
        line = error_line(capsys)
        assert "no snapshot was published yet" in line
        assert namespace in line
    fill_servers(config, read_pairs(config, world), "arrow")
    trained = drain(config)
    capsys.readouterr()
    assert run(["-c", str(path), "snapshots", "list"]) == 0
    listed = capsys.readouterr().out
    newest = listed.splitlines()[-1].split()
    assert newest[:2] == [trained["lineage"], str(trained["version"])]
    assert newest[-1] == "current"
    assert run(["-c", str(path), "snapshots", "show"]) == 0
    manifest: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (manifest["lineage"], manifest["version"]) == (trained["lineage"], trained["version"])
    assert manifest["schema_hash"] == trained["schema"]
    assert run(["-c", str(path), "snapshots", "show", "999999"]) == 1
    assert f"snapshot {trained['lineage']}:999999: not in Redis" in error_line(capsys)
    assert run(["-c", str(path), "snapshots", "show", "--lineage", trained["lineage"]]) == 0
    assert json.loads(capsys.readouterr().out)["version"] == trained["version"]
    for version in ([], [str(trained["version"])]):
        assert run(["-c", str(path), "snapshots", "show", *version, "--lineage", "zzz"]) == 1
        line = error_line(capsys)
        assert "zzz" in line
        assert "not in Redis" in line or f"no snapshot of that lineage, expected one of {trained['lineage']}" in line


@pytest.mark.timeout(300)
def test_serve_from_before_the_first_snapshot_to_sigterm(
    capsys: Captured, tmp_path: Path, redis_url: str, namespace: str, world: Path
) -> None:
    path = write_config(tmp_path, redis_url, namespace, scorer={"port": 0, "poll_s": 0.05, "entity_timeout_ms": 5000})
    config = read_config(path)
    pairs = read_pairs(config, world)
    log = tmp_path / "serve.log"
    process = start_smes(log, "-c", str(path), "serve")
    until_log_says(log, "scorer: listening on http://", process)
    url = log.read_text().split("listening on ")[1].split()[0]
    with httpx.Client(base_url=url, timeout=30) as http:
        assert http.get("/health/live").status_code == 200
        assert http.get("/health/ready").status_code == 503
        refused = http.post("/v1/score", json={"user_id": 1, "items": [1]})
        assert (refused.status_code, refused.json()["detail"][:9]) == (503, "not ready")
        assert run(["freshness", "--url", url]) == 0
        assert "has not counted any feedback yet" in capsys.readouterr().out

        assert run(["-c", str(path), "features", "load", str(world)]) == 0
        assert "users and" in capsys.readouterr().out
        versions = []
        for segment in (pairs[:8], pairs[8:]):
            fill_servers(config, segment, "arrow")
            trained = drain(config)
            versions.append(trained["version"])
            until(lambda: http.get("/v1/stats").json()["version"] == versions[-1], "the swap")
            assert http.get("/health/ready").status_code == 200
            assert_answers_with_stored_features(config, world, pairs, http, versions[-1])
        assert versions[1] > versions[0] > 0
        capsys.readouterr()
        assert run(["freshness", "--url", url, "--report", str(tmp_path / "freshness.json")]) == 0
        assert_shows_freshness(capsys.readouterr().out, read_json(tmp_path / "freshness.json"))
    assert stop(process, timeout_s=DEADLINE_S) == 0
    assert "Traceback" not in log.read_text()


def assert_shows_freshness(text: str, figures: dict[str, Any]) -> None:
    """Seven stages and the sum."""
    table = text.splitlines()[3:]
    assert [line.strip().split("  ")[0] for line in table] == [
        "event log → joined",
        "joined → batched",
        "batched → trained",
        "trained → cut",
        "cut → published",
        "published → in service",
        "in service → first answer",
        "freshness",
    ]
    means = {stage: spans["mean"] for stage, spans in figures["freshness_stages_ms"].items()}
    assert figures["freshness_ms"]["count"] > 0
    assert 0 < figures["freshness_ms"]["p50"] <= 1.01 * sum(means.values()) + 10_000
    assert all(mean >= 0 for mean in means.values())


def assert_answers_with_stored_features(
    config: Config, world: Path, pairs: Pairs, http: httpx.Client, version: int
) -> None:
    """The answer holds the snapshot's scores for the features in the log's own entity tables."""
    schema = config.schema_file().schema
    user = int(pairs[0][0].user_id[0])
    items = [*np.unique(pairs[0][0].item_id)[:20].tolist(), 987_654_321]
    context = {"tab": 1, "device": 2}
    answer = http.post("/v1/score", json={"user_id": user, "items": items, "context": context}).json()
    assert answer["version"] == version
    ids = np.full((len(items), schema.id_width), MISSING)
    numerics = np.full((len(items), schema.num_numerics), np.nan, np.float32)
    ids[:, 0], ids[:, 1] = user, items
    for name, value in context.items():
        ids[:, schema.id_slices[name]] = value
    with open_log(world, config.schema_file()) as reader:
        for entity, wanted in (("user", [user] * len(items)), ("item", items)):
            for block in reader.entity_blocks("user" if entity == "user" else "item"):
                place = {int(key): row for row, key in enumerate(block.ids)}
                for row, key in enumerate(wanted):
                    for feature in (f for f in schema.features if f.name in block.columns and key in place):
                        value = block.columns[feature.name][place[key]]
                        if feature.kind == "numeric":
                            numerics[row, schema.numeric_features.index(feature)] = value
                        else:
                            ids[row, schema.id_slices[feature.name]] = value
    assert (ids[:-1] != MISSING).any(axis=0).all()  # every feature is known of some item
    with snapshots_of(config) as store:
        manifest = store.current()
        assert manifest is not None
        model = loaded_from(store, manifest, schema)
    expected = model.score(ids, numerics)
    scores = [[item["scores"][task.name] for task in schema.tasks] for item in answer["items"]]
    np.testing.assert_allclose(np.array(scores, np.float32), expected, rtol=2e-5, atol=1e-6)


def test_freshness_of_nobody_is_status_1(capsys: Captured, nobody: str) -> None:
    assert run(["freshness", "--url", f"http://{nobody}"]) == 1
    assert f"scorer http://{nobody}: no answer: " in error_line(capsys)


def test_freshness_of_another_service_is_status_1(capsys: Captured, tmp_path: Path) -> None:
    (tmp_path / "v1").mkdir()
    (tmp_path / "v1/stats").write_text('{"requests": 3}')

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert run(["freshness", "--url", url]) == 1
        assert run(["freshness", "--url", f"{url}/elsewhere"]) == 1
        server.shutdown()
    errors = capsys.readouterr().err

    assert "/v1/stats: expected the statistics of `smes serve`: KeyError('freshness_ms')" in errors
    assert "no answer: Client error '404 File not found'" in errors


def test_the_command_is_installed() -> None:
    assert shutil.which("smes", path=str(Path(sys.executable).parent))


def test_loaded_features_lie_beside_those_of_another_schema_until_all_are_replaced(
    capsys: Captured, tmp_path: Path, world: Path, redis_url: str, namespace: str
) -> None:
    path = write_config(tmp_path, redis_url, namespace)
    other = tmp_path / "other.yaml"
    other.write_text(builtin_path("synthetic").read_text().replace("name: synthetic", "name: other", 1))
    features = ["-c", str(path), "features"]
    load = [*features, "load", str(world), "--schema", str(other)]
    assert run([*features, "put", "item", "by-hand", "item_category=3"]) == 0
    assert run(load) == 0
    capsys.readouterr()
    assert run([*features, "get", "item", "by-hand"]) == 0
    assert '"item_category": 3' in capsys.readouterr().out
    assert run([*load, "--replace"]) == 0
    capsys.readouterr()
    assert run([*features, "get", "item", "by-hand"]) != 0
