"""The worker processes of a demo: started from one configuration file, watched, and asked for their reports."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import yaml

from smes.errors import SmesError
from smes_cli.config import Config
from smes_cli.console import console, number, progress, read_report
from smes_cli.demo.addresses import scorer_stats
from smes_cli.demo.processes import log_tail, spawn, stop
from smes_io.clock import wait_until

_READY_WITHIN_S = 90.0
_LOOK_S = 0.5
_URL = re.compile(r"(?:listening on|metrics:) (http://\S+)")


class Workers:
    """``smes train``, ``serve``, ``replay`` and ``console`` as processes that die with this one.

    Args:
        config: Their configuration, which is written to a file in the folder.
        folder: Folder of that file, of the workers' output and of their reports.
        stack: Stops the workers when it is closed.
    """

    def __init__(self, config: Config, folder: Path, stack: ExitStack) -> None:
        self._folder, self._stack = folder, stack
        self._config_file = folder / "smes.yaml"
        self.write(config)

    def write(self, config: Config) -> None:
        """Write the configuration anew, in one move: for workers that start from now on, and for whoever looks."""
        new = self._config_file.with_suffix(".new")
        new.touch(mode=0o600)  # it may hold the password of a server
        new.write_text(yaml.safe_dump(_plain(asdict(config)), sort_keys=False))
        new.replace(self._config_file)

    def log_of(self, command: str) -> Path:
        """The file with a worker's output."""
        return self._folder / f"{command}.log"

    def start(self, command: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Start ``smes COMMAND`` as a process that dies with this one."""
        argv = [sys.executable, "-P", "-m", "smes_cli", "-c", str(self._config_file), command, *arguments]
        # The file already holds the values of this process's variables.
        env = {name: value for name, value in os.environ.items() if not name.startswith("SMES_")}
        process = spawn(argv, log=self.log_of(command), env={**env, "PYTHONUNBUFFERED": "1"})
        self._stack.callback(stop, process, timeout_s=10)
        return process

    def printed_url(self, command: str, process: subprocess.Popen[bytes]) -> str:
        """Wait for a worker to print the URL that it listens on, whose port it chose itself.

        Raises:
            SmesError: It ended, or did not listen in time.
        """

        def printed() -> str | None:
            found = _URL.search(log_tail(self.log_of(command), 200))
            if found is None:
                self._check_alive(command, process)
            return None if found is None else found[1]

        with console.status(f"starting smes {command}"):
            url = wait_until(printed, timeout_s=_READY_WITHIN_S)
        if url is None:
            raise SmesError(f"smes {command}: not listening within {_READY_WITHIN_S:g} s:\n{self._tail(command)}")
        return url

    def wait_ready(self, url: str, scorer: subprocess.Popen[bytes], trainer: subprocess.Popen[bytes]) -> None:
        """Wait until the scorer serves the first snapshot.

        Raises:
            SmesError: Trainer or scorer ended, or there was no snapshot in time.
        """

        def is_ready() -> bool:
            if httpx.get(f"{url}/health/ready", timeout=10).status_code == 200:
                return True
            self._check_alive("serve", scorer)
            self._check_alive("train", trainer)
            return False

        with console.status("waiting for the first snapshot"):
            if not wait_until(is_ready, timeout_s=_READY_WITHIN_S):
                raise SmesError(f"no snapshot within {_READY_WITHIN_S:g} s; the trainer:\n{self._tail('train')}")

    def watch(
        self,
        url: str,
        replay: subprocess.Popen[bytes],
        others: Mapping[str, subprocess.Popen[bytes]],
        should_stop: Callable[[], bool],
    ) -> dict[str, Any]:
        """Show progress until the replay ends or is stopped; the replay's report.

        Args:
            url: Base URL of the scorer.
            replay: The replay.
            others: Command → the worker that must keep running.
            should_stop: Whether to stop the replay early.

        Raises:
            SmesError: A worker ended too early or failed.
        """
        with progress("replaying and serving", None) as advance:
            while replay.poll() is None and not should_stop():
                self.check_alive(others)
                stats = scorer_stats(url)
                fresh = number(stats["freshness_ms"]["p50"], 0)
                advance(
                    int(stats["requests"]),
                    f"requests · serving version {stats['version']}, {stats['swaps']} swaps · freshness p50 {fresh} ms",
                )
                time.sleep(_LOOK_S)
        if replay.poll() not in (0, None):
            raise SmesError(f"replay failed:\n{self._tail('replay')}")
        if replay.poll() is None:  # should_stop() became true
            stop(replay, timeout_s=30)
        return read_report(self._folder / "replay.json", self._tail("replay"))

    def stay(self, processes: Mapping[str, subprocess.Popen[bytes]], should_stop: Callable[[], bool]) -> None:
        """Wait until a stop is asked for.

        Raises:
            SmesError: One of the workers has ended.
        """
        while not should_stop():
            self.check_alive(processes)
            time.sleep(_LOOK_S)

    def check_alive(self, processes: Mapping[str, subprocess.Popen[bytes]]) -> None:
        """Check that workers run.

        Raises:
            SmesError: One has ended; the message ends with its output.
        """
        for command, process in processes.items():
            self._check_alive(command, process)

    def _tail(self, command: str) -> str:
        return log_tail(self.log_of(command))

    def _check_alive(self, command: str, process: subprocess.Popen[bytes]) -> None:
        if process.poll() is not None:
            raise SmesError(f"smes {command} ended with status {process.returncode}:\n{self._tail(command)}")


def _plain(value: Any) -> Any:
    """Dataclass contents as YAML can write them: lists for tuples and text for paths."""
    if isinstance(value, dict):
        return {key: _plain(below) for key, below in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(below) for below in value]
    return str(value) if isinstance(value, Path) else value
