"""Nobody acts without a token, nobody else's page reaches the console, and the page asks nobody else."""

import re
import signal
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from smes_cli.__main__ import run
from smes_cli.config import load_config
from smes_cli.console_command import places_of
from smes_cli.demo.processes import log_tail
from smes_console.app import create_console
from smes_console.config import ConsoleConfig
from smes_console.sources import Places
from tests.running import environment, start_smes, until, write_config
from tests.smes_console.consoles import NOBODY, TOKEN, bearer, console, places_on, served

CHANGING = {"POST", "PUT", "PATCH", "DELETE"}
STATIC = Path(str(files("smes_console"))) / "static"


@pytest.fixture
def nothing(redis_url: str, namespace: str) -> Places:
    """A deployment of which only Redis runs, which is empty."""
    return places_on(redis_url, namespace, trainer_url=None)


def routes(app: FastAPI) -> list[tuple[str, str]]:
    """(Method, path) of everything below ``/api``, with a number in place of parameters."""
    paths = app.openapi()["paths"]
    assert all(path.startswith("/api/") for path in paths)
    return [(method.upper(), re.sub(r"\{\w+\}", "1", path)) for path, methods in paths.items() for method in methods]


def test_whatever_changes_something_needs_a_token(nothing: Places, tmp_path: Path) -> None:
    every = routes(create_console(ConsoleConfig(), nothing))
    changing = [(method, path) for method, path in every if method in CHANGING]
    assert ("POST", "/api/header/token") in changing
    assert ("GET", "/api/flow") in every
    with console(nothing, tmp_path) as http:
        for method, path in [*changing, ("POST", "/"), ("DELETE", "/index.html"), ("OPTIONS", "/api/flow")]:
            for headers in ({}, bearer("a-token-of-nobody"), {"authorization": f"Basic {TOKEN}"}, {"cookie": TOKEN}):
                answer = http.request(method, path, headers=headers, json={})
                assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer"), (method, path)
            twice = [("authorization", f"Bearer {TOKEN}"), ("authorization", f"Bearer {TOKEN}")]
            assert http.request(method, path, headers=twice).status_code == 401
        assert http.post("/api/header/token", headers=bearer()).json() == {"accepted": True}
        assert http.get("/api/header").status_code == 200, "reading needs none"


def test_a_private_console_shows_nothing_without_a_token(nothing: Places, tmp_path: Path) -> None:
    with console(nothing, tmp_path, private=True) as http:
        for method, path in routes(create_console(ConsoleConfig(), nothing)):
            assert http.request(method, path).status_code == 401, path
        assert "SMES Online" in http.get("/").text, "the page itself, which asks for the token"
        assert http.get("/api/header", headers=bearer()).status_code == 200


def test_a_made_token_counts_for_one_console(nothing: Places) -> None:
    app, other = (create_console(ConsoleConfig(), nothing) for _ in range(2))
    with served(app) as url:
        path = f"{url}/api/header/token"
        assert httpx.post(path, headers=bearer(app.state.tokens.token)).status_code == 200
        assert httpx.post(path, headers=bearer(other.state.tokens.token)).status_code == 401


def test_a_name_of_somebody_else_leads_nowhere(nothing: Places, tmp_path: Path) -> None:
    with console(nothing, tmp_path, hosts=("Console.Example",)) as http:
        for name in (
            "127.0.0.1",
            "localhost",
            "LOCALHOST.",
            "[::1]",
            "10.0.0.7",
            "console.example",
            "console.example.",
        ):
            for port in ("", ":8080"):
                assert http.get("/", headers={"host": name + port}).status_code == 200, name
        for name in ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "[::1", "[evil]", "", "1"):
            for path in ("/", "/api/flow", "/shell.js"):
                answer = http.get(path, headers={"host": name, **bearer()})
                assert answer.status_code == 421, name
                assert "console.hosts" in answer.json()["detail"]


