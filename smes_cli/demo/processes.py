"""Start child processes that die with their parent and write to log files, and stop them in bounded time."""

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

    On Linux the kernel kills the child when this process ends, also after a SIGKILL. It does so when the *thread* that
    started the child ends, so only the main thread may start one. On other systems the caller has to stop the child.

    The child gets its own session: Ctrl-C in the terminal reaches this process only, which then stops its children in
    the right order.

    Args:
        argv: Program and arguments. The program is looked up on ``PATH``.
        log: File to append to. Its folder is created.
        env: Environment of the child. Default: that of this process.
        cwd: Working folder of the child. Default: that of this process.

    Raises:
        ValueError: The caller is not the main thread.
        FileNotFoundError: There is no such program.
    """
    if threading.current_thread() is not threading.main_thread():
        raise ValueError(f"spawn {argv[0]!r}: expected the main thread: a child dies with the thread that starts it")
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
    """Send SIGTERM, wait at most ``timeout_s``, then send SIGKILL. Idempotent.

    Returns:
        The exit status.
    """
    return stop_all([process], timeout_s=timeout_s)[0]


def stop_all(processes: Iterable[subprocess.Popen[bytes]], *, timeout_s: float = 10.0) -> list[int]:
    """Stop several processes: send SIGTERM to all, then wait for each as :func:`stop` does."""
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
    """The last lines that a child wrote, for an error message. Empty if there are none."""
    try:
        text = log.read_text(errors="replace")
    except FileNotFoundError:
        return ""
    return "\n".join(text.splitlines()[-lines:])
