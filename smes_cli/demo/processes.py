"""Child processes that die with their parent, write to log files, and stop within a bounded time."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from smes_cli.demo import bound_child


def spawn(
    argv: Sequence[str],
    *,
    log: Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> subprocess.Popen[bytes]:
    """Start a program whose standard output and error go to ``log``.

    On Linux the child is killed when this process ends, however it ends (the kernel sends the signal when the thread
    that started the child ends, hence the main thread only). On other systems it has to be stopped. It gets a session
    of its own, so Ctrl-C in the terminal reaches this process alone, which then stops its children in its own order.

    Args:
        argv: Program and arguments; the program is looked up on ``PATH``.
        log: File that is appended to; its folder is created.
        env: The child's environment; default: this process'.
        cwd: The child's working folder; default: this process'.

    Raises:
        ValueError: Called from another thread than the main thread.
        FileNotFoundError: There is no such program.
    """
    if threading.current_thread() is not threading.main_thread():
        raise ValueError(f"spawn {argv[0]!r}: expected the main thread, a child dies with the thread that started it")
    program = shutil.which(argv[0], path=None if env is None else env.get("PATH"))
    if program is None:
        raise FileNotFoundError(f"{argv[0]!r}: no such program on PATH")
    log.parent.mkdir(parents=True, exist_ok=True)
    wrapper = [sys.executable, "-I", "-S", str(Path(bound_child.__file__)), str(os.getpid())]
    with log.open("ab") as output:
        return subprocess.Popen(  # noqa: S603 - the arguments are this project's own, and no shell reads them
            [*wrapper, program, *argv[1:]],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=None if env is None else dict(env),
            cwd=cwd,
            start_new_session=True,
        )


def stop(process: subprocess.Popen[bytes], *, timeout_s: float = 10.0) -> int:
    """SIGTERM, wait at most ``timeout_s``, then SIGKILL; returns the exit status. Idempotent."""
    return stop_all([process], timeout_s=timeout_s)[0]


def stop_all(processes: Iterable[subprocess.Popen[bytes]], *, timeout_s: float = 10.0) -> list[int]:
    """:func:`stop` for several at once: all get SIGTERM first, and each at most ``timeout_s`` from then on."""
    children = list(processes)
    for child in children:
        if child.poll() is None:
            child.send_signal(signal.SIGTERM)
    return [_reap(child, timeout_s) for child in children]


def _reap(child: subprocess.Popen[bytes], timeout_s: float) -> int:
    try:
        return child.wait(timeout_s)
    except subprocess.TimeoutExpired:
        child.kill()
        return child.wait()


def log_tail(log: Path, lines: int = 15) -> str:
    """The last lines a child wrote, for an error message; empty if it wrote none."""
    try:
        text = log.read_text(errors="replace")
    except FileNotFoundError:
        return ""
    return "\n".join(text.splitlines()[-lines:])
