"""Children write to their log, stop in bounded time, and die with their parent."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from smes_cli.demo import bound_child
from smes_cli.demo.processes import log_tail, spawn, stop, stop_all

DEADLINE_S = 60.0
SLEEPER = "import time; print('up', flush=True); time.sleep(600)"
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
)


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > deadline:
            return False
        os.sched_yield()
    return True


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def python(code: str) -> list[str]:
    return [sys.executable, "-P", "-c", code]


def test_output_and_errors_go_to_the_log_and_the_status_comes_back(tmp_path: Path) -> None:
    log = tmp_path / "new" / "child.log"
    code = "import os, sys; print(os.environ['X'], os.getcwd()); print('oops', file=sys.stderr); sys.exit(3)"
    child = spawn(python(code), log=log, env={**os.environ, "X": "42"}, cwd=tmp_path)
    assert child.wait(DEADLINE_S) == 3
    assert sorted(log.read_text().splitlines()) == sorted([f"42 {tmp_path}", "oops"])
    assert log_tail(log, lines=1) in {f"42 {tmp_path}", "oops"}
    assert log_tail(tmp_path / "none") == ""


def test_stop_sends_sigterm_first_and_is_idempotent(tmp_path: Path) -> None:
    child = spawn(python(SLEEPER), log=tmp_path / "log")
    assert eventually(lambda: log_tail(tmp_path / "log") == "up")
    assert stop(child) == -signal.SIGTERM
    assert stop(child) == -signal.SIGTERM


def test_a_child_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    children = [spawn(python(STUBBORN), log=tmp_path / f"{i}") for i in range(2)]
    assert eventually(lambda: all(log_tail(tmp_path / f"{i}") == "up" for i in range(2)))

    statuses = stop_all(children, timeout_s=0.2)

    assert statuses == [-signal.SIGKILL] * 2


def test_ctrl_c_in_the_terminal_does_not_reach_the_child(tmp_path: Path) -> None:
    child = spawn(python(SLEEPER), log=tmp_path / "log")
    assert os.getpgid(child.pid) == child.pid != os.getpgid(0)
    stop(child)


def test_a_missing_program_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no-such-program"):
        spawn(["no-such-program"], log=tmp_path / "log")


def test_only_the_main_thread_may_spawn(tmp_path: Path) -> None:
    errors: list[ValueError] = []

    def attempt() -> None:
        try:
            spawn(python(SLEEPER), log=tmp_path / "log")
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join(DEADLINE_S)
    assert "main thread" in str(errors[0])


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_valkey_dies_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from smes_cli.demo.local_servers import start_valkey;"
        "server = start_valkey(pathlib.Path(sys.argv[1])); print(server.pid, flush=True); sys.stdin.read()"
    )
    argv = [*python(code), str(tmp_path)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        server_pid = int(parent.stdout.readline())
        assert runs(server_pid)
        assert "server" in psutil.Process(server_pid).name()
        parent.kill()
    assert eventually(lambda: not runs(server_pid))


def test_a_child_whose_parent_is_gone_already_does_not_start() -> None:
    not_the_parent = os.getppid()
    argv = [sys.executable, "-I", str(bound_child.__file__), str(not_the_parent), "echo", "started"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"parent {not_the_parent} is gone" in done.stderr
