"""What the command prints is true: names, defaults, rates and places, and never a password."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn, get_args

import pytest
import redis

from simulators.synthetic import synthesize
from smes.model.config import RANKER_NAMES, Preset
from smes_cli.__main__ import run
from smes_cli.console import RecentRate
from smes_cli.demo.local_servers import ValkeyServer, start_valkey
from smes_cli.demo.processes import stop
from smes_cli.demo.workers import Workers
from smes_cli.starter import STARTER
from stream.topics import IMPRESSIONS
from tests.integration.training import drain
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

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("messages") / "world.parquet"
    synthesize(path, 2000, seed=6)
    return path


def comment(key: str) -> str:
    found = re.search(rf"^ *{key}: .*#(.*)$", STARTER, re.MULTILINE)
    assert found is not None
    return found[1]


def test_the_starter_names_every_ranker_and_every_preset() -> None:
    assert set(re.findall(r"\w+", comment("ranker"))) >= set(RANKER_NAMES)
    assert set(re.findall(r"\w+", comment("preset"))) >= set(get_args(Preset))


def test_the_help_of_a_baseline_names_every_ranker(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run(["backtest", "--help"]) == 0
    line = " ".join(capsys.readouterr().out.replace("│", " ").split()).split("--baseline")[1].split("--routing")[0]
    assert set(re.findall(r"\w+", line)) >= set(RANKER_NAMES)


def test_an_unknown_baseline_is_status_2_and_named(capsys: Captured, tmp_path: Path, world: Path) -> None:
    path = write_config(tmp_path, "redis://unused:1/0", "unused")
    assert run(["-c", str(path), "backtest", str(world), "--baseline", "magic"]) == 2
    assert f"--baseline 'magic': expected one of {', '.join(RANKER_NAMES)}" in capsys.readouterr().err


def test_a_baseline_stands_under_its_own_name(capsys: Captured, tmp_path: Path, world: Path) -> None:
    path = write_config(tmp_path, "redis://unused:1/0", "unused")
    assert run(["-c", str(path), "backtest", str(world), "--limit", "200", "--baseline", "shared_bottom"]) == 0
    printed = capsys.readouterr().out
    assert "shared_bottom AUC" in printed
    assert "; shared_bottom: AUC 0." in printed, "in the headline, too"
    assert "linear" not in printed


def test_a_rate_is_of_the_last_seconds() -> None:
    now_s = 0.0
    rate = RecentRate(5.0, monotonic_s=lambda: now_s)
    for second in range(1, 11):
        now_s = float(second)
        assert rate(100 * second) == pytest.approx(100)
    for second in range(11, 17):  # nothing is done any more
        now_s = float(second)
        last = rate(1000)
    assert last == 0


def test_an_error_of_the_system_is_one_line_and_status_1(
    capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: Path
) -> None:
    path = write_config(tmp_path, "redis://unused:1/0", "unused")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    assert run(["-c", str(path), "backtest", str(world)]) == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "No such file or directory" in line


@pytest.mark.parametrize(
    ("error", "said"),
    [(MemoryError("Unable to allocate 64 GiB"), "Unable to allocate 64 GiB"), (MemoryError(), "MemoryError")],
)
def test_a_lack_of_memory_is_one_line_and_status_1(
    capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: Path, error: MemoryError, said: str
) -> None:
    def learner_of_everything(*arguments: object) -> NoReturn:
        raise error

    path = write_config(tmp_path, "redis://unused:1/0", "unused")
    monkeypatch.setattr("smes_cli.backtest.build_learner", learner_of_everything)
    assert run(["-c", str(path), "backtest", str(world)]) == 1
    line = capsys.readouterr().err
    assert line == f"smes: {said}; expected more memory, or a configuration that asks for less\n"


@pytest.mark.parametrize("name", ["nowhere/report.json", "."])
def test_a_place_without_room_for_a_report_is_named_before_the_run(capsys: Captured, tmp_path: Path, name: str) -> None:
    # The log does not exist either: the report is looked at first.
    assert run(["backtest", "no.parquet", "--report", str(tmp_path / name)]) == 1
    assert f"{tmp_path / name}: cannot be written: " in capsys.readouterr().err


def test_a_file_that_is_not_called_parquet_is_not_synthesized(capsys: Captured, tmp_path: Path) -> None:
    assert run(["synthesize", str(tmp_path / "world.csv"), "--impressions", "10"]) == 2
    assert "world.csv: expected a file that ends in .parquet" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "command", [["train"], ["snapshots", "list"], ["features", "load", "WORLD"], ["replay", "WORLD"]]
)
@pytest.mark.parametrize("wrong", ["away", "no URL", "misspelt"])
def test_no_password_is_printed(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, world: Path, command: list[str], wrong: str
) -> None:
    """Neither of a server that is away, nor of a URL that is none, nor under a key that is misspelt."""
    secret = "t0p/s#cret" if wrong == "no URL" else "t0psecret"
    url = f"redis://user:{secret}@127.0.0.1:1/0"
    short: dict[str, Any] = {"event_log": {"connect_timeout_s": 0.1}, "feature_store": {"timeout_s": 0.1}}
    path = write_config(tmp_path, url, "away", **short)
    if wrong == "misspelt":
        path.write_text(path.read_text().replace("redis_url:", "redis_uri:"))
    words = [str(world) if word == "WORLD" else word for word in command]
    assert run(["-v", "-c", str(path), *words]) in (1, 2)
    said = "".join(capfd.readouterr())
    assert "***@127.0.0.1:1" in said
    assert not any(part in said for part in ("t0p", "s#cret"))


def test_the_file_of_a_demo_that_holds_a_password_is_for_its_user_only(tmp_path: Path) -> None:
    for _ in range(2):  # made, and found from an earlier demo
        with ExitStack() as stack:
            Workers(read_config(write_config(tmp_path / "own", "redis://:secret@h:1/0", "n")), tmp_path, stack)
        assert "secret" in (tmp_path / "smes.yaml").read_text()
        assert (tmp_path / "smes.yaml").stat().st_mode & 0o777 == 0o600
        (tmp_path / "smes.yaml").chmod(0o644)


def test_a_process_that_read_a_log_prints_nothing_on_its_way_out(tmp_path: Path, world: Path) -> None:
    process = start_smes(tmp_path / "log", "-q", "check", str(world))
    assert process.wait(DEADLINE_S) == 0
    assert (tmp_path / "log").read_text() == ""


def appends(redis_url: str, namespace: str) -> int:
    """Records of impressions in the event log."""
    with redis.Redis.from_url(redis_url) as client:
        return sum(client.xlen(f"{{{namespace}}}:log:{IMPRESSIONS}:{partition}") for partition in range(2))


def drained(config: Path) -> int:
    """Impressions that a trainer reads from the event log."""
    return int(drain(read_config(config))["events"]["impressions"])


def test_a_replay_that_is_stopped_says_where_it_was(
    tmp_path: Path, world: Path, redis_url: str, namespace: str
) -> None:
    path = write_config(tmp_path, redis_url, namespace)
    report, log = tmp_path / "report.json", tmp_path / "log"
    process = start_smes(log, "-c", str(path), "replay", str(world), "--rate", "300", "--report", str(report))
    until(lambda: appends(redis_url, namespace) > 2, "some events")
    assert stop(process, timeout_s=DEADLINE_S) == 0
    said, appended = log.read_text(), read_json(report)
    assert re.search(r"replay stopped at event time 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d, after", said)
    assert f"after {appended['impressions']:,} of 2,000 impressions" in said
    assert appended["finished"] is False


@pytest.fixture
def own_valkey(tmp_path: Path) -> Iterator[ValkeyServer]:
    with start_valkey(tmp_path / "valkey") as server:
        yield server


def test_a_replay_waits_for_an_event_log_longer_than_the_event_log_s_own_bound(
    tmp_path: Path, world: Path, own_valkey: ValkeyServer
) -> None:
    """The event log gives up after 0.2 s; the replay does not, and loses nothing."""
    impatient = {"outage_timeout_s": 0.2}
    path = write_config(tmp_path, own_valkey.url, "patience", event_log={"redis": impatient, "kafka": {}})
    report, log = tmp_path / "report.json", tmp_path / "log"
    process = start_smes(log, "-c", str(path), "replay", str(world), "--rate", "1500", "--report", str(report))
    until(lambda: appends(own_valkey.url, "patience") > 2, "some events")
    own_valkey.process.send_signal(signal.SIGKILL)
    own_valkey.process.wait()
    until_log_says(log, "trying again", process)
    with start_valkey(tmp_path / "valkey", port=own_valkey.port) as again:
        assert process.wait(DEADLINE_S) == 0, log.read_text()
        assert again.url == own_valkey.url
        assert read_json(report)["impressions"] == 2000
        assert drained(path) == 2000


def test_a_replay_that_fails_says_where_it_was(tmp_path: Path, world: Path, own_valkey: ValkeyServer) -> None:
    path = write_config(
        tmp_path,
        own_valkey.url,
        "patience",
        event_log={"redis": {"outage_timeout_s": 0.2}},
        replay={"outage_timeout_s": 0.2},
    )
    report, log = tmp_path / "report.json", tmp_path / "log"
    process = start_smes(log, "-c", str(path), "replay", str(world), "--rate", "300", "--report", str(report))
    until(lambda: appends(own_valkey.url, "patience") > 2, "some events")
    own_valkey.process.send_signal(signal.SIGKILL)
    own_valkey.process.wait()
    assert process.wait(DEADLINE_S) == 1
    said = log.read_text().strip().splitlines()[-1]
    assert said.startswith("smes: Redis at ")
    assert "replay stopped at event time 20" in said
    assert json.loads(report.read_text())["finished"] is False


def test_a_replay_of_nothing_takes_no_time(capsys: Captured, tmp_path: Path, redis_url: str, namespace: str) -> None:
    """The clock starts with the first event; without one it has not run since the machine was started."""
    synthesize(tmp_path / "world.parquet", 50, seed=1)
    path = write_config(tmp_path, redis_url, namespace)
    assert run(["-c", str(path), "replay", str(tmp_path / "world.parquet"), "--limit", "0"]) == 0
    assert "0 impressions and 0 feedback events appended in 0.0 s" in capsys.readouterr().out


def test_verbose_says_where_an_error_came_from(tmp_path: Path) -> None:
    """As a process: it configures the logging of the whole program."""
    command = [sys.executable, "-P", "-m", "smes_cli", "check", "nowhere", "--schema", "synthetic"]
    quiet, verbose = (
        subprocess.run(each, cwd=tmp_path, env=environment(), capture_output=True, text=True).stderr
        for each in (command, [*command[:4], "-v", *command[4:]])
    )
    assert "Traceback" not in quiet
    assert "find_files" in verbose
    assert verbose.endswith(quiet)