def test_the_page_loads_and_asks_nothing_from_elsewhere(nothing: Places, tmp_path: Path) -> None:
    with console(nothing, tmp_path) as http:
        answers = [http.get(path) for path in ("/", "/shell.js", "/console.css", "/api/header", "/none", "/docs")]
        answers.append(http.post("/api/header/token"))
        for answer in answers:
            assert answer.headers["content-security-policy"].startswith("default-src 'self'; ")
            assert answer.headers["x-content-type-options"] == "nosniff"
        assert [answer.headers["cache-control"] for answer in answers[:4]] == ["no-cache"] * 3 + ["no-store"]
        assert [answer.status_code for answer in answers[4:6]] == [404, 404]
        for escape in ("/../config.py", "/%2e%2e/config.py", "/..%2fconfig.py", "/static/../../app.py"):
            assert http.get(escape).status_code == 404
    # The policy forbids both; a page that had one would break, but only in a browser.
    ours = [
        path for path in STATIC.rglob("*") if path.suffix in {".html", ".js", ".css"} and "vendor" not in path.parts
    ]
    assert len(ours) > 10
    for path in ours:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"""(?:src|href|import|from|fetch\(|url\()\s*[=(]?\s*["'`]?(?:https?:)?//""", text), path
        assert not re.search(
            r"\sstyle=|\son\w+=\"|(?:inner|outer)HTML\s*[+]?=[^=]|insertAdjacentHTML|document\.write", text
        ), path
    assert (STATIC / "vendor/uplot/LICENSE").read_text().startswith("The MIT License")


_LIGHT = """
import sys, time
import smes_console.service
heavy = {"torch", "duckdb", "numba"} & sys.modules.keys()
assert not heavy, heavy
"""


def test_the_console_imports_no_torch_no_duckdb_and_no_numba() -> None:
    subprocess.run([sys.executable, "-P", "-c", _LIGHT], env=environment(), check=True)


def test_the_command_says_where_it_listens_and_ends_at_once(tmp_path: Path) -> None:
    path = write_config(tmp_path, "redis://127.0.0.1:1/0", "nothing")
    log = tmp_path / "console.log"
    process = start_smes(log, "-c", str(path), "console", "--port", "0", "--trainer", NOBODY)

    def address() -> re.Match[str] | None:
        assert process.poll() is None, log_tail(log, 40)
        return re.search(r"listening on (http://\S+)/#token=(\S+)", log_tail(log, 40))

    until(address, "the console listens")
    found = address()
    assert found is not None
    url, token = found.groups()
    assert httpx.post(f"{url}/api/header/token", headers=bearer(token)).status_code == 200
    assert httpx.get(f"{url}/api/header", timeout=30).json()["namespace"] == "nothing"
    assert run(["-c", str(path), "console", "--port", url.rpartition(":")[2]]) == 1, "the port is taken"
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
    assert "Traceback" not in log.read_text()


def test_what_is_wrong_with_its_options_is_said_before_it_listens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write_config(tmp_path, "redis://127.0.0.1:1/0", "nothing"))
    (tmp_path / "short").write_text("short\n")
    (tmp_path / "one/run").mkdir(parents=True)
    (tmp_path / "two/run").mkdir(parents=True)
    same = ["--baseline", str(tmp_path / "one/run"), "--baseline", str(tmp_path / "two/run")]
    for arguments, code, said in (
        (["--trainer", "trainer:9100"], 2, "trainer_url: 'trainer:9100', expected http://"),
        (["--baseline", f"before={tmp_path}/none"], 2, "none: no such folder"),
        (same, 2, "a second one of the name 'run', expected NAME=DIR"),
    ):
        assert run(["-c", path, "console", *arguments]) == code
        assert said in capsys.readouterr().err
    assert (
        run(
            [
                "-c",
                str(
                    write_config(
                        tmp_path,
                        "redis://127.0.0.1:1/0",
                        "nothing",
                        console={"tokens": {"file": str(tmp_path / "short")}, "port": 0},
                    )
                ),
                "console",
            ]
        )
        == 1
    )
    assert "console.tokens: file" in capsys.readouterr().err


def test_it_finds_everything_by_the_configuration_of_the_others(tmp_path: Path) -> None:
    trainer = {"http": {"host": "0.0.0.0", "port": 9100, "tokens": {"env": "OF_TRAINER"}}}
    path = write_config(
        tmp_path,
        "redis://127.0.0.1:1/0",
        "nothing",
        trainer={**trainer, "history": {"directory": "runs/now"}},
        scorer={"host": "::1", "port": 8001, "tokens": {"env": "OF_SCORER"}},
        console={"baseline": [f"before={tmp_path}"]},
    )
    found = places_of(load_config(path, {}))
    assert (found.trainer_url, found.scorer_url) == ("http://127.0.0.1:9100", "http://[::1]:8001")
    assert (str(found.trainer_token), str(found.scorer_token)) == (
        "environment variable OF_TRAINER",
        "environment variable OF_SCORER",
    )
    assert (found.history, found.baselines) == (Path("runs/now"), {"before": tmp_path})
    other = write_config(tmp_path / "other", "redis://127.0.0.1:1/0", "x", console={"trainer_url": "http://t:1"})
    assert places_of(load_config(other, {})).trainer_url == "http://t:1"
    assert places_of(load_config(write_config(tmp_path / "none", "redis://a:1/0", "x"), {})).trainer_url is None
