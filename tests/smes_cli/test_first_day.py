"""What one meets on the first day: the version, mistakes that are told at once, the embedded Redis, the status."""

import re
import socket
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import redis

from smes_cli.__main__ import run
from smes_cli.demo.processes import spawn, stop
from tests.running import environment, read_json, start_smes, until_log_says, write_config

Captured = pytest.CaptureFixture[str]

_RUN = """
import sys
from smes_cli.__main__ import run
for arguments in sys.argv[1:]:
    code = run(arguments.split())
    print(f"exit {code}, torch loaded: {'torch' in sys.modules}", file=sys.stderr)
"""


def test_the_version_is_that_of_the_installed_package(capsys: Captured) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"smes {version('smes-online')}\n"


def test_completion_is_offered_for_the_shells(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    # Else the shell is the one that started the tests, if one did.
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")

    assert run(["--show-completion", "bash"]) == 0
    assert "_SMES_COMPLETE" in capsys.readouterr().out


def test_a_mistake_is_told_before_torch_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("name: x\ntasks: [{name: click, kind: maybe}]\n")
    (tmp_path / "wrong.yaml").write_text("schema: synthetic\ntrainer: {threads: many}\n")
    log, commands = (
        tmp_path / "log",
        {
            "train --schema broken.yaml": "broken.yaml",
            "serve --schema broken.yaml": "broken.yaml",
            "backtest broken.yaml --schema broken.yaml": "broken.yaml",
            "evaluate broken.yaml --schema broken.yaml --version 1": "broken.yaml",
            "--config wrong.yaml train": "trainer.threads",
        },
    )

    process = spawn([sys.executable, "-P", "-c", _RUN, *commands], log=log, env=environment(), cwd=tmp_path)

    process.wait(60)
    lines = log.read_text().splitlines()
    assert lines[1::2] == len(commands) * ["exit 2, torch loaded: False"]
    assert all(expected in error for error, expected in zip(lines[::2], commands.values(), strict=True))


def test_the_embedded_redis_keeps_its_data(tmp_path: Path) -> None:
    kept = None
    for _ in range(2):
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        process = start_smes(log, "redis", "--dir", str(tmp_path / "data"), "--port", "0")
        until_log_says(log, "listening on", process)
        [url] = re.findall(r"redis://[0-9.:/]+", log.read_text())
        client = redis.Redis.from_url(url)
        if kept is None:
            client.set("key", "value")
        kept = client.get("key")
        client.close()
        assert stop(process) == 0
    assert kept == b"value"


def test_status_names_what_is_missing(redis_url: str, tmp_path: Path, capsys: Captured) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{probe.getsockname()[1]}"
    config, report = write_config(tmp_path, redis_url, "status-empty"), tmp_path / "status.json"

    code = run(["--config", str(config), "status", "--url", nobody, "--report", str(report)])

    out = capsys.readouterr().out
    alarms = read_json(report)["alarms"]
    assert code == 3
    assert [alarm.split(":")[0] for alarm in alarms] == ["event log", "trainer", "snapshots", "scorer"]
    assert all(f"alarm         {alarm}" in out for alarm in alarms)


def test_status_says_which_server_is_away(tmp_path: Path, capsys: Captured) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"redis://127.0.0.1:{probe.getsockname()[1]}/0"
    soon = {"timeout_s": 0.2}
    config = write_config(tmp_path, url, "status-away", feature_store=soon, event_log={"connect_timeout_s": 0.2})

    assert run(["--config", str(config), "status"]) == 3

    out = capsys.readouterr().out
    assert f"alarm         snapshots: Redis at {url} gave no answer" in out
    assert f"alarm         event log: Redis at {url} gave no answer" in out
